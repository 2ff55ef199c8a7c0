"""Runs that are killed, stopped, starved of disk or handed damaged files, and end as if nothing had been.

Every fault here is real: signals, a full file system, bytes changed on disk. Each run is a process of its own
that executes the script as `python script.py` does, forked from one that holds PyTorch already, to save time.
"""

import ast
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, run
from twenty_kills import SHORT, differences, kill_and_resume, progress, results

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these are POSIX signals and forks")

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    [
        "pytest",
        "torch",
        "torch._dynamo",
        "gymnasium.envs.mujoco.inverted_pendulum_v4",
        "gymnasium.wrappers",
        "tyro",
    ]
)


STEPS = 400  # of the run that nearly all tests use; its buffer is full after 250


# ---- Processes


def play(script: str, arguments: list[str], output: Path, prepare: Callable | None) -> None:
    """What a warm process does: what Python does with a script, its output going to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if prepare:
        prepare()
    sys.argv = [f"{script}.py", *arguments]
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output.with_suffix(".peak").write_text(str(peak))


class Warm:
    """A script started in a warm process, to be used as a Popen; `prepare` is called there before it."""

    def __init__(self, script: str, *arguments, output: Path, prepare: Callable | None = None):
        words = [str(argument) for argument in arguments]
        output.unlink(missing_ok=True)
        self.path = output
        self.process = WARM.Process(target=play, args=(script, words, output, prepare))
        self.process.start()
        self.kill, self.pid = self.process.kill, self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """Its exit status; minus the signal's number if one killed it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running after {timeout} s: {self.output()}")
        return self.process.exitcode

    def output(self) -> str:
        return self.path.read_text()


def start(script: str, run_dir: Path, *flags, prepare: Callable | None = None, steps: int = STEPS) -> Warm:
    """Starts or resumes the short run in a folder, with flags that come last and so win."""
    command = [*SHORT.split(), "--total-timesteps", steps, "--resume", "--run-dir", run_dir, *flags]
    return Warm(script, *command, output=run_dir.with_suffix(".out"), prepare=prepare)


def finish(*arguments, status: int = 0, **options) -> str:
    """Starts a run, waits for it, checks its exit status; returns what it printed."""
    process = start(*arguments, **options)
    assert process.wait() == status, f"{arguments}: {process.output()[-3000:]}"
    return process.output()


def contents(folder: Path) -> dict[str, bytes]:
    """All files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def flip(path: Path, generator: random.Random, bits: int) -> None:
    """Flips random bits of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(bits):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


# ---- An environment in which things go wrong at a given step


class Drift(gym.Env):
    """A point that drifts at random, in episodes of random length, about 60 steps. Resets and steps draw
    random numbers, so that only a generator put back exactly gives the same episode again."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(np.float32([-2]), np.float32([1]))
    faults: dict[int, Callable] = {}  # what is called before which step of the training environment

    def __init__(self, render_mode=None):
        self.training, self.steps = False, 0

    def observe(self) -> np.ndarray:
        return np.float32([*self.position, self.left / 100])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.training |= seed is None  # evaluations always give a seed
        self.position, self.left = self.np_random.normal(size=2), self.np_random.integers(40, 80)
        return self.observe(), {}

    def step(self, action):
        if self.training:
            self.steps += 1
            self.faults.get(self.steps, int)()
        self.position = self.position + 0.1 * action + 0.1 * self.np_random.normal(size=2)
        self.left -= 1
        return self.observe(), -float(np.abs(self.position).sum()), False, bool(self.left == 0), {}


class Wide(Drift):
    """Observations of 20,000 numbers, so that a few transitions fill much memory."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (20_000,))

    def observe(self) -> np.ndarray:
        return np.full(20_000, self.position[0], dtype=np.float32)


def drift(faults: dict[int, Callable] | None = None) -> None:
    """To prepare a process: Gymnasium knows the environments from here on, and they have these faults."""
    Drift.faults = faults or {}
    for environment in (Drift, Wide):
        gym.register(f"{environment.__name__}-v0", environment)


DRIFT = ["--env-id", "Drift-v0", "--eval-episodes", 1]


def send(number: int, sleep: float = 0.001) -> None:
    """Sends the process itself a signal, then sleeps, so that Python has called the handler."""
    os.kill(os.getpid(), number)
    time.sleep(sleep)


def fill_disk(folder: Path) -> None:
    """Writes a file until the folder's file system is full."""
    try:
        with open(folder / "filler", "wb", buffering=0) as file:
            while file.write(bytes(1000)):
                pass
    except OSError:
        pass


def limit_files(size: int) -> None:
    """No file can grow beyond a size in bytes: there is a SIGXFSZ and, if that is ignored, an EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def wait_for(path: Path, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def in_turn(*faults: Callable) -> None:
    for fault in faults:
        fault()


# ---- Runs left alone


@pytest.fixture
def name(script) -> str:
    """The name of each script in turn."""
    return script.__name__


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable:
    """alone(script, *flags) is the results of a run that nothing ever happened to; each is run once."""

    @functools.cache
    def left_alone(
        script: str, *flags, prepare: Callable | None = None, steps: int = STEPS
    ) -> dict[str, bytes]:
        run_dir = tmp_path_factory.mktemp("alone") / "run"
        finish(script, run_dir, *flags, prepare=prepare, steps=steps)
        return results(run_dir)

    return left_alone


# ---- Killed


def test_killed_at_random_moments(name, alone, tmp_path):
    """SIGKILL five times, spread over the run, some after the buffer wrapped; each time the same command."""
    generator = random.Random(f"{name} moments")
    killed, _ = kill_and_resume(functools.partial(start, name), tmp_path / "run", 5, STEPS, generator)
    assert killed >= 4  # the last may find that the run has just ended
    assert not differences(tmp_path / "run", alone(name))


def before_changes(folder: Path, call: Callable) -> None:
    """Has `call(change, path)` called just before the process changes a file of a folder, or flushes one."""
    kinds = {"os.rename", "os.remove", "os.truncate", "os.mkdir", "os.link", "sqlite3.connect"}

    def audit(event: str, arguments: tuple) -> None:
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if (writes or event in kinds) and str(arguments[0]).startswith(str(folder)):
            call(event, str(arguments[0]))

    def fsync(file: int, real: Callable = os.fsync) -> None:
        call("fsync", "")
        real(file)
        call("fsynced", "")

    os.fsync = fsync
    sys.addaudithook(audit)


def die_at(touch: int, folder: Path, ignore: str = "nothing") -> None:
    """To prepare a process: SIGKILL before the nth change in a folder."""
    touches = 0

    def count(change: str, path: str) -> None:
        nonlocal touches
        touches += ignore not in path
        if touches == touch:
            os.kill(os.getpid(), signal.SIGKILL)

    before_changes(folder, count)


def note_changes(notes: Path, folder: Path) -> None:
    """To prepare a process: it writes down the changes in a folder."""

    def note(change: str, path: str) -> None:
        descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{change} {path}\n".encode())
        os.close(descriptor)

    before_changes(folder, note)


LIFE = ["--learning-starts", 10, "--checkpoint-frequency", 15, "--log-frequency", 10, "--eval-frequency", 20]
LIFE += ["--batch-size", 4]


def test_killed_between_any_two_changes_of_its_files(name, alone, tmp_path):
    """A run of 40 steps with three checkpoints: SIGKILL before the first file operation, before the second,
    and so on to the last, but for rows of CSV files."""
    expected = alone(name, *LIFE, steps=40)
    for touch in itertools.count(1):
        run_dir = tmp_path / f"{touch}"
        kill = functools.partial(die_at, touch, run_dir, ignore=".csv")
        process = start(name, run_dir, *LIFE, steps=40, prepare=kill)
        status = process.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL, process.output()
        finish(name, run_dir, *LIFE, steps=40)
        assert not differences(run_dir, expected), f"killed at change {touch}"
    assert touch > 12, "three checkpoints are more changes than that"


def test_a_checkpoint_is_on_disk_before_it_takes_its_place(name, tmp_path):
    """Else a power cut could leave the new name with nothing under it: what no signal can show."""
    prepare = functools.partial(note_changes, tmp_path / "notes", tmp_path / "run")
    finish(name, tmp_path / "run", *LIFE, steps=40, prepare=prepare)
    changes = [line for line in (tmp_path / "notes").read_text().splitlines() if ".csv" not in line]
    checkpoints = "\n".join(changes).split("open ")
    checkpoints = [changes for changes in checkpoints if changes.startswith(f"{tmp_path}/run/checkpoint")]
    assert len(checkpoints) >= 2
    for changes in checkpoints:
        assert "fsynced" in changes.split("os.rename")[0]
        assert changes.count("os.rename") >= 1


def die_beyond(size: int) -> None:
    """The kernel kills the process in the middle of the write that takes a file beyond a size in bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_files(size)


def test_killed_while_a_checkpoint_is_half_written(name, alone, tmp_path):
    base = tmp_path / "base"
    finish(name, base, steps=350)
    size = (base / "checkpoint.pt").stat().st_size
    for share in (0.3, 0.9):
        run_dir = copy(base, tmp_path / f"{share}")
        process = start(name, run_dir, prepare=functools.partial(die_beyond, int(share * size)))
        assert process.wait() == -signal.SIGXFSZ, process.output()
        finish(name, run_dir)
        assert not differences(run_dir, alone(name))


def test_killed_while_it_replaces_a_damaged_checkpoint(name, alone, tmp_path):
    """The newest checkpoint is damaged, the one before is sound: it must not go before there is a new one.
    Here rows of CSV files count too, as they are cut back first."""
    base, generator = tmp_path / "base", random.Random(name)
    for steps in (38, 40):
        finish(name, base, *LIFE, steps=steps)
    flip(base / "checkpoint.pt", generator, bits=100)
    for touch in itertools.count(1):
        run_dir = copy(base, tmp_path / f"{touch}")
        process = start(name, run_dir, *LIFE, steps=41, prepare=functools.partial(die_at, touch, run_dir))
        status = process.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL, process.output()
        finish(name, run_dir, *LIFE, steps=41)
        assert not differences(run_dir, alone(name, *LIFE, steps=41)), f"killed at change {touch}"
    assert touch > 8, "the CSV files and a checkpoint are more changes than that"


def test_killed_before_the_first_checkpoint(name, alone, tmp_path):
    """The same command starts over, and no row is there twice."""
    off = [*DRIFT, "--checkpoint-frequency", 0]
    kill = functools.partial(drift, {250: functools.partial(send, signal.SIGKILL)})
    assert start(name, tmp_path / "run", *off, prepare=kill).wait() == -signal.SIGKILL
    assert progress(tmp_path / "run") > 100
    assert not list(tmp_path.glob("run/*.pt"))
    finish(name, tmp_path / "run", *off, prepare=drift)
    assert not differences(tmp_path / "run", alone(name, *off, prepare=drift))


# ---- Asked to stop


def test_stopped_twice_in_the_middle_of_an_episode(name, alone, tmp_path):
    """Each time a checkpoint is written at once, so that not one step is repeated, and the status says which
    signal it was. The environment draws random numbers in its steps and at its resets."""
    off, run_dir = [*DRIFT, "--checkpoint-frequency", 0], tmp_path / "run"
    stop = functools.partial(drift, {180: functools.partial(send, signal.SIGTERM)})
    assert f"180 of {STEPS}" in finish(name, run_dir, *off, prepare=stop, status=143)
    assert 0 < progress(run_dir) < 180
    # The environment's count now begins with the steps of the episode that are played again.
    stop = functools.partial(drift, {200: functools.partial(send, signal.SIGINT)})
    finish(name, run_dir, *off, prepare=stop, status=130)
    assert progress(run_dir) > 180
    finish(name, run_dir, *off, prepare=drift)
    assert not differences(run_dir, alone(name, *off, prepare=drift))


def test_a_second_signal_ends_it_at_once(name, alone, tmp_path):
    """Without a checkpoint, however long the step would still take; nothing is lost but the time."""
    run_dir = tmp_path / "run"
    signals = functools.partial(send, signal.SIGTERM), functools.partial(send, signal.SIGINT, sleep=100)
    twice = functools.partial(drift, {250: functools.partial(in_turn, *signals)})
    process = start(name, run_dir, *DRIFT, prepare=twice)
    assert process.wait(timeout=50) == 130
    assert f"250 of {STEPS}" not in process.output()
    finish(name, run_dir, *DRIFT, prepare=drift)
    assert not differences(run_dir, alone(name, *DRIFT, prepare=drift))


def stop_at_line(line: int) -> None:
    """SIGTERM just before the nth line that train() executes from its 20th step on to the next."""
    lines = 0

    def trace(frame, event, _):
        return count if frame.f_code.co_name == "train" else None

    def count(frame, event, _):
        nonlocal lines
        if event == "line" and frame.f_locals.get("global_step") == 20:
            lines += 1
            if lines == line:
                os.kill(os.getpid(), signal.SIGTERM)
        return count

    sys.settrace(trace)


def test_stopped_at_any_line_of_the_loop(name, tmp_path):
    """Whatever line is next when the signal comes, the run stops with a checkpoint. Scripts share lines."""
    off = [*LIFE, "--checkpoint-frequency", 0]
    for line in itertools.count(1 + SCRIPTS.index(name), 3):
        run_dir = tmp_path / f"{line}"
        process = start(name, run_dir, *off, steps=40, prepare=functools.partial(stop_at_line, line))
        if process.wait() == 0:
            break
        assert process.wait() == 143, process.output()
        assert (run_dir / "checkpoint.pt").exists(), f"stopped at line {line} without a checkpoint"
    assert line > 15, "the loop has more lines than that"


def test_started_by_the_shell_and_stopped(name, alone, tmp_path):
    """Once from the command line, not in a warm process: SIGTERM to `python script.py`, then once more."""
    run_dir = tmp_path / "run"
    arguments = [*SHORT.split(), "--total-timesteps", STEPS, "--resume", "--run-dir", run_dir]
    command = [sys.executable, ROOT / f"{name}.py", *arguments]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    while progress(run_dir) < 150 and process.poll() is None:
        time.sleep(0.001)
    process.terminate()
    assert process.wait() == 143
    completed = run(name, *arguments)
    assert completed.returncode == 0, completed.stderr
    assert not differences(run_dir, alone(name))


# ---- Resumed


def test_more_steps_after_the_end(name, alone, tmp_path):
    """`--total-timesteps` raised after a finished run: what one longer run would have given."""
    for steps in (130, 270, STEPS):
        finish(name, tmp_path / "run", steps=steps)
    assert not differences(tmp_path / "run", alone(name))


def test_a_finished_run_says_so_and_stays_as_it_is(name, tmp_path):
    finish(name, tmp_path / "run", steps=200)
    before = contents(tmp_path / "run")
    output = finish(name, tmp_path / "run", steps=200)
    assert "200 of 200" in output
    assert contents(tmp_path / "run") == before


def test_without_resume_a_run_is_not_touched(name, tmp_path):
    finish(name, tmp_path / "run", steps=50)
    before = contents(tmp_path / "run")
    output = finish(name, tmp_path / "run", "--no-resume", steps=100, status=2)
    assert "--resume" in output
    assert len(output.splitlines()) == 1
    assert contents(tmp_path / "run") == before


def test_rows_between_two_updates(name, alone, tmp_path):
    """Gradient norms are logged at steps without an update too, and then are those of the last one before."""
    rare = ["--train-frequency", 40, "--log-frequency", 1, "--checkpoint-frequency", 0]
    rare += ["--policy-frequency", 3] if name.startswith("td3") else []
    for steps in (210, 390, STEPS):
        finish(name, tmp_path / "run", *rare, steps=steps)
    assert not differences(tmp_path / "run", alone(name, *rare))


def test_noise_with_a_memory(alone, tmp_path):
    """The Ornstein-Uhlenbeck process goes on where it was in the episode."""
    noise = [*DRIFT, "--ou-noise", "--random-action-prob", 0.1]
    for steps in (233, STEPS):
        finish("ddpg_continuous", tmp_path / "run", *noise, steps=steps, prepare=drift)
    expected = alone("ddpg_continuous", *noise, prepare=drift)
    assert not differences(tmp_path / "run", expected)
    assert expected["episodes.csv"] != alone("ddpg_continuous", *DRIFT, prepare=drift)["episodes.csv"]


def draw(count: int) -> None:
    np.random.random(count)


def note_draw(path: Path) -> None:
    path.write_text(repr(np.random.random()))


def test_numpys_generator(name, tmp_path):
    """Someone who changes a script may draw from NumPy's own generator: it goes on where it was."""
    kill = {20: functools.partial(draw, 5), 190: functools.partial(send, signal.SIGKILL)}
    process = start(name, tmp_path / "run", *DRIFT, prepare=functools.partial(drift, kill))
    assert process.wait() == -signal.SIGKILL
    note = functools.partial(drift, {1: functools.partial(note_draw, tmp_path / "drawn")})
    finish(name, tmp_path / "run", *DRIFT, prepare=note)
    seed = json.loads((tmp_path / "run/args.json").read_text())["args"]["seed"]
    assert float((tmp_path / "drawn").read_text()) == np.random.RandomState(seed).random(6)[5]


FREE = "exp_name run_dir resume checkpoint_frequency capture_video video_frequency watch watch_episodes track"
FREE = f"{FREE} wandb_project_name wandb_entity cuda".split()  # cuda: not every machine can be asked for it


def changed(field: dataclasses.Field, value) -> list[str]:
    """Flags that give an argument another value than it had."""
    flag = field.name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--no-{flag}" if value else f"--{flag}"]
    if field.name == "env_id":
        return ["--env-id", "InvertedDoublePendulum-v4"]
    if field.name == "total_timesteps":
        return ["--total-timesteps", value - 1]
    return [f"--{flag}", -0.5 if value is None else value + 1 if isinstance(value, int) else value / 2 or 0.5]


def test_changed_arguments_are_refused_by_name(script, name, tmp_path):
    """All that the algorithm owns, and a third of the shared ones for each script, one at a time."""
    finish(name, tmp_path / "run", steps=50)
    before, args = contents(tmp_path / "run"), json.loads((tmp_path / "run/args.json").read_text())["args"]
    fields = [field for field in dataclasses.fields(script.Args) if field.name not in FREE]
    shared = [field.name for field in fields].index("env_id")
    for field in fields[:shared] + fields[shared + SCRIPTS.index(name) :: 3]:
        flags = changed(field, args[field.name])
        output = finish(name, tmp_path / "run", *flags, steps=50, status=2)
        assert field.name in output.replace("-", "_"), output
        assert len(output.splitlines()) == 1
    assert contents(tmp_path / "run") == before


def test_what_cannot_change_the_past_may_change(name, alone, tmp_path):
    finish(name, tmp_path / "run", steps=150)
    free = ["--track", "--wandb-project-name", "p", "--wandb-entity", "e", "--checkpoint-frequency", 20]
    free += ["--video-frequency", 10_000, "--capture-video", "--exp-name", "x", "--watch-episodes", 2]
    finish(name, tmp_path / "run", *free, prepare=functools.partial(fake_wandb, tmp_path / "calls"))
    assert not differences(tmp_path / "run", alone(name))


def test_a_run_of_another_script_is_refused(name, tmp_path):
    other = SCRIPTS[SCRIPTS.index(name) - 1]
    finish(other, tmp_path / "run", steps=50)
    before = contents(tmp_path / "run")
    assert len(finish(name, tmp_path / "run", steps=50, status=2).splitlines()) == 1
    assert contents(tmp_path / "run") == before


def test_a_second_process_on_the_same_folder_is_refused(name, alone, tmp_path):
    """And the first goes on as if it had not been there."""
    run_dir, here, go = tmp_path / "run", tmp_path / "here", tmp_path / "go"
    wait = functools.partial(in_turn, here.touch, functools.partial(wait_for, go))
    first = start(name, run_dir, *DRIFT, prepare=functools.partial(drift, {250: wait}))
    wait_for(here)
    before = contents(run_dir)
    words = [*SHORT.split(), *DRIFT, "--total-timesteps", STEPS, "--resume", "--run-dir", run_dir]
    second = Warm(name, *words, output=tmp_path / "second", prepare=drift)
    assert second.wait() == 2, second.output()
    assert "in use" in second.output()
    assert len(second.output().splitlines()) == 1
    assert contents(run_dir) == before
    assert first.poll() is None
    go.touch()
    assert first.wait() == 0, first.output()
    assert not differences(run_dir, alone(name, *DRIFT, prepare=drift))


# ---- Damaged checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Callable:
    """two_checkpoints(script) is the folder of a run with checkpoints of step 300, the previous, and 350."""

    @functools.cache
    def make(script: str) -> Path:
        run_dir = tmp_path_factory.mktemp("two") / "run"
        for steps in (300, 350):
            finish(script, run_dir, steps=steps)
        assert (run_dir / "checkpoint.previous.pt").exists()
        return run_dir

    return make


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_checkpoint(name, share, alone, two_checkpoints, tmp_path):
    """The one before takes its place, and the output says so."""
    run_dir = copy(two_checkpoints(name), tmp_path / "run")
    path = run_dir / "checkpoint.pt"
    os.truncate(path, int(share * path.stat().st_size))
    assert "damaged" in finish(name, run_dir)
    assert not differences(run_dir, alone(name))


@pytest.mark.parametrize("bits", [1, 1, 8, 100])
def test_flipped_bits(name, bits, request, alone, two_checkpoints, tmp_path):
    """Wherever they are, they are found or do no harm."""
    run_dir = copy(two_checkpoints(name), tmp_path / "run")
    flip(run_dir / "checkpoint.pt", random.Random(request.node.name), bits)
    finish(name, run_dir)
    assert not differences(run_dir, alone(name))


def test_flipped_bits_in_the_weights(name, two_checkpoints, tmp_path):
    """Bytes of the first layer's weights, which a reader that ignores checksums would take."""
    run_dir = copy(two_checkpoints(name), tmp_path / "run")
    path = run_dir / "checkpoint.pt"
    weights = max((k, v) for k, v in results(run_dir).items() if "actor.net.0.weight" in k)[1]
    data = path.read_bytes()
    place = data.index(weights)
    path.write_bytes(data[:place] + bytes(byte ^ 1 for byte in data[place : place + 4]) + data[place + 4 :])
    assert "damaged" in finish(name, run_dir)


@pytest.mark.parametrize("damage", ["both", "the only one"])
def test_no_sound_checkpoint(name, damage, two_checkpoints, tmp_path):
    """Exit status 2, what to do in the last line, and no result touched."""
    run_dir = copy(two_checkpoints(name), tmp_path / "run")
    flip(run_dir / "checkpoint.pt", random.Random(1), bits=100)
    if damage == "both":
        os.truncate(run_dir / "checkpoint.previous.pt", 1000)
    else:
        (run_dir / "checkpoint.previous.pt").unlink()
    before = {path: path.read_bytes() for path in run_dir.iterdir() if path.suffix in {".csv", ".pt"}}
    output = finish(name, run_dir, steps=350, status=2)
    assert "Traceback" not in output
    assert "delete" in output.splitlines()[-1]
    assert {path: path.read_bytes() for path in before} == before
    # What it says to do helps.
    for path in run_dir.glob("*.pt"):
        path.unlink()
    finish(name, run_dir, steps=350)


# ---- A full disk


@pytest.fixture(params=["tmpfs", "file size limit"])
def small_disk(request, tmp_path):
    """A folder, what makes its disk full, and what makes room again: a file system of one megabyte, where one
    may mount it; a limit on the size of files, everywhere."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "file size limit":
        yield (
            folder,
            functools.partial(limit_files, 5000),
            functools.partial(limit_files, resource.RLIM_INFINITY),
        )
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder, functools.partial(fill_disk, folder), functools.partial(os.remove, folder / "filler")
    subprocess.run(["umount", folder], check=True)


def test_full_disk(name, small_disk, alone, tmp_path):
    """Training goes on, says what it could not write, keeps the checkpoint that it has, and writes one again
    when there is room."""
    folder, fill, free = small_disk
    run_dir, kept = folder / "run", tmp_path / "kept"
    faults = {150: fill, 300: functools.partial(in_turn, free, functools.partial(copy, run_dir, kept))}
    output = finish(name, run_dir, *DRIFT, prepare=functools.partial(drift, faults))
    assert "no checkpoint" in output
    assert "Traceback" not in output

    expected = alone(name, *DRIFT, prepare=drift)
    rows_may_miss = ["episodes.csv", "evaluations.csv", "losses.csv"]
    assert set(differences(run_dir, expected)) <= set(rows_may_miss)
    for file in rows_may_miss:
        rows = (run_dir / file).read_bytes().split(b"\n")
        assert set(rows) <= set(expected[file].split(b"\n")), f"half a row in {file}"

    # The folder as it was while the disk was full: its last checkpoint is of step 100 to 150, and works.
    assert 0 < progress(kept) < 300
    assert "damaged" not in finish(name, kept, *DRIFT, prepare=drift)
    assert not differences(kept, expected)


# ---- Weights & Biases


def fake_wandb(calls: Path, dies: str = "never") -> None:
    """To prepare a process: a module wandb that writes down its calls, and fails when it is told to."""
    module = types.ModuleType("wandb")
    module.run, module.Video = None, str
    module.util = types.SimpleNamespace(generate_id=lambda: os.urandom(4).hex())

    def note(**call) -> None:
        with open(calls, "a") as file:
            file.write(json.dumps(call, default=str) + "\n")

    def init(**options) -> None:
        note(init=options)
        if dies == "at init":
            raise ConnectionError("no route to host")
        module.run = options

    def log(metrics, step) -> None:
        note(log=metrics, step=step)
        if dies == "mid-run" and step > 150:
            raise BrokenPipeError("the service died")

    module.init, module.log = init, log
    sys.modules["wandb"] = None if dies == "missing" else module


@pytest.mark.parametrize("dies", ["missing", "at init", "mid-run"])
def test_wandb_dies(name, dies, alone, tmp_path):
    """One line says so; the run and its files are as they would have been."""
    prepare = functools.partial(fake_wandb, tmp_path / "calls", dies)
    output = finish(name, tmp_path / "run", "--track", prepare=prepare, steps=200)
    assert len([line for line in output.splitlines() if "Weights & Biases" in line]) == 1
    assert "Traceback" not in output
    assert not differences(tmp_path / "run", alone(name, steps=200))
    calls = (tmp_path / "calls").read_text().splitlines() if dies != "missing" else []
    assert len(calls) == {"missing": 0, "at init": 1}.get(dies, len(calls)), "it tried again"


def test_a_resumed_run_is_the_same_run_in_wandb(name, tmp_path):
    prepare = functools.partial(fake_wandb, tmp_path / "calls")
    for steps in (110, 140):
        finish(name, tmp_path / "run", "--track", steps=steps, prepare=prepare)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    first, second = [call["init"] for call in calls if "init" in call]
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    logged = [call["step"] for call in calls if "log" in call]
    assert logged == sorted(logged)


# ---- Strangers' files


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


FORMATS = {
    "a bare pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "torch's old format": lambda content, path: torch.save(
        content, path, _use_new_zipfile_serialization=False
    ),
    "torch's zip": torch.save,
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "in a checkpoint"])
def test_a_malicious_checkpoint_executes_nothing(name, kind, bare, two_checkpoints, tmp_path):
    run_dir, sign = copy(two_checkpoints(name), tmp_path / "run"), tmp_path / "executed"
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    content = Payload(sign) if bare else {**content, "more": Payload(sign)}
    for path in run_dir.glob("*.pt"):
        FORMATS[kind](content, path)
    sign.unlink(missing_ok=True)
    for flags in (["--resume", "--run-dir", run_dir], ["--watch", run_dir]):
        words = [*SHORT.split(), "--total-timesteps", STEPS, *flags]
        process = Warm(name, *words, output=tmp_path / "out")
        assert process.wait() == 2, process.output()
        assert not sign.exists()
        assert "Traceback" not in process.output()

    if kind != "a bare pickle" or bare:
        # The file would have been created by a reader that trusts it.
        load = functools.partial(torch.load, weights_only=False) if kind != "a bare pickle" else _unpickle
        load(run_dir / "checkpoint.pt")
        assert sign.exists()


def _unpickle(path: Path):
    return pickle.loads(path.read_bytes())


def test_nothing_but_data_is_ever_loaded(name):
    """Every torch.load in a script says weights_only=True, and there is no other way in."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads
    for call in loads:
        values = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert values.get("weights_only") == "True", ast.unparse(call)
    named = {ast.unparse(call.func).split(".")[-1] for call in calls}
    assert not named & {"eval", "exec", "unpickle", "Unpickler", "__import__", "import_module"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib"}


# ---- Size


def test_only_what_is_filled_of_the_buffer_is_saved(name, tmp_path):
    """200 of a million transitions, 44 bytes each: the file has no room for the others."""
    finish(name, tmp_path / "run", "--buffer-size", 1_000_000, steps=200)
    size = (tmp_path / "run/checkpoint.pt").stat().st_size
    assert 200 * 44 < size < 200 * 44 + 120_000


def note_peak(path: Path) -> None:
    path.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_a_checkpoint_does_not_double_memory(name, tmp_path):
    """The most memory that the process ever had, before the only checkpoint and after: it may differ by a
    tenth of the 160 MB of the buffer."""
    prepare = functools.partial(drift, {999: functools.partial(note_peak, tmp_path / "before")})
    flags = ["--env-id", "Wide-v0", "--learning-starts", 1000, "--buffer-size", 1000, "--log-frequency", 500]
    flags += ["--checkpoint-frequency", 0, "--eval-frequency", 0]
    finish(name, tmp_path / "run", *flags, steps=1000, prepare=prepare)
    before, after = int((tmp_path / "before").read_text()), int((tmp_path / "run.peak").read_text())
    unit = 1 if sys.platform == "darwin" else 1024
    rows = 1000 * (2 * 20_000 + 1 + 2) * 4
    assert (tmp_path / "run/checkpoint.pt").stat().st_size > rows
    assert before * unit > rows, "the buffer is not in memory"
    assert (after - before) * unit < rows / 10
