"""The shape of the project: what the three scripts share, byte for byte, and what each must have."""

import ast
import re
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

STOP = "# ######## A reader may stop here"
OWN = ["3. Arguments", "4. Networks", "5. Losses", "6. Agent"]
EQUATIONS = {  # of the pseudocode at the head of each script
    "ddpg_continuous": {"E1", "E2", "E3", "E4", "E5"},
    "td3_continuous": {"E1", "E3", "E5", "E6", "E7"},
    "sac_continuous": {"E1", "E3", "E8", "E9", "E10", "E11", "E12"},
}
PACKAGES = {"torch", "numpy", "gymnasium", "tyro", "tqdm", "filelock", "wandb"}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def sections(name: str) -> list[tuple[str, str, str]]:
    """The parts of a script in order: title, kind, and text up to the next marker."""
    marker = r"^ *# ======== (\d+\. .+): (shared|this algorithm's own) ========$"
    _, *parts = re.split(marker, source(name), flags=re.MULTILINE)
    return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_parts_are_identical_and_name_no_algorithm(name):
    names = r"(?<![a-z])(ddpg|td3|sac)(?![a-z])|deep deterministic|twin delayed|soft actor"
    assert [title for title, kind, _ in sections(name) if kind != "shared"] == OWN
    assert source(name).count("========") == 2 * len(sections(name))  # no marker is misspelt
    for ours, first in zip(sections(name), sections(SCRIPTS[0]), strict=True):
        assert ours[:2] == first[:2]
        if ours[1] == "shared":
            assert ours == first
            assert not re.search(names, ours[2], re.IGNORECASE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readers_part_is_short_and_the_plumbing_in_small_pieces(name):
    """Above the one mark 350 lines, the last of them train, a loop of 50; below it functions of 30 lines."""
    above, mark, below = source(name).partition(STOP)
    assert mark
    assert STOP not in below
    assert len(above.splitlines()) <= 350
    last = ast.parse(above).body[-1]
    assert last.name == "train"
    assert last.end_lineno - last.lineno < 50
    functions = [node for node in ast.walk(ast.parse(f"#{below}")) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 30] == []


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
def test_every_argument_is_read_and_explained(name):
    """As args.x, self.args.x or arguments.x: a flag that nothing reads would promise what it does not do.
    --help shows the comment on its line."""
    nodes, lines = list(ast.walk(ast.parse(source(name)))), source(name).splitlines()
    (args,) = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == "Args"]
    fields = {field.target.id: field for field in args.body if isinstance(field, ast.AnnAssign)}
    assert len(fields) > 30
    for field in fields.values():
        _, _, comment = lines[field.lineno - 1].partition("  # ")
        assert len(comment.split()) >= 3
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if ast.unparse(node.value) in ("args", "self.args", "arguments")}
    assert fields.keys() - read == set()


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
