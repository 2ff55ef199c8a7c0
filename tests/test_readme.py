"""The README against what it speaks of: its map of the equations, names of tests, commands, links and patch.

python tests/test_readme.py        write the map of the equations anew, after lines have moved
"""

import ast
import csv
import importlib
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SCRIPTS = ["ddpg_continuous", "td3_continuous", "sac_continuous"]
FILES = [f"{name}.py" for name in SCRIPTS] + ["benchmark/ablations/sac_value_network.py"]
START, END = "<!-- equations: written by tests/test_readme.py -->\n", "<!-- end of equations -->"
OVERVIEW, END_OF_OVERVIEW = "<!-- overview of benchmark/figures/tables.md -->\n", "<!-- end of overview -->"
FORMULAS = {
    "E0": r"$`a_\text{env} = \tfrac{u+l}{2} + \tfrac{u-l}{2}\, a`$",
    "E1": r"$`\theta' \leftarrow (1-\tau)\,\theta' + \tau\,\theta`$",
    "E2": r"$`y = r + \gamma (1-d)\, Q'(s', \mu'(s'))`$",
    "E3": r"$`\text{mean}\,(Q(s,a) - y)^2`$",
    "E4": r"$`-\text{mean}\; Q(s, \mu(s))`$",
    "E5": r"$`\text{clip}(\mu(s) + N, -1, 1)`$",
    "E6": r"$`y = r + \gamma (1-d) \min_i Q_i'(s', a'), a' = \text{clip}(\mu'(s') + \text{clip}(\epsilon))`$",
    "E7": r"$`-\text{mean}\; Q_1(s, \mu(s))`$",
    "E8": r"$`a = \tanh(m(s) + \sigma(s) \odot \xi),\; \xi \sim N(0, I)`$",
    "E9": r"$`\log \pi = \sum_\text{dim} [\log N(u; m, \sigma) - 2 (\log 2 - u - \text{softplus}(-2u))]`$",
    "E10": r"$`y = r + \gamma (1-d) (\min_i Q_i'(s', a') - \alpha \log \pi(a' \mid s'))`$",
    "E11": r"$`\text{mean}\,(\alpha \log \pi(\tilde a \mid s) - \min_i Q_i(s, \tilde a))`$",
    "E12": r"$`-\log \alpha \cdot \text{mean}\,(\log \pi(\tilde a \mid s) + \bar H)`$",
    "E13": r"$`\tfrac12 \text{mean}\,(V(s) - \min_i Q_i(s, \tilde a) + \alpha \log \pi(\tilde a \mid s))^2`$",
    "E14": r"$`y = r + \gamma (1-d)\, V'(s')`$",
}


def places(file: str) -> dict[str, list[tuple[str, int]]]:
    """Where a script computes each equation: functions that cite it in their docstrings, and their lines."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            for equation in re.findall(r"\((E\d+)\)", ast.get_docstring(node) or ""):
                found.setdefault(equation, []).append((node.name, node.lineno))
    return found


def equation_map() -> str:
    """The README's table of the equations with links to the lines that compute them, in Markdown."""
    found = {file: places(file) for file in FILES}
    lines = ["| | computes | DDPG | TD3 | SAC |", "|---|---|---|---|---|"]
    for equation, formula in FORMULAS.items():
        cells = []
        for file, where in found.items():
            links = [f"[`{name}`:{line}]({file}#L{line})" for name, line in where.get(equation, [])]
            cells.append(", ".join(links))
        # SAC v1 has its own file; it stands only where SAC does not compute the equation.
        first_version = cells.pop()
        cells[-1] = cells[-1] or first_version.replace("[", "v1: [")
        assert any(cells), f"no function cites ({equation})"
        lines.append(f"| ({equation}) | {formula} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_map_of_the_equations_is_true():
    """Each link leads to the line where the function starts; `python tests/test_readme.py` renews it."""
    _, _, rest = README.read_text(encoding="utf-8").partition(START)
    written, _, after = rest.partition(END)
    assert after
    assert written == equation_map()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_map_moves_with_the_lines(name, monkeypatch, tmp_path):
    """A line more at the top of a script, and the map is another."""
    before = equation_map()
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"\n" * (file == f"{name}.py") + (ROOT / file).read_bytes())
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert equation_map() != before


def test_tests_that_it_names_exist():
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        defined |= set(re.findall(r"(?m)^def (test_\w+)", path.read_text(encoding="utf-8")))
    named = set(re.findall(r"`(test_\w+)`", README.read_text(encoding="utf-8")))
    assert len(named) >= 10
    assert named - defined == set()


@pytest.mark.parametrize("path", ["README.md", "benchmark/README.md", "benchmark/ablations/README.md"])
def test_links_lead_somewhere(path):
    document = ROOT / path
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        if anchor and not re.fullmatch(r"L\d+", anchor):
            titles = re.findall(r"(?m)^#+ (.+)$", target.read_text(encoding="utf-8"))
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, link


def commands() -> list[tuple[str, list[str]]]:
    """Every command in the READMEs that runs one of the scripts: (script, arguments)."""
    found = []
    for path in ("README.md", "benchmark/README.md"):
        for block in re.findall(
            r"(?ms)^```(?:bash|sh)\n(.+?)^```", (ROOT / path).read_text(encoding="utf-8")
        ):
            for command in re.split(r"\n|&&", block.replace("\\\n", "")):
                words = shlex.split(command, comments=True)
                script = [word for word in words if Path(word).name in FILES[:3]]
                if script and words.index(script[0]) <= 2 and "python" in words[0]:
                    found.append((Path(script[0]).stem, words[words.index(script[0]) + 1 :]))
    return found


def test_flags_of_its_commands_exist():
    found = commands()
    assert len(found) >= 5
    for name, arguments in found:
        tyro.cli(importlib.import_module(name).Args, args=arguments)


def test_its_patch_applies_and_trains(tmp_path):
    """The change that it shows for a copied file: lines with - are there once; those with + replace them."""
    (patch,) = re.findall(r"(?ms)^```diff\n(.+?)^```", README.read_text(encoding="utf-8"))
    old = "".join(line[1:] + "\n" for line in patch.splitlines() if line[0] in " -")
    new = "".join(line[1:] + "\n" for line in patch.splitlines() if line[0] in " +")
    source = (ROOT / "sac_continuous.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "my_sac.py").write_text(source.replace(old, new), encoding="utf-8")
    options = "--env-id Pendulum-v1 --total-timesteps 300 --learning-starts 100 --hidden-dim 16 --threads 1"
    command = [sys.executable, "my_sac.py", *options.split(), "--no-cuda", "--run-dir", "run"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def overview() -> str:
    """The first table of benchmark/figures/tables.md."""
    text = (ROOT / "benchmark" / "figures" / "tables.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"(?m)^## Overview\n(?:.*\n)+?((?:\|.*\n)+)", text)
    return table


def test_tables_are_those_of_the_committed_results():
    """figures/tables.md is what plot.py makes of benchmark/results, and the README has its overview."""
    plot = importlib.import_module("plot")
    runs = plot.read_runs(ROOT / "benchmark" / "results")
    reference = plot.read_reference(ROOT / "benchmark" / "reference_returns.csv")
    written = (ROOT / "benchmark" / "figures" / "tables.md").read_text(encoding="utf-8")
    assert written == plot.write_tables(runs, reference)
    _, _, rest = README.read_text(encoding="utf-8").partition(OVERVIEW)
    assert rest.partition(END_OF_OVERVIEW)[0] == overview()


def test_the_causes_are_those_of_the_runs():
    """The table of benchmark/README.md against causes/ and results/: evaluations with and without flags."""

    def final(folder: Path) -> str:
        with open(folder / "evaluations.csv", newline="") as file:
            rows = [(int(row["global_step"]), float(row["episodic_return"])) for row in csv.DictReader(file)]
        value = statistics.mean(value for step, value in rows if step > rows[-1][0] - 25_000)
        return f"{value:,.0f}".replace("-", "−")

    measured = []
    for path in (ROOT / "benchmark" / "causes").glob("*/*/seed1"):
        algorithm, task = path.parent.parent.name.partition("_")[0], path.parent.name
        plain = ROOT / "benchmark" / "results" / algorithm / task / "seed1"
        measured.append((task.removesuffix("-v4"), algorithm.upper(), final(path), final(plain)))
    text = (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")
    _, _, text = text.partition("| Task | Flags | Final evaluation |")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[0].splitlines()[2:]
    ]
    assert sorted((task, flags.split()[0], *values[:2]) for task, flags, *values in rows) == sorted(measured)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for start, end, table in ((START, END, equation_map()), (OVERVIEW, END_OF_OVERVIEW, overview())):
        before, _, rest = text.partition(start)
        text = before + start + table + end + rest.partition(end)[2]
    README.write_text(text, encoding="utf-8")
