"""Tunes DDPG by random search: draws the trials, and trains with the parameters of the best one.

    python random_search.py draw 8                      the trials: a name and the flags of each, one a line
    python random_search.py best {trials} --env-id ...  DDPG with the best trial's flags and those that follow

benchmark/ablations.sh runs both, and between them each trial with every search seed. The choice is by the
mean over search seeds of the score, which is the mean evaluation return in the last quarter of a run. What
was chosen is then trained with fresh seeds: the best of several noisy scores is too high to be reported
itself. `best` writes all trials to trials.csv.
"""

import csv
import json
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def draw(count: int) -> dict[str, dict[str, str]]:
    """The first `count` trials: name to flags and values. The same ones every time, whatever the count."""
    generator, trials = random.Random(0), {}
    for trial in range(count):
        values = {
            "--learning-rate": 10 ** generator.uniform(-4, -2.5),
            "--tau": 10 ** generator.uniform(-3, -1.3),
            "--exploration-noise": generator.uniform(0.05, 0.5),
            "--batch-size": generator.choice([64, 128, 256]),
        }
        trials[f"{trial:02}"] = {flag: f"{value:.3g}" for flag, value in values.items()}
    return trials


def score(folder: Path) -> float:
    """Mean evaluation return in the last quarter of the run in a folder. Raises OSError if there is none."""
    steps = json.loads((folder / "args.json").read_text())["args"]["total_timesteps"]
    with open(folder / "evaluations.csv", newline="") as file:
        rows = [(int(row["global_step"]), float(row["episodic_return"])) for row in csv.DictReader(file)]
    last = [value for step, value in rows if step > 0.75 * steps]
    return sum(last) / len(last)


def compare(folder: Path) -> list[dict]:
    """A row for each trial under a folder: its name, flags, score with each search seed, and their mean."""
    rows = []
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    for name, flags in draw(len(names)).items():
        scores = {path.name: score(path) for path in sorted((folder / name).glob("seed*"))}
        rows.append({"trial": name} | flags | scores | {"mean": sum(scores.values()) / len(scores)})
    return rows


def choose(folder: Path) -> dict[str, str]:
    """The flags of the best trial under a folder; writes all trials to trials.csv there."""
    rows = compare(folder)
    unfinished = folder / f"trials.csv.{os.getpid()}.new"  # several seeds of what was tuned may start at once
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(folder / "trials.csv")
    best = max(rows, key=lambda row: row["mean"])
    return {flag: value for flag, value in best.items() if flag.startswith("--")}


def main() -> None:
    mode, argument, *rest = sys.argv[1:]
    if mode == "draw":
        for name, flags in draw(int(argument)).items():
            print(name, *(f"{flag} {value}" for flag, value in flags.items()))
    elif mode == "best":
        flags = [word for pair in choose(Path(argument)).items() for word in pair]
        # In place of this process, so that a sweep's signals reach the run.
        os.execv(sys.executable, [sys.executable, str(ROOT / "ddpg_continuous.py"), *flags, *rest])


if __name__ == "__main__":
    main()
