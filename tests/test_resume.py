"""Runs that are killed, stopped, starved of disk or handed damaged files, and end as if nothing had been.

Most tests train in their own process. A kill, a full disk or a peak of memory takes another one, which is
forked from a clean one that has PyTorch already, to save time.
"""

import functools
import gc
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import random
import resource
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, contents
from twenty_kills import SHORT, differences, kill_and_resume, results

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these are POSIX signals and forks")

# ---- A short run


class Drift(gym.Env):
    """A point that drifts at random, in episodes of random length, about 15 steps. Resets and steps draw
    random numbers, so that only a generator put back exactly gives the same episode again."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(np.float32([-2]), np.float32([1]))

    def observe(self) -> np.ndarray:
        return np.float32([*self.position, self.left / 100])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.left = self.np_random.normal(size=2), self.np_random.integers(8, 25)
        return self.observe(), {}

    def step(self, action):
        self.position = self.position + 0.1 * action + 0.1 * self.np_random.normal(size=2)
        self.left -= 1
        return self.observe(), -float(np.abs(self.position).sum()), False, bool(self.left == 0), {}


class Wide(Drift):
    """Observations of 5,000 numbers, so that a few transitions fill much memory."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (5_000,))

    def observe(self) -> np.ndarray:
        return np.full(5_000, self.position[0], dtype=np.float32)


gym.register("Drift-v0", Drift)
gym.register("Wide-v0", Wide)

DDPG, TD3, SAC = SCRIPTS
STEPS = 300
FLAGS = f"--env-id Drift-v0 --hidden-dim 8 --batch-size 8 --total-timesteps {STEPS} --learning-starts 60"
FLAGS += " --buffer-size 150 --train-frequency 3 --gradient-steps 2 --log-frequency 10 --eval-frequency 100"
FLAGS += " --eval-episodes 3 --checkpoint-frequency 50 --threads 1 --no-cuda --no-compile --resume"
OWN = {DDPG: "--ou-noise --random-action-prob 0.1", TD3: "--policy-frequency 25", SAC: ""}


def words(script: str, run_dir: Path, flags: str = "") -> list[str]:
    """The command line of the short run; the last of equal flags wins."""
    return f"{FLAGS} {OWN[script]} --run-dir {run_dir} {flags}".split()


def train(script: str, run_dir: Path, flags: str = "") -> int:
    """Starts or resumes the short run in this process; the status with which it would have ended."""
    module = importlib.import_module(script)
    return status(module.train, tyro.cli(module.Args, args=words(script, run_dir, flags)))


def status(function: Callable, *arguments) -> int:
    """The exit status of a program that calls this function."""
    ended = 0
    try:
        function(*arguments)
    except SystemExit as end:
        ended = end.code
    gc.collect()  # a run that was refused, and its lock on the folder
    return ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable:
    """alone(script, flags) is the results of a run that nothing ever happened to; each is run once."""

    @functools.cache
    def left_alone(script: str, flags: str = "") -> dict[str, bytes]:
        run_dir = tmp_path_factory.mktemp("alone") / "run"
        assert train(script, run_dir, flags) == 0
        return results(run_dir)

    return left_alone


@pytest.fixture
def refused(capfd) -> Callable:
    """refused(run_dir, function, ...) is the one line of a refusal, which leaves the folder as it was."""

    def refused(run_dir: Path, function: Callable, *arguments) -> str:
        before = contents(run_dir)
        capfd.readouterr()
        assert function(*arguments) == 2
        line = capfd.readouterr().err
        assert len(line.splitlines()) == 1, line
        assert contents(run_dir) == before
        return line

    return refused


def before_call(patch: pytest.MonkeyPatch, name: str, call: int, fault: Callable, *arguments) -> list:
    """Has fault(*arguments) called before the nth call of a script's function; returns a list that counts
    the calls."""
    function, calls = pkgutil.resolve_name(name), []

    def replacement(*own_arguments):
        calls.append(own_arguments)
        if len(calls) == call:
            fault(*arguments)
        return function(*own_arguments)

    patch.setattr(name, replacement)
    return calls


@pytest.fixture(autouse=True)
def exit_is_an_exception(monkeypatch) -> None:
    """os._exit would end the tests too."""

    def leave(number: int) -> None:
        raise KeyboardInterrupt(number)

    monkeypatch.setattr(os, "_exit", leave)


def send(*signals: int) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


# ---- Processes

WARM = multiprocessing.get_context("forkserver")
MODULES = ["pytest", "torch._inductor", "gymnasium.wrappers", "gymnasium.envs.mujoco.inverted_pendulum_v4"]
WARM.set_forkserver_preload([*MODULES, "tyro._backends", "tyro.constructors", "tqdm", "filelock"])


def play(script: str, arguments: list[str], output: Path, prepare: Callable) -> None:
    """What a process does: what Python does with a script, its output going to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    prepare()
    sys.argv = [f"{script}.py", *arguments]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


class Process(WARM.Process):
    """A script started in a process, to be used as a Popen; `prepare` is called there before it."""

    def __init__(self, script: str, arguments: list[str], prepare: Callable = int):
        self.output = Path(arguments[arguments.index("--run-dir") + 1] + ".output")
        super().__init__(target=play, args=(script, arguments, self.output, prepare))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int:
        """Its exit status; minus the signal's number if one killed it."""
        self.join(100)
        if self.exitcode is None:
            self.kill()
            pytest.fail(f"it did not end: {self.output.read_text()}")
        return self.exitcode


# ---- Killed


def test_killed_at_random_moments(tmp_path):
    """SIGKILL four times, spread over a run in MuJoCo; each time the same command."""

    def start(run_dir: Path) -> Process:
        return Process(SAC, f"{SHORT} --total-timesteps 300 --resume --run-dir {run_dir}".split())

    killed = kill_and_resume(start, tmp_path / "killed", 4, 300, random.Random(1))
    assert killed >= 3  # the last may find that the run has just ended
    assert start(tmp_path / "alone").wait() == 0
    assert not differences(tmp_path / "killed", results(tmp_path / "alone"))


LIFE = "--total-timesteps 30 --learning-starts 10 --checkpoint-frequency 15 --log-frequency 5"
LIFE += " --eval-frequency 5 --eval-episodes 1"


def die_before(change: int, folder: Path) -> None:
    """To prepare a process: SIGKILL before the nth change in a folder, but for rows of CSV files."""
    changes = itertools.count(1)
    kinds = {"os.rename", "os.truncate", "os.mkdir"}

    def audit(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if arguments else ""
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and ".csv" not in path
        if (writes or event in kinds) and path.startswith(str(folder)) and next(changes) == change:
            send(signal.SIGKILL)

    sys.addaudithook(audit)


@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "resumed"])
def test_killed_between_any_two_changes_of_its_files(begun, alone, tmp_path):
    """SIGKILL before the first change, before the second, and so on, in a new run with two checkpoints, or in
    one that has a checkpoint and rows from after it."""
    base = tmp_path / "base"
    if begun:
        train(DDPG, base, f"{LIFE} --total-timesteps 15")
        checkpoint = (base / "checkpoint.pt").read_bytes()
        train(DDPG, base, LIFE)
        (base / "checkpoint.pt").write_bytes(checkpoint)
    for change in itertools.count(1):
        run_dir = tmp_path / f"{change}"
        if begun:
            shutil.copytree(base, run_dir)
        kill = functools.partial(die_before, change, run_dir)
        ended = Process(DDPG, words(DDPG, run_dir, LIFE), kill).wait()
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        assert (run_dir / "checkpoint.pt").exists() >= begun
        train(DDPG, run_dir, LIFE)
        assert not differences(run_dir, alone(DDPG, LIFE)), f"killed before change {change}"
    assert change > 10


def test_a_checkpoint_and_its_rows_are_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """Else a power cut could leave the new name with nothing under it, or rows of zeros."""
    synced, places, fsync, replace = {}, [], os.fsync, os.replace

    def note_fsync(file: int) -> None:
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size
        fsync(file)

    def check_replace(source: Path, target: Path) -> None:
        places.append(Path(target).name)
        rows = tmp_path.glob("run/*.csv") if places[-1] == "checkpoint.pt" else []
        for path in (Path(source), *rows):
            assert synced.get(path.stat().st_ino) == path.stat().st_size, path
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", check_replace)
    train(DDPG, tmp_path / "run", LIFE)
    assert places == ["args.json", *["policy.pt", "checkpoint.pt"] * 2]


# ---- Asked to stop


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
RUNS = [*((name, "") for name in SCRIPTS), pytest.param(SAC, "--cuda", marks=GPU)]


@pytest.mark.parametrize("script, device", RUNS)
def test_stopped_twice_in_the_middle_of_an_episode(script, device, alone, tmp_path, monkeypatch, capfd):
    """Each time a checkpoint is written at once, so that not one step is repeated, and the status says which
    signal it was. Each script has its own state: noise, optimizers, what the rows between two updates say."""
    run_dir, flags, done = tmp_path / "run", f"{device} --checkpoint-frequency 0", 60
    for signals, steps in (((signal.SIGTERM, signal.SIGTERM), 74), ((signal.SIGINT,), 47)):
        done += steps
        with monkeypatch.context() as patch:
            before_call(patch, f"{script}.Agent.explore", steps, send, *signals)
            assert train(script, run_dir, flags) == 128 + signals[0]
        output = capfd.readouterr()
        assert f"{done} of {STEPS}" in output.out
        assert "Ctrl-C" in output.err  # what happens now, and what another Ctrl-C does
    train(script, run_dir, flags)
    assert not differences(run_dir, alone(script, device))


def test_a_second_ctrl_c_ends_it_at_once(alone, tmp_path, monkeypatch):
    """Without a checkpoint; nothing is lost but the time."""
    for first in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="130"):
            before_call(patch, f"{DDPG}.Agent.explore", 75, send, first, signal.SIGINT)
            train(DDPG, tmp_path / "run", "--checkpoint-frequency 0")
        assert not (tmp_path / "run/checkpoint.pt").exists()
    train(DDPG, tmp_path / "run")
    assert not differences(tmp_path / "run", alone(DDPG))


@pytest.mark.parametrize("call", [2, 8], ids=["in the first evaluation", "in the last evaluation"])
def test_stopped_in_an_evaluation(call, alone, tmp_path, monkeypatch):
    """The episode is the last one that is played; on resuming the evaluation is made anew."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        calls = before_call(patch, f"{DDPG}.play", call, send, signal.SIGTERM)
        assert train(DDPG, run_dir, "--checkpoint-frequency 0") == 143
    assert len(calls) == call
    assert (run_dir / "checkpoint.pt").exists()
    train(DDPG, run_dir)
    assert not differences(run_dir, alone(DDPG))


def test_stopped_at_any_line_between_two_steps(tmp_path):
    """Whatever line of Run is next when the signal comes, it stops with a checkpoint."""
    run_class, lines = importlib.import_module(DDPG).Run, 0

    def trace(frame, event, _):
        nonlocal lines
        run = frame.f_locals.get("self")
        if type(run) is not run_class:
            return None
        if event == "line" and getattr(run, "global_step", 0) == 12:
            lines += 1
            if lines == line:
                send(signal.SIGTERM)
        return trace

    for line in itertools.count(1):
        run_dir, lines = tmp_path / f"{line}", 0
        sys.settrace(trace)
        try:
            ended = train(DDPG, run_dir, "--total-timesteps 13 --checkpoint-frequency 0")
        finally:
            sys.settrace(None)
        if ended == 0:
            break
        assert (run_dir / "checkpoint.pt").exists(), f"stopped at line {line} without a checkpoint"
    assert line > 10


# ---- Resumed


def test_more_steps_after_the_end(alone, tmp_path, capfd):
    """`--total-timesteps` raised after a finished run gives what one longer run would have given. A finished
    run with nothing more to do says so and stays as it is."""
    for steps in (100, 200, STEPS):
        train(SAC, tmp_path / "run", f"--total-timesteps {steps}")
    assert not differences(tmp_path / "run", alone(SAC))
    before = contents(tmp_path / "run")
    for steps in (STEPS, 200):
        train(SAC, tmp_path / "run", f"--total-timesteps {steps}")
        assert f"{STEPS} of {steps}" in capfd.readouterr().out
        assert contents(tmp_path / "run") == before


CHANGES = ["--env-id Pendulum-v1", "--seed 2", "--gamma 0.5", "--target-entropy -0.5", "--buffer-size 151"]
CHANGES += ["--learning-starts 61", "--eval-frequency 101", "--log-frequency 11", "--exp-name other"]


def test_changed_arguments_are_refused_by_name(tmp_path, refused, capfd):
    """But for those that change nothing, or by rounding alone, which a line says."""
    run_dir = tmp_path / "run"
    train(SAC, run_dir, "--total-timesteps 30")
    for change in CHANGES:
        assert change.split()[0] in refused(run_dir, train, SAC, run_dir, change)
    assert "--autotune" in refused(run_dir, train, SAC, run_dir, "--no-autotune")
    assert "--policy-frequency" in refused(run_dir, train, TD3, run_dir)
    assert train(SAC, run_dir, "--total-timesteps 31 --checkpoint-frequency 7 --threads 2") == 0
    assert "--threads" in capfd.readouterr().out


def test_a_second_process_on_the_same_folder_is_refused(alone, tmp_path, monkeypatch, refused):
    """And the first goes on as if it had not been there."""

    def second() -> None:
        generator = torch.get_rng_state()
        assert "in use" in refused(tmp_path / "run", train, DDPG, tmp_path / "run")
        torch.set_rng_state(generator)

    calls = before_call(monkeypatch, f"{DDPG}.Agent.explore", 75, second)
    train(DDPG, tmp_path / "run")
    assert len(calls) > 75
    assert not differences(tmp_path / "run", alone(DDPG))


# ---- Damaged checkpoints, and strangers'


@pytest.fixture
def stopped(tmp_path) -> Path:
    """The folder of a run that has come to step 100."""
    train(DDPG, tmp_path / "run", "--total-timesteps 100")
    return tmp_path / "run"


def test_a_damaged_checkpoint_is_refused(stopped, alone, refused):
    """With what to do, and that helps."""
    path = stopped / "checkpoint.pt"
    whole, weight = path.read_bytes(), torch.load(path)["agent"]["actor.net.0.weight"].numpy().tobytes()
    for damaged in (whole.replace(weight, weight[::-1]), whole[:-50], whole[: len(whole) // 2], b""):
        assert damaged != whole
        path.write_bytes(damaged)
        line = refused(stopped, train, DDPG, stopped)
        assert str(path) in line
        assert "delete" in line
    path.unlink()
    train(DDPG, stopped)
    assert not differences(stopped, alone(DDPG))


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_malicious_file_executes_nothing(stopped, refused):
    module, sign = importlib.import_module(DDPG), stopped.parent / "executed"
    watch = functools.partial(status, module.watch, module.Args(watch=str(stopped)))
    for name, read in (("checkpoint.pt", functools.partial(train, DDPG, stopped)), ("policy.pt", watch)):
        path = stopped / name
        torch.save(torch.load(path) | {"more": Payload(sign)}, path)
        torch.load(path, weights_only=False)
        assert sign.exists(), "a reader that trusts it creates the file"
        sign.unlink()
        assert name in refused(stopped, read)
        assert not sign.exists()


# ---- No room on the disk, none in memory


def limit_files(size: int, handler: signal.Handlers) -> None:
    """To prepare a process: files cannot grow beyond a size in bytes. There is a signal, then an OSError."""
    signal.signal(signal.SIGXFSZ, handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


WIDE = "--env-id Wide-v0"


@pytest.mark.parametrize(
    "size, handler, status, flags",
    [
        pytest.param(3_500_000, signal.SIG_DFL, -signal.SIGXFSZ, WIDE, id="killed in a checkpoint"),
        pytest.param(3_500_000, signal.SIG_IGN, 1, WIDE, id="an error in a checkpoint"),
        pytest.param(2_500, signal.SIG_IGN, 1, "--checkpoint-frequency 0", id="an error in a row"),
    ],
)
def test_no_room_on_the_disk(size, handler, status, flags, alone, tmp_path):
    """The run is killed in the middle of writing a file, or stops with one line, as it does when the disk is
    full. Its last checkpoint is sound; when there is more room, it goes on."""
    run_dir = tmp_path / "run"
    process = Process(DDPG, words(DDPG, run_dir, flags), functools.partial(limit_files, size, handler))
    assert process.wait() == status
    assert "Traceback" not in process.output.read_text()
    if status == 1:
        assert "File too large" in process.output.read_text().splitlines()[-1]
    assert (run_dir / "checkpoint.pt").exists() == (flags == WIDE)
    assert train(DDPG, run_dir, flags) == 0
    assert not differences(run_dir, alone(DDPG, flags))


def note_peaks(path: Path) -> None:
    """To prepare a process: it writes down the most memory it ever had whenever it opens timing.csv."""

    def audit(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith("timing.csv") and arguments[1] == "a":
            with open(path, "a") as file:
                file.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")

    sys.addaudithook(audit)


def test_only_what_is_filled_of_the_buffer_takes_memory(tmp_path):
    """40 MB of 2 GB are filled. A checkpoint holds these alone, and does not have them in memory twice: this
    compares the peak just before it with that after it."""
    flags = f"{WIDE} --total-timesteps 1010 --learning-starts 2000 --buffer-size 50000"
    arguments = words(DDPG, tmp_path / "run", f"{flags} --checkpoint-frequency 1000 --eval-frequency 0")
    assert Process(DDPG, arguments, functools.partial(note_peaks, tmp_path / "peaks")).wait() == 0
    filled = 1010 * (2 * 5_000 + 1 + 1 + 1) * 4
    assert filled < (tmp_path / "run/checkpoint.pt").stat().st_size < 1.1 * filled
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [unit * int(peak) for peak in (tmp_path / "peaks").read_text().split()]
    before, after = peaks[99], peaks[-1]  # the row of step 1000 is the hundredth
    assert filled < before <= after < before + filled / 4
    assert after < 1e9
