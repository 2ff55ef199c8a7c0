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

import itertools
import math
from pathlib import Path

import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from records import HERE, REFERENCE, Run, check, published, read_runs, seeds_of, tasks_of

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"DDPG": "#E69F00", "TD3": "#0072B2", "SAC": "#009E73"}
MORE_COLOURS = ["#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999"]
MARKERS = dict(zip(REFERENCE["source"].unique(), itertools.cycle("osD^vPX"), strict=False))
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
NOTE = """
Return of these runs: the mean over the evaluations in the last tenth of the steps that all seeds have.
Published: mean ± standard deviation over seeds; reference_returns.md says what each source measured.
Steps/s is the median over a run, hours are as the clock went.
"""
ANT = "Standing still on Ant-v4 returns about 1,000, as each step that it survives is worth 1.\n"


def colours_of(runs: list[Run]) -> dict[str, str]:
    """A colour for each curve."""
    return choose_colours({run.curve for run in runs})


def choose_colours(curves: set[str]) -> dict[str, str]:
    """A colour for each name: DDPG, TD3 and SAC first, others by the alphabet."""
    others = sorted(curves - COLOURS.keys())
    colours = COLOURS | dict(zip(others, itertools.cycle(MORE_COLOURS), strict=False))
    return {curve: colour for curve, colour in colours.items() if curve in curves}


def smooth(seeds: pd.DataFrame) -> pd.DataFrame:
    """Averages each row with those before it, over 1% of the rows: a long run is a blur without."""
    return seeds.rolling(1 + len(seeds) // 100, min_periods=1).mean().where(seeds.notna())


# ======== Figures ========
def new_figure(
    titles: list[str], columns: int, ylabel: str = "", xlabel: str = "environment steps"
) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel for each title."""
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(max(7, 4.2 * columns), 3 * rows + 1.3), layout="constrained")
    panels = {}
    for place, title in enumerate(titles, start=1):
        axes = figure.add_subplot(rows, columns, place, xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, fontsize="medium")
        axes.grid(color="#E5E5E5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=4, steps=[1, 2, 2.5, 5, 10])
        axes.xaxis.set_major_formatter("{x:,.10g}")
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


def finish(figure: Figure, runs: list[Run], entries: list[Line2D]) -> Figure:
    """Removes empty panels, and adds one legend below all of them."""
    for axes in figure.axes:
        if not axes.has_data():
            axes.remove()
    handles = [Line2D([], [], color=colour, lw=4, label=curve) for curve, colour in colours_of(runs).items()]
    handles += [grey("mean over seeds (thin: one seed)", linewidth=2), *entries]
    columns = int(figure.get_figwidth() // 2.8)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    return figure


def returns_figure(runs: list[Run]) -> Figure:
    """Evaluation return against environment steps, with published returns to the right of their step."""
    figure, panels = new_figure(tasks_of(runs), 3, "evaluation return")
    sources = set()
    marks = dict.fromkeys(panels, 0)  # published returns in each panel, side by side
    for (task, axes), (curve, colour) in itertools.product(panels.items(), colours_of(runs).items()):
        seeds = seeds_of(runs, task, curve, "evaluations", "episodic_return")
        if seeds.empty:
            continue
        draw_seeds(axes, seeds, colour)
        end = seeds.index.max()
        for row in published(task, curve, end).itertuples():
            marks[task] += 1
            place = row.steps + 0.02 * end * marks[task]
            style = {"fmt": MARKERS[row.source], "color": colour, "markerfacecolor": "white"}
            axes.errorbar(place, row.return_mean, row.return_std, **style)
            sources.add(row.source)
    entries = [grey(f"{name}, mean ± sd", marker=MARKERS[name], linestyle="") for name in sorted(sources)]
    return finish(figure, runs, entries)


def losses_figure(runs: list[Run]) -> Figure:
    """What losses.csv recorded: a row for each task, a column for each panel that has data."""
    recorded = {name for run in runs for name in run.tables["losses"]}
    columns = [names for names in LOSSES if names[0] in recorded]
    titles = [f"{task}\n{', dashed: '.join(names)}" for task in tasks_of(runs) for names in columns]
    figure, panels = new_figure(titles, len(columns))
    for axes, (task, names) in zip(panels.values(), itertools.product(tasks_of(runs), columns), strict=True):
        for curve, colour in colours_of(runs).items():
            for name, style in zip(names, ["-", "--"], strict=False):
                draw_seeds(axes, smooth(seeds_of(runs, task, curve, "losses", name)), colour, style)
        if names[0] in LOG_SCALE:
            axes.set_yscale("log")
    return finish(figure, runs, [grey("each averaged over 1% of its rows", linestyle="")])


def q_values_figure(runs: list[Run]) -> Figure:
    """The first critic's mean value, and the mean discounted return that the noise-free policy gets."""
    figure, panels = new_figure(tasks_of(runs), 3, "discounted return")
    for (task, axes), (curve, colour) in itertools.product(panels.items(), colours_of(runs).items()):
        received = seeds_of(runs, task, curve, "evaluations", "discounted_return")
        predicted = seeds_of(runs, task, curve, "losses", "qf1_values")
        if len(received):
            draw_seeds(axes, received, colour, "--")
            draw_seeds(axes, smooth(predicted), colour)
    solid = grey("predicted by the critic (qf1_values)", linewidth=2)
    dashed = grey("received by the policy (discounted_return)", linewidth=2, linestyle="--")
    return finish(figure, runs, [solid, dashed])


# ======== Table ========
def number(value: float) -> str:
    """1,234 or 12.3: three significant digits, or all before the point; nothing for NaN."""
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def make_table(runs: list[Run]) -> str:
    """Final evaluations, published returns at the same number of steps and running times, as Markdown."""
    rows = []
    for task, curve in itertools.product(tasks_of(runs), colours_of(runs)):
        returns = seeds_of(runs, task, curve, "evaluations", "episodic_return").dropna()
        if returns.empty:
            continue
        steps = returns.index[-1]
        finals = returns[returns.index > 0.9 * steps].mean()
        hours = seeds_of(runs, task, curve, "timing", "elapsed").max().mean() / 3600
        speed = seeds_of(runs, task, curve, "timing", "SPS").median().mean()
        ours = ["these runs", str(len(finals)), number(finals.mean()), "; ".join(map(number, finals))]
        rows.append([task, curve, f"{steps:,}", *ours, number(hours), number(speed)])
        for row in published(task, curve, steps).itertuples():
            if row.steps == steps:
                spread = f" ± {number(row.return_std)}" if row.return_std > 0 else ""
                theirs = [f"{row.source} ({row.metric})", str(row.seeds), number(row.return_mean) + spread]
                rows.append([task, curve, f"{steps:,}", *theirs, "", "", ""])
    header = "Task", "Algorithm", "Steps", "Source", "Seeds", "Return", "Each seed", "Hours", "Steps/s"
    lines = [header, ["---"] * len(header), *rows]
    note = NOTE + ANT if "Ant-v4" in tasks_of(runs) else NOTE
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + note


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (HERE / "results",), output: Path = HERE / "figures"
) -> None:
    """Draws training runs, and writes a table of them with published returns beside.

    Args:
        folders: Folders that hold runs, at any depth.
        output: Folder for the figures and the table.
    """
    runs = read_runs(folders)
    check(runs)
    figures = {"returns": returns_figure(runs)}
    if any(len(run.tables["losses"]) for run in runs):
        figures["losses"] = losses_figure(runs)
    if any("discounted_return" in run.tables["evaluations"] for run in runs):
        figures["q_values"] = q_values_figure(runs)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=120)
    text = make_table(runs)
    (output / "table.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    tyro.cli(main)
