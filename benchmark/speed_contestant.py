"""A contestant of speed.py: trains with one of the libraries, in turns. speed.py starts it.

Its arguments are the algorithm, the contestant's name, and the options of speed.py as JSON. For each line it
reads, a number of environment steps, it makes so many steps, and then writes how many seconds they took.
It imports nothing that the peers' interpreter may lack.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym

LEARNING_STARTS = 100  # environment steps
FOREVER = 10**9


class Clock(gym.Wrapper):
    """Counts environment steps: reports how long those of a turn took, and waits for the next turn."""

    reports = sys.stdout
    left = 0  # steps of this turn that are still to come
    started = time.perf_counter()

    def step(self, action):
        if self.left <= 0:
            print(time.perf_counter() - self.started, file=self.reports, flush=True)
            self.left = int(sys.stdin.readline())
            self.started = time.perf_counter()
        self.left -= 1
        return self.env.step(action)


def train_ours(algorithm: str, contestant: str, options: SimpleNamespace) -> None:
    """One of the three scripts as it is, but for evaluations, which the peers do not make."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    script = importlib.import_module(f"{algorithm}_continuous")
    script.COMPILE_AFTER = 100  # gradient steps, so that compiling falls into the warm-up
    args = script.Args(
        env_id=options.env_id,
        total_timesteps=FOREVER,
        learning_starts=LEARNING_STARTS,
        batch_size=options.batch_size,
        hidden_dim=options.hidden_dim,
        eval_frequency=0,
        threads=options.threads,
        cuda=options.device == "cuda",
        compile=contestant == "ours" and script.CAN_COMPILE,
    )
    script.train(args)


def train_peer(algorithm: str, contestant: str, options: SimpleNamespace) -> None:
    """Stable-Baselines3 or SBX, with our sizes and exploration."""
    os.environ |= {"JAX_PLATFORMS": options.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    library = importlib.import_module({"SB3": "stable_baselines3", "SBX": "sbx"}[contestant])
    import numpy as np
    import torch
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(options.threads)
    env = gym.make(options.env_id)
    settings = {
        "policy_kwargs": {"net_arch": [options.hidden_dim, options.hidden_dim]},
        "batch_size": options.batch_size,
        "learning_starts": LEARNING_STARTS,
    }
    if contestant == "SB3":
        settings["device"] = options.device
    if algorithm != "sac":
        zeros = np.zeros(env.action_space.shape)
        settings["action_noise"] = NormalActionNoise(zeros, zeros + 0.1)
    algorithm_class = getattr(library, algorithm.upper())
    algorithm_class("MlpPolicy", env, train_freq=1, gradient_steps=1, **settings).learn(FOREVER)


TRAINERS = {"ours": train_ours, "ours --no-compile": train_ours, "SB3": train_peer, "SBX": train_peer}


def main(algorithm: str, contestant: str, options: str) -> None:
    """Trains for good, in turns."""
    Clock.reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contestant prints goes to its log, not among the times
    make = gym.make
    gym.make = lambda *arguments, **keywords: Clock(make(*arguments, **keywords))
    TRAINERS[contestant](algorithm, contestant, SimpleNamespace(**json.loads(options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
