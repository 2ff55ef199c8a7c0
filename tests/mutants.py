"""Writes single mistakes into copies of the scripts, one at a time, and says which test catches each.

Usage: python tests/mutants.py              all those of mutants.txt, which takes an hour or more
       python tests/mutants.py 3 40-45      some, by number

A mistake in a part that the scripts share is made in all three. It is caught if any test fails.
mutants_caught.txt is the output of a whole run.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs")


class Mutant(NamedTuple):
    """A mistake, and the files of tests that are tried before all others."""

    scripts: list[str]
    old: str
    new: str
    tests: list[str]


def read_mutants() -> list[Mutant]:
    """Those of mutants.txt."""
    text = (ROOT / "tests/mutants.txt").read_text(encoding="utf-8").replace("\n    =>", " =>")
    mutants = []
    for line in text.splitlines():
        if line.startswith("["):
            tests = [f"tests/{name}" for name in line.strip("[]").split()]
        elif line and not line.startswith("#"):
            name, _, change = line.replace("\\n", "\n").partition(": ")
            old, _, new = change.partition(" => ")
            scripts = ["ddpg", "td3", "sac"] if name == "all" else [name]
            mutants.append(Mutant(scripts, old, new, tests))
    return mutants


def catching_test(mutant: Mutant, folder: Path) -> str:
    """The first test that fails in a copy of the project with this mistake; "" if none does."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    for script in mutant.scripts:
        path = folder / f"{script}_continuous.py"
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.old!r} stands {text.count(mutant.old)} times in {path.name}")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    for files in (mutant.tests, ["tests"]):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if failed:
            return failed[0].partition(" ")[2].partition(" - ")[0]
    return ""


def main() -> int:
    """Prints a line for each mutant; returns the number of those that got through."""
    mutants, numbers = read_mutants(), []
    for argument in sys.argv[1:]:
        first, _, last = argument.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    survivors = 0
    for number in numbers or range(len(mutants)):
        mutant = mutants[number]
        with tempfile.TemporaryDirectory() as folder:
            caught_by = catching_test(mutant, Path(folder, "project"))
        survivors += not caught_by
        change = f"{mutant.old} -> {mutant.new}".replace("\n", " ")
        print(f"{number} {'+'.join(mutant.scripts)}: {change}: {caught_by or 'GOT THROUGH'}", flush=True)
    print(f"{survivors} got through")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
