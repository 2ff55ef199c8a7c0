"""Refusals: one line on stderr, exit status 2, no traceback, and nothing left behind.

Scripts run in this process, as from the command line.
"""

import dataclasses
import importlib
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, contents
from gymnasium import spaces
from test_environment import COUNTER, Anything, quick_train, register

import ddpg_continuous as ddpg

MAY_BE_ZERO = {"seed", "learning_starts", "gamma", "exploration_noise", "policy_noise", "noise_clip"}
MAY_BE_ZERO |= {"random_action_prob", "eval_frequency", "checkpoint_frequency", "target_entropy"}
MAY_BE_NEGATIVE = {"target_entropy"}
AT_MOST_ONE = {"gamma", "tau", "random_action_prob", "learning_rate", "policy_lr", "q_lr"}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capfd):
    """A function that runs a script in an empty folder, checks the form of the refusal, and returns it."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments, name: str = "ddpg_continuous", lines: int = 1) -> str:
        before = contents(tmp_path)
        capfd.readouterr()
        small = ["--env-id", COUNTER, "--total-timesteps", "10", "--no-cuda", "--run-dir", "run"]
        command = [f"{name}.py", *small, *map(str, arguments)]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", command)
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        assert end.value.code == 2
        output = capfd.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) <= lines, output.err
        assert contents(tmp_path) == before
        return output.err

    return refused


# ---- The task ----


@pytest.mark.parametrize("env_id", ["Hoper-v4", "Hopper-v9", "Hopper-v2", "no_such_module:A-v0", "a:b:c", ""])
def test_unknown_tasks(env_id, refusal):
    assert f"--env-id {env_id}" in refusal("--env-id", env_id)


ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "(2, 3)": spaces.Box(-1.0, 1.0, (2, 3)),
    "int64": spaces.Box(-3, 4, (2,), np.int64),
    "[inf 1.]": spaces.Box(np.float32([0, 0]), np.float32([np.inf, 1])),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_that_are_no_bounded_box_of_real_numbers(kind, refusal):
    line = refusal("--env-id", register(Anything, kwargs={"action_space": ACTIONS[kind]}))
    assert "--env-id" in line
    assert "actions" in line
    assert kind in line


def test_observations_that_cannot_be_flattened(refusal):
    space = spaces.Dict({"seen": spaces.Sequence(spaces.Discrete(2))})
    line = refusal("--env-id", register(Anything, kwargs={"observation_space": space}))
    assert "--env-id" in line
    assert "observations" in line


# ---- Numbers and flags ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_impossible_numbers(name, tmp_path, monkeypatch, capfd):
    """Numbers out of range, sizes and frequencies of zero, NaN and infinity, by the flag's name."""
    monkeypatch.chdir(tmp_path)
    script, refused = importlib.import_module(name), 0
    for field in dataclasses.fields(script.Args):
        kind, values = str(getattr(field.type, "__name__", field.type)), []
        if "float" in kind:
            values = [math.nan, math.inf, -math.inf]
        if "int" in kind or "float" in kind:
            values += [] if field.name in MAY_BE_NEGATIVE else [-1]
            values += [] if field.name in MAY_BE_ZERO else [0]
            values += [1.001] if field.name in AT_MOST_ONE else []
        for value in values:
            with pytest.raises(SystemExit, match="2"):
                script.train(script.Args(**{"cuda": False, "total_timesteps": 10, field.name: value}))
            line = capfd.readouterr().err
            assert f"--{field.name.replace('_', '-')} {value}" in line
            refused += 1
    assert refused > 40
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_at_the_edge_are_taken(name, tmp_path):
    """Zero means something for these; γ = 1 is an undiscounted task, τ = 1 a hard copy."""
    script = importlib.import_module(name)
    fields = vars(script.Args()).keys()
    zeros = dict.fromkeys(MAY_BE_ZERO & fields, 0)
    ones = dict.fromkeys(AT_MOST_ONE & fields, 1.0)
    for number, changes in enumerate((zeros, ones)):
        quick_train(script, tmp_path / str(number), total_timesteps=65, **changes)


def test_a_batch_larger_than_the_buffer(refusal, tmp_path):
    """More than can ever be stored is refused, with both numbers; as much as can be stored is not."""
    line = refusal("--batch-size", 65, "--buffer-size", 64)
    assert "--batch-size 65" in line
    assert "64 " in line
    quick_train(ddpg, tmp_path / "run", batch_size=64, buffer_size=64, total_timesteps=65)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(refusal):
    assert "--cuda" in refusal("--cuda")


@pytest.mark.parametrize(
    "name, flag",
    [("ddpg_continuous", "--n-envs"), ("sac_continuous", "--policy-noise"), ("td3_continuous", "--alpha")],
)
def test_unknown_flags(name, flag, refusal):
    """A flag that the script does not have, be it another algorithm's, is refused by name."""
    assert flag in refusal(flag, 3, name=name, lines=20)  # in a box that tyro draws


# ---- The run's folder ----


def test_a_folder_that_holds_a_run(tmp_path, refusal):
    """A second run into a run's folder is refused, whether the first has ended or not."""
    run_dir = quick_train(ddpg, tmp_path / "run", total_timesteps=65)
    for _ in range(2):
        line = refusal()
        assert "--run-dir run" in line
        assert "--resume" in line
        (run_dir / "checkpoint.pt").unlink(missing_ok=True)  # as a run that was killed early leaves it


@pytest.mark.parametrize("run_dir", ["file", "file/run"])
def test_a_folder_that_cannot_be_made(run_dir, tmp_path, refusal):
    (tmp_path / "file").write_text("mine")
    assert f"--run-dir {run_dir}" in refusal("--run-dir", run_dir)


def test_a_folder_without_a_run_is_used(tmp_path):
    """What lies in it is left alone."""
    (tmp_path / "notes.csv").write_text("mine")
    quick_train(ddpg, tmp_path, total_timesteps=10)
    assert (tmp_path / "args.json").exists()
    assert (tmp_path / "notes.csv").read_text() == "mine"


def test_no_folder_to_resume_in(refusal):
    assert "--run-dir" in refusal("--resume", "--run-dir", "")
