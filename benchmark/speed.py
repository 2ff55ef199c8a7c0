"""How fast do the scripts train beside Stable-Baselines3 and SBX, on this machine, now?

    python benchmark/speed.py --peer-python .peers/bin/python          a table, and every turn in speed.csv
    python benchmark/speed.py --threads 2 --busy 2 --csv busy.csv      two threads, beside two busy processes
    python benchmark/speed.py --device cuda                            on a GPU
    for n in 64 128 256 512; do python benchmark/speed.py --hidden-dim $n --csv $n.csv; done

Each contestant trains by its own loop in a process of its own, with one update for each environment step. It
warms up, compiling included, and is stopped (SIGSTOP). Then all take turns, round after round: one goes on
for --steps environment steps while the others stand still, so that whatever slows the machine down slows all
of them. A ratio is that of two turns in one round. The peers may have an interpreter of their own:

    python3.11 -m venv .peers
    .peers/bin/pip install torch==2.13.0 "gymnasium[mujoco]==1.4.0" mujoco==4.0.0
    .peers/bin/pip install stable-baselines3==2.9.2 sbx-rl==0.28.0 jax==0.10.2 flax==0.12.8 optax==0.2.8

Who is not installed is left out and named. All are confined to the first --threads of the cores that this
program may use; taskset chooses others.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

CONTESTANT = Path(__file__).resolve().parent / "speed_contestant.py"


@dataclass(frozen=True)
class Options:
    """Times training: environment steps per second of all contestants, in turns."""

    algorithms: tuple[str, ...] = ("ddpg", "td3", "sac")
    contestants: tuple[str, ...] = ("ours", "ours --no-compile", "SB3", "SBX")
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
    csv: str = "speed.csv"  # for the speed in every turn


class Contestant:
    """A process that trains in turns, and is stopped between them."""

    def __init__(self, algorithm: str, name: str, options: Options, stack: contextlib.ExitStack):
        self.columns = {"algorithm": algorithm, "contestant": name}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self.log = stack.enter_context(open(f"{folder}/log", "w+"))  # noqa: SIM115
        python = sys.executable if name.startswith("ours") else os.path.abspath(options.peer_python)
        command = [python, str(CONTESTANT), algorithm, name, json.dumps(dataclasses.asdict(options))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = stack.enter_context(subprocess.Popen(command, cwd=folder, **pipes))
        stack.callback(self.process.kill)
        self.wait()

    def wait(self) -> float:
        """Stops the process when its turn is over; the turn's seconds. Raises RuntimeError if it has died."""
        report = self.process.stdout.readline()
        if not report:
            self.log.seek(0)
            lines = self.log.read().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until it stands still
        return float(report)

    def advance(self, steps: int) -> float:
        """Lets it go on for so many environment steps; how many seconds they took."""
        self.process.send_signal(signal.SIGCONT)
        print(steps, file=self.process.stdin, flush=True)
        return self.wait()


def race(options: Options) -> pd.DataFrame:
    """The speed of every contestant in every round: a row for each turn."""
    rows, contestants = [], []
    settings = "env_id", "device", "threads", "busy", "batch_size", "hidden_dim"
    columns = {"cpu": cpu()} | {name: getattr(options, name) for name in settings}
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
            if hasattr(os, "sched_setaffinity"):  # not only the contestants' cores
                os.sched_setaffinity(busy.pid, range(os.cpu_count()))
        for turn in range(options.rounds):
            for contestant in random.sample(contestants, len(contestants)):
                contestant.advance(options.steps // 5)  # not timed: its data have left the caches
                speed = options.steps / contestant.advance(options.steps)
                rows.append(columns | contestant.columns | {"round": turn, "steps_per_second": speed})
    return pd.DataFrame(rows)


def cpu() -> str:
    """The CPU's model, as the system names it, and the number of cores."""
    model = os.uname().machine
    if os.path.exists("/proc/cpuinfo"):
        facts = dict(re.findall(r"(model name|cpu family|model)\s*: (.*)", Path("/proc/cpuinfo").read_text()))
        model = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"{model}, {os.cpu_count()} cores"


def table(turns: pd.DataFrame) -> str:
    """Speeds and their ratios to SBX's, in Markdown: medians over the rounds, and quartiles in brackets."""
    speeds = turns.pivot(index=["algorithm", "round"], columns="contestant", values="steps_per_second")
    lines = ["| | | steps/s | × SBX |", "| --- | --- | ---: | ---: |"]
    for algorithm, group in speeds.groupby("algorithm"):
        rounds = group.dropna(axis="columns")  # without those that were left out
        for contestant in rounds:
            cells = [algorithm, contestant, quartiles(rounds[contestant], 0), ""]
            if "SBX" in rounds:
                cells[3] = quartiles(rounds[contestant] / rounds["SBX"], 2)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quartiles(values: pd.Series, digits: int) -> str:
    """Median (first quartile to third)."""
    low, median, high = values.quantile([0.25, 0.5, 0.75])
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(options: Options) -> None:
    """Measures, writes the CSV file and prints the table."""
    turns = race(options)
    if turns.empty:
        sys.exit("nobody could take part")
    turns.to_csv(options.csv, index=False)
    print(f"{cpu()}; median (quartiles) of {options.rounds} turns of {options.steps} steps")
    print(f"`{shlex.join(['python', *sys.argv])}`\n\n{table(turns)}")


if __name__ == "__main__":
    arguments = tyro.cli(Options, description=__doc__)
    if hasattr(os, "sched_setaffinity"):  # JAX takes no number of threads: it goes by the number of cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    main(arguments)
