"""Trains SAC, and evaluates it with sampled actions besides its mean action.

    python benchmark/ablations/sampled_actions.py --run-dir runs/sampled --env-id Hopper-v4

Takes the flags of sac_continuous.py, which trains and writes evaluations.csv. Every --eval-frequency steps it
stops, the policy in its checkpoint.pt plays the same episodes with a ~ π(·|s), and their returns go to
sampled.csv. Training is what it is without: each part continues the one before exactly. Started again, it
continues.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sac_continuous as sac


def evaluate_samples(run_dir: Path, args: sac.Args) -> list[float]:
    """Returns of a run's checkpoint with sampled actions, from the same starts as in evaluations.csv."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True, map_location="cpu")
    agent = sac.Agent(*checkpoint["dimensions"], args)
    agent.load_state_dict(checkpoint["agent"])
    torch.manual_seed(args.seed)  # training draws from the generator's state in the checkpoint
    env, seed = sac.make_env(args.env_id), 10_000 * (1 + args.seed)
    return sac.evaluate(agent.explore, env, args.eval_episodes, seed, torch.device("cpu"))


def main(args: sac.Args) -> None:
    path = Path(args.run_dir) / "sampled.csv"
    if not path.exists() or not path.read_text():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("global_step,episodic_return,episodic_return_std\n")
    done = len(path.read_text().splitlines()) - 1
    for steps in range((done + 1) * args.eval_frequency, args.total_timesteps + 1, args.eval_frequency):
        sac.train(dataclasses.replace(args, total_timesteps=steps, resume=True))
        returns = evaluate_samples(path.parent, args)
        with open(path, "a") as file:
            file.write(f"{steps},{np.mean(returns)},{np.std(returns)}\n")


if __name__ == "__main__":
    main(tyro.cli(sac.Args))
