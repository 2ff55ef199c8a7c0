"""The READMEs against what they speak of: commands, links, the equations, the example in Python."""

import ast
import importlib
import re
import shlex
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT, SCRIPTS, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "benchmark/README.md"]
ALGORITHMS = ["DDPG", "TD3", "SAC"]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each command in a page's shell blocks."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    """Every flag of a main script in a command exists, and every file that a command starts."""
    started = 0
    for words in commands(page):
        files = [word for word in words if re.fullmatch(r"(benchmark/)?[\w/]+\.(py|sh|sbatch)", word)]
        for name in files:
            assert (ROOT / name).exists(), name
        scripts = [name for name in files if name.removesuffix(".py") in SCRIPTS]
        if scripts and words[0] in ("python", "PYTHONPATH=."):
            script = importlib.import_module(scripts[0].removesuffix(".py"))
            tyro.cli(script.Args, args=words[words.index(scripts[0]) + 1 :])
            started += 1
    assert started >= 1


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def equations(name: str) -> set[tuple[str, str]]:
    """(equation, function) for each function of a script whose docstring cites an equation."""
    tree = ast.parse((ROOT / f"{name.lower()}_continuous.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {
        (equation, function.name)
        for function in functions
        for equation in re.findall(r"\(E\d+\)", ast.get_docstring(function) or "")
    }


def test_the_table_of_the_equations_is_true():
    """Each row names the functions that cite its equation, and the algorithms that have them."""
    rows = re.findall(r"^\| (\(E\d+\)) \| .* \| ([^|]*) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == [f"(E{number})" for number in range(13)]
    listed = set()
    for equation, place in rows:
        named = [name for name in ALGORITHMS if name in place] or ALGORITHMS
        listed |= {
            (algorithm, equation, function)
            for algorithm in named
            for function in re.findall(r"`(\w+)`", place)
        }
    cited = {(algorithm, *pair) for algorithm in ALGORITHMS for pair in equations(algorithm)}
    assert listed == cited


def test_the_example_in_python_runs(tmp_path):
    """What the README shows of load_policy works on a run."""
    (example,) = blocks("README.md", "python")
    trained = run(
        *("sac_continuous", "--total-timesteps", 40, "--learning-starts", 20, "--run-dir", "runs/hopper"),
        *("--eval-frequency", 0, "--hidden-dim", 8, "--batch-size", 8, "--no-compile", "--no-cuda"),
        cwd=tmp_path,
    )
    assert trained.returncode == 0, trained.stderr
    command = [sys.executable, "-c", f"{example}\nprint(action.shape)"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(3,)", done.stderr
