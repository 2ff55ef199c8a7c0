"""Environment steps per second: our three scripts, installed peers, and what the matrix products alone allow.

    python benchmark/throughput.py                          # side by side on one task; all in throughput.csv
    python benchmark/throughput.py --scaling                # how cost grows: scaling.csv and scaling.png
    python benchmark/throughput.py --profile sac            # where one script's time goes
    python benchmark/throughput.py --report throughput.csv  # the tables of an earlier measurement

Every contestant runs in a process of its own: ours as a user starts them, `python {script}.py`, and the
peers through their own `learn`. It warms up (uniform actions for half of --warm-up, then it learns, which
compiles what is to be compiled) and is paused. Then all take turns, --rounds times: one goes on for --steps
environment steps, which are timed, while the others stand still. Turns are short, and rounds many, so that a
machine that slows down for a few seconds slows all of them. The table has medians over the rounds; a ratio is
the median of the rounds'.

The bound is the speed of a program that does the matrix products of the updates and nothing else: `products`
says which they are, `measure_products` how their time is measured, in every tenth round. Linux or macOS.
"""

import contextlib
import csv
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

# PyTorch, JAX and Gymnasium are imported by the workers only: a child's peak memory is never less than what
# its parent used when it was started, so this process stays small.
ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = ("ddpg", "td3", "sac")
PEERS = {"sb3": ("stable_baselines3", "stable-baselines3"), "sbx": ("sbx", "sbx-rl")}  # module, distribution
PRODUCTS = "products alone"
MANY = 1_000_000  # environment steps, of which a measurement never sees the end
CPUS = Path("/sys/devices/system/cpu")  # where Linux says which cores share a physical one
AXES = {
    "batch_size": [64, 128, 256, 512, 1024],
    "hidden_dim": [64, 128, 256, 512, 1024],
    "gradient_steps": [1, 2, 5, 10, 20],
    "env_id": ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4"],
    "processes": [2**n for n in range(10) if 2**n <= (os.cpu_count() or 1)],
}


@dataclass(frozen=True)
class Options:
    """Times training: our scripts beside their peers (the default), --scaling, or --profile."""

    # ddpg, td3, sac, each also with flags of the script, as in "sac --compile"; sb3-ddpg, ..., sbx-sac;
    # none is all of them, or our three with --scaling
    contestants: tuple[str, ...] = ()
    env_id: str = "HalfCheetah-v4"  # better one whose episodes do not end early, as resets are timed too
    device: Literal["cpu", "cuda"] = "cpu"  # where to train
    threads: int = 2  # CPU threads of each process
    batch_size: int = 256  # transitions in a minibatch
    hidden_dim: int = 256  # width of the two hidden layers of every network
    gradient_steps: int = 1  # updates after each environment step
    processes: int = 1  # copies of a contestant that run at a time; steps/s is their sum
    steps: int = 100  # environment steps of a turn, an even number
    warm_up: int = 1_000  # environment steps before the first turn
    rounds: int = 40  # turns of every contestant
    csv: Path | None = None  # for every measurement; None is throughput.csv, or scaling.csv with --scaling
    scaling: bool = False  # vary batch, width, updates a step, task and processes, one at a time
    profile: str | None = None  # one of our contestants: say where its time goes
    report: Path | None = None  # a CSV file: print its tables and measure nothing


class UnmeasuredError(Exception):
    """A contestant cannot run here; the message says why."""


# ======== The matrix products of an update ========
class Product(NamedTuple):
    """A matrix product (m, k) @ (k, n): 2 m k n floating-point operations."""

    kind: Literal["forward", "input gradient", "weight gradient"]
    m: int
    k: int
    n: int


def forward(sizes: list[int], batch_size: int) -> list[Product]:
    """x Wᵀ in every layer of an MLP with these sizes, from its input's to its output's."""
    return [Product("forward", batch_size, i, o) for i, o in zip(sizes, sizes[1:], strict=False)]


def backward(sizes: list[int], batch_size: int, to: Literal["weights", "input"]) -> list[Product]:
    """Back through an MLP: δᵀ x is a layer's weight gradient, δ W the gradient of its input.

    On the way to the weights only the first layer's input gradient is spared; on the way to the input, all
    weight gradients are.
    """
    layers = list(zip(sizes, sizes[1:], strict=False))
    inputs = [Product("input gradient", batch_size, o, i) for i, o in layers]
    weights = [Product("weight gradient", o, batch_size, i) for i, o in layers]
    return weights + inputs[1:] if to == "weights" else inputs


def products(
    algorithm: str, obs_dim: int, action_dim: int, hidden_dim: int, batch_size: int
) -> tuple[list[Product], int]:
    """The matrix products of some updates, and of how many: one, or TD3's two, of which one moves the actor.

    An update is: for the target, the actor and each target critic forward; each critic forward and back to
    its weights; for the actor, itself forward, a critic (SAC: two) forward and back to its input, and itself
    back to its weights. Biases, and acting on a single observation, are left out.
    """
    updates = 2 if algorithm == "td3" else 1
    critics, actor_critics = (1 if algorithm == "ddpg" else 2), (2 if algorithm == "sac" else 1)
    actor = [obs_dim, hidden_dim, hidden_dim, 2 * action_dim if algorithm == "sac" else action_dim]
    critic = [obs_dim + action_dim, hidden_dim, hidden_dim, 1]

    target = forward(actor, batch_size) + critics * forward(critic, batch_size)
    critic_step = critics * (forward(critic, batch_size) + backward(critic, batch_size, to="weights"))
    through_critic = forward(critic, batch_size) + backward(critic, batch_size, to="input")
    actor_step = forward(actor, batch_size) + backward(actor, batch_size, to="weights")
    return updates * (target + critic_step) + actor_step + actor_critics * through_critic, updates


def flops(needed: list[Product]) -> int:
    """Floating-point operations: a multiplication and an addition for every term of every sum."""
    return sum(2 * product.m * product.k * product.n for product in needed)


def measure_products(options: Options) -> dict:
    """Times the matrix products of an update of every algorithm that takes part, at their own shapes.

    Each distinct product is timed alone, with its matrices laid out as autograd has them and room for the
    result, both as PyTorch does it by default (MKL) and as the scripts have it done (oneDNN, where there is
    AVX-512); the faster counts. The bound is the sum over all products of an update.
    """
    script, _ = load(options.contestants[0])
    import torch

    torch.set_num_threads(options.threads)
    precisions = ["none"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # the scripts' `train` says why this is float32
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
        precisions.append("bf16")
    env = script.make_env(options.env_id)
    (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape

    @functools.cache
    def seconds(product: Product) -> float:
        timings = []
        for precision in precisions:
            torch.backends.mkldnn.matmul.fp32_precision = precision
            timings.append(time_product(product, options.device))
        return min(timings)

    results = {}
    for algorithm in options.contestants:
        needed, updates = products(algorithm, obs_dim, action_dim, options.hidden_dim, options.batch_size)
        total = sum(map(seconds, needed))
        results[algorithm] = {
            "updates_per_second": updates / total,
            "mflop_per_update": flops(needed) / updates / 1e6,
            "gflop_per_second": flops(needed) / total / 1e9,
        }
    return {"hardware": hardware(options.device), "algorithms": results}


def time_product(product: Product, device: str) -> float:
    """Seconds for one product: the median of 5 timings of about 20 ms each.

    On a GPU, 100 copies in a CUDA graph are replayed, so that the time to launch one does not count.
    """
    import torch

    kind, m, k, n = product
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    if kind == "weight gradient":
        left = left.t().contiguous().t()
    elif kind == "forward":
        right = right.t().contiguous().t()
    left, right, out = (matrix.to(device) for matrix in (left, right, out))

    def multiply() -> None:
        for _ in range(100):
            torch.mm(left, right, out=out)

    multiply()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply()
        multiply = graph.replay

    def clock(times: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            multiply()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / (100 * times)

    times = max(1, round(0.02 / (100 * clock(1))))
    return statistics.median(clock(times) for _ in range(5))


# ======== The contestants ========
def everyone(device: str) -> tuple[str, ...]:
    """Who takes part: our scripts, plain and with the flags that speed them up there, and their peers."""
    faster = ["--compile"] if device == "cpu" else ["--cudagraphs", "--compile --cudagraphs"]
    names = []
    for algorithm in ALGORITHMS:
        names += [algorithm, *(f"{algorithm} {flags}" for flags in faster)]
        names += [f"{family}-{algorithm}" for family in PEERS]
    return tuple(names)


def algorithm_of(contestant: str) -> str:
    """sbx-td3, td3 and "td3 --compile" -> td3."""
    name, *_ = contestant.split()
    return name.rpartition("-")[2]


def load(contestant: str):
    """The module of our script for the contestant's algorithm, and the flags that the contestant adds."""
    sys.path.insert(0, str(ROOT))
    _, *flags = shlex.split(contestant)
    return importlib.import_module(f"{algorithm_of(contestant)}_continuous"), flags


def check(options: Options) -> None:
    """Ends the program, by SystemExit, if the options cannot be meant."""
    for contestant in options.contestants:
        known = everyone(options.device)
        if contestant not in known and contestant.partition(" ")[0] not in ALGORITHMS:
            raise SystemExit(f"--contestants: {contestant!r} is none of {', '.join(known)}")
    if options.profile and options.profile.partition(" ")[0] not in ALGORITHMS:
        raise SystemExit(f"--profile: {options.profile!r} is none of {', '.join(ALGORITHMS)}")
    if options.warm_up < 2 or options.steps < 2 or options.steps % 2:
        raise SystemExit("--steps must be even, and --warm-up at least 2")


def script_arguments(options: Options, run_dir: Path) -> list[str]:
    """The command line of a script: real training without evaluations, which writes two times a turn."""
    values = {
        "run-dir": run_dir,
        "env-id": options.env_id,
        "threads": options.threads,
        "batch-size": options.batch_size,
        "hidden-dim": options.hidden_dim,
        "gradient-steps": options.gradient_steps,
        "learning-starts": options.warm_up // 2,
        "log-frequency": options.steps // 2,
        "total-timesteps": MANY,
        "eval-frequency": 0,
        "checkpoint-frequency": 0,
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [*flags, "--cuda" if options.device == "cuda" else "--no-cuda"]


class Racer:
    """The copies of a contestant: started, warmed up, and paused except while `speed` times them.

    Raises UnmeasuredError where the contestant cannot run here or fails. `peak_mib` is the most memory that a
    copy ever had, once `end` has ended them all.
    """

    def __init__(self, contestant: str, options: Options, folder: Path):
        name, *flags = shlex.split(contestant)
        module, distribution = PEERS.get(name.partition("-")[0], (None, None))
        if module and importlib.util.find_spec(module) is None:
            raise UnmeasuredError(f"{distribution} is not installed")
        if "--compile" in flags and options.device == "cpu" and not shutil.which("c++"):
            raise UnmeasuredError("there is no C++ compiler")
        self.interval = options.steps // 2  # environment steps from one row of timing.csv to the next
        self.folders = [folder / str(copy) for copy in range(options.processes)]
        self.processes, self.peak_mib = [], 0.0
        script = str(ROOT / f"{name}_continuous.py")
        try:
            with confined_to(cores(options.threads * options.processes) if options.device == "cpu" else []):
                for run_dir in self.folders:
                    run_dir.mkdir(parents=True)
                    command = [sys.executable, script, *script_arguments(options, run_dir), *flags]
                    command = worker_command("peer", [contestant], options) if module else command
                    with open(run_dir / "output", "w") as output:
                        started = subprocess.Popen(command, stdout=output, stderr=output, cwd=run_dir)
                    self.processes.append(started)
            self.advance(-(-options.warm_up // self.interval))
        except BaseException:
            self.end()
            raise

    def times(self, run_dir: Path) -> list[float]:
        """What timing.csv says of the seconds since the start, whole rows only."""
        path = run_dir / "timing.csv"
        rows = path.read_text().split("\n")[1:-1] if path.exists() else []
        return [float(row.rpartition(",")[2]) for row in rows]

    def advance(self, rows: int) -> list[int]:
        """Lets all copies run until each has written so many more rows: how many each had before."""
        before = [len(self.times(run_dir)) for run_dir in self.folders]
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
        while any(
            len(self.times(run_dir)) < done + rows for run_dir, done in zip(self.folders, before, strict=True)
        ):
            time.sleep(0.005)
            for process, run_dir in zip(self.processes, self.folders, strict=True):
                if process.poll() is not None:
                    lines = (run_dir / "output").read_text().splitlines()
                    raise UnmeasuredError([f"exit status {process.returncode}", *lines][-1])
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)
        return before

    def speed(self) -> float:
        """Environment steps per second over the next steps, of all copies together.

        The interval in which a copy was paused is not counted.
        """
        before = self.advance(3)
        seconds = [
            times[done + 2] - times[done]
            for times, done in zip(map(self.times, self.folders), before, strict=True)
        ]
        return sum(2 * self.interval / value for value in seconds)

    def end(self) -> None:
        """Kills the copies and notes their peak memory."""
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                _, _, usage = os.wait4(process.pid, 0)
                process.returncode = -signal.SIGKILL
                self.peak_mib = max(self.peak_mib, usage.ru_maxrss / unit)


def train_peer(options: Options) -> None:
    """Trains a peer by its own loop, with our sizes and exploration noise, writing timing.csv as ours do."""
    family, algorithm = options.contestants[0].split("-")
    if family == "sbx":
        os.environ["JAX_PLATFORMS"] = options.device  # an error where JAX has no such device
    import gymnasium as gym
    import numpy as np
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(options.threads)

    class Clock(BaseCallback):
        """Notes when environment steps were done."""

        def _on_step(self) -> bool:
            if self.num_timesteps % (options.steps // 2) == 0:
                print(self.num_timesteps, time.perf_counter(), sep=",", file=timing, flush=True)
            return True

    env = gym.make(options.env_id)
    settings = {"policy_kwargs": {"net_arch": [options.hidden_dim, options.hidden_dim]}}
    if family == "sb3":  # SBX has rectified units as well, and takes no device
        settings["policy_kwargs"]["activation_fn"] = torch.nn.ReLU
        settings["device"] = options.device
    if algorithm != "sac":
        zeros = np.zeros(env.action_space.shape)
        settings["action_noise"] = NormalActionNoise(zeros, zeros + 0.1)
    model = getattr(importlib.import_module(PEERS[family][0]), algorithm.upper())(
        "MlpPolicy",
        env,
        batch_size=options.batch_size,
        learning_starts=options.warm_up // 2,
        train_freq=1,
        gradient_steps=options.gradient_steps,
        **settings,
    )
    with open("timing.csv", "w") as timing:
        print("global_step,elapsed", file=timing)
        model.learn(MANY, callback=Clock())


# ======== Processes ========
def worker_command(task: str, contestants: list[str], options: Options) -> list[str]:
    """The command that does `TASKS[task]` in a process of its own and prints the result as its last line."""
    values = dataclasses.asdict(options) | {"contestants": contestants, "csv": None, "report": None}
    return [sys.executable, str(Path(__file__).resolve()), "worker", task, json.dumps(values)]


def cores(number: int) -> list[int]:
    """That many of the cores that this process may use, no two on one physical core if there are enough.

    Empty where the operating system has no such notion.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    seen, ranked = Counter(), []
    for core in sorted(os.sched_getaffinity(0)):
        siblings = CPUS / f"cpu{core}/topology/thread_siblings_list"
        physical = siblings.read_text() if siblings.exists() else core
        ranked.append((seen[physical], core))
        seen[physical] += 1
    return [core for _, core in sorted(ranked)[:number]]


def run_together(commands: list[list[str]], options: Options, folder: Path) -> list[str]:
    """Runs processes side by side: of each the last line that it prints.

    On a CPU they are confined to as many cores as they have threads together: JAX takes no number of
    threads, but sizes its pool by the cores that it may use. Raises UnmeasuredError if one fails, with
    the last line of its stderr.
    """
    results, running = [], []
    with contextlib.ExitStack() as stack:
        if options.device == "cpu":
            stack.enter_context(confined_to(cores(options.threads * options.processes)))
        for index, command in enumerate(commands):
            out = stack.enter_context(open(folder / f"{index}.out", "w+"))
            err = stack.enter_context(open(folder / f"{index}.err", "w+"))
            process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder)
            stack.callback(stop, process)
            running.append((process, out, err))
        for process, out, err in running:
            if process.wait():
                err.seek(0)
                raise UnmeasuredError([f"exit status {process.returncode}", *err.read().split("\n")[:-1]][-1])
            out.seek(0)
            results.append(out.read().split("\n")[-2:][0])
    return results


@contextlib.contextmanager
def confined_to(allowed: list[int]):
    """Confines this process, and those it starts, to these cores for a while; [] is no confinement."""
    before = os.sched_getaffinity(0) if allowed else set()
    if allowed:
        os.sched_setaffinity(0, allowed)
    try:
        yield
    finally:
        if allowed:
            os.sched_setaffinity(0, before)


def stop(process: subprocess.Popen) -> None:
    """Ends a process that still runs because another one failed."""
    if process.returncode is None:
        process.kill()
        process.wait()


def hardware(device: str) -> str:
    """The processor's name, number of cores and vector instructions, and the GPU's name if that is used."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    name = f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.cuda.get_device_name()}; {name}" if device == "cuda" else name


def versions() -> str:
    """The versions of what bears on speed, as installed, and the commit of the scripts."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "sbx-rl", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        found += [f"scripts {commit}"] if commit else []
    return ", ".join(found)


# ======== Rounds ========
TEXTS = ["time", "axis", "value", "contestant", "algorithm", "env_id", "device", "hardware", "versions"]
TEXTS += ["command"]
SETTINGS = ["threads", "processes", "batch_size", "hidden_dim", "gradient_steps", "steps", "warm_up"]
RESULTS = ["steps_per_second", "updates_per_second", "peak_mib", "mflop_per_update", "gflop_per_second"]
NUMBERS = ["round", *SETTINGS, *RESULTS]
Row = dict[str, str | float]  # of the CSV file


def points(options: Options) -> list[tuple[str, str, Options]]:
    """What to measure, as (axis, value, options): one point, or with --scaling every value of every axis."""
    if not options.scaling:
        return [("", "", options)]
    found = []
    for axis, values in AXES.items():
        for value in values:
            point = dataclasses.replace(options, **{axis: value})
            point = dataclasses.replace(point, threads=1) if axis == "processes" else point
            found.append((axis, str(value), shortened(point, options)))
    return found


def shortened(point: Options, base: Options) -> Options:
    """A point with fewer steps than the base where its steps cost more, as far as 20, and 10 of a turn."""
    cost = point.batch_size / base.batch_size * point.gradient_steps / base.gradient_steps
    cost = max(1.0, cost * (point.hidden_dim / base.hidden_dim) ** 2)
    warm_up = min(base.warm_up, max(20, int(base.warm_up / cost)))
    steps = min(base.steps, max(10, 2 * int(base.steps / cost / 2)))
    return dataclasses.replace(point, warm_up=warm_up, steps=steps)


def race(options: Options, path: Path) -> dict[str, str]:
    """Measures every contestant at every point, round after round, into a CSV file.

    In each round the order moves on by one, so that nobody always follows the same one. Returns who was left
    out, and why.
    """
    command = shlex.join(["python", f"benchmark/{Path(__file__).name}", *sys.argv[1:]])
    common: Row = {"versions": versions(), "command": command}
    left_out = {}
    with open(path, "x", newline="") as file:
        writer = csv.DictWriter(file, [*TEXTS, *NUMBERS], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for axis, value, point in points(options):
            common |= dataclasses.asdict(point) | {"axis": axis, "value": value}
            where = f" with {axis} {value}" if axis else ""
            rows: list[Row] = []
            racers: dict[str, Racer] = {}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    for row in take_turns(point, where, Path(folder), racers, left_out):
                        rows.append(common | row)
                finally:  # a measurement that is interrupted keeps what it has
                    for racer in racers.values():
                        racer.end()
                    peaks = {contestant: {"peak_mib": racer.peak_mib} for contestant, racer in racers.items()}
                    writer.writerows(row | peaks.get(row["contestant"], {}) for row in rows)
                    file.flush()
    return left_out


def take_turns(
    options: Options, where: str, folder: Path, racers: dict[str, Racer], left_out: dict[str, str]
) -> Iterator[Row]:
    """All rounds at one point, as rows; starts the racers in the first and leaves out those that fail."""
    for turn in range(options.rounds):
        if turn % 10 == 0:  # it takes as long as several turns
            bounds = bound(options)
            for algorithm, row in bounds.items():
                yield {"contestant": PRODUCTS, "algorithm": algorithm, "time": now(), "round": turn} | row
        shift = turn % len(options.contestants)
        for contestant in options.contestants[shift:] + options.contestants[:shift]:
            if contestant + where in left_out:
                continue
            try:
                if contestant not in racers:
                    racers[contestant] = Racer(contestant, options, folder / contestant)
                speed = racers[contestant].speed()
            except UnmeasuredError as reason:
                left_out[contestant + where] = str(reason)
                print(f"{contestant}{where} is left out: {reason}", file=sys.stderr, flush=True)
                continue
            limit = bounds[algorithm_of(contestant)]
            row = {"contestant": contestant, "algorithm": algorithm_of(contestant), "time": now()}
            row |= {name: limit[name] for name in ("hardware", "mflop_per_update")}
            row |= {"round": turn, "steps_per_second": speed}
            row["updates_per_second"] = speed * options.gradient_steps
            row["gflop_per_second"] = row["mflop_per_update"] * row["updates_per_second"] / 1e3
            yield row
            told = f"round {turn + 1} of {options.rounds}, {contestant}{where}: {speed:.1f} steps/s"
            print(told, file=sys.stderr, flush=True)


def now() -> str:
    """The date and time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def bound(options: Options) -> dict[str, Row]:
    """What the matrix products alone allow each algorithm that takes part, all processes together."""
    names = list(dict.fromkeys(map(algorithm_of, options.contestants)))
    with tempfile.TemporaryDirectory() as folder:
        commands = [worker_command("products", names, options)] * options.processes
        results = [json.loads(output) for output in run_together(commands, options, Path(folder))]
    rows = {}
    for algorithm, row in results[0]["algorithms"].items():
        for name in ("updates_per_second", "gflop_per_second"):
            row[name] = sum(result["algorithms"][algorithm][name] for result in results)
        row["steps_per_second"] = row["updates_per_second"] / options.gradient_steps
        rows[algorithm] = row | {"hardware": results[0]["hardware"]}
    return rows


# ======== Tables ========
def read(path: Path) -> list[Row]:
    """The rows of a CSV file of measurements, with its numbers as numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {name: float(row[name]) for name in NUMBERS if row[name]} for row in rows]


def median(rows: list[Row], contestant: str, column: str = "steps_per_second") -> float:
    """The median of a contestant's column over the rounds; NaN if it took part in none."""
    values = [row[column] for row in rows if row["contestant"] == contestant]
    return statistics.median(values) if values else math.nan


def ratio(rows: list[Row], contestant: str, other: str) -> float:
    """The median over the rounds of a contestant's speed relative to another's; NaN if they never met."""
    speeds = {(row["contestant"], row["round"]): row["steps_per_second"] for row in rows}
    turns = [turn for name, turn in speeds if name == contestant and (other, turn) in speeds]
    ratios = [speeds[contestant, turn] / speeds[other, turn] for turn in turns]
    return statistics.median(ratios) if ratios else math.nan


def markdown(header: list[str], lines: list[list[str | float]], digits: list[int]) -> str:
    """A Markdown table: text to the left, numbers to the right with so many digits, an empty cell for NaN."""

    def cell(value: str | float, places: int) -> str:
        return value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.{places}f}"

    body = [[cell(value, places) for value, places in zip(line, digits, strict=True)] for line in lines]
    aligned = ["---:" if places >= 0 else "---" for places in digits]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, aligned, *body])


def comparison(rows: list[Row]) -> str:
    """Each contestant's speed, how many times its peers' and what part of the bound that is, in Markdown."""
    header = ["contestant", "steps/s", "lowest", "highest", "× SB3", "× SBX", "of the bound", "peak MiB"]
    lines = []
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        group = [row for row in rows if row["algorithm"] == algorithm]
        names = list(dict.fromkeys(row["contestant"] for row in group))
        for name in sorted(names, key=PRODUCTS.__eq__):  # it comes last
            speeds = [row["steps_per_second"] for row in group if row["contestant"] == name]
            line = [name, statistics.median(speeds), min(speeds), max(speeds)]
            line += [ratio(group, name, f"{family}-{algorithm}") for family in PEERS]
            line.append(ratio(group, name, PRODUCTS))
            line.append(math.nan if name == PRODUCTS else median(group, name, "peak_mib"))
            if name == PRODUCTS:
                line[0] = (
                    f"{algorithm}'s {name}: {median(group, name, 'mflop_per_update'):.0f} MFLOP an update, "
                )
                line[0] += f"{median(group, name, 'gflop_per_second'):.0f} GFLOP/s"
            lines.append(line)
    return markdown(header, lines, [-1, 0, 0, 0, 2, 2, 2, 0])


def growth(rows: list[Row], axis: str) -> str:
    """How the time of an update grows along an axis, beside its matrix products' operations, in Markdown.

    "× first" is relative to the first value on the axis. The time of an update includes its share of the
    environment step; with several processes it is the time between any two updates.
    """
    header = ["contestant", axis.replace("_", " "), "steps/s", "updates/s", "ms/update", "× first"]
    header += ["MFLOP/update", "× first", "of the bound", "peak MiB"]
    rows = [row for row in rows if row["axis"] == axis]
    lines = []
    for contestant in dict.fromkeys(row["contestant"] for row in rows if row["contestant"] != PRODUCTS):
        first = None
        for value in dict.fromkeys(row["value"] for row in rows if row["contestant"] == contestant):
            group = [row for row in rows if row["value"] == value]
            group = [row for row in group if row["algorithm"] == algorithm_of(contestant)]
            duration = 1e3 / median(group, contestant, "updates_per_second")
            amount = median(group, contestant, "mflop_per_update")
            first = first or (duration, amount)
            line = [contestant, value, median(group, contestant), 1e3 / duration]
            line += [duration, duration / first[0], amount, amount / first[1]]
            line += [ratio(group, contestant, PRODUCTS), median(group, contestant, "peak_mib")]
            lines.append(line)
    return markdown(header, lines, [-1, -1, 1, 1, 2, 2, 1, 2, 2, 0])


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each axis: updates/s of each contestant and, dotted, what the products alone allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    contestants = list(dict.fromkeys(row["contestant"] for row in rows if row["contestant"] != PRODUCTS))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3.2 * len(axes), 3.6), squeeze=False, sharey=True)
    for axis, panel in zip(axes, panels[0], strict=True):
        values = list(dict.fromkeys(row["value"] for row in rows if row["axis"] == axis))
        for index, contestant in enumerate(contestants):
            algorithm = algorithm_of(contestant)
            at = [[row for row in rows if (row["axis"], row["value"]) == (axis, value)] for value in values]
            at = [[row for row in group if row["algorithm"] == algorithm] for group in at]
            for name, style in ((contestant, "o-"), (PRODUCTS, ":")):
                heights = [median(group, name, "updates_per_second") for group in at]
                panel.plot(range(len(values)), heights, style, color=f"C{index}", label=name, markersize=4)
        panel.set_xticks(range(len(values)), [value.removesuffix("-v4") for value in values])
        panel.tick_params(axis="x", labelrotation=30 if axis == "env_id" else 0)
        panel.set(xlabel="task" if axis == "env_id" else axis.replace("_", " "), yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("updates per second")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(path: Path) -> None:
    """Prints the tables of a CSV file; draws the figure, under the same name, if it is of --scaling."""
    rows = read(path) if path.exists() else []
    if not rows:
        raise SystemExit(f"{path} holds no measurements")
    turns = len({row["round"] for row in rows})
    print(f"- {rows[0]['hardware']}", f"- {rows[0]['versions']}", sep="\n")
    print(f"- `{rows[0]['command']}`, medians of {turns} round{'s' * (turns > 1)}\n")
    axes = [axis for axis in dict.fromkeys(row["axis"] for row in rows) if axis]
    print(*([growth(rows, axis) for axis in axes] or [comparison(rows)]), sep="\n\n")
    if axes and importlib.util.find_spec("matplotlib"):
        draw(rows, path.with_suffix(".png"))
        print(f"\nDrawn in {path.with_suffix('.png')}.")
    elif axes:
        print("\nNo figure: matplotlib is not installed.")


# ======== Profile ========
PARTS = {"acting": "Agent.explore", "storing": "ReplayBuffer.add", "sampling": "ReplayBuffer.sample"}
PARTS |= {"update": "Agent.update"}
MATRIX_PRODUCT = re.compile(r"aten::(_?addmm|mm|baddbmm|bmm|addmv|mv)(_|$)|linear_pointwise|gemm|cutlass")
OPTIMIZER = re.compile(r"_fused_adam|FusedAdam|multi_tensor|_foreach")  # a foreach moves the targets, too


def category(name: str) -> str:
    """The kind of work that an operator, a GPU kernel or a marked region does, by its name."""
    if name == "environment":
        return name
    if MATRIX_PRODUCT.search(name):
        return "matrix products"
    return "optimizer and targets" if OPTIMIZER.search(name) else "other PyTorch operators"


def profile(options: Options) -> list[dict[str, float]]:
    """Trains twice, timed by the parts of the loop and by torch.profiler: ms per environment step of both.

    Under the profiler an operator has the time spent in itself, on the GPU that of the kernels, and "Python"
    is what no operator accounts for. It slows operators and Python down itself, hence the first table.
    """
    script, flags = load(options.contestants[0])
    import gymnasium as gym
    import torch
    import tyro

    on_gpu, steps = options.device == "cuda", options.steps
    profiler, spent, marks = None, Counter(), []

    def timed(part: str, function):
        def call(*arguments, **keywords):
            started = time.perf_counter()
            with torch.profiler.record_function(part) if part == "environment" else contextlib.nullcontext():
                result = function(*arguments, **keywords)
            spent[part] += time.perf_counter() - started
            return result

        return call

    class Watched(gym.Wrapper):
        """Times the environment, and starts and stops the measurement at its steps."""

        def __init__(self, env: gym.Env):
            super().__init__(env)
            self.count = 0
            self.reset, self.timed_step = timed("environment", env.reset), timed("environment", env.step)

        def step(self, action):
            self.count += 1
            if self.count in (options.warm_up, options.warm_up + steps):
                if on_gpu:
                    torch.cuda.synchronize()
                if profiler and not marks:
                    profiler.start()
                marks.append((time.perf_counter(), dict(spent)))
                if profiler and len(marks) == 2:
                    profiler.stop()
            return self.timed_step(action)

    def train() -> float:
        """Trains, and returns the wall-clock time of a step."""
        marks.clear()
        with tempfile.TemporaryDirectory() as folder:
            arguments = [*script_arguments(options, Path(folder) / "run"), *flags]
            arguments += ["--total-timesteps", str(options.warm_up + steps)]
            script.train(tyro.cli(script.Args, args=arguments))
        return 1e3 * (marks[1][0] - marks[0][0]) / steps

    make_env = script.make_env
    script.make_env = lambda *arguments: Watched(make_env(*arguments))
    parts = {part: place for part, place in PARTS.items() if part != "update" or "--compile" not in flags}
    with contextlib.ExitStack() as stack:
        for part, place in parts.items():
            owner, name = place.split(".")
            method = getattr(getattr(script, owner), name)
            setattr(getattr(script, owner), name, timed(part, method))
            stack.callback(setattr, getattr(script, owner), name, method)
        wall = train()
    (_, before), (_, after) = marks
    by_clock = {part: 1e3 * (after[part] - before.get(part, 0)) / steps for part in after}
    by_clock["the rest of the loop"] = wall - sum(by_clock.values())

    activity = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU])
    wall = train()
    by_operator = Counter()
    for event in profiler.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device != on_gpu or (on_gpu and event.is_user_annotation):
            continue
        kind, ancestor = category(event.name), event.cpu_parent
        while ancestor is not None and kind == "other PyTorch operators":  # it may be the optimizer's
            kind = category(ancestor.name) if OPTIMIZER.search(ancestor.name) else kind
            ancestor = ancestor.cpu_parent
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        by_operator[kind] += microseconds / 1e3 / steps
    by_operator["no kernel on the GPU" if on_gpu else "Python"] = wall - sum(by_operator.values())
    return [by_clock, dict(by_operator)]


def profile_report(options: Options) -> str:
    """Where the time of one of our scripts goes: two Markdown tables."""
    with tempfile.TemporaryDirectory() as folder:
        command = worker_command("profile", [options.profile], dataclasses.replace(options, processes=1))
        [output] = run_together([command], options, Path(folder))
    tables = []
    for title, times in zip(("by the clock", "under torch.profiler"), json.loads(output), strict=True):
        whole = sum(times.values())
        ordered = sorted(times.items(), key=lambda item: -item[1])
        lines = [[name, value, 100 * value / whole] for name, value in ordered]
        header = [f"{options.profile}, {title}", "ms per environment step", "%"]
        tables.append(markdown(header, [*lines, ["all", whole, 100.0]], [-1, 3, 0]))
    return "\n\n".join(tables)


# ======== Command line ========
TASKS = {"products": measure_products, "peer": train_peer, "profile": profile}


def work(task: str, values: str) -> None:
    """What a worker does: a task, whose result it prints as JSON."""
    print("", json.dumps(TASKS[task](Options(**json.loads(values)))), sep="\n")


def main(options: Options) -> int:
    """Does what the options ask for; the exit status is 1 if one of our scripts could not be measured."""
    check(options)
    if options.report:
        report(options.report)
        return 0
    busy, available = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 0.2 * available:
        print(f"Busy (load {busy:.1f} on {available} cores): these figures are no use.", file=sys.stderr)
    try:
        if options.profile:
            print(profile_report(options))
            return 0
        path = options.csv or Path("scaling.csv" if options.scaling else "throughput.csv")
        if path.exists():
            raise SystemExit(f"{path} exists; name another file with --csv")
        default = ALGORITHMS if options.scaling else everyone(options.device)
        left_out = race(dataclasses.replace(options, contestants=options.contestants or default), path)
    except UnmeasuredError as reason:
        print(f"cannot measure: {reason}", file=sys.stderr)
        return 1
    report(path)
    for contestant, reason in left_out.items():
        print(f"\n{contestant} is left out: {reason}")
    print(f"\nEvery measurement is in {path}.")
    return int(any(contestant.split()[0] in ALGORITHMS for contestant in left_out))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(*sys.argv[2:])
    else:
        import tyro

        sys.exit(main(tyro.cli(Options, description=__doc__)))
