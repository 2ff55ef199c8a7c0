"""How fast do the scripts train beside Stable-Baselines3 and SBX, on this machine, now?

    python benchmark/speed.py --peer-python .peers/bin/python          a table, and every turn in speed.csv
    python benchmark/speed.py --threads 2 --busy 2 --csv busy.csv      two threads, beside two busy processes
    python benchmark/speed.py --device cuda --leanrl ~/LeanRL          LeanRL's scripts take part, too
    for n in 64 128 256 512; do python benchmark/speed.py --hidden-dim $n --csv $n.csv; done

Each contestant trains by its own loop in a process of its own, with one update for each environment step. It
warms up, compiling included, and is stopped (SIGSTOP). Then all take turns, round after round: one goes on
for --steps environment steps while the others stand still, so that whatever slows the machine down slows all
of them. A ratio is that of two turns in one round. The peers may have an interpreter of their own:

    python3.11 -m venv .peers
    .peers/bin/pip install torch==2.13.0 "gymnasium[mujoco]==1.4.0" mujoco==4.0.0
    .peers/bin/pip install stable-baselines3==2.9.2 sbx-rl==0.28.0 jax==0.10.2 flax==0.12.8 optax==0.2.8
    .peers/bin/pip install tensordict==0.10.0 torchrl==0.10.0 tyro tqdm wandb  # for LeanRL

Who is not installed is left out and named. All are confined to the first --threads of the cores that this
program may use; taskset chooses others.
"""

import contextlib
import csv
import dataclasses
import importlib
import itertools
import json
import os
import random
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym

LEARNING_STARTS, FOREVER = 100, 10**9  # environment steps


@dataclass(frozen=True)
class Options:
    """Times training: environment steps per second of all contestants, in turns."""

    algorithms: tuple[str, ...] = ("ddpg", "td3", "sac")
    contestants: tuple[str, ...] = ("ours", "ours --no-compile", "SB3", "SBX", "LeanRL")
    env_id: str = "HalfCheetah-v4"  # better one whose episodes never end early, as resets are timed too
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1  # CPU threads of a contestant
    batch_size: int = 256  # transitions in a minibatch
    hidden_dim: int = 256  # width of the two hidden layers of every network
    rounds: int = 20  # turns of each contestant; at least two
    steps: int = 300  # environment steps in a turn
    warm_up: int = 1_000  # environment steps before the first turn
    busy: int = 0  # processes beside that only keep a core busy
    peer_python: str = sys.executable  # the interpreter that has the peers
    leanrl: str | None = None  # a copy of github.com/pytorch-labs/LeanRL
    csv: str = "speed.csv"  # for the speed in every turn


# ======== In a contestant's process ========
class Clock(gym.Wrapper):
    """Counts environment steps: reports how long those of a turn took, and waits for the next turn."""

    reports, left, started = sys.stdout, 0, time.perf_counter()

    def step(self, action):
        if self.left == 0:
            print(time.perf_counter() - self.started, file=self.reports, flush=True)
            self.left = int(sys.stdin.readline())
            self.started = time.perf_counter()
        self.left -= 1
        return self.env.step(action)


def work(algorithm: str, contestant: str, options: Options) -> None:
    """Trains for good, in turns."""
    if hasattr(os, "sched_setaffinity"):  # JAX takes no number of threads: it goes by the number of cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    Clock.reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contestant prints is no report
    make = gym.make
    gym.make = lambda *arguments, **keywords: Clock(make(*arguments, **keywords))
    trainers = {"SB3": train_peer, "SBX": train_peer, "LeanRL": train_leanrl}
    trainers.get(contestant, train_ours)(algorithm, contestant, options)


def train_ours(algorithm: str, contestant: str, options: Options) -> None:
    """One of the three scripts as it is, but for evaluations, which the peers do not make."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    script = importlib.import_module(f"{algorithm}_continuous")
    script.COMPILE_AFTER = LEARNING_STARTS
    settings = {"env_id": options.env_id, "threads": options.threads, "cuda": options.device == "cuda"}
    settings |= {"batch_size": options.batch_size, "hidden_dim": options.hidden_dim, "eval_frequency": 0}
    settings |= {"total_timesteps": FOREVER, "learning_starts": LEARNING_STARTS}
    script.train(script.Args(**settings, compile=contestant == "ours"))


def train_peer(algorithm: str, contestant: str, options: Options) -> None:
    """Stable-Baselines3 or SBX, with our sizes and exploration."""
    os.environ |= {"JAX_PLATFORMS": options.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    library = importlib.import_module({"SB3": "stable_baselines3", "SBX": "sbx"}[contestant])
    import numpy as np
    import torch
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(options.threads)
    env = gym.make(options.env_id)
    settings = {"policy_kwargs": {"net_arch": [options.hidden_dim, options.hidden_dim]}}
    settings |= {"batch_size": options.batch_size, "learning_starts": LEARNING_STARTS}
    if contestant == "SB3":
        settings["device"] = options.device
    if algorithm != "sac":
        zeros = np.zeros(env.action_space.shape)
        settings["action_noise"] = NormalActionNoise(zeros, zeros + 0.1)
    algorithm_class = getattr(library, algorithm.upper())
    algorithm_class("MlpPolicy", env, train_freq=1, gradient_steps=1, **settings).learn(FOREVER)


def train_leanrl(algorithm: str, contestant: str, options: Options) -> None:
    """LeanRL's compiled script."""
    if not options.leanrl or options.hidden_dim != 256:
        sys.exit("it needs --leanrl, and has layers of 256")
    os.environ["WANDB_MODE"] = "disabled"
    script = f"{options.leanrl}/leanrl/{algorithm}_continuous_action_torchcompile.py"
    flags = f"--env-id {options.env_id} --batch-size {options.batch_size} --compile"
    flags += f" --total-timesteps {FOREVER} --learning-starts {LEARNING_STARTS}"
    flags += {"cpu": " --no-cuda", "cuda": " --cudagraphs"}[options.device]
    sys.argv = [script, *flags.split()]
    runpy.run_path(script, run_name="__main__")


# ======== In the first process ========
class Contestant:
    """A process that trains in turns, and is stopped between them."""

    def __init__(self, algorithm: str, name: str, options: Options, stack: contextlib.ExitStack):
        self.columns = {"algorithm": algorithm, "contestant": name}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self.log = stack.enter_context(open(f"{folder}/log", "w+"))  # noqa: SIM115
        python = sys.executable if name.startswith("ours") else options.peer_python
        values = json.dumps(dataclasses.asdict(options))
        command = [python, str(Path(__file__).resolve()), "work", algorithm, name, values]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = stack.enter_context(subprocess.Popen(command, cwd=folder, **pipes))
        stack.callback(self.process.kill)
        self.wait()

    def wait(self) -> float:
        """Stops the process when its turn is over; the turn's seconds. Raises RuntimeError if it has died."""
        report = self.process.stdout.readline()
        if not report:
            self.log.seek(0)
            raise RuntimeError([f"exit status {self.process.wait()}", *self.log.read().splitlines()][-1])
        self.process.send_signal(signal.SIGSTOP)
        return float(report)

    def advance(self, steps: int) -> float:
        """Lets it go on for so many environment steps; how many seconds they took."""
        self.process.send_signal(signal.SIGCONT)
        print(steps, file=self.process.stdin, flush=True)
        return self.wait()


def race(options: Options) -> list[dict]:
    """The speed of every contestant in every round: the rows of the CSV file."""
    rows, contestants = [], []
    names = "env_id", "device", "threads", "busy", "batch_size", "hidden_dim"
    columns = {"cpu": cpu()} | {name: getattr(options, name) for name in names}
    with contextlib.ExitStack() as stack:
        for algorithm, name in itertools.product(options.algorithms, options.contestants):
            print(f"{algorithm}, {name}: warms up", file=sys.stderr)
            try:
                contestant = Contestant(algorithm, name, options, stack)
                contestant.advance(options.warm_up)
                contestants.append(contestant)
            except RuntimeError as reason:
                print(f"{algorithm}, {name}: left out: {reason}", file=sys.stderr)
        for _ in range(options.busy):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        for turn in range(options.rounds):
            for contestant in random.sample(contestants, len(contestants)):
                contestant.advance(options.steps // 5)  # not timed: its data have left the caches
                speed = options.steps / contestant.advance(options.steps)
                rows.append(columns | contestant.columns | {"round": turn, "steps_per_second": speed})
    return rows


def cpu() -> str:
    """The CPU's model and the number of cores."""
    model = os.uname().machine
    if os.path.exists("/proc/cpuinfo"):
        found = dict(re.findall(r"(model name|cpu family|model)\s*: (.*)", Path("/proc/cpuinfo").read_text()))
        model = ", ".join([found.pop("model name", model), *map(" ".join, found.items())])
    return f"{model}, {os.cpu_count()} cores"


def table(rows: list[dict]) -> str:
    """Speeds and their ratios to SBX's, in Markdown: medians over the rounds, and quartiles in brackets."""

    def quartiles(values: list[float], digits: int) -> str:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    speeds = {}
    for row in rows:
        speeds.setdefault((row["algorithm"], row["contestant"]), []).append(row["steps_per_second"])
    lines = ["| | | steps/s | × SBX |", "| --- | --- | ---: | ---: |"]
    for (algorithm, contestant), values in sorted(speeds.items()):
        pairs = zip(values, speeds.get((algorithm, "SBX"), []), strict=False)
        ratios = [speed / other for speed, other in pairs]
        cells = [algorithm, contestant, quartiles(values, 0), quartiles(ratios, 2) if ratios else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measures, writes the CSV file and prints the table."""
    rows = race(options)
    if not rows:
        sys.exit("nobody could take part")
    with open(options.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{cpu()}; median (quartiles) of {options.rounds} turns of {options.steps} steps")
    print(f"`{shlex.join(['python', *sys.argv])}`\n\n{table(rows)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:4], Options(**json.loads(sys.argv[4])))
    else:
        import tyro

        main(tyro.cli(Options, description=__doc__))
