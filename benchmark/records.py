"""Reads the folders of training runs, and published returns.

A run is a folder with args.json and evaluations.csv, at any depth; each CSV file may be a .csv.gz.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd

HERE = Path(__file__).resolve().parent
REFERENCE = pd.read_csv(HERE / "reference_returns.csv")
# Arguments that may differ between the seeds of a curve: they do not change what is learned.
FREE_ARGUMENTS = (
    {"seed", "run_dir", "resume", "total_timesteps", "checkpoint_frequency", "log_frequency"}
    | {"cuda", "compile", "threads", "torch_deterministic", "capture_video", "watch"}
    | {"track", "wandb_project_name", "wandb_entity"}
)


@dataclass
class Run:
    """A run's folder, what it trained, and what it recorded."""

    folder: Path
    args: dict
    task: str
    curve: str  # its name
    tables: dict[str, pd.DataFrame]  # evaluations, losses and timing


def refuse(reason: str) -> NoReturn:
    """Ends the program with one line on stderr and status 2."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file, or its .csv.gz; empty without one."""
    for file in (path, path.with_name(f"{path.name}.gz")):
        if file.exists() and file.stat().st_size > 0:
            return pd.read_csv(file)
    return pd.DataFrame(columns=["global_step"])


def curve_of(args: dict) -> str:
    """The name of a run's curve."""
    name = args["exp_name"].removesuffix("_continuous")
    return name.upper() if name in ("ddpg", "td3", "sac") else name


def read_runs(folders: tuple[Path, ...]) -> list[Run]:
    """Every run under the folders that has an evaluation. Refuses to go on without one."""
    runs = []
    # In a set, a run that lies under two of the folders counts once.
    found = {path.parent.resolve() for parent in folders for path in parent.rglob("args.json")}
    for folder in sorted(found):
        tables = {name: read_csv(folder / f"{name}.csv") for name in ("evaluations", "losses", "timing")}
        args = json.loads((folder / "args.json").read_text())["args"]
        if len(tables["evaluations"]):
            task = args["env_id"].rpartition(":")[2]  # without the module that registers it
            runs.append(Run(folder, args, task, curve_of(args), tables))
    if not runs:
        refuse(f"no run with an evaluation in {', '.join(map(str, folders))}")
    return runs


def check(runs: list[Run]) -> None:
    """Refuses runs of one curve that have the same seed, or differ in an argument that matters."""
    for run, other in itertools.combinations(runs, 2):
        if (run.task, run.curve) != (other.task, other.curve):
            continue
        if run.args["seed"] == other.args["seed"]:
            seed = f"seed {run.args['seed']}"
            refuse(f"{run.curve} on {run.task} has {seed} twice: {run.folder} and {other.folder}")
        # An argument that only one of them has is no difference: a later version of a script may add one.
        shared = run.args.keys() & other.args.keys()
        names = sorted(name for name in shared - FREE_ARGUMENTS if run.args[name] != other.args[name])
        different = ", ".join(names)
        if different:
            refuse(f"{run.folder} and {other.folder} differ in {different}; tell them apart by --exp-name")


def tasks_of(runs: list[Run]) -> list[str]:
    """All tasks, sorted."""
    return sorted({run.task for run in runs})


def seeds_of(runs: list[Run], task: str, curve: str, table: str, column: str) -> pd.DataFrame:
    """One column of a table: a row for each step, a column for each seed of this task and curve."""
    seeds = {}
    for run in runs:
        if (run.task, run.curve) == (task, curve) and column in run.tables[table]:
            seeds[run.args["seed"]] = run.tables[table].set_index("global_step")[column].dropna()
    return pd.DataFrame(dict(sorted(seeds.items())))


def published(task: str, curve: str, steps: int) -> pd.DataFrame:
    """Published returns of an algorithm at the largest published number of steps up to `steps`."""
    algorithm = REFERENCE["algorithm"].replace("OurDDPG", "DDPG")  # the TD3 paper's own version of DDPG
    environment = task.rpartition("-v")[0]
    rows = REFERENCE[(REFERENCE["environment"] == environment) & (algorithm == curve)]
    rows = rows[rows["steps"] <= steps]
    return rows[rows["steps"] == rows["steps"].max()]
