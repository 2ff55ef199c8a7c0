"""Training: seeds, settings, when it learns, the record of a run, its terminal, wandb, and broken numbers.

The small environments are those of test_environment. What all three scripts share is tested on one.
"""

import dataclasses
import importlib
import importlib.metadata
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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_environment import COUNTER, Counter, Steady, quick_train, register, rows, steps

import ddpg_continuous as ddpg
import sac_continuous as sac

RECORD = ("episodes.csv", "evaluations.csv", "losses.csv")  # the same bytes for the same seed
LOSSES = {"ddpg_continuous": {"qf1_values", "qf1_loss", "target_q", "actor_loss"}}  # columns of losses.csv
LOSSES["ddpg_continuous"] |= {"global_step", "q_gradient_norm", "actor_gradient_norm"}
LOSSES["td3_continuous"] = LOSSES["ddpg_continuous"] | {"qf2_values", "qf2_loss", "qf_loss"}
LOSSES["sac_continuous"] = LOSSES["td3_continuous"] | {"alpha", "alpha_loss", "entropy"}


def record(run_dir: Path) -> dict[str, bytes]:
    """The CSV files whose bytes depend on the seed alone."""
    return {name: (run_dir / name).read_bytes() for name in RECORD}


# ---- Seeds and settings ----


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


def test_the_seed_reaches_all_that_is_random(tmp_path):
    """The networks, the noise, the random actions, and where episodes start."""
    found = []
    for seed in (1, 2):
        options = {"env_id": "Pendulum-v1", "total_timesteps": 5, "seed": seed}
        run_dir = quick_train(ddpg, tmp_path / str(seed), **options)
        state = torch.load(run_dir / "checkpoint.pt")
        observations, actions, *_ = state["buffer"]["transitions"]
        found.append([*state["agent"].values(), state["run"]["generator"], observations[0], actions[0]])
    for one, two in zip(*found, strict=True):
        assert not torch.equal(one, two) or not one.any()  # the noise's own memory starts at 0


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


OWN = [("ddpg_continuous", {"ou_noise": True, "random_action_prob": 0.5})]
OWN += [("td3_continuous", {"clipped_double_q": False}), ("sac_continuous", {"autotune": False})]


@pytest.mark.parametrize("name, changes", OWN)
def test_each_algorithms_own_switches(name, changes, tmp_path):
    """A run learns with them turned; and α stays where it is told to."""
    run_dir = quick_train(importlib.import_module(name), tmp_path / "run", **changes)
    losses = rows(run_dir / "losses.csv")
    assert [row["global_step"] for row in losses] == [80, 100, 120]
    assert all(math.isfinite(value) for row in losses for value in row.values())
    if name == "sac_continuous":
        assert [row["alpha"] for row in losses] == pytest.approx([0.2] * 3)


# ---- When it learns ----


@pytest.fixture
def updates(script, monkeypatch) -> list:
    """(environment steps so far, gradient_step, batch, metrics) of every update; on COUNTER."""
    Counter.history.clear()
    made, update = [], script.Agent.update

    def noting(self, batch, gradient_step):
        metrics = update(self, batch, gradient_step)
        made.append((len(Counter.history), gradient_step, batch, metrics))
        return metrics

    monkeypatch.setattr(script.Agent, "update", noting)
    return made


@pytest.mark.parametrize("script", [ddpg], ids=["ddpg_continuous"])
@pytest.mark.parametrize(
    "total, starts, frequency, gradient_steps",
    [(100, 60, 1, 1), (20, 0, 1, 1), (100, 61, 7, 3), (100, 63, 7, 1), (50, 60, 1, 1)],
)
def test_when_gradient_steps_are_taken(
    script, total, starts, frequency, gradient_steps, tmp_path, updates, monkeypatch
):
    """After learning_starts the agent explores, and every train_frequency steps there are gradient_steps
    updates, counted from 1 on, each on a minibatch of its own."""
    explored, explore = [], script.Agent.explore

    def noting(self, observation):
        explored.append((len(Counter.history) + 1, explore(self, observation)))
        return explored[-1][1]

    monkeypatch.setattr(script.Agent, "explore", noting)
    options = {"total_timesteps": total, "learning_starts": starts, "train_frequency": frequency}
    quick_train(script, tmp_path / "run", **options, gradient_steps=gradient_steps, batch_size=16)
    phases = [step for step in range(1, total + 1) if step > starts and step % frequency == 0]
    wanted = [step for step in phases for _ in range(gradient_steps)]
    assert [step for step, *_ in updates] == wanted
    assert [number for _, number, *_ in updates] == list(range(1, len(wanted) + 1))
    assert all(len(batch.rewards) == 16 for _, _, batch, _ in updates)
    if starts > 0:  # the first batches of a nearly empty buffer may well be equal
        assert not any(torch.equal(a[2].rewards, b[2].rewards) for a, b in pairwise(updates))

    assert [step for step, _ in explored] == list(range(starts + 1, total + 1))
    for step, action in explored:
        _, _, received, _ = Counter.history[step - 1]
        np.testing.assert_allclose(received, [1 + 2 * action[0], 2.25 + 0.25 * action[1]], rtol=1e-6)


# ---- The record ----


def test_losses_csv_has_the_latest_of_each_metric(script, tmp_path, updates):
    """Learning starts just before the first row: TD3's actor has not moved yet."""
    run_dir = quick_train(script, tmp_path / "run", learning_starts=79)
    losses, latest = rows(run_dir / "losses.csv"), {}
    assert [row["global_step"] for row in losses] == [80, 100, 120]
    for step, gradient_step, _, metrics in updates:
        assert gradient_step == step - 79
        latest |= {name: float(value) for name, value in metrics.items()}
        for row in losses:
            if row["global_step"] == step:
                assert row.keys() == LOSSES[script.__name__]
                moved = {name: value for name, value in row.items() if not math.isnan(value)}
                assert moved == {"global_step": step} | latest
    assert all(math.isfinite(value) for value in losses[-1].values())
    if "qf_loss" in latest:
        assert row["qf_loss"] == pytest.approx((row["qf1_loss"] + row["qf2_loss"]) / 2)


def test_columns_of_the_record(tmp_path):
    run_dir = quick_train(ddpg, tmp_path / "run", eval_frequency=50, eval_episodes=2)
    columns = {path.name: path.read_text().split("\n")[0] for path in run_dir.glob("*.csv")}
    returns = "episodic_return,episodic_return_std,discounted_return,return_0,return_1"
    assert columns.pop("losses.csv").startswith("global_step,")
    assert columns == {
        "episodes.csv": "global_step,episodic_return,episodic_length",
        "evaluations.csv": f"global_step,{returns}",
        "timing.csv": "global_step,SPS,elapsed",
    }


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
    for library in ("torch", "gymnasium", "mujoco", "numpy"):
        version, _, _ = saved["versions"][library].partition("+")  # torch adds +cu130 where it can use CUDA
        assert version == importlib.metadata.version(library).partition("+")[0]
    assert saved["device"] == "cpu"
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True)
        assert saved["git_commit"].removesuffix("-dirty") == head.strip()


# ---- The terminal ----


def test_a_log_file_gets_plain_lines(tmp_path, capfd):
    """The task and the folder; a line per log_frequency, with the time left once it learns; the folder."""
    quick_train(ddpg, tmp_path / "run", eval_frequency=70, eval_episodes=1)
    output = capfd.readouterr()
    assert output.err == ""
    assert "\r" not in output.out
    first, *lines, last = output.out.splitlines()
    assert all(fact in first for fact in (COUNTER, "cpu", str(tmp_path / "run")))
    assert str(tmp_path / "run") in last
    assert len(lines) == 6
    for line, step in zip(lines, range(20, 140, 20), strict=True):
        assert re.match(rf"step {step}: \d+ steps/s, ", line)
        assert re.search(r"\d\d:\d\d left" if step > 60 else "random actions", line)
        assert ("left" in line) != ("random actions" in line)
    for name in ("episodes", "evaluations"):
        row = [row for row in rows(tmp_path / "run" / f"{name}.csv") if row["global_step"] <= 120][-1]
        assert f", {name} {row['episodic_return']:.1f}" in lines[-1]


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, capsys):
    """One bar with steps and speed, the time left once it learns, and the latest returns."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    quick_train(ddpg, tmp_path / "run", eval_frequency=70, eval_episodes=1)
    text = terminal.getvalue()
    bars = re.findall(r"(\d+)/130 \[\d\d:\d\d(<\d\d:\d\d|), +[\d.]+step/s(, random actions|)", text)
    assert {bool(left) for step, left, _ in bars if int(step) <= 60} == {False}
    assert all(bool(left) != bool(random) for _, left, random in bars)
    assert bars[-1][1]
    assert re.search(r"episodes=[\d.e+]+.*evaluations=[\d.e+]+", text)
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
    cleanrl = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/actor_loss"}
    cleanrl |= {f"losses/{qf}_{what}" for qf in ("qf1", "qf2") for what in ("values", "loss")}
    cleanrl |= {"losses/qf_loss", "losses/alpha", "losses/alpha_loss"}
    assert cleanrl <= {name for _, name in arrived}


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


class Broken(Steady):
    """Steady, until at step 72 a number is not finite."""

    def __init__(self, what: str, value: float):
        super().__init__()
        self.what, self.value, self.taken = what, value, 0

    def step(self, action):
        observation, reward, *ends = super().step(action)
        self.taken += 1
        if self.taken == 72 and self.what == "observation":
            observation[0] = self.value
        if self.taken == 72 and self.what == "reward":
            reward = self.value
        return observation, reward, *ends


@pytest.mark.parametrize("what, value", [("observation", math.nan), ("reward", -math.inf)])
def test_a_broken_environment_stops_the_run(what, value, tmp_path, monkeypatch):
    """From the command line, with one line and a status that is not 0; what was learned before is kept."""
    env_id = register(Broken, kwargs={"what": what, "value": value})
    options = f"--env-id {env_id} --total-timesteps 130 --learning-starts 60 --log-frequency 1 --run-dir run"
    options += " --hidden-dim 8 --batch-size 8 --eval-frequency 0 --no-cuda --checkpoint-frequency 70"
    monkeypatch.chdir(tmp_path)
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
