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
STOP = "# ######## A reader may stop here"
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
    ("8. Training", "shared"),
    ("9. Environment and evaluation", "shared"),
    ("10. Run", "shared"),
    ("11. Watching", "shared"),
    ("12. Settings of PyTorch, and the optimizer's step", "shared"),
    ("13. Refusals", "shared"),
    ("14. Command line", "shared"),
]
EQUATIONS = {  # of the pseudocode at the head of each script
    "ddpg_continuous": {"E1", "E2", "E3", "E4", "E5"},
    "td3_continuous": {"E1", "E3", "E5", "E6", "E7"},
    "sac_continuous": {"E1", "E3", "E8", "E9", "E10", "E11", "E12"},
}
PACKAGES = {"torch", "numpy", "gymnasium", "tyro", "tqdm", "filelock", "wandb"}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def sections(name: str) -> list[tuple[tuple[str, str], range]]:
    """The parts of a script in order: (title, kind) and the numbers of its lines, from marker to marker."""
    lines = source(name).split("\n")
    starts = [number for number, line in enumerate(lines) if MARKER.match(line)]
    found = []
    for start, end in pairwise([*starts, len(lines)]):
        marker = MARKER.match(lines[start])
        found.append(((marker["title"], marker["kind"]), range(start, end)))
    return found


def arguments(name: str) -> dict[str, tuple[int, int]]:
    """The fields of Args: name to (first line, last line), counted from 1."""
    (args,) = [node for node in ast.parse(source(name)).body if getattr(node, "name", None) == "Args"]
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {field.target.id: (field.lineno, field.end_lineno) for field in fields}


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_stand_in_order(name):
    assert [title for title, _ in sections(name)] == SECTIONS
    assert source(name).count("========") == 2 * len(SECTIONS)  # no marker is misspelt


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_shared_parts_are_identical(name):
    ours, first = source(name).split("\n"), source(SCRIPTS[0]).split("\n")
    for (title, one), (_, other) in zip(sections(name), sections(SCRIPTS[0]), strict=True):
        if title[1] == "shared":
            assert [ours[number] for number in one] == [first[number] for number in other], title


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_parts_name_no_algorithm(name):
    lines = source(name).split("\n")
    for (title, kind), numbers in sections(name):
        if kind == "shared":
            text = "\n".join(lines[number] for number in numbers)
            names = r"(?<![a-z])(ddpg|td3|sac)(?![a-z])|deep deterministic|twin delayed|soft actor"
            assert not re.search(names, text, re.IGNORECASE), title


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readers_part_is_short_and_holds_the_loop(name):
    """Above the one mark: at most 350 lines, the last of them train, a loop of at most 50."""
    above, mark, below = source(name).partition(STOP)
    assert mark
    assert STOP not in below
    assert len(above.splitlines()) <= 350
    last = ast.parse(above).body[-1]
    assert last.name == "train"
    assert last.end_lineno - last.lineno + 1 <= 50


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_plumbing_is_in_small_pieces(name):
    """Below the mark no function is longer than 30 lines; nor is any line wider than 110 columns."""
    mark = len(source(name).partition(STOP)[0].splitlines())
    functions = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.FunctionDef)]
    plumbing = [node for node in functions if node.lineno > mark]
    assert len(plumbing) > 20
    assert [node.name for node in plumbing if node.end_lineno - node.lineno + 1 > 30] == []
    assert max(map(len, source(name).splitlines())) <= 110


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
    to_run, to_test, _ = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("\n# to test\n")
    assert to_test
    required = [line.split("#")[0].strip() for line in to_run.splitlines()]
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
    """Nothing but the standard library and packages of requirements.txt, so that one file is enough."""
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
    assert 0 < count <= 130
