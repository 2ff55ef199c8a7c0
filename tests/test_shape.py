"""The shape of the project: what the three scripts share, byte for byte, and what each must have."""

import ast
import difflib
import importlib
import re
import sys
import tomllib
from itertools import pairwise

import pytest
import tyro
from conftest import ROOT, SCRIPTS

MARKER = re.compile(r"^ *# ======== (?P<title>\d+\. .+): (?P<kind>shared|this algorithm's own) ========$")
SECTIONS = [
    ("2. Imports", "shared"),
    ("3. Arguments", "this algorithm's own"),
    ("3. Arguments", "shared"),
    ("4. Networks", "shared"),
    ("4. Networks", "this algorithm's own"),
    ("5. Losses", "shared"),
    ("5. Losses", "this algorithm's own"),
    ("6. Agent", "this algorithm's own"),
    ("7. Replay buffer", "shared"),
    ("8. Environment and evaluation", "shared"),
    ("9. Logging", "shared"),
    ("10. Checkpoint", "shared"),
    ("11. Watching", "shared"),
    ("12. Training", "shared"),
    ("13. Command line", "shared"),
]
EQUATIONS = {  # of the pseudocode at the head of each script
    "ddpg_continuous": {"E1", "E2", "E3", "E4", "E5"},
    "td3_continuous": {"E1", "E3", "E5", "E6", "E7"},
    "sac_continuous": {"E1", "E3", "E8", "E9", "E10", "E11", "E12"},
}
PACKAGES = {"torch", "numpy", "gymnasium", "tyro", "tqdm", "wandb"}


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def sections(name):
    """The parts of a script in order: ((title, kind), numbers of its lines, from marker to marker)."""
    lines = source(name).split("\n")
    starts = [number for number, line in enumerate(lines) if MARKER.match(line)]
    found = []
    for start, end in pairwise([*starts, len(lines)]):
        marker = MARKER.match(lines[start])
        found.append(((marker["title"], marker["kind"]), range(start, end)))
    return found


def arguments(name):
    """The fields of Args: name to (first line, last line), counted from 1."""
    (args,) = [node for node in ast.parse(source(name)).body if getattr(node, "name", None) == "Args"]
    return {
        node.target.id: (node.lineno, node.end_lineno)
        for node in args.body
        if isinstance(node, ast.AnnAssign)
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_stand_in_order(name):
    assert [title for title, _ in sections(name)] == SECTIONS
    assert source(name).count("========") == 2 * len(SECTIONS)  # no marker is misspelt


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_shared_parts_are_identical(name):
    ours, first = ((source(script).split("\n"), sections(script)) for script in (name, SCRIPTS[0]))
    pairs = zip(ours[1], first[1], strict=True)
    shared = [(one, other) for (title, one), (_, other) in pairs if title[1] == "shared"]
    assert len(shared) == 11
    for one, other in shared:
        assert [ours[0][number] for number in one] == [first[0][number] for number in other]


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_parts_name_no_algorithm(name):
    lines = source(name).split("\n")
    for (title, kind), numbers in sections(name):
        if kind == "shared":
            text = "\n".join(lines[number] for number in numbers)
            names = r"(?<![a-z])(ddpg|td3|sac)(?![a-z])|deep deterministic|twin delayed|soft actor"
            assert not re.search(names, text, re.IGNORECASE), title


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_reader_may_stop_after_the_agent(name):
    """The mark stands once, in the last lines before the replay buffer, alike in all three scripts."""
    lines, found = source(name).split("\n"), dict(sections(name))
    marks = [number for number, line in enumerate(lines) if "A reader may stop here" in line]
    (mark,) = marks
    agent = found["6. Agent", "this algorithm's own"]
    assert mark in agent
    assert not any(lines[number] for number in range(mark + 1, agent[-1] + 1))
    assert lines[mark] in source(SCRIPTS[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_length(name):
    lines = source(name).splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) < 720


@pytest.mark.parametrize("name", SCRIPTS)
def test_equations_of_the_pseudocode_are_cited_in_the_code(name):
    docstring = ast.get_docstring(ast.parse(source(name)), clean=False)
    _, _, code = source(name).partition(docstring)
    assert set(re.findall(r"\bE\d+\b", docstring)) == EQUATIONS[name]
    assert set(re.findall(r"\bE\d+\b", code)) == EQUATIONS[name] | {"E0"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_equals_requirements(name):
    """PEP 723's block against requirements.txt as far as `# to test`."""
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", source(name))
    metadata = tomllib.loads("".join(f"{line[2:]}\n" for line in block.splitlines()))
    training, to_test, _ = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("\n# to test\n")
    assert to_test
    required = [line.split("#")[0].strip() for line in training.splitlines()]
    assert sorted(metadata["dependencies"]) == sorted(filter(None, required))
    assert all(re.fullmatch(r"[\w\[\]-]+==[\d.]+", dependency) for dependency in metadata["dependencies"])
    assert metadata["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_read(name):
    """As args.x, self.args.x or arguments.x: a flag that nothing reads would promise what it does not do."""
    read = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
            if owner in ("args", "arguments"):
                read.add(node.attr)
    assert set(arguments(name)) - read == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_explained(name, capsys):
    """By a comment on its line, which --help shows."""
    lines = source(name).splitlines()
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(importlib.import_module(name).Args, args=["--help"])
    # Without the box and the line breaks, as spaces differ with the width of the terminal.
    text = re.sub(r"[\s│╭╮╰╯─]", "", capsys.readouterr().out)
    for argument, (first, last) in arguments(name).items():
        (comment,) = [part for line in lines[first - 1 : last] for part in line.partition("  # ")[2:] if part]
        assert len(comment.split()) >= 3, argument
        flag = "--" + argument.replace("_", "-")
        explanation = re.escape(re.sub(r"\s", "", comment))
        assert re.search(rf"{flag}.{{0,60}}?{explanation}\(default:", text), f"{flag}: {comment}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_are_few(name):
    """Nothing but the standard library and the packages of requirements.txt, so that one file is enough."""
    imported = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert {"torch", "gymnasium"} <= imported
    assert imported - PACKAGES - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("pair", list(pairwise(SCRIPTS)), ids="-".join)
def test_diff_is_the_algorithms_difference(pair):
    """No line of a shared part shows in the diff, and the diff fits on two screens."""
    lines = [source(name).split("\n") for name in pair]
    shared = [
        {number for (_, kind), numbers in sections(name) if kind == "shared" for number in numbers}
        for name in pair
    ]
    count = 0
    for tag, *bounds in difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes():
        if tag != "equal":
            old, new = range(*bounds[:2]), range(*bounds[2:])
            assert not shared[0] & set(old)
            assert not shared[1] & set(new)
            count += len(old) + len(new)
    assert 0 < count <= 150
