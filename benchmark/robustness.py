"""Plays trained policies again: with exploring actions, and with a heavier or lighter body.

    python benchmark/robustness.py                                 # benchmark/results -> benchmark/figures
    python benchmark/robustness.py runs/sac runs/td3 --output figures

A policy is a folder with the args.json and policy.pt of one of the three scripts, at any depth. It plays the
same episodes, by their seeds, under every condition. The files written are

    robustness.csv    the return of every episode
    robustness.png    return against the mass of the body, relative to the one that it was trained with
    exploring.md      return of noise-free and of exploring actions, and their difference in the same episodes

Exploring actions are those of training: SAC samples its policy, DDPG and TD3 add noise to theirs.
All masses and moments of inertia are multiplied; motors, friction and gravity stay as they are.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import mujoco
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from plot import choose_colours, draw_seeds, new_figure, number
from records import HERE, curve_of

sys.path.insert(0, str(HERE.parent))  # where the three scripts are
MASSES = (0.5, 0.75, 1.0, 1.25, 1.5)
FIRST_SEED = 1_000_000  # of the episodes; evaluations in training start elsewhere


def script_of(args: dict) -> ModuleType:
    """The script that has these arguments. Raises ValueError if none of the three does."""
    for name in ("ddpg_continuous", "td3_continuous", "sac_continuous"):
        script = importlib.import_module(name)
        if args.keys() == {field.name for field in dataclasses.fields(script.Args)}:
            return script
    raise ValueError("none of the three scripts has its arguments")


def play_policy(folder: Path, args: dict, episodes: int) -> Iterator[dict]:
    """Plays the policy of a run under every condition: a row for each episode.

    Raises ValueError or RuntimeError if it is not one of the three scripts' policies.
    """
    script = script_of(args)
    conditions = [("noise-free", mass) for mass in MASSES] + [("exploring", 1.0)]
    for actions, mass in conditions:
        agent = script.load_policy(folder)
        env = script.make_env(args["env_id"], args["seed"])
        multiply_mass(env.unwrapped, mass)
        if actions == "exploring":
            torch.manual_seed(0)
            agent.act = agent.explore  # script.play calls act
        for seed in range(FIRST_SEED, FIRST_SEED + episodes):
            agent.start_episode()
            yield {
                "task": args["env_id"],
                "algorithm": curve_of(args),
                "seed": args["seed"],
                "actions": actions,
                "mass": mass,
                "episode": seed,
                "return": sum(script.play(agent, env, seed)),
            }


def multiply_mass(env: gym.Env, factor: float) -> None:
    """Multiplies every mass and moment of inertia, and has MuJoCo compute what follows from them.

    Raises ValueError if the task is not one of MuJoCo's.
    """
    if not hasattr(env, "model"):
        raise ValueError("its task has no masses")
    env.model.body_mass *= factor
    env.model.body_inertia *= factor
    mujoco.mj_setConst(env.model, env.data)


def mass_figure(returns: pd.DataFrame) -> Figure:
    """Noise-free return against mass: each policy thin, and bold the mean over an algorithm's policies."""
    returns = returns[returns["actions"] == "noise-free"]
    figure, panels = new_figure(sorted(returns["task"].unique()), 3, "return", "mass, relative to training")
    colours = choose_colours(set(returns["algorithm"]))
    for (task, algorithm), rows in returns.groupby(["task", "algorithm"]):
        means = rows.pivot_table(index="mass", columns="seed", values="return")
        draw_seeds(panels[task], means, colours[algorithm])
    handles = [Line2D([], [], color=colour, lw=4, label=curve) for curve, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def exploring_table(returns: pd.DataFrame) -> str:
    """Both kinds of actions at the original mass, as Markdown: a row for each policy."""
    lines = ["| Task | Algorithm | Seed | Noise-free | Exploring | Difference |", "| --- " * 6 + "|"]
    original = returns[returns["mass"] == 1]
    for policy, rows in original.groupby(["task", "algorithm", "seed"]):
        pairs = rows.pivot(index="episode", columns="actions", values="return")
        difference = pairs["exploring"] - pairs["noise-free"]
        means = map(number, [pairs["noise-free"].mean(), pairs["exploring"].mean(), difference.mean()])
        lines.append(f"| {' | '.join(map(str, [*policy, *means]))} ± {number(difference.sem())} |")
    lines.append("\nDifference: mean ± standard error over episodes with the same start.\n")
    return "\n".join(lines)


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (HERE / "results",),
    output: Path = HERE / "figures",
    episodes: int = 20,
) -> None:
    """Plays trained policies again, with exploring actions and with a heavier or lighter body.

    Args:
        folders: Folders that hold runs of the three scripts, at any depth.
        output: Folder for the files that are written.
        episodes: Episodes of each policy under each condition.
    """
    policies, rows = {}, []
    for folder in sorted({path.parent.resolve() for parent in folders for path in parent.rglob("policy.pt")}):
        args = json.loads((folder / "args.json").read_text())["args"]
        policy = (args["env_id"], curve_of(args), args["seed"])
        if policy in policies:
            sys.exit(f"robustness.py: error: {folder} has the task, name and seed of another run")
        policies[policy] = folder, args
    for folder, args in policies.values():
        print(f"plays {folder}", flush=True)
        try:
            rows += play_policy(folder, args, episodes)
        except (ValueError, RuntimeError) as reason:
            print(f"left out: {reason}", file=sys.stderr)
    if not rows:
        sys.exit(f"robustness.py: error: no policy of the three scripts in {', '.join(map(str, folders))}")
    returns = pd.DataFrame(rows)
    output.mkdir(parents=True, exist_ok=True)
    returns.to_csv(output / "robustness.csv", index=False)
    mass_figure(returns).savefig(output / "robustness.png", dpi=120)
    table = exploring_table(returns)
    (output / "exploring.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    tyro.cli(main)
