"""Draws training runs, and writes a table of them with published returns beside.

    python benchmark/plot.py                                     # benchmark/results -> benchmark/figures
    python benchmark/plot.py runs/a runs/b --output figures      # any runs

A run is a folder with args.json and evaluations.csv, at any depth; each CSV file may be a .csv.gz.
A curve is named after --exp-name: td3_continuous is TD3, any other name is shown as it is. Runs that share
task and name are seeds of one curve. The files written are

    returns.png     evaluation return against environment steps, with published returns
    losses.png      what losses.csv recorded, of the first critic only: the second looks the same
    q_values.png    the return that the critic predicts, and the one that the policy gets
    table.md        final evaluations, published returns at the same number of steps, running times

Published returns are in reference_returns.csv; reference_returns.md says where they are from.
"""

import gzip
import io
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

HERE = Path(__file__).resolve().parent
LABELS = {"ddpg": "DDPG", "td3": "TD3", "sac": "SAC"}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"DDPG": "#E69F00", "TD3": "#0072B2", "SAC": "#009E73"}
MORE_COLOURS = ["#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999"]
MARKERS = "osD^vPX"  # of the published sources
# Panels of losses.png: columns of losses.csv, the first drawn solid and the second dashed.
LOSSES = [
    ["qf1_values", "target_q"],
    ["qf1_loss"],
    ["actor_loss"],
    ["entropy"],
    ["alpha"],
    ["q_gradient_norm", "actor_gradient_norm"],
]
LOG_SCALE = {"qf1_loss", "q_gradient_norm"}
# Arguments that may differ between the seeds of a curve: they do not change what is learned.
FREE_ARGUMENTS = {"seed", "run_dir", "resume", "total_timesteps", "checkpoint_frequency", "log_frequency"}
FREE_ARGUMENTS |= {"cuda", "compile", "threads", "torch_deterministic", "capture_video", "watch", "track"}
FREE_ARGUMENTS |= {"wandb_project_name", "wandb_entity"}
# Mean return of 10 episodes of zero actions, seeds 0 to 9, with Gymnasium 1.4.0 and MuJoCo 4.0.0.
STANDING_STILL = {"Ant-v4": 1000.9}
NOTE = """
Return of these runs: the mean over the evaluations in the last tenth of the steps that all seeds have.
Published: mean ± standard deviation over seeds; reference_returns.md says what each source measured.
"""


@dataclass
class Runs:
    """All runs in long tables: each row also says the task, the label and the seed of its run."""

    args: pd.DataFrame  # a row for each run: its folder, and its arguments as JSON
    evaluations: pd.DataFrame
    losses: pd.DataFrame
    timing: pd.DataFrame

    @property
    def tasks(self) -> list[str]:
        """All tasks, sorted."""
        return sorted(set(self.args["task"]))

    @property
    def colours(self) -> dict[str, str]:
        """A colour for each label: DDPG, TD3 and SAC first, others by name."""
        labels = set(self.args["label"])
        others = zip(sorted(labels - set(COLOURS)), itertools.cycle(MORE_COLOURS), strict=False)
        return {label: colour for label, colour in [*COLOURS.items(), *others] if label in labels}


def refuse(reason: str) -> NoReturn:
    """Ends the program with one line on stderr and status 2."""
    print(f"plot.py: error: {reason}", file=sys.stderr)
    sys.exit(2)


# ======== Reading ========
def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file, or its .csv.gz; empty without one. A half-written last line is left out."""
    compressed = path.with_name(f"{path.name}.gz")
    text = ""
    if path.exists():
        text = path.read_text()
    elif compressed.exists():
        text = gzip.decompress(compressed.read_bytes()).decode()
    complete = text[: text.rfind("\n") + 1]
    return pd.read_csv(io.StringIO(complete or "global_step\n"))


def read_runs(folders: tuple[Path, ...]) -> Runs:
    """Every run under the folders that has an evaluation. Refuses to go on without one."""
    tables: dict[str, list[pd.DataFrame]] = {"args": [], "evaluations": [], "losses": [], "timing": []}
    # In a set, a run that lies under two of the folders counts once.
    paths = {path.parent.resolve() for folder in folders for path in folder.rglob("args.json")}
    for path in sorted(paths):
        if read_csv(path / "evaluations.csv").empty:
            continue
        args = json.loads((path / "args.json").read_text())["args"]
        name = args["exp_name"].removesuffix("_continuous")
        run = {"task": args["env_id"], "label": LABELS.get(name, name), "seed": args["seed"]}
        as_json = {argument: json.dumps(value) for argument, value in args.items()}
        tables["args"].append(pd.DataFrame([as_json | run | {"folder": str(path)}]))
        for table in ("evaluations", "losses", "timing"):
            tables[table].append(read_csv(path / f"{table}.csv").assign(**run))
    if not tables["args"]:
        refuse(f"no run with an evaluation in {', '.join(map(str, folders))}")
    return Runs(**{name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()})


def check(args: pd.DataFrame) -> None:
    """Refuses runs of one curve that differ in an argument that matters, or have the same seed."""
    for (task, label), curve in args.groupby(["task", "label"]):
        # An argument that only some of them have is no difference: a later version of a script may add one.
        values = curve.drop(columns=["folder", *FREE_ARGUMENTS], errors="ignore").nunique()
        if values.max() > 1:
            names = ", ".join(values.index[values > 1])
            refuse(f"runs of {label} on {task} differ in {names}; tell them apart by --exp-name")
        for seed, same in curve.groupby("seed"):
            if len(same) > 1:
                refuse(f"{label} on {task} has seed {seed} twice: {' and '.join(same['folder'])}")


def seeds_of(table: pd.DataFrame, task: str, label: str, column: str) -> pd.DataFrame:
    """One column of a table: a row for each step, a column for each seed of this task and label."""
    if column not in table:
        return pd.DataFrame()
    rows = table[(table["task"] == task) & (table["label"] == label)].dropna(subset=[column])
    return rows.pivot(index="global_step", columns="seed", values=column)


def smooth(seeds: pd.DataFrame) -> pd.DataFrame:
    """Averages each row with those before it, over 1% of the rows: a long run is a blur without."""
    return seeds.rolling(1 + len(seeds) // 100, min_periods=1).mean()


def published(reference: pd.DataFrame, task: str, label: str, steps: int) -> pd.DataFrame:
    """Published returns of an algorithm at the largest published number of steps up to `steps`."""
    algorithm = reference["algorithm"].replace("OurDDPG", "DDPG")  # the TD3 paper's own version of DDPG
    environment = task.rpartition("-v")[0]
    rows = reference[(reference["environment"] == environment) & (algorithm == label)]
    rows = rows[rows["steps"] <= steps]
    return rows[rows["steps"] == rows["steps"].max()]


# ======== Figures ========
def new_figure(titles: list[str], columns: int, ylabel: str = "") -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel for each title."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)  # rounded up
    figure = Figure(figsize=(max(7, 4.2 * columns), 3 * rows + 1.3), layout="constrained")
    panels = {}
    for place, title in enumerate(titles, start=1):
        axes = figure.add_subplot(rows, columns, place, xlabel="environment steps", ylabel=ylabel)
        axes.set_title(title, fontsize="medium")
        axes.grid(color="#E5E5E5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=4, steps=[1, 2, 2.5, 5, 10])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        panels[title] = axes
    return figure, panels


def draw_seeds(axes: Axes, seeds: pd.DataFrame, colour: str, style: str = "-") -> None:
    """Draws each seed thin, and bold their mean over the steps that all of them have."""
    if seeds.empty:
        return
    for seed in seeds:
        one = seeds[seed].dropna()
        axes.plot(one.index, one, style, color=colour, linewidth=0.7, alpha=0.4, zorder=2)
    mean = seeds.dropna().mean(axis=1)
    marker = "o" if len(mean) < 12 else ""
    axes.plot(mean.index, mean, style, color=colour, linewidth=2, marker=marker, markersize=4, zorder=3)


def grey(label: str, **style) -> Line2D:
    """A legend entry for what is drawn in every colour."""
    return Line2D([], [], color="#555555", markerfacecolor="white", label=label, **style)


def finish(figure: Figure, colours: dict[str, str], entries: list[Line2D]) -> None:
    """Removes empty panels, and adds one legend below all of them."""
    for axes in figure.axes:
        if not axes.has_data():
            axes.remove()
    labels = [Line2D([], [], color=colour, linewidth=4, label=label) for label, colour in colours.items()]
    handles = [*labels, grey("mean over seeds (thin: one seed)", linewidth=2), *entries]
    columns = int(figure.get_figwidth() // 2.8)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def returns_figure(runs: Runs, reference: pd.DataFrame) -> Figure:
    """Evaluation return against environment steps, with published returns to the right of their step."""
    figure, panels = new_figure(runs.tasks, 3, "evaluation return")
    markers = dict(zip(reference["source"].unique(), itertools.cycle(MARKERS), strict=False))
    drawn = set()
    for task, label in itertools.product(runs.tasks, runs.colours):
        axes, colour = panels[task], runs.colours[label]
        seeds = seeds_of(runs.evaluations, task, label, "episodic_return")
        draw_seeds(axes, seeds, colour)
        end = seeds.index.max()
        for row in published(reference, task, label, end).itertuples():
            place = row.steps + 0.02 * end * (1 + len(axes.containers))  # beside those that are there
            style = {"fmt": markers[row.source], "color": colour, "markerfacecolor": "white"}
            axes.errorbar(place, row.return_mean, row.return_std, **style)
            drawn.add(row.source)
    entries = [grey(f"{source}, mean ± sd", marker=markers[source], linestyle="") for source in sorted(drawn)]
    finish(figure, runs.colours, entries)
    return figure


def losses_figure(runs: Runs) -> Figure:
    """What losses.csv recorded: a row for each task, a column for each panel that has data."""
    columns = [names for names in LOSSES if names[0] in runs.losses]
    titles = [f"{task}\n{', dashed: '.join(names)}" for task in runs.tasks for names in columns]
    figure, panels = new_figure(titles, len(columns))
    for axes, (task, names) in zip(panels.values(), itertools.product(runs.tasks, columns), strict=True):
        for label, colour in runs.colours.items():
            for name, style in zip(names, ["-", "--"], strict=False):
                draw_seeds(axes, smooth(seeds_of(runs.losses, task, label, name)), colour, style)
        if names[0] in LOG_SCALE:
            axes.set_yscale("log")
    finish(figure, runs.colours, [grey("each averaged over 1% of its rows", linestyle="")])
    return figure


def q_values_figure(runs: Runs) -> Figure:
    """The first critic's mean value, and the mean discounted return that the noise-free policy gets."""
    figure, panels = new_figure(runs.tasks, 3, "discounted return")
    for task, label in itertools.product(runs.tasks, runs.colours):
        received = seeds_of(runs.evaluations, task, label, "discounted_return")
        predicted = seeds_of(runs.losses, task, label, "qf1_values")
        if len(received):
            draw_seeds(panels[task], received, runs.colours[label], "--")
            draw_seeds(panels[task], smooth(predicted), runs.colours[label])
    solid = grey("predicted by the critic (qf1_values)", linewidth=2)
    dashed = grey("received by the policy (discounted_return)", linewidth=2, linestyle="--")
    finish(figure, runs.colours, [solid, dashed])
    return figure


# ======== Table ========
def number(value: float) -> str:
    """1,234 or 12.3, with three digits at least; nothing for NaN."""
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def runs_row(returns: pd.DataFrame, elapsed: pd.DataFrame) -> dict[str, str]:
    """The row of one curve: evaluations at the last steps that all seeds have, and running times."""
    finals = returns[returns.index > 0.9 * returns.index[-1]].mean()
    speeds = elapsed.apply(pd.Series.last_valid_index) / elapsed.max()
    return {
        "Source": "these runs",
        "Steps": f"{returns.index[-1]:,}",
        "Seeds": str(len(finals)),
        "Return": number(finals.mean()),
        "Each seed": "; ".join(map(number, finals)),
        "Hours a run": number(elapsed.max().mean() / 3600),
        "Steps/s": number(speeds.mean()),
    }


def published_row(row: pd.Series) -> dict[str, str]:
    """The row of one published return."""
    spread = number(row["return_std"])
    return {
        "Source": f"{row['source']} ({row['metric']})",
        "Steps": f"{row['steps']:,}",
        "Seeds": str(row["seeds"]),
        "Return": number(row["return_mean"]) + (f" ± {spread}" if spread else ""),
    }


def make_table(runs: Runs, reference: pd.DataFrame) -> str:
    """Final evaluations, published returns at the same number of steps and running times, as Markdown."""
    rows = []
    for task, label in itertools.product(runs.tasks, runs.colours):
        returns = seeds_of(runs.evaluations, task, label, "episodic_return").dropna()
        if returns.empty:
            continue
        curve = {"Task": task, "Algorithm": label}
        rows.append(curve | runs_row(returns, seeds_of(runs.timing, task, label, "elapsed")))
        steps = returns.index[-1]
        for _, row in published(reference, task, label, steps).iterrows():
            if row["steps"] == steps:
                rows.append(curve | published_row(row))
    for task in sorted(set(STANDING_STILL) & set(runs.tasks)):
        still = {"Task": task, "Algorithm": "standing still", "Source": "10 episodes of zero actions"}
        rows.append(still | {"Return": number(STANDING_STILL[task])})
    return markdown(pd.DataFrame(rows).fillna("")) + NOTE


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (HERE / "results",), output: Path = HERE / "figures"
) -> None:
    """Draws training runs, and writes a table of them with published returns beside.

    Args:
        folders: Folders that hold runs, at any depth.
        output: Folder for the figures and the table.
    """
    runs = read_runs(folders)
    check(runs.args)
    reference = pd.read_csv(HERE / "reference_returns.csv")
    figures = {"returns": returns_figure(runs, reference)}
    if any(names[0] in runs.losses for names in LOSSES):
        figures["losses"] = losses_figure(runs)
    if "discounted_return" in runs.evaluations:
        figures["q_values"] = q_values_figure(runs)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=120)
    text = make_table(runs, reference)
    (output / "table.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    tyro.cli(main)
