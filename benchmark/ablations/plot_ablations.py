"""From the runs of benchmark/ablations.sh to a figure for each comparison, and the tables of README.md.

    python benchmark/ablations/plot_ablations.py          # results -> figures, final.csv, README.md's tables

The final return of a run is its mean evaluation return in the last quarter of its steps, its return while
learning that of all evaluations after learning started. Tables give mean ± sample standard deviation over
seeds; bands are 95% percentile bootstrap intervals of the mean over seeds.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plot  # of the main benchmark

HERE = Path(__file__).resolve().parent
SAC, DDPG = "shared/sac", "shared/ddpg"
NAMED = ["#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00"]  # for variants in no order


class Comparison(NamedTuple):
    title: str
    variants: dict[str, str]  # name in the legend to folder in the results; :sampled for sampled actions
    ordered: bool = False  # whether the variants are values of one number, in order
    metric: str = ""  # column of losses.csv to draw beside the returns
    metric_name: str = ""


COMPARISONS = {
    "deterministic": Comparison(
        "SAC and its deterministic variant",
        {"SAC": SAC, "deterministic SAC": "deterministic/deterministic"},
        metric="qf1_values",
        metric_name="mean Q1 of the minibatch",
    ),
    "mean-action": Comparison(
        "Evaluating SAC with its mean action or a sample",
        {"mean action": "mean-action/sac", "sampled actions": "mean-action/sac:sampled"},
    ),
    "reward-scale": Comparison(
        "Reward scale k, as a fixed temperature 1/k",
        {f"k = {k}": f"reward-scale/{k}" for k in ("0.01", "1", "3", "10", "30", "100")},
        ordered=True,
        metric="entropy",
        metric_name="entropy of the policy, nats",
    ),
    "tau": Comparison(
        "Polyak step τ of SAC's targets",
        {f"τ = {t}": f"tau/{t}" if t != "0.005" else SAC for t in ("0.0001", "0.001", "0.005", "0.01", "0.1")}
        | {"τ = 1 every 200 steps": "tau/hard"},
        ordered=True,
        metric="qf1_values",
        metric_name="mean Q1 of the minibatch",
    ),
    "temperature": Comparison(
        "Learned and fixed temperatures",
        {
            "α learned": SAC,
            "α = 0.01": "reward-scale/100",
            "α = 0.2": "shared/sac-fixed",
            "α = 1": "reward-scale/1",
        },
        metric="entropy",
        metric_name="entropy of the policy, nats",
    ),
    "value-network": Comparison(
        "SAC v1 and v2",
        {"v1, α = 0.2": "value-network/v1", "v2, α = 0.2": "shared/sac-fixed", "v2, α learned": SAC},
    ),
    "tuned-ddpg": Comparison(
        "Tuned DDPG and untuned SAC",
        {"SAC, untuned": SAC, "DDPG, untuned": DDPG, "DDPG, tuned": "tuned-ddpg/tuned"},
    ),
    "exploration": Comparison(
        "Exploration of DDPG",
        {
            "Gaussian": DDPG,
            "Ornstein-Uhlenbeck": "exploration/ornstein-uhlenbeck",
            "ε-uniform": "exploration/epsilon-uniform",
        },
    ),
    "gradient-steps": Comparison(
        "Gradient steps of SAC per environment step",
        {"1": SAC, "2": "gradient-steps/2", "4": "gradient-steps/4"},
        ordered=True,
    ),
}


@dataclass
class Args:
    """Draws a figure for each comparison, and writes final.csv and README.md's tables."""

    results: Path = HERE / "results"  # of benchmark/ablations.sh
    output: Path = HERE / "figures"  # folder for the figures and final.csv
    only: tuple[str, ...] = ()  # names of comparisons; none is all
    readme: Path | None = HERE / "README.md"  # the file whose tables are rewritten; None for none


class Variant(NamedTuple):
    """The seeds of one variant."""

    name: str
    runs: list[plot.Run]
    evaluations: dict[int, pd.Series]  # by seed: return by global_step

    def final(self) -> pd.Series:
        """By seed: mean evaluation return in the last quarter of the run."""
        last = {run.seed: self.evaluations[run.seed].loc[0.75 * run.steps + 1 :] for run in self.runs}
        return pd.Series({seed: series.mean() for seed, series in last.items()})

    def whole(self) -> pd.Series:
        """By seed: mean evaluation return after learning started."""
        starts = {run.seed: run.record["args"]["learning_starts"] for run in self.runs}
        return pd.Series({seed: s.loc[starts[seed] + 1 :].mean() for seed, s in self.evaluations.items()})

    def minutes(self) -> float:
        """Of all seeds together, training and evaluations."""
        return 60 * sum(plot.at(run.hours, math.inf) for run in self.runs)


def read_variant(results: Path, name: str, place: str) -> Variant:
    """The finished runs of the variant in a folder; there may be none."""
    folder, _, sampled = place.partition(":")
    runs = [plot.read_run(path.parent) for path in (results / folder).glob("seed*/args.json")]
    runs = [run for run in runs if run.steps == run.record["args"]["total_timesteps"]]
    runs.sort(key=lambda run: run.seed)
    evaluations = {run.seed: run.evaluations for run in runs}
    if sampled:
        evaluations = {
            run.seed: plot.read_series(run.folder / "sampled.csv", "episodic_return") for run in runs
        }
    return Variant(name, runs, evaluations)


def read_comparison(results: Path, comparison: Comparison) -> list[Variant]:
    """Its variants that have finished runs. Raises Refusal where they differ in task or length."""
    variants = [read_variant(results, name, place) for name, place in comparison.variants.items()]
    variants = [variant for variant in variants if variant.runs]
    kinds = {(run.task, run.steps) for variant in variants for run in variant.runs}
    if len(kinds) > 1:
        raise plot.Refusal(f"{comparison.title}: runs of {sorted(kinds)} cannot be compared")
    return variants


# ======== Figures ========
def draw(comparison: Comparison, variants: list[Variant]) -> Figure:
    """Return against steps for each variant and, where there is one, a metric beside it."""
    panels = 2 if comparison.metric else 1
    ramp = plt.get_cmap("viridis")
    colours = {
        name: ramp(0.9 * place / (len(comparison.variants) - 1)) if comparison.ordered else NAMED[place]
        for place, name in enumerate(comparison.variants)
    }
    with plt.rc_context(plot.STYLE):
        figure, grid = plt.subplots(
            1, panels, figsize=(2.6 + 5.2 * panels, 4.2), layout="constrained", squeeze=False
        )
        axes = grid[0, 0]
        for variant in variants:
            band = plot.mean_and_band(pd.concat(variant.evaluations, axis=1).sort_index())
            plot.draw_curve(axes, band.index.to_numpy(), band, colours[variant.name])
            axes.plot([], [], color=colours[variant.name], linewidth=4, label=variant.name)
        axes.set_ylabel("evaluation return")
        run, seeds = variants[0].runs[0], sorted({len(variant.runs) for variant in variants})
        text = f"{run.task}, {' to '.join(map(str, seeds))} seeds, mean and 95% bootstrap interval"
        if comparison.metric:
            axes = grid[0, 1]
            for variant in variants:
                columns = {
                    run.seed: plot.read_series(run.folder / "losses.csv", comparison.metric)
                    for run in variant.runs
                }
                band = plot.mean_and_band(pd.concat(columns, axis=1).sort_index())
                plot.draw_curve(axes, band.index.to_numpy(), band, colours[variant.name])
            axes.set_ylabel(comparison.metric_name)
        for axes in grid.flat:
            axes.set_xlim(0, run.steps)
            axes.set_xlabel("environment steps")
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=plot.NICE))
            axes.xaxis.set_major_formatter(plot.thousands)
            axes.yaxis.set_major_formatter(plot.thousands)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=12, handlelength=1.2)
        figure.suptitle(f"{comparison.title}\n", x=0.01, ha="left", fontsize=15, fontweight="bold")
        figure.text(0.01, 0.895, text, fontsize=11, color="#666666")
    return figure


# ======== Tables ========
def plus_minus(values: pd.Series) -> str:
    return f"{plot.number(values.mean())} ± {plot.number(plot.deviation(values.to_numpy()))}"


def table(variants: list[Variant]) -> str:
    """The scores of a comparison's variants."""
    header = ["Variant", "Seeds", "Final return", "Worst seed", "Best seed", "Return while learning"]
    lines = []
    for variant in variants:
        final, whole = variant.final(), variant.whole()
        line = [variant.name, len(final), plus_minus(final), plot.number(final.min())]
        lines.append([*line, plot.number(final.max()), plus_minus(whole)])
    return plot.markdown(header, lines)


def trials_table(path: Path) -> str:
    """The random search, the best trial first."""
    trials = pd.read_csv(path, dtype={"trial": str}).sort_values("mean", ascending=False)
    flags = [column for column in trials if column.startswith("--")]
    seeds = [column for column in trials if column.startswith("seed")]
    header = ["Trial", *(f"`{flag}`" for flag in flags), *(s.replace("seed", "seed ") for s in seeds), "Mean"]
    lines = [
        [
            row["trial"],
            *(f"{row[flag]:g}" for flag in flags),
            *(plot.number(row[key]) for key in (*seeds, "mean")),
        ]
        for _, row in trials.iterrows()
    ]
    return plot.markdown(header, lines)


def cost(results: Path) -> str:
    """How long all runs took, on what."""
    runs = [plot.read_run(path.parent) for path in results.rglob("args.json")]
    minutes = sum(60 * plot.at(run.hours, math.inf) for run in runs)
    steps = sum(run.steps for run in runs)
    devices = sorted({run.record["device"] for run in runs})
    commits = sorted({run.record["git_commit"] for run in runs})
    versions = sorted({json.dumps(run.record["versions"], sort_keys=True) for run in runs})
    versions = "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in versions)
    text = f"{len(runs)} runs, {steps:,} environment steps, {minutes:.0f} minutes of training and evaluation"
    return f"{text} in all, one thread each. {'; '.join(devices)}; {versions}; commit {', '.join(commits)}.\n"


def rewrite(readme: Path, texts: dict[str, str]) -> None:
    """Puts each text between its markers, <!-- {folder of the results} {name} --> and <!-- end -->."""
    before = readme.read_text(encoding="utf-8")
    after = before
    for name, text in texts.items():
        pattern = rf"(?s)(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        after = re.sub(pattern, lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", after)
    if after != before:
        readme.write_text(after, encoding="utf-8")


def main(args: Args) -> dict[str, str]:
    """Writes figures, final.csv and the tables; returns the tables by name."""
    args.output.mkdir(parents=True, exist_ok=True)
    texts, rows = {}, []
    for name in args.only or COMPARISONS:
        comparison = COMPARISONS[name]
        variants = read_comparison(args.results, comparison)
        missing = set(comparison.variants) - {variant.name for variant in variants}
        if missing:
            print(f"{name}: no finished runs of {', '.join(sorted(missing))}", file=sys.stderr)
        if not variants:
            continue
        figure = draw(comparison, variants)
        figure.savefig(args.output / f"{name}.png", dpi=110)
        plt.close(figure)
        texts[name] = table(variants)
        for variant in variants:
            final, whole = variant.final(), variant.whole()
            key = {"comparison": name, "variant": variant.name}
            rows += [
                key | {"seed": s, "final": final[s], "while_learning": whole[s]} for s in sorted(final.index)
            ]
    pd.DataFrame(rows).to_csv(args.output / "final.csv", index=False)
    if (trials := args.results / "tuned-ddpg" / "trials" / "trials.csv").exists():
        texts["trials"] = trials_table(trials)
    texts["cost"] = cost(args.results)
    if args.readme and args.readme.exists():
        rewrite(args.readme, {f"{args.results.resolve().name} {name}": text for name, text in texts.items()})
    return texts


if __name__ == "__main__":
    try:
        for title, text in main(tyro.cli(Args)).items():
            print(f"{title}\n\n{text}")
    except (plot.Refusal, OSError) as error:
        print(f"plot_ablations.py: error: {error}", file=sys.stderr)
        sys.exit(2)
