"""Training: seeds, flags, counters, the record of a run, its terminal, Weights & Biases, and how it stops.

The small environments are those of test_environment.
"""

import dataclasses
import fcntl
import functools
import importlib
import importlib.metadata
import json
import math
import os
import platform
import pty
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import termios
import types
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, run
from test_environment import COUNTER, Counter, Steady, process_as_it_was, quick_train, register, rows

RECORD = ("episodes.csv", "evaluations.csv", "losses.csv")  # the same bytes for the same seed
LOSSES = {  # what losses.csv has besides global_step
    "ddpg_continuous": {"qf1_values", "qf1_loss", "actor_loss", "target_q", "buffer_size"}
    | {"actor_gradient_norm", "q_gradient_norm"},
}
LOSSES["td3_continuous"] = LOSSES["ddpg_continuous"] | {"qf2_values", "qf2_loss"}
LOSSES["sac_continuous"] = LOSSES["td3_continuous"] | {"alpha", "alpha_loss", "entropy", "std"}
LOSSES["sac_continuous"] |= {"alpha_gradient_norm"}
QUICK = ["--hidden-dim", "8", "--batch-size", "8", "--buffer-size", "1000", "--threads", "1", "--no-cuda"]
QUICK += ["--eval-episodes", "1"]


def record(run_dir: Path) -> dict[str, bytes]:
    """The CSV files whose bytes depend on the seed alone."""
    return {name: (run_dir / name).read_bytes() for name in RECORD}


# ---- Seeds ----


def test_equal_seeds_give_equal_bytes_and_others_do_not(script, tmp_path):
    """The seed decides every byte, whatever was drawn before; another seed changes every file."""
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        np.random.seed(number)
        options = {"env_id": "InvertedPendulum-v4", "seed": seed, "eval_frequency": 50, "eval_episodes": 2}
        runs.append(record(quick_train(script, tmp_path / str(number), **options)))
    assert all(len(content) > 80 for content in runs[0].values())
    assert runs[0] == runs[1]
    assert all(runs[0][name] != runs[2][name] for name in RECORD)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 is known to flush")
@pytest.mark.parametrize("trained, left", [(False, 2**20), (True, 0)])
def test_training_flushes_denormals_in_every_thread(trained, left, tmp_path):
    """The product is shared by two threads, of which one is started by it."""
    train = (
        f"train(Args(env_id='Pendulum-v1', total_timesteps=2, threads=2, run_dir={str(tmp_path / 'run')!r}))"
    )
    code = f"from sac_continuous import *; {train if trained else 'torch.set_num_threads(2)'}; "
    code += "print(torch.count_nonzero(torch.full((2**20,), 1e-39) * 0.5).item())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ended.stdout.split()[-1]) == left


def test_equal_seeds_give_equal_bytes_in_two_processes(tmp_path, monkeypatch):
    """So do two processes, in two places and with two hash seeds."""
    runs = []
    for number in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", number)
        folder = tmp_path / number
        folder.mkdir()
        options = (
            "--env-id Hopper-v4 --total-timesteps 150 --learning-starts 80 --eval-frequency 50 --run-dir run"
        )
        done = run("sac_continuous", *options.split(), "--log-frequency", 10, *QUICK, cwd=folder)
        assert done.returncode == 0, done.stderr
        runs.append(record(folder / "run"))
    assert all(len(content) > 80 for content in runs[0].values())
    assert runs[0] == runs[1]


class Dice(Steady):
    """An environment of the old kind: it draws from NumPy's global generator, at resets and at steps."""

    def reset(self, *, seed=None, options=None):
        self.length = np.random.randint(5, 9)
        return super().reset(seed=seed)

    def step(self, action):
        _, reward, *_ = super().step(action)
        return np.float32([np.random.random()]), reward, self.steps == self.length, False, {}


def test_an_environment_that_draws_from_numpys_generator(script, tmp_path):
    """It goes on as it would have, wherever the run was stopped; evaluations leave the generator alone."""
    options = {"env_id": register(Dice), "log_frequency": 1}
    whole = record(quick_train(script, tmp_path / "whole", **options))
    for steps in (33, 94, 130):
        quick_train(script, tmp_path / "parts", **options, resume=True, total_timesteps=steps)
    assert record(tmp_path / "parts") == whole
    evaluated = record(quick_train(script, tmp_path / "evaluated", **options, eval_frequency=9))
    assert [evaluated[name] for name in RECORD if name != "evaluations.csv"] == [
        whole[name] for name in RECORD if name != "evaluations.csv"
    ]


def test_an_agent_that_draws_from_numpys_generator(script, tmp_path, monkeypatch):
    """Stopped in the middle of an episode, it draws next what it would have drawn."""
    explore = script.Agent.explore

    def noise(self, observation):
        return explore(self, observation) * np.random.random()

    monkeypatch.setattr(script.Agent, "explore", noise)
    options = {"env_id": register(Steady), "log_frequency": 1}
    whole = record(quick_train(script, tmp_path / "whole", **options))
    for steps in (67, 94, 130):  # an episode has four steps
        quick_train(script, tmp_path / "parts", **options, resume=True, total_timesteps=steps)
    assert record(tmp_path / "parts") == whole


# ---- Flags ----


class Filmed(Steady):
    """Steady, with a picture to film."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 64, 3), 50 * self.steps, np.uint8)


FILMED = register(Filmed)


def boolean_flags(script: str) -> list[str]:
    """The names of a script's boolean arguments."""
    fields = dataclasses.fields(importlib.import_module(script).Args)
    return [field.name for field in fields if field.type in (bool, "bool")]


def test_boolean_flags_are_found():
    """The list that the next test goes through is not empty, and has each algorithm's own."""
    assert {"track", "cuda", "compile", "capture_video", "torch_deterministic", "resume"} <= set(
        boolean_flags("ddpg_continuous")
    )
    assert "ou_noise" in boolean_flags("ddpg_continuous")
    assert "clipped_double_q" in boolean_flags("td3_continuous")
    assert "autotune" in boolean_flags("sac_continuous")


@pytest.mark.parametrize(
    "name, flag", [(name, flag) for name in SCRIPTS for flag in [None, *boolean_flags(name)]]
)
def test_every_boolean_flag_both_ways(name, flag, tmp_path, monkeypatch):
    """With all flags as by default, and with each one turned, a run learns, logs, evaluates and ends."""
    script = importlib.import_module(name)
    values = {each: getattr(script.Args(), each) for each in boolean_flags(name)}
    if flag:
        values[flag] = not values[flag]
    values["cuda"] |= values["cudagraphs"]  # on a CPU test_cudagraphs.py emulates them
    if values["cuda"] and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if values["compile"] and name != "td3_continuous":
        # Half a minute for machine code is spent on one script alone, whose update has branches.
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Evaluations, films and checkpoints come before and after learning_starts, which is 60.
    frequencies = {
        "eval_frequency": 35,
        "video_frequency": 45,
        "checkpoint_frequency": 50,
        "eval_episodes": 2,
    }
    try:
        run_dir = quick_train(script, tmp_path / "run", env_id=FILMED, **frequencies, **values)
    finally:
        if values["track"]:
            sys.modules["wandb"].finish()

    losses = rows(run_dir / "losses.csv")
    assert [row["global_step"] for row in losses] == [80, 100, 120]
    assert all(math.isfinite(value) for row in losses for value in row.values())
    assert [row["global_step"] for row in rows(run_dir / "evaluations.csv")] == [35, 70, 105]
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] == 130
    saved = json.loads((run_dir / "args.json").read_text())["args"]
    assert {each: saved[each] for each in values} == values
    assert bool(list(run_dir.rglob("*.mp4"))) == values["capture_video"]
    assert bool(list(run_dir.rglob("*.wandb"))) == values["track"]
    if name == "sac_continuous":
        alphas = {row["alpha"] for row in losses}
        assert len(alphas) == (3 if values["autotune"] else 1)


COUNTS = [  # total_timesteps, learning_starts, train_frequency, gradient_steps
    (100, 60, 1, 1),
    (20, 0, 1, 1),
    (100, 61, 7, 3),
    (100, 63, 7, 1),
    (50, 60, 1, 1),
]


@pytest.fixture
def updates(script, monkeypatch) -> list:
    """(environment steps so far, gradient_step, batch, did the actor change) of every update; on COUNTER."""
    Counter.history.clear()
    made, update = [], script.Agent.update

    def noting(self, batch, gradient_step):
        before = [parameter.clone() for parameter in self.actor.parameters()]
        metrics = update(self, batch, gradient_step)
        changed = not all(map(torch.equal, before, self.actor.parameters()))
        made.append((len(Counter.history), gradient_step, batch, changed))
        return metrics

    monkeypatch.setattr(script.Agent, "update", noting)
    return made


@pytest.mark.parametrize("total, starts, frequency, gradient_steps", COUNTS)
def test_when_gradient_steps_are_taken(script, total, starts, frequency, gradient_steps, tmp_path, updates):
    """After learning_starts, every train_frequency steps, gradient_steps updates, on fresh minibatches."""
    options = {"total_timesteps": total, "learning_starts": starts, "train_frequency": frequency}
    options |= {"gradient_steps": gradient_steps, "batch_size": 16, "log_frequency": 10}
    run_dir = quick_train(script, tmp_path / "run", **options)
    phases = [step for step in range(1, total + 1) if step > starts and step % frequency == 0]
    wanted = [step for step in phases for _ in range(gradient_steps)]
    assert [step for step, *_ in updates] == wanted
    assert [number for _, number, *_ in updates] == list(range(1, len(wanted) + 1))
    assert all(len(batch.rewards) == 16 for _, _, batch, _ in updates)
    if total > 50:  # the first batches of a nearly empty buffer may well be equal
        assert not any(torch.equal(a[2].rewards, b[2].rewards) for a, b in pairwise(updates))

    logged = list(range(10, total + 1, 10))
    assert [row["global_step"] for row in rows(run_dir / "timing.csv")] == logged
    if phases:
        losses = [row["global_step"] for row in rows(run_dir / "losses.csv")]
        assert losses == [step for step in logged if step >= phases[0]]
    else:
        assert not (run_dir / "losses.csv").exists() or not (run_dir / "losses.csv").read_text()


@pytest.mark.parametrize("script", [importlib.import_module("td3_continuous")], ids=["td3_continuous"])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_policy_delay_counts_gradient_steps(script, period, tmp_path, updates):
    """TD3's actor moves at every policy_frequency-th update, not environment step."""
    quick_train(script, tmp_path / "run", train_frequency=2, gradient_steps=3, policy_frequency=period)
    assert len(updates) == 105
    assert [changed for *_, changed in updates] == [number % period == 0 for _, number, _, _ in updates]


# ---- The record ----


def test_columns_of_the_record(script, tmp_path, updates, monkeypatch):
    """All that ALGORITHMS.md promises is there, global_step first, and the columns agree with each other."""
    agents, update = [], script.Agent.update

    def noting(self, *arguments):
        agents.append(self)
        return update(self, *arguments)

    monkeypatch.setattr(script.Agent, "update", noting)
    run_dir = quick_train(
        script, tmp_path / "run", total_timesteps=120, buffer_size=100, eval_frequency=40, eval_episodes=3
    )
    for name in (*RECORD, "timing.csv"):
        assert (run_dir / name).read_text().startswith("global_step,"), name
    assert rows(run_dir / "episodes.csv")[0].keys() == {"global_step", "episodic_return", "episodic_length"}

    losses = rows(run_dir / "losses.csv")
    assert losses[0].keys() == LOSSES[script.__name__] | {"global_step"}
    assert [row["buffer_size"] for row in losses] == [80, 100, 100]
    # The last row is of the last update, whose gradients are still there.
    for name, networks in {"actor": ["actor"], "q": ["qf1", "qf2"]}.items():
        parameters = [
            p
            for network in networks
            if hasattr(agents[-1], network)
            for p in getattr(agents[-1], network).parameters()
        ]
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters))
        assert norm > 0
        assert losses[-1][f"{name}_gradient_norm"] == pytest.approx(norm, rel=1e-5)

    for row in rows(run_dir / "evaluations.csv"):
        returns = [row[f"return_{episode}"] for episode in range(3)]
        assert row["episodic_return"] == pytest.approx(statistics.fmean(returns))
        assert row["episodic_return_std"] == pytest.approx(statistics.pstdev(returns))
        assert len(row) == 6

    timing = rows(run_dir / "timing.csv")
    assert timing[0].keys() == {"global_step", "SPS", "elapsed"}
    for before, after in pairwise(timing):
        assert after["SPS"] == pytest.approx(20 / (after["elapsed"] - before["elapsed"]))


def test_args_json_says_what_was_run(script, tmp_path):
    """args.json holds every argument, the versions of the libraries, the device and the commit."""
    run_dir = quick_train(script, tmp_path / "run", total_timesteps=10, seed=5, gamma=0.875)
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["args"].keys() == {field.name for field in dataclasses.fields(script.Args)}
    assert saved["args"]["seed"] == 5
    assert saved["args"]["gamma"] == 0.875
    assert script.Args(**saved["args"]).run_dir == str(run_dir)
    for library in ("torch", "gymnasium", "mujoco", "numpy"):
        version, _, _ = saved["versions"][library].partition("+")  # torch adds +cu130 where it can use CUDA
        assert version == importlib.metadata.version(library).partition("+")[0]
    assert saved["device"]
    assert "git_commit" in saved
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert saved["git_commit"].startswith(head.stdout.strip())


def test_an_empty_buffer_takes_no_memory(script, tmp_path, monkeypatch):
    """A million of Humanoid's transitions, 3 GB, take next to no memory and no disk before they are there."""
    statm = Path("/proc/self/statm")
    if not statm.exists() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 4e9:
        pytest.skip("this needs Linux and 4 GB of memory")
    made, make = [], script.ReplayBuffer  # kept, for a buffer that is gone takes no memory either
    monkeypatch.setattr(script, "ReplayBuffer", lambda *sizes: made.append(make(*sizes)) or made[-1])

    def resident() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    options = {
        "env_id": "Humanoid-v4",
        "buffer_size": 1_000_000,
        "total_timesteps": 30,
        "learning_starts": 20,
    }
    run_dir = quick_train(script, tmp_path / "run", **options)
    assert len(made) == 1
    assert resident() - before < 300e6
    assert (run_dir / "checkpoint.pt").stat().st_size < 10e6


# ---- The terminal ----


def test_a_log_file_gets_plain_lines(tmp_path):
    """Not on a terminal: a banner, a line per log_frequency, a last line with the folder."""
    options = "--env-id Hopper-v4 --total-timesteps 300 --learning-starts 200 --log-frequency 100"
    options += " --eval-frequency 100 --run-dir some/where"
    done = run("td3_continuous", *options.split(), *QUICK, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\r" not in done.stdout
    banner, *lines, last = done.stdout.splitlines()
    size = 4 * 1000 * (11 + 3 + 1 + 11 + 1)  # float32: s, a, r, s', d
    for fact in ("Hopper-v4", "cpu", "11", "3", "8", f"{size:,} bytes"):
        assert re.search(rf"(?<![\w,]){fact}\b", banner), (fact, banner)
    assert len(lines) == 3
    for line, step in zip(lines, (100, 200, 300), strict=True):
        assert re.match(rf"step {step}: [\d,]+ steps/s, \d+:\d\d left, ", line), line
        assert re.search(r"return -?\d+\.\d, evaluation -?\d+\.\d$", line), line
    assert "some/where" in last


def test_a_terminal_gets_a_progress_bar(tmp_path):
    """On a terminal: one bar with steps/s, the time left, the last episode's and evaluation's return."""
    options = "--env-id InvertedPendulum-v4 --total-timesteps 1500 --learning-starts 1200 --log-frequency 100"
    options += " --eval-frequency 300 --run-dir here"
    command = [sys.executable, str(ROOT / "ddpg_continuous.py"), *options.split(), *QUICK]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = subprocess.Popen(command, cwd=tmp_path, stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(terminal)
    assert process.wait(60) == 0
    text = shown.decode()
    frames = [frame for frame in text.split("\r") if "%|" in frame]
    assert len(frames) >= 3
    assert any(re.search(r"\d+/1500 \[\d\d:\d\d<\d\d:\d\d", frame) for frame in frames)
    assert any(re.search(r"[\d.]+ ?k?steps?/s", frame) for frame in frames)
    assert re.search(r"return=[\d.]+.*evaluation=[\d.]+", frames[-1])
    assert "step 100:" not in text
    assert "here" in text.strip().splitlines()[-1]


# ---- Weights & Biases ----


class FakeWandb(types.ModuleType):
    """Stands for wandb: notes what is logged, or fails where it is told to."""

    def __init__(self, failing: str = ""):
        super().__init__("wandb")
        self.failing, self.run, self.logged, self.options = failing, None, [], {}
        self.Video = str

    def init(self, **options):
        if self.failing == "init":
            raise ConnectionError("the login was refused")
        self.options = options
        self.run = types.SimpleNamespace(id=options.get("id") or "0a1b2c3d")
        return self.run

    def log(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))
        if self.failing == "log" and len(self.logged) == 3:
            raise ConnectionError("the line is cut")


def test_wandb_mirrors_the_csv_files_under_cleanrls_names(script, tmp_path, monkeypatch):
    """Every figure of the CSV files arrives in the order of the steps, under CleanRL's name if it has one."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {"eval_frequency": 40, "eval_episodes": 2, "wandb_project_name": "ours", "wandb_entity": "us"}
    run_dir = quick_train(script, tmp_path / "run", track=True, **options)
    assert fake.options["project"] == "ours"
    assert fake.options["entity"] == "us"
    assert fake.options["config"] == json.loads((run_dir / "args.json").read_text())["args"]

    steps = [step for step, _ in fake.logged]
    assert steps == sorted(steps)  # wandb drops what comes late
    for name, prefix in {
        "episodes": "charts",
        "timing": "charts",
        "evaluations": "eval",
        "losses": "losses",
    }.items():
        for row in rows(run_dir / f"{name}.csv"):
            step = row.pop("global_step")
            wanted = {f"{prefix}/{key}": value for key, value in row.items()}
            assert any(
                step == at and wanted.items() <= metrics.items() and metrics["global_step"] == step
                for at, metrics in fake.logged
            ), (name, step)
    names = {name for _, metrics in fake.logged for name in metrics}
    cleanrl = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    cleanrl |= {"losses/qf1_values", "losses/qf1_loss", "losses/actor_loss"}
    if script.__name__ != "ddpg_continuous":
        cleanrl |= {"losses/qf2_values", "losses/qf2_loss"}
    if script.__name__ == "sac_continuous":
        cleanrl |= {"losses/alpha", "losses/alpha_loss"}
    assert cleanrl <= names


@pytest.mark.parametrize("failing", ["import", "init", "log"])
def test_a_failing_wandb_costs_nothing(script, failing, tmp_path, monkeypatch, capsys):
    """Missing, refusing to start or failing later, wandb is given up with one message."""
    plain = quick_train(script, tmp_path / "plain", eval_frequency=40, eval_episodes=2)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "wandb", None if failing == "import" else FakeWandb(failing))
    tracked = quick_train(script, tmp_path / "tracked", eval_frequency=40, eval_episodes=2, track=True)
    output = capsys.readouterr()
    assert (output.out + output.err).count("Weights & Biases") == 1
    assert record(tracked) == record(plain)
    assert len(rows(tracked / "timing.csv")) == 6


def test_a_failing_wandb_costs_nothing_from_the_command_line(tmp_path, monkeypatch):
    """The same for a wandb found on the path that raises something of its own making."""
    (tmp_path / "wandb.py").write_text(
        "class Refused(Exception): pass\nrun = None\ndef init(**options): raise Refused('no account')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = "--env-id Pendulum-v1 --total-timesteps 450 --learning-starts 430 --log-frequency 50 --track"
    done = run(
        "ddpg_continuous", *options.split(), *QUICK, "--eval-frequency", 0, "--run-dir", "run", cwd=tmp_path
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Weights & Biases") == 1
    assert [row["global_step"] for row in rows(tmp_path / "run" / "episodes.csv")] == [200, 400]
    assert rows(tmp_path / "run" / "losses.csv")[-1]["global_step"] == 450


# ---- Alone, killed, broken ----


def test_a_script_copied_alone_runs(script, tmp_path, monkeypatch):
    """One file in an empty folder, on a machine without Git, trains into the folder named by default."""
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    options = "--env-id Pendulum-v1 --seed 3 --total-timesteps 210 --learning-starts 200 --log-frequency 10"
    command = [sys.executable, f"{script.__name__}.py", *options.split(), *QUICK, "--eval-frequency", "210"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"Pendulum-v1__{script.__name__}__3__\d{{10}}", run_dir.name)
    assert [row["global_step"] for row in rows(run_dir / "episodes.csv")] == [200]
    assert [row["global_step"] for row in rows(run_dir / "losses.csv")] == [210]
    assert [row["global_step"] for row in rows(run_dir / "evaluations.csv")] == [210]
    assert (run_dir / "checkpoint.pt").exists()
    assert str(Path("runs") / run_dir.name) in done.stdout.splitlines()[-1]


def test_a_killed_run_leaves_whole_rows(tmp_path):
    """SIGKILL costs nothing that was reported before it, and leaves no row in part."""
    options = "--env-id InvertedPendulum-v4 --learning-starts 20 --log-frequency 1 --eval-frequency 50"
    options += " --run-dir run"
    command = [sys.executable, str(ROOT / "sac_continuous.py"), *options.split(), *QUICK]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    reported = 0
    for line in process.stdout:
        if line.startswith("step "):
            reported = int(line.split()[1].strip(":").replace(",", ""))
        if reported == 130:
            process.kill()  # the lines that it had already printed are still read
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == -signal.SIGKILL
    for name, first in {"timing.csv": 1, "losses.csv": 21}.items():
        text = (tmp_path / "run" / name).read_text()
        assert text.endswith("\n")
        steps = [row["global_step"] for row in rows(tmp_path / "run" / name)]
        assert steps == list(range(first, first + len(steps)))
        assert steps[-1] >= reported >= 130
    assert [row["global_step"] for row in rows(tmp_path / "run" / "evaluations.csv")][:2] == [50, 100]
    episodes = rows(tmp_path / "run" / "episodes.csv")
    assert sum(row["episodic_length"] for row in episodes) == episodes[-1]["global_step"]
    assert episodes[-1]["global_step"] > 100


class Broken(Steady):
    """Steady, until a number is not finite: a step's observation or reward, or a reset's observation."""

    def __init__(self, what: str, value: float, when: int, render_mode=None):
        super().__init__()
        self.what, self.value, self.when, self.taken = what, value, when, 0

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        if self.what == "reset" and self.taken >= self.when:
            observation[0] = self.value
        return observation, info

    def step(self, action):
        observation, reward, *end = super().step(action)
        self.taken += 1
        if self.taken == self.when and self.what == "observation":
            observation[0] = self.value
        if self.taken == self.when and self.what == "reward":
            reward = self.value
        return observation, reward, *end


def stops(script, run_dir: Path, at: tuple[int, ...], quantity: str, **changes) -> None:
    """Checks that training stops at one of these steps, names this quantity, and leaves its record whole."""
    with pytest.raises(FloatingPointError) as stopped:
        quick_train(script, run_dir, log_frequency=1, **changes)
    message = str(stopped.value)
    assert re.search(rf"step ({'|'.join(map(str, at))})\b", message), message
    assert re.search(rf"\b{quantity}", message), message
    assert "\n" not in message
    for name in ("episodes.csv", "timing.csv", "losses.csv"):
        if (run_dir / name).stat().st_size:
            table = rows(run_dir / name)
            assert table[-1]["global_step"] in range(at[0] - 7, at[-1] + 1), (
                name
            )  # an episode has up to 7 steps
            first_learned = [row for row in table if row["global_step"] > 62]  # TD3's actor waits
            assert all(math.isfinite(value) for row in first_learned for value in row.values()), name
    assert rows(run_dir / "timing.csv")[-1]["global_step"] >= at[0] - 1
    assert rows(run_dir / "episodes.csv")


@pytest.mark.parametrize("what", ["observation", "reward", "reset"])
@pytest.mark.parametrize("value, when", [(math.nan, 12), (math.nan, 72), (math.inf, 72), (-math.inf, 12)])
def test_a_broken_environment_stops_the_run(script, what, value, when, tmp_path):
    """NaN and ±inf from the environment stop the run at that step; from a reset, by the next."""
    env_id = register(Broken, kwargs={"what": what, "value": value, "when": when})
    quantity, at = ("observation", (when, when + 1)) if what == "reset" else (what, (when,))
    stops(script, tmp_path / "run", at, quantity, env_id=env_id)


@pytest.mark.parametrize("loss", ["critic_loss", "actor_loss", "alpha_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_stops_the_run(script, loss, value, tmp_path, monkeypatch):
    """A loss that is not finite stops the run at that step."""
    if not hasattr(script, loss):
        pytest.skip("this algorithm has no such loss")
    function, at = getattr(script, loss), []
    Counter.history.clear()

    def broken(*arguments):
        result = function(*arguments)
        if len(Counter.history) < 75:
            return result
        at.append(len(Counter.history))
        return (result[0] * value, *result[1:]) if isinstance(result, tuple) else result * value

    monkeypatch.setattr(script, loss, broken)
    with pytest.raises(FloatingPointError) as stopped:
        quick_train(script, tmp_path / "run", log_frequency=1)
    assert f"step {at[0]}:" in str(stopped.value)
    assert {"critic_loss": "qf1_loss"}.get(loss, loss) in str(stopped.value)
    assert rows(tmp_path / "run" / "losses.csv")[-1]["global_step"] == at[0] - 1
    assert all(math.isfinite(value) for value in rows(tmp_path / "run" / "losses.csv")[-1].values())


@pytest.mark.parametrize(
    "network", ["actor", "actor_target", "qf1", "qf2", "qf1_target", "qf2_target", "log_alpha"]
)
@pytest.mark.parametrize("when", [75, 130])
def test_a_broken_parameter_stops_the_run(script, network, when, tmp_path, monkeypatch):
    """A NaN in any network stops the run by the next step, and named; after the last step as well.

    Otherwise the last checkpoint would hold it, and the run would claim to have ended well.
    """
    update = script.Agent.update
    Counter.history.clear()
    if not hasattr(script.Agent(4, 2, script.Args(hidden_dim=8)), network):
        pytest.skip("this algorithm has no such network")

    def breaking(self, *arguments):
        metrics = update(self, *arguments)
        if len(Counter.history) == when:
            part = getattr(self, network)
            parameter = part if isinstance(part, torch.nn.Parameter) else next(part.parameters())
            parameter.data.view(-1)[0] = math.nan
        return metrics

    monkeypatch.setattr(script.Agent, "update", breaking)
    stops(script, tmp_path / "run", (when, when + 1), network, env_id=COUNTER)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)["agent"]
        assert all(values.isfinite().all() for values in saved.values())


def test_a_broken_actor_is_not_evaluated(script, tmp_path, monkeypatch):
    update = script.Agent.update

    def breaking(self, batch, gradient_step):
        metrics = update(self, batch, gradient_step)
        if gradient_step == 10:  # at step 70
            next(self.actor.parameters()).data.view(-1)[0] = math.nan
        return metrics

    monkeypatch.setattr(script.Agent, "update", breaking)
    stops(script, tmp_path / "run", (70,), "actor", env_id=COUNTER, eval_frequency=35)
    assert [row["global_step"] for row in rows(tmp_path / "run" / "evaluations.csv")] == [35]


class Large(Steady):
    """Finite observations whose sum their own type cannot hold."""

    def __init__(self, render_mode=None):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 1000, (200,), np.float16)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(200, 400, np.float16), {}

    def step(self, action):
        return np.full(200, 400, np.float16), *super().step(action)[1:]


def test_large_observations_are_finite(script, tmp_path):
    quick_train(script, tmp_path / "run", env_id=register(Large))


class Blind(Steady):
    """One that cannot be drawn, and says so with an error that refuses a task at the start."""

    def __init__(self, render_mode=None):
        super().__init__()
        if render_mode:
            raise ImportError("no viewer")


def test_a_task_that_cannot_be_drawn_is_trained(script, tmp_path, capfd):
    run_dir = quick_train(
        script, tmp_path / "run", env_id=register(Blind), capture_video=True, video_frequency=50
    )
    assert (run_dir / "checkpoint.pt").exists()
    assert "no viewer" in capfd.readouterr().err


def test_a_signal_during_the_last_evaluation_comes_too_late(script, tmp_path, monkeypatch):
    """The run is finished, says so by its exit status, and leaves no signal handlers."""
    evaluate = script.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(script, "evaluate", interrupted)
    quick_train(script, tmp_path / "run", eval_frequency=130)
    assert len(rows(tmp_path / "run" / "evaluations.csv")) == 1
    with process_as_it_was():
        args = script.Args(env_id=COUNTER, total_timesteps=9, batch_size=8, buffer_size=99, cuda=False)
        args.run_dir, args.threads = str(tmp_path / "second"), 1
        script.train(args)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


BROKEN = """
import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv


class Broken(PendulumEnv):
    steps = 0

    def step(self, action):
        self.steps += 1
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if self.steps == 70 else reward, *rest


gym.register("Broken-v0", Broken, max_episode_steps=20)
"""


def test_a_broken_environment_from_the_command_line(tmp_path, monkeypatch):
    """The process ends with status 1 and one line that names step and quantity; the CSV files are whole."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = "--env-id broken:Broken-v0 --total-timesteps 100 --learning-starts 50 --log-frequency 10"
    done = run(
        "td3_continuous", *options.split(), *QUICK, "--eval-frequency", 60, "--run-dir", "run", cwd=tmp_path
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "step 70" in done.stderr
    assert "reward" in done.stderr
    assert [row["global_step"] for row in rows(tmp_path / "run" / "episodes.csv")] == [20, 40, 60]
    assert [row["global_step"] for row in rows(tmp_path / "run" / "losses.csv")] == [60]
    assert [row["global_step"] for row in rows(tmp_path / "run" / "evaluations.csv")] == [60]
