"""Training: seeds, settings, when it learns, the record of a run, its terminal, wandb, and broken numbers.

The small environments are those of test_environment. What all three scripts share is tested on one.
"""

import dataclasses
import io
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import types
from itertools import pairwise

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_environment import COUNTER, STEADY, Counter, Steady, quick_train, rows, steps

import ddpg_continuous as ddpg
import sac_continuous as sac
import td3_continuous as td3

# ---- Seeds and settings ----


def test_the_seed_decides_everything(tmp_path):
    """Whatever was drawn before. Another one changes networks, noise, random actions and starts."""
    records, states = [], []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        np.random.seed(number)
        options = {"env_id": "Pendulum-v1", "total_timesteps": 210, "seed": seed, "eval_frequency": 100}
        run_dir = quick_train(sac, tmp_path / str(number), eval_episodes=2, **options)
        names = ("episodes.csv", "evaluations.csv", "losses.csv", "policy.pt")
        records.append([(run_dir / name).read_bytes() for name in names])
        state = torch.load(run_dir / "checkpoint.pt")
        observations, actions, *_ = state["buffer"]["transitions"]
        states.append([*state["agent"].values(), state["run"]["generator"], observations[0], actions[0]])
    assert records[0] == records[1]
    assert not any(map(torch.equal, states[0], states[2]))


@pytest.mark.parametrize("threads, deterministic", [(2, True), (1, False)])
def test_settings_of_pytorch(threads, deterministic, tmp_path):
    """Those of the flags; and numbers too small for all their digits, which are slow, count as 0."""
    torch.use_deterministic_algorithms(not deterministic)
    can_flush = torch.set_flush_denormal(False)
    options = {"threads": threads, "torch_deterministic": deterministic}
    quick_train(ddpg, tmp_path / "run", total_timesteps=5, **options)
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not can_flush or torch.tensor([1e-39]).mul(0.5).item() == 0


# ---- When it learns ----


@pytest.mark.parametrize(
    "total, starts, frequency, gradient_steps", [(100, 60, 1, 1), (20, 0, 1, 1), (100, 61, 7, 3)]
)
def test_when_it_explores_and_learns(total, starts, frequency, gradient_steps, tmp_path, monkeypatch):
    """After learning_starts the agent explores, and every train_frequency steps there are gradient_steps
    updates, counted from 1 on, each on a minibatch of its own."""
    Counter.history.clear()
    explored, updates, explore, update = [], [], ddpg.Agent.explore, ddpg.Agent.update

    def noting_explore(self, observation):
        explored.append(len(Counter.history) + 1)
        return explore(self, observation)

    def noting_update(self, batch, gradient_step):
        updates.append((len(Counter.history), gradient_step, batch.rewards.tolist()))
        return update(self, batch, gradient_step)

    monkeypatch.setattr(ddpg.Agent, "explore", noting_explore)
    monkeypatch.setattr(ddpg.Agent, "update", noting_update)
    options = {"total_timesteps": total, "learning_starts": starts, "train_frequency": frequency}
    quick_train(ddpg, tmp_path / "run", **options, gradient_steps=gradient_steps, batch_size=16)
    assert explored == list(range(starts + 1, total + 1))
    phases = [step for step in explored if step % frequency == 0]
    assert [step for step, *_ in updates] == [step for step in phases for _ in range(gradient_steps)]
    assert [number for _, number, _ in updates] == list(range(1, len(updates) + 1))
    assert all(len(rewards) == 16 for *_, rewards in updates)
    if starts > 0:  # the first batches of a nearly empty buffer may well be equal
        assert not any(one == other for (*_, one), (*_, other) in pairwise(updates))


# ---- The record ----


def test_losses_csv_has_the_latest_of_each_metric(tmp_path, monkeypatch):
    """Learning starts just before the first row, when a delayed actor has not moved yet."""

    def update(self, batch, gradient_step):
        metrics = {"qf1_loss": torch.tensor(gradient_step + 0.5)}
        if gradient_step % 2 == 0:
            metrics |= {name: torch.tensor(gradient_step) for name in ("actor_loss", "actor_gradient_norm")}
        return metrics

    monkeypatch.setattr(td3.Agent, "update", update)
    run_dir = quick_train(td3, tmp_path / "run", learning_starts=79)
    for row, step in zip(rows(run_dir / "losses.csv"), (80, 100, 120), strict=True):
        actor = math.nan if step == 80 else step - 80
        wanted = {"qf1_loss": step - 78.5, "actor_loss": actor, "actor_gradient_norm": actor}
        assert row == pytest.approx({"global_step": step} | wanted, nan_ok=True)


def test_the_clock_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Each process takes half a second for each of its first 30 steps, and then twice as long."""
    run_dir = tmp_path / "run"
    for origin, total in ((1000, 50), (9000, 110)):
        Counter.history.clear()

        def clock(origin=origin) -> float:
            taken = len(Counter.history)
            return origin + max(0.5 * taken, taken - 15)

        monkeypatch.setattr(ddpg, "time", types.SimpleNamespace(time=lambda: 0, perf_counter=clock))
        quick_train(ddpg, run_dir, total_timesteps=total, resume=True)
    timing = rows(run_dir / "timing.csv")
    assert [row["global_step"] for row in timing] == [20, 40, 60, 80, 100]
    assert [row["elapsed"] for row in timing] == [10, 25, 40, 50, 70]
    assert [row["SPS"] for row in timing] == pytest.approx([2, 20 / 15, 2, 2, 1])


def test_args_json_says_what_was_run(tmp_path):
    """Every argument, the versions of the libraries, the device and the commit."""
    run_dir = quick_train(ddpg, tmp_path / "run", total_timesteps=10, seed=5, gamma=0.875)
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["args"].keys() == {field.name for field in dataclasses.fields(ddpg.Args)}
    assert ddpg.Args(**saved["args"]).run_dir == str(run_dir)
    assert (saved["args"]["seed"], saved["args"]["gamma"]) == (5, 0.875)
    for library in (torch, gym, mujoco, np):
        assert saved["versions"][library.__name__] == library.__version__
    assert saved["device"] == "cpu"
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True)
        assert saved["git_commit"].removesuffix("-dirty") == head.strip()


# ---- The terminal ----


def test_a_log_file_gets_plain_lines(tmp_path, capfd):
    """The task and the folder; a line per log_frequency, with the time left once it learns; the folder."""
    run_dir = quick_train(ddpg, tmp_path / "run", eval_frequency=70, eval_episodes=1)
    output = capfd.readouterr()
    assert output.err == ""
    first, *lines, last = output.out.splitlines()
    assert all(fact in first for fact in (COUNTER, "cpu", str(run_dir)))
    assert str(run_dir) in last
    for line, step in zip(lines, range(20, 140, 20), strict=True):
        assert re.match(rf"step {step}: \d+ steps/s, ", line)
        assert bool(re.search(r"\d\d:\d\d left", line)) == (step > 60)
        assert ("random actions" in line) == (step <= 60)
    for name in ("episodes", "evaluations"):
        row = [row for row in rows(run_dir / f"{name}.csv") if row["global_step"] <= 120][-1]
        assert f", {name} {row['episodic_return']:.1f}" in lines[-1]


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, capsys):
    """With steps and speed, the time left once it learns, and the latest returns."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    quick_train(ddpg, tmp_path / "run", eval_frequency=70, eval_episodes=1)
    first, *_, last = terminal.getvalue().split("\r")[1:]
    assert re.search(r"\b0/130 \[.*random actions", first)
    assert re.search(r"\d+/130 \[\d\d:\d\d<\d\d:\d\d, +\S+, episodes=\S+, evaluations=", last)
    assert "step 20:" not in capsys.readouterr().out


@pytest.mark.parametrize("total, told", [(60, True), (61, False)])
def test_a_run_too_short_to_learn_says_so(total, told, tmp_path, capsys):
    quick_train(ddpg, tmp_path / "run", total_timesteps=total)
    lines = [line for line in capsys.readouterr().out.splitlines() if "--learning-starts" in line]
    assert len(lines) == told


# ---- Weights & Biases ----


def test_wandb_mirrors_the_csv_files_under_cleanrls_names(tmp_path, monkeypatch):
    """Every number of the CSV files, in the order of the steps; a resumed run goes on under the same id."""
    begun, logged = [], []

    def init(**options):
        begun.append(options)
        log = lambda metrics, step: logged.append((step, dict(metrics)))  # noqa: E731
        return types.SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    options = {"eval_frequency": 40, "eval_episodes": 2, "wandb_project_name": "ours", "wandb_entity": "us"}
    for total in (100, 130):
        options |= {"total_timesteps": total, "resume": True}
        run_dir = quick_train(sac, tmp_path / "run", track=True, **options)
    assert [(call["project"], call["entity"]) for call in begun] == [("ours", "us")] * 2
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[1]["resume"] == "allow"
    assert begun[1]["config"] == json.loads((run_dir / "args.json").read_text())["args"]

    assert [step for step, _ in logged] == sorted(step for step, _ in logged)  # wandb drops what comes late
    arrived = {}
    for step, metrics in logged:
        arrived |= {(step, name): float(value) for name, value in metrics.items()}
    prefixes = {"episodes": "charts", "timing": "charts", "evaluations": "eval", "losses": "losses"}
    for name, prefix in prefixes.items():
        for row in rows(run_dir / f"{name}.csv"):
            for column, value in row.items():
                assert arrived[row["global_step"], f"{prefix}/{column}"] == value


def test_wandb_offline_needs_no_account(tmp_path, monkeypatch):
    """The package itself, and not only what the last test takes it for."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = quick_train(ddpg, tmp_path / "run", total_timesteps=40, track=True)
    sys.modules["wandb"].finish()
    assert list(run_dir.rglob("*.wandb"))


# ---- Alone, and broken ----


def test_a_script_copied_alone_runs(tmp_path, monkeypatch):
    """One file in an empty folder, without Git, trains quietly into the folder that is named by default."""
    shutil.copy(ROOT / "sac_continuous.py", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    options = (
        "--env-id HalfCheetah-v4 --seed 3 --total-timesteps 110 --learning-starts 100 --log-frequency 10"
    )
    options += " --hidden-dim 8 --batch-size 8 --eval-frequency 0 --no-cuda"
    command = [sys.executable, "sac_continuous.py", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"HalfCheetah-v4__sac_continuous__3__\d{10}", run_dir.name)
    assert steps(run_dir / "losses.csv") == [110]
    assert {"checkpoint.pt", "policy.pt"} <= {path.name for path in run_dir.iterdir()}


@pytest.mark.parametrize("what, number, reward", [("observation", math.nan, 0), ("reward", 1, -math.inf)])
def test_a_broken_environment_stops_the_run(what, number, reward, tmp_path, monkeypatch):
    """From the command line, with one line and a status that is not 0; what was learned before is kept."""
    step, actions = Steady.step, []

    def breaking(self, action):
        actions.append(action)
        if len(actions) == 72:
            return np.float32([number]), reward, False, False, {}
        return step(self, action)

    options = f"--env-id {STEADY} --total-timesteps 130 --learning-starts 60 --log-frequency 1 --run-dir run"
    options += " --hidden-dim 8 --batch-size 8 --eval-frequency 0 --no-cuda --checkpoint-frequency 70"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Steady, "step", breaking)
    monkeypatch.setattr(sys, "argv", ["ddpg_continuous.py", *options.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "ddpg_continuous.py"), run_name="__main__")
    assert re.fullmatch(rf"stopped: .*\b{what}\b.*", end.value.code)  # which Python prints, with status 1
    assert steps(tmp_path / "run" / "timing.csv") == list(range(1, 72))
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["buffer"]["added"] == 70


def test_a_broken_action_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ddpg.Agent, "explore", lambda self, observation: np.float32([0, math.nan]))
    with pytest.raises(FloatingPointError, match="action"):
        quick_train(ddpg, tmp_path / "run")


@pytest.mark.parametrize("network", ["actor", "qf2_target", "log_alpha"])
def test_no_checkpoint_holds_a_broken_parameter(network, tmp_path, monkeypatch):
    """The run stops where it would be written; from the last sound one it goes on as if nothing had been."""
    update, options = sac.Agent.update, {"env_id": "Pendulum-v1", "checkpoint_frequency": 20}

    def breaking(self, batch, gradient_step):
        metrics = update(self, batch, gradient_step)
        for name, parameter in self.named_parameters():
            if gradient_step == 40 and name.startswith(network):  # at step 100
                parameter.data.fill_(math.inf)
        return metrics

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=network):
        patch.setattr(sac.Agent, "update", breaking)
        quick_train(sac, tmp_path / "run", **options)
    whole = quick_train(sac, tmp_path / "whole", **options)
    resumed = quick_train(sac, tmp_path / "run", **options, resume=True)
    for name in ("policy.pt", "losses.csv"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
