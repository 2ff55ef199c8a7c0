"""From run folders to the benchmark's figures and tables, with published returns beside ours.

    python benchmark/plot.py                                  # benchmark/results -> benchmark/figures
    python benchmark/plot.py --results runs --steps 100000    # any runs, compared at 100,000 steps

A run is any folder with args.json and evaluations.csv, at any depth; args.json says the task, the algorithm
and the seed. Writes returns.png, returns_hours.png, aggregate.png and tables.md, and prints the tables.

Statistics after Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
https://arxiv.org/abs/2108.13264: interquartile means, percentile bootstrap over seeds, stratified by task.
"""

import io
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy import stats

HERE = Path(__file__).resolve().parent
TASKS = ["Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid"]
# Okabe and Ito's palette, which colour-blind readers can tell apart; the rest is for algorithms that you add.
COLOURS = {"DDPG": "#E69F00", "TD3": "#0072B2", "SAC": "#009E73"}
MORE_COLOURS = ["#CC79A7", "#D55E00", "#56B4E9", "#000000"]
PUBLISHED_NAMES = {"OurDDPG": "DDPG"}  # the TD3 paper's own version of DDPG counts as DDPG
WINDOW = 25_000  # steps at the end that make the final evaluation, as in reference_returns.md
NORMALISE_AT = 1_000_000  # steps of the best published return that counts as 1 in the aggregate
SEED = 0  # of the bootstrap: the same runs give the same intervals
# Arguments that may differ between the seeds of a cell: they change nothing that is learned or measured.
FREE = {"seed", "total_timesteps", "exp_name", "run_dir", "resume", "checkpoint_frequency", "log_frequency"}
FREE |= {"capture_video", "video_frequency", "watch", "watch_episodes", "track", "wandb_project_name"}
FREE |= {"wandb_entity", "cuda", "compile", "cudagraphs", "threads", "torch_deterministic"}


class Measure(NamedTuple):
    """What a published return measures."""

    column: str  # of our table, to set beside it
    name: str
    mark: str  # in the figure


# By the names of reference_returns.csv.
MEASURES = {
    "evaluation": Measure("final", "final evaluation", "D"),
    "max-average": Measure("max_average", "max-average", "^"),
    "training": Measure("exploring", "exploring episodes", "o"),
    "final-training": Measure("exploring", "exploring episodes", "o"),
}


@dataclass
class Args:
    """Draws the benchmark's figures and writes its tables from run folders."""

    results: Path = HERE / "results"  # folder that holds runs, at any depth
    output: Path = HERE / "figures"  # folder for the figures and tables.md
    reference: Path = HERE / "reference_returns.csv"  # published returns
    steps: tuple[int, ...] = ()  # compare at these step counts; none is the one that all runs share
    allow_mixed: tuple[Literal["versions", "steps", "settings"], ...] = ()  # what may differ between runs
    share: float = 0.9  # of a final return: the tables say how many steps it took to reach it


class Refusal(ValueError):
    """Runs that cannot be compared, or are not there; its text says why in one line."""


# ======== Runs ========
@dataclass
class Run:
    """One training run, as its folder records it."""

    folder: Path
    algorithm: str  # SAC for sac_continuous; any other exp_name as it is
    task: str  # Hopper-v4
    seed: int
    steps: int  # environment steps done, as far as evaluations tell
    evaluations: pd.Series  # mean return of each noise-free evaluation, by global_step
    episodes: pd.Series  # return of each exploring episode, by the global_step at which it ended
    hours: pd.Series  # since the start, evaluations included, by global_step
    record: dict = field(repr=False)  # args.json


Cells = dict[tuple[str, str], list[Run]]


def read_series(path: Path, column: str) -> pd.Series:
    """A column of a CSV file by global_step, without a half-written last line; empty if there is no file."""
    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1] or f"global_step,{column}\n"
    series = pd.read_csv(io.StringIO(text)).set_index("global_step")[column].astype(float)
    if not (np.isfinite(series).all() and series.index.is_monotonic_increasing and series.index.is_unique):
        raise ValueError(f"{path.name} has a value that is not finite, or steps out of order")
    return series


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises Refusal if there is none of these scripts."""
    try:
        record = json.loads((folder / "args.json").read_text())
        args = record["args"]
        evaluations = read_series(folder / "evaluations.csv", "episodic_return")
        # A finished run may end between two evaluations; one under way has come as far as its last.
        last = int(evaluations.index[-1]) if len(evaluations) else 0
        finished = last > max(0, args["total_timesteps"] - args["eval_frequency"])
        name = args["exp_name"].removesuffix("_continuous")
        return Run(
            folder=folder,
            algorithm=name.upper() if name.upper() in COLOURS else name,
            task=args["env_id"],
            seed=args["seed"],
            steps=args["total_timesteps"] if finished else last,
            evaluations=evaluations,
            episodes=read_series(folder / "episodes.csv", "episodic_return"),
            hours=read_series(folder / "timing.csv", "elapsed") / 3600,
            record=record,
        )
    except (KeyError, ValueError) as error:
        raise Refusal(f"{folder} is not the folder of a run: {error!r}") from error


def task_name(task: str) -> str:
    """Hopper for Hopper-v4."""
    return task.rpartition("-v")[0] or task


def order(run: Run) -> tuple:
    """Sorts by task, algorithm and seed: the five and the three as the papers do, others after them."""
    name, known = task_name(run.task), list(COLOURS)
    task = (TASKS.index(name) if name in TASKS else len(TASKS), run.task)
    algorithm = (known.index(run.algorithm) if run.algorithm in known else len(known), run.algorithm)
    return *task, *algorithm, run.seed


def algorithms_of(runs: list[Run]) -> list[str]:
    """The algorithms' names, in order."""
    return list(dict.fromkeys(run.algorithm for run in sorted(runs, key=lambda run: order(run)[2:])))


def read_runs(results: Path) -> list[Run]:
    """Every run under a folder, in order; names those that it leaves out for want of an evaluation."""
    runs = [read_run(path.parent) for path in results.rglob("args.json")]
    for run in runs:
        if run.evaluations.empty:
            print(f"plot.py: left out, as it has no evaluation yet: {run.folder}", file=sys.stderr)
    runs = sorted((run for run in runs if len(run.evaluations)), key=order)
    if not runs:
        raise Refusal(f"{results} holds no run with an evaluation")
    return runs


def cells_of(runs: list[Run]) -> Cells:
    """Runs by (task, algorithm): the seeds of each cell."""
    cells: Cells = {}
    for run in runs:
        cells.setdefault((run.task, run.algorithm), []).append(run)
    return cells


def check(runs: list[Run], steps: tuple[int, ...] = (), allow_mixed: tuple[str, ...] = ()) -> None:
    """Raises Refusal where runs are side by side that should not be compared or pooled."""
    families: dict[str, set[str]] = {}
    for run in runs:  # the five tasks changed versions together, so they are one family
        name = task_name(run.task)
        families.setdefault("the five" if name in TASKS else name, set()).add(run.task)
    for tasks in families.values():
        if len({task.rpartition("-v")[2] for task in tasks}) > 1 and "versions" not in allow_mixed:
            names = ", ".join(sorted(tasks))
            raise Refusal(f"task versions are mixed: {names}; --allow-mixed versions shows them side by side")
    counts = sorted({run.steps for run in runs})
    if len(counts) > 1 and not steps and "steps" not in allow_mixed:
        mixed = "step counts are mixed: " + ", ".join(f"{count:,}" for count in counts)
        choice = "--steps compares at those that you name, --allow-mixed steps each run at its end"
        raise Refusal(f"{mixed}; {choice}")
    if steps and counts[-1] < max(steps):
        raise Refusal(f"--steps {max(steps)}: the longest run has {counts[-1]:,}")
    for (task, algorithm), cell in cells_of(runs).items():
        folders: dict[int, list[str]] = {}
        for run in cell:
            folders.setdefault(run.seed, []).append(str(run.folder))
        for seed, twice in folders.items():
            if len(twice) > 1:
                raise Refusal(f"{algorithm} has seed {seed} of {task} twice: {' and '.join(twice)}")
        settings = [run.record["args"] for run in cell]
        shared = set.intersection(*map(set, settings)) - FREE
        differ = sorted(key for key in shared if any(other[key] != settings[0][key] for other in settings))
        if differ and "settings" not in allow_mixed:
            differ = f"the {algorithm} runs on {task} differ in {', '.join(differ)}"
            raise Refusal(f"{differ}; --allow-mixed settings pools them all the same")


# ======== Statistics ========
def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean, the mean of the middle half of the scores, in which each sample weighs the same.

    A sample holds the scores of one task's seeds along `axis`. Where all hold as many, this is the trimmed
    mean of all scores. Fewer than four scores in all are not trimmed: their IQM is their mean.
    """
    common = math.lcm(*(sample.shape[axis] for sample in samples))
    even = [np.repeat(sample, common // sample.shape[axis], axis=axis) for sample in samples]
    return stats.trim_mean(np.concatenate(even, axis=axis), 0.25, axis=axis)


def interval(*samples: np.ndarray, statistic=iqm, resamples: int = 9_999, axis: int = -1) -> tuple:
    """The 95% percentile bootstrap interval (low, high) of a statistic; NaN if a sample has one score only.

    SciPy resamples each sample on its own: with a sample for each task, that is the stratified bootstrap.
    """
    if min(sample.shape[axis] for sample in samples) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(SEED)
    options = {"axis": axis, "method": "percentile", "n_resamples": resamples, "batch": 500, "rng": rng}
    result = stats.bootstrap(samples, statistic, **options)
    return result.confidence_interval.low, result.confidence_interval.high


def deviation(values: np.ndarray) -> float:
    """Sample standard deviation over seeds; NaN for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def curve(cell: list[Run], limit: float = math.inf) -> pd.DataFrame:
    """Evaluation returns up to a step: a row for each global_step, a column for each run, NaN for none."""
    table = pd.concat({run.seed: run.evaluations for run in cell}, axis=1).sort_index()
    return table[table.index <= limit]


def mean_and_band(table: pd.DataFrame) -> pd.DataFrame:
    """Of a curve, by step: mean over seeds, its 95% interval's low and high, and how many seeds there are."""
    band = pd.DataFrame({"mean": table.mean(axis=1), "low": np.nan, "high": np.nan})
    band["seeds"] = table.count(axis=1)
    there = table.notna()
    for pattern in there.drop_duplicates().to_numpy():
        rows = (there.to_numpy() == pattern).all(axis=1)
        scores = table.to_numpy()[rows][:, pattern]
        band.loc[rows, "low"], band.loc[rows, "high"] = interval(
            scores, statistic=np.mean, resamples=2_000, axis=1
        )
    return band


def at(series: pd.Series, place: float) -> float:
    """The value at a place of the index or, without one there, the last before it; NaN if there is none."""
    before = series[series.index <= place]
    return float(before.iloc[-1]) if len(before) else math.nan


def final(series: pd.Series, steps: int) -> float:
    """Mean of the values in the last 25,000 steps up to `steps`; where there are none, the last value."""
    values = series[(series.index > steps - WINDOW) & (series.index <= steps)]
    return float(values.mean()) if len(values) else at(series, steps)


def reach(mean: pd.Series, threshold: float) -> float:
    """The first step at which a mean curve is at or above a threshold above zero; NaN if it never is."""
    reached = mean.index[mean >= threshold]
    return float(reached[0]) if threshold > 0 and len(reached) else math.nan


def hours_at(cell: list[Run], steps: pd.Index) -> np.ndarray:
    """Mean hours over runs at each step; NaN where a run has no timing."""
    hours = [np.interp(steps, run.hours.index, run.hours) if len(run.hours) else math.nan for run in cell]
    return np.mean([np.broadcast_to(row, len(steps)) for row in hours], axis=0)


# ======== Published returns ========
def read_reference(path: Path) -> pd.DataFrame:
    """Published returns; column `kind` is the algorithm that a row counts for."""
    reference = pd.read_csv(path)
    return reference.assign(kind=reference["algorithm"].replace(PUBLISHED_NAMES))


def published(reference: pd.DataFrame, algorithm: str, task: str, steps: int) -> pd.DataFrame:
    """Rows for an algorithm and task at the published step count nearest to `steps`, the best first.

    Of two as near, the larger is taken, which is harder to match. Empty if nothing is published.
    """
    rows = reference[(reference["kind"] == algorithm) & (reference["environment"] == task_name(task))]
    nearest = min(rows["steps"].unique(), key=lambda count: (abs(count - steps), -count), default=0)
    return rows[rows["steps"] == nearest].sort_values("return_mean", ascending=False)


def best_of_all(reference: pd.DataFrame) -> pd.Series:
    """The best published return of any algorithm at 1,000,000 steps by task name: 1 in the aggregate."""
    return reference[reference["steps"] == NORMALISE_AT].groupby("environment")["return_mean"].max()


# ======== Comparison ========
def row_of(cell: list[Run], steps: int, reference: pd.DataFrame) -> dict:
    """Every number about a cell's runs at a step count that they all reach."""
    task, algorithm = cell[0].task, cell[0].algorithm
    shared = curve(cell, steps).dropna()
    if shared.empty:
        raise Refusal(f"the {algorithm} runs on {task} share no evaluation up to step {steps:,}")
    mean = shared.mean(axis=1)
    values = {
        "final": np.array([final(run.evaluations, steps) for run in cell]),
        "max_average": shared.loc[mean.idxmax()].to_numpy(),
        "exploring": np.array([final(run.episodes, steps) for run in cell]),
        "hours": np.array([at(run.hours, steps) for run in cell]),
    }
    for percent in (25, 50, 100):
        values[f"after_{percent}"] = np.array([at(run.evaluations, steps * percent / 100) for run in cell])
    row = {"task": task, "algorithm": algorithm, "steps": steps, "seeds": len(cell), "mean": mean}
    for name, scores in values.items():
        row |= {name: scores.mean(), f"{name}_std": deviation(scores)}
    row["iqm"], (row["iqm_low"], row["iqm_high"]) = iqm(values["final"]), interval(values["final"])
    row["by_hours"] = pd.Series(mean.to_numpy(), index=hours_at(cell, mean.index))
    row["published"] = published(reference, algorithm, task, steps)
    return row


def compare(
    runs: list[Run], reference: pd.DataFrame, steps: tuple[int, ...] = (), share: float = 0.9
) -> list[dict]:
    """A row of numbers for each task, step count and algorithm, in this order.

    Compares the runs that reach them at the step counts named or, where none is named, each run at its end.
    """
    rows = []
    for cell in cells_of(runs).values():
        for count in sorted(set(steps) or {run.steps for run in cell}):
            long_enough = [run for run in cell if run.steps >= count]
            rows += [row_of(long_enough, count, reference)] if long_enough else []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    rows.sort(key=lambda row: (tasks.index(row["task"]), row["steps"]))  # stable: algorithms stay in order
    for row in rows:
        rivals = [other for other in rows if (other["task"], other["steps"]) == (row["task"], row["steps"])]
        row["reach_own"] = reach(row["mean"], share * row["final"])
        row["reach_best"] = reach(row["mean"], share * max(other["final"] for other in rivals))
        row["clock"] = min(other["hours"] for other in rivals)
        row["at_clock"] = at(
            row["by_hours"], row["clock"] * (1 + 1e-9)
        )  # two sums of the same hours may differ
    return rows


def aggregate(runs: list[Run], reference: pd.DataFrame, steps: tuple[int, ...] = ()) -> list[dict]:
    """IQM over tasks and seeds of final return / best published: a row for each step count and algorithm.

    Takes the tasks that every algorithm has at a step count; no row where these are fewer than two.
    """
    cells, best, rows = cells_of(runs), best_of_all(reference), []
    ends = {key: max(run.steps for run in cell) for key, cell in cells.items()}
    for count in sorted(set(steps)) or [min(ends.values())]:
        reached = [key for key, end in ends.items() if end >= count and task_name(key[0]) in best.index]
        names = [name for name in algorithms_of(runs) if name in {name for _, name in reached}]
        tasks = dict.fromkeys(task for task, _ in reached)
        tasks = [task for task in tasks if all((task, name) in reached for name in names)]
        for name in names if len(tasks) > 1 else []:
            samples = []
            for task in tasks:
                scores = [final(run.evaluations, count) for run in cells[task, name] if run.steps >= count]
                samples.append(np.array(scores) / best[task_name(task)])
            row = {"algorithm": name, "steps": count, "tasks": tasks, "seeds": [len(s) for s in samples]}
            row["iqm"], (row["iqm_low"], row["iqm_high"]) = iqm(*samples), interval(*samples)
            rows.append(row)
    return rows


# ======== Tables ========
HOW_TO_READ = f"""\
# Benchmark tables

`benchmark/plot.py` writes this file from the runs' CSV files; edit no number.

- **Final evaluation**: mean of a run's noise-free evaluations in its last {WINDOW:,} steps; then mean ±
  sample standard deviation over seeds.
- **IQM**: interquartile mean of the final evaluations over seeds (of fewer than four, the mean), with the 95%
  percentile bootstrap interval over seeds. From three seeds such an interval is a rough guide only.
- **Max-average**: the best mean over seeds of any evaluation so far, ± standard deviation over seeds there.
- **Exploring episodes**: mean return of the training episodes that ended in the last {WINDOW:,} steps.
- **Published**: from `reference_returns.csv`, at the step count nearest to ours; `reference_returns.md` names
  the sources, and how their task versions differ.
"""
OVERVIEW = """\
## Overview

Final evaluation, mean ± standard deviation over seeds. In brackets the lowest and highest published mean of
noise-free evaluations at the same step count, where there is one.
"""
EFFICIENCY = """\
## Sample efficiency

Mean ± standard deviation over seeds of the evaluation at that step, or the last before it. The last two
columns are the first evaluation at which the mean over seeds is at least {share:.0%} of the algorithm's own
final evaluation, and of the best algorithm's: a dash where it never is, or where that is not above zero.
"""
CLOCK = """\
## Wall-clock time

Training and evaluations, as the runs were run: often many side by side, which slows each. The last column is
the mean return at the last evaluation within the time that the fastest algorithm takes for its steps.
"""
TOGETHER = """\
## All tasks together

IQM over tasks and seeds of the final evaluation, divided by the best return that anybody published at
{steps:,} steps ({ones}).
The interval is a stratified bootstrap: seeds are drawn anew within each task.
"""


def number(value: float, digits: int = 1) -> str:
    """1,234.5, or a dash for what is not finite."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "–"


def plus_minus(row: dict, name: str) -> str:
    return f"{number(row[name])} ± {number(row[name + '_std'])}"


def with_interval(row: dict, digits: int = 1) -> str:
    low, high = number(row["iqm_low"], digits), number(row["iqm_high"], digits)
    return f"{number(row['iqm'], digits)} " + ("[–]" if low == "–" else f"[{low}, {high}]")


def markdown(header: list[str], lines: list[list]) -> str:
    """A Markdown table: the first column and titles that end in a colon stand left, the others right."""
    rule = [":--" if place == 0 or title.endswith(":") else "--:" for place, title in enumerate(header)]
    texts = [[title.rstrip(":") for title in header], rule, *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in texts)


def best_published(row: dict) -> list[str]:
    """The best published figure for a row, where it is from, and ours by its measure."""
    if row["published"].empty:
        return ["–", "–", "–"]
    best = row["published"].iloc[0]
    ours = row[MEASURES[best["metric"]].column]
    share = ours / best["return_mean"] if best["return_mean"] > 0 else math.nan
    source = best["source"] + (f", {best['algorithm']}" if best["algorithm"] != row["algorithm"] else "")
    source += f": {best['metric']}, {best['seeds']} seeds, {best['steps']:,} steps"
    text = f"{number(best['return_mean'])} ± {number(best['return_std'])}"
    return [text, source, number(ours) + (f" ({share:.0%})" if math.isfinite(share) else "")]


def overview_table(rows: list[dict]) -> str:
    """Final evaluations, a line for each task and step count; in brackets the published ones there."""
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    lines: dict[tuple, list] = {}
    for row in rows:
        line = lines.setdefault(
            (row["task"], row["steps"]), [row["task"], f"{row['steps']:,}", *["–"] * len(algorithms)]
        )
        found = row["published"]
        returns = found.loc[
            (found["metric"] == "evaluation") & (found["steps"] == row["steps"]), "return_mean"
        ]
        low, high = (number(value, 0) for value in (returns.min(), returns.max()))
        text = number(row["final"], 0) + (f" ± {number(row['final_std'], 0)}" if row["seeds"] > 1 else "")
        text += f" ({low if low == high else f'{low} to {high}'})" if len(returns) else ""
        line[2 + algorithms.index(row["algorithm"])] = text
    return markdown(["Task", "Steps", *algorithms], list(lines.values()))


def task_table(rows: list[dict]) -> str:
    header = ["Algorithm", "Seeds", "Steps", "Final evaluation", "IQM [95% interval]", "Max-average"]
    lines = []
    for row in rows:
        line = [row["algorithm"], row["seeds"], f"{row['steps']:,}", plus_minus(row, "final")]
        lines.append([*line, with_interval(row), plus_minus(row, "max_average"), *best_published(row)])
    return markdown([*header, "Best published", "from:", "ours by its measure"], lines)


def range_table(rows: list[dict]) -> str:
    header = ["Task", "Algorithm:", "Steps", "Measure:", "Ours", "Lowest published", "Highest", "Rows"]
    lines = []
    for row in rows:
        found = row["published"].assign(column=[MEASURES[name].column for name in row["published"]["metric"]])
        for column, name in {measure.column: measure.name for measure in MEASURES.values()}.items():
            returns, ours = found.loc[found["column"] == column, "return_mean"], row[column]
            if len(returns) and math.isfinite(ours):
                low, high = returns.min(), returns.max()
                line = [row["task"], row["algorithm"], f"{row['steps']:,}", name, number(ours), number(low)]
                line += [number(high), len(returns), f"{found['steps'].iloc[0]:,}"]
                verdict = "**below**" if ours < low else "above" if ours > high else "within"
                lines.append([*line, verdict if found["steps"].iloc[0] == row["steps"] else "–"])
    return markdown([*header, "at steps", "Ours is:"], lines)


def efficiency_table(rows: list[dict], share: float) -> str:
    header = ["Task", "Algorithm:", "Steps", "after 25% of them", "after 50%", "after 100%"]
    header += [
        f"steps to {share:.0%} of its own final return",
        f"steps to {share:.0%} of the best algorithm's",
    ]
    lines = []
    for row in rows:
        line = [row["task"], row["algorithm"], f"{row['steps']:,}"]
        line += [plus_minus(row, f"after_{percent}") for percent in (25, 50, 100)]
        lines.append([*line, number(row["reach_own"], 0), number(row["reach_best"], 0)])
    return markdown(header, lines)


def clock_table(rows: list[dict]) -> str:
    header = ["Task", "Algorithm:", "Steps", "Seeds", "Hours a run", "Steps per second"]
    lines = []
    for row in rows:
        line = [row["task"], row["algorithm"], f"{row['steps']:,}", row["seeds"], number(row["hours"], 2)]
        line += [number(row["steps"] / (3600 * row["hours"]), 0), number(row["clock"], 2)]
        lines.append([*line, number(row["at_clock"])])
    return markdown([*header, "Same time, hours", "return after it"], lines)


def aggregate_table(rows: list[dict]) -> str:
    header = ["Algorithm", "Steps", "IQM [95% interval]", "Tasks:", "Seeds of each:"]
    lines = []
    for row in rows:
        tasks, seeds = ", ".join(map(task_name, row["tasks"])), ", ".join(map(str, row["seeds"]))
        lines.append([row["algorithm"], f"{row['steps']:,}", with_interval(row, 3), tasks, seeds])
    return markdown(header, lines)


def runs_table(runs: list[Run]) -> str:
    """What the runs ran on, and how long they took."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.record.get("versions", {}).items())
        device, threads = run.record.get("device") or "–", run.record["args"].get("threads", "–")
        key = (versions, f"{device.rstrip(': ')}; threads: {threads}", run.record.get("git_commit") or "–")
        groups.setdefault(key, []).append(run)
    lines = []
    for key, members in sorted(groups.items()):
        hours = sum(run.hours.iloc[-1] for run in members if len(run.hours))
        lines.append([*key, len(members), f"{sum(run.steps for run in members):,}", number(hours, 1)])
    return markdown(["Versions", "Device:", "Commit:", "Runs", "Steps in all", "Hours in all"], lines)


def write_tables(
    runs: list[Run], reference: pd.DataFrame, steps: tuple[int, ...] = (), share: float = 0.9
) -> str:
    """All tables as one Markdown text."""
    rows, total = compare(runs, reference, steps, share), aggregate(runs, reference, steps)
    parts = [HOW_TO_READ]
    if min(row["seeds"] for row in rows) < 2:
        parts.append("A cell with one seed has no spread: its standard deviation and intervals are dashes.\n")
    parts += [OVERVIEW, overview_table(rows)]
    for task in dict.fromkeys(row["task"] for row in rows):
        parts += [f"## {task}\n", task_table([row for row in rows if row["task"] == task])]
    parts.append("## Against the published range\n\nLowest and highest published mean by the same measure.\n")
    parts += [range_table(rows), EFFICIENCY.format(share=share), efficiency_table(rows, share)]
    parts += [CLOCK, clock_table(rows)]
    if total:
        names, best = (
            dict.fromkeys(task_name(task) for row in total for task in row["tasks"]),
            best_of_all(reference),
        )
        ones = ", ".join(f"{name} {number(best[name])}" for name in names)
        parts += [TOGETHER.format(steps=NORMALISE_AT, ones=ones), aggregate_table(total)]
    return "\n".join([*parts, "## Runs\n", runs_table(runs)])


# ======== Figures ========
STYLE = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E4E4E4",
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.frameon": False,
}
SMALL = {"fontsize": 11, "color": "#666666", "fontweight": "normal"}
SPREAD = 0.035  # of the horizontal axis, between the published marks of two algorithms
NICE = [1, 2, 2.5, 5, 10]  # between two ticks, times a power of ten
thousands = FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "−"))


def colours_of(runs: list[Run]) -> dict[str, str]:
    """A colour for each algorithm, in order."""
    names = algorithms_of(runs)
    added = [name for name in names if name not in COLOURS]
    more = {name: MORE_COLOURS[place % len(MORE_COLOURS)] for place, name in enumerate(added)}
    return {name: (COLOURS | more)[name] for name in names}


def draw_curve(axes: plt.Axes, along: np.ndarray, band: pd.DataFrame, colour: str) -> None:
    """A mean line with its band; thin where some of the seeds have ended."""
    axes.fill_between(along, band["low"], band["high"], color=colour, alpha=0.2, linewidth=0)
    axes.plot(along, band["mean"], color=colour, linewidth=1.2)
    whole = (band["seeds"] == band["seeds"].max()).to_numpy()
    axes.plot(along[whole], band["mean"][whole], color=colour, linewidth=2.4)


def draw_published(axes: plt.Axes, rows: pd.DataFrame, offset: float, colour: str) -> None:
    """One algorithm's published returns at their steps, moved by `offset` steps, clear of the others'."""
    for steps, group in rows.groupby("steps"):
        low, high = group["return_mean"].min(), group["return_mean"].max()
        axes.vlines(steps + offset, low, high, color=colour, linewidth=1, zorder=3)
    for metric, group in rows.groupby("metric"):
        style = {"marker": MEASURES[metric].mark, "s": 36, "facecolor": "white", "edgecolor": colour}
        axes.scatter(group["steps"] + offset, group["return_mean"], **style, linewidth=1.6, zorder=4)


def draw_legend(
    axes: plt.Axes, colours: dict[str, str], banded: bool, metrics: set[str], notes: list[str]
) -> None:
    """The one legend of a figure, in a cell of its own."""
    lines = [Line2D([], [], color=colour, linewidth=4) for colour in colours.values()]
    place = {"loc": "upper left", "borderaxespad": 0, "handlelength": 1.3}
    names = axes.legend(lines, colours.keys(), fontsize=15, ncols=3, columnspacing=1.2, **place)
    axes.add_artist(names)
    grey = "#555555"
    handles = {"mean over seeds" if banded else "one seed": Line2D([], [], color=grey, linewidth=2.4)}
    if banded:
        handles["95% bootstrap interval"] = Patch(color=grey, alpha=0.25, linewidth=0)
    style = {"markerfacecolor": "white", "markeredgecolor": grey, "markeredgewidth": 1.6, "markersize": 7}
    for metric, measure in MEASURES.items():
        if metric in metrics:
            mark = Line2D([], [], linestyle="", marker=measure.mark, **style)
            handles[f"published, {measure.name}"] = mark
    below = {"bbox_to_anchor": (0, 0.95 - 0.115 * math.ceil(len(colours) / 3))}
    axes.legend(handles.values(), handles.keys(), fontsize=12, **place, **below)
    axes.text(0, 0, "\n".join(notes), fontsize=10.5, color="#666666", transform=axes.transAxes)


def notes_on(runs: list[Run], x: str, metrics: set[str], limit: float) -> list[str]:
    """What a reader has to know about a figure's runs, in short lines."""
    cells, notes = cells_of(runs).values(), []
    if metrics:
        notes.append("Published: means over seeds, most on earlier")
        notes.append("task versions; side by side at one step count.")
    if min(map(len, cells)) < 2:
        notes.append("One seed alone has no interval.")
    if any(len({min(limit, run.steps) for run in cell}) > 1 for cell in cells):
        notes.append("Thin lines: some of the seeds have ended.")
    if x == "hours":
        notes += ["Hours as recorded: runs side by side", "slow each other."]
    return notes


def plot_returns(
    runs: list[Run], reference: pd.DataFrame, x: Literal["steps", "hours"] = "steps", limit: float = math.inf
) -> Figure:
    """A panel for each task: evaluation return against environment steps, or hours, up to a step `limit`."""
    cells, colours, metrics, banded = cells_of(runs), colours_of(runs), set(), False
    tasks = list(dict.fromkeys(task for task, _ in cells))
    columns = 2 if len(tasks) == 3 else min(3, len(tasks) + 1)  # one cell more than tasks, for the legend
    rows = math.ceil((len(tasks) + 1) / columns)
    with plt.rc_context(STYLE):
        size = (4.44 * columns, 3.75 * rows)  # 16 : 9 for five tasks
        figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for axes in grid.flat[len(tasks) :]:
            axes.axis("off")
        for place, (task, axes) in enumerate(zip(tasks, grid.flat, strict=False)):
            here = [cells[task, name] for name in colours if (task, name) in cells]
            end = min(limit, max(run.steps for cell in here for run in cell))
            for cell in here:
                name, band = cell[0].algorithm, mean_and_band(curve(cell, limit))
                along = band.index.to_numpy() if x == "steps" else hours_at(cell, band.index)
                draw_curve(axes, along, band, colours[name])
                banded |= bool(band["low"].notna().any())
                found = reference[(reference["kind"] == name) & (reference["environment"] == task_name(task))]
                found = found[found["steps"] <= (end if x == "steps" else 0)]
                side = list(colours).index(name) - (len(colours) - 1) / 2
                draw_published(axes, found, side * SPREAD * end, colours[name])
                metrics |= set(found["metric"])
            seeds = sorted({len(cell) for cell in here})
            text = " to ".join(map(str, seeds[:: max(1, len(seeds) - 1)])) + " seed" + "s" * (seeds != [1])
            version = task.removeprefix(task_name(task)).replace("-v", "v")
            axes.set_title(task_name(task))
            axes.set_title(f"{version}, {text}".removeprefix(", "), loc="right", **SMALL)
            axes.set_xlim(0, end * (1.02 + SPREAD) if x == "steps" else None)
            axes.xaxis.set_major_locator(MaxNLocator(3, steps=NICE))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=NICE))
            axes.xaxis.set_major_formatter(thousands)
            axes.yaxis.set_major_formatter(thousands)
            if place >= len(tasks) - columns:
                axes.set_xlabel("environment steps" if x == "steps" else "hours of training and evaluation")
            if place % columns == 0:
                axes.set_ylabel("return, noise-free")
        draw_legend(grid.flat[-1], colours, banded, metrics, notes_on(runs, x, metrics, limit))
    return figure


def plot_aggregate(runs: list[Run], reference: pd.DataFrame, limit: float = math.inf) -> Figure | None:
    """IQM over tasks and seeds of normalised return against steps; None for fewer than two common tasks."""
    cells, colours, best = cells_of(runs), colours_of(runs), best_of_all(reference)
    tasks = [task for task in dict.fromkeys(task for task, _ in cells) if task_name(task) in best.index]
    tasks = [task for task in tasks if all((task, name) in cells for name in colours)]
    if len(tasks) < 2:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.9, 5), layout="constrained")
        for name, colour in colours.items():
            # Only the steps that every seed of every task has: the same runs stand behind the whole line.
            curves = [curve(cells[task, name], limit).dropna() / best[task_name(task)] for task in tasks]
            steps = sorted(set.intersection(*(set(table.index) for table in curves)))
            if not steps:
                continue
            scores = [table.loc[steps].to_numpy() for table in curves]
            low, high = interval(*scores, resamples=2_000, axis=1)
            band = pd.DataFrame(
                {"mean": iqm(*scores, axis=1), "low": low, "high": high, "seeds": 1}, index=steps
            )
            draw_curve(axes, np.array(steps), band, colour)
            axes.plot([], [], color=colour, linewidth=4, label=name)
        axes.set_title(f"IQM over {len(tasks)} tasks")
        axes.set_title("95% stratified bootstrap interval (none for one seed)", loc="right", **SMALL)
        axes.set_xlabel("environment steps")
        axes.set_ylabel(f"return / best published at {NORMALISE_AT:,}")
        axes.set_xlim(0)
        axes.xaxis.set_major_formatter(thousands)
        axes.legend(loc="upper left", fontsize=14, handlelength=1.4)
    return figure


# ======== Command line ========
def main(args: Args) -> str:
    """Writes figures and tables; returns the tables. Raises Refusal for runs that cannot be compared."""
    runs, reference = read_runs(args.results), read_reference(args.reference)
    check(runs, args.steps, args.allow_mixed)
    limit = max(args.steps, default=math.inf)
    for run in runs:
        if run.steps < min(args.steps, default=0):
            print(f"plot.py: not compared, as it has {run.steps:,} steps: {run.folder}", file=sys.stderr)
    text = write_tables(runs, reference, args.steps, args.share)
    figures = {"returns": plot_returns(runs, reference, "steps", limit)}
    if all(len(run.hours) for run in runs):
        figures["returns_hours"] = plot_returns(runs, reference, "hours", limit)
    if together := plot_aggregate(runs, reference, limit):
        figures["aggregate"] = together
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.output / f"{name}.png", dpi=150)
        plt.close(figure)
    (args.output / "tables.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    try:
        print(main(arguments))
    except (Refusal, OSError) as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        sys.exit(2)
