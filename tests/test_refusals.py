"""Refusals: one line on stderr, exit status 2, no traceback, and nothing left behind."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, run
from gymnasium import spaces
from test_environment import COUNTER, Anything, quick_train, register


@pytest.fixture
def refusal(tmp_path, monkeypatch, capfd):
    """A function that trains in an empty folder, checks the form of the refusal, and returns its line."""
    monkeypatch.chdir(tmp_path)

    def refused(script, **changes) -> str:
        before = contents(tmp_path)
        capfd.readouterr()
        options = {"env_id": COUNTER, "run_dir": "run", "cuda": False, "total_timesteps": 10} | changes
        with pytest.raises(SystemExit) as end:
            script.train(script.Args(**options))
        assert end.value.code == 2
        output = capfd.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1, output.err
        assert contents(tmp_path) == before
        return output.err.strip()

    return refused


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: the files' bytes, by their path."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ---- The task ----


def space(observations: spaces.Space | None = None, actions: spaces.Space | None = None) -> str:
    """The name of a task with these spaces."""
    return register(Anything, kwargs={"observation_space": observations, "action_space": actions})


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("Hoper-v4", ["Hoper", "did you mean", "Hopper"]),
        ("HalfCheeta-v4", ["HalfCheeta", "did you mean", "HalfCheetah"]),
        ("Hopper-v9", ["v9", "v4", "v5"]),
        ("Hopper-v2", ["Hopper-v2"]),
        ("Nowhere/Hopper-v4", ["Nowhere"]),
        ("no_such_module:Hopper-v4", ["no_such_module"]),
        ("a:b:c", ["a:b:c"]),
        ("", ["--env-id"]),
        ("Hopper v4", ["Hopper v4"]),
    ],
)
def test_unknown_tasks(script, env_id, words, refusal):
    """A name that Gymnasium does not know is refused, with near names where there are any."""
    line = refusal(script, env_id=env_id)
    assert "--env-id" in line
    assert all(word.lower() in line.lower() for word in words), line


ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
    "dictionary": spaces.Dict({"motor": spaces.Box(-1.0, 1.0, (2,))}),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "unbounded above": spaces.Box(np.float32([0, 0]), np.float32([np.inf, 1])),
    "unbounded below": spaces.Box(-np.inf, 0.0, (1,), np.float64),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_that_are_no_bounded_box(script, kind, refusal):
    """Discrete, composed and unbounded actions are refused as what they are."""
    line = refusal(script, env_id=space(actions=ACTIONS[kind]))
    assert "--env-id" in line
    assert "action" in line
    assert type(ACTIONS[kind]).__name__ in line


OBSERVATIONS = {
    "sequence": spaces.Sequence(spaces.Box(-1.0, 1.0, (2,))),
    "graph": spaces.Graph(spaces.Box(-1.0, 1.0, (2,)), None),
    "a sequence within": spaces.Dict({"seen": spaces.Sequence(spaces.Discrete(2))}),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_that_cannot_be_flattened(script, kind, refusal):
    """Observations of no fixed size are refused as what they are."""
    line = refusal(script, env_id=space(observations=OBSERVATIONS[kind]))
    assert "--env-id" in line
    assert "observation" in line
    assert type(OBSERVATIONS[kind]).__name__ in line


# ---- Numbers ----

MAY_BE_ZERO = {"seed", "learning_starts", "gamma", "exploration_noise", "policy_noise", "noise_clip"}
MAY_BE_ZERO |= {"random_action_prob", "eval_frequency", "checkpoint_frequency", "target_entropy"}
MAY_BE_NEGATIVE = {"target_entropy"}
AT_MOST_ONE = {"gamma", "tau", "random_action_prob", "learning_rate", "policy_lr", "q_lr"}


def impossible_numbers() -> list:
    """(script, argument, value) for each number of each script and each value that cannot be meant."""
    cases = []
    for name in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(name).Args):
            kind, values = str(getattr(field.type, "__name__", field.type)), []
            if "float" in kind:
                values = [math.nan, math.inf, -math.inf]
            if "int" in kind or "float" in kind:
                values += [] if field.name in MAY_BE_NEGATIVE else [-1]
                values += [] if field.name in MAY_BE_ZERO else [0]
                values += [1.001] if field.name in AT_MOST_ONE else []
                values += [1025] if field.name == "threads" else []
            cases += [
                pytest.param(name, field.name, value, id=f"{name}-{field.name}={value}") for value in values
            ]
    return cases


def test_impossible_numbers_are_many():
    """The next test's list holds what the numbers are for, so that it cannot run empty."""
    named = {case.values[1] for case in impossible_numbers()}
    assert {
        "gamma",
        "tau",
        "batch_size",
        "buffer_size",
        "hidden_dim",
        "train_frequency",
        "target_entropy",
    } <= named
    assert {"learning_rate", "policy_lr", "q_lr", "alpha", "policy_frequency", "random_action_prob"} <= named
    assert {"total_timesteps", "gradient_steps", "eval_episodes", "log_frequency", "threads", "seed"} <= named


@pytest.mark.parametrize("name, argument, value", impossible_numbers())
def test_impossible_numbers(name, argument, value, refusal):
    """Numbers out of range, sizes and frequencies of zero, NaN and inf are refused by the flag's name."""
    line = refusal(importlib.import_module(name), **{argument: value})
    assert f"--{argument.replace('_', '-')}" in line
    assert str(value) in line


@pytest.mark.parametrize("argument", sorted(MAY_BE_ZERO))
def test_numbers_at_the_edge_are_taken(script, argument, tmp_path):
    """Zero means something for these."""
    if argument not in vars(script.Args()):
        pytest.skip("another algorithm's argument")
    assert quick_train(script, tmp_path / "run", total_timesteps=65, **{argument: 0}).exists()


def test_one_is_in_range(script, tmp_path):
    """γ = 1 is an undiscounted task, τ = 1 a hard copy."""
    assert quick_train(script, tmp_path / "run", total_timesteps=65, gamma=1.0, tau=1.0).exists()


def test_a_seed_that_no_generator_takes(script, refusal):
    """NumPy's seeds end at 2³²."""
    assert "--seed" in refusal(script, seed=2**32)


# ---- Sizes ----


def test_a_batch_larger_than_the_buffer(script, refusal):
    """More than can ever be stored is refused, with both numbers."""
    line = refusal(script, batch_size=65, buffer_size=64)
    assert "--batch-size" in line
    assert "65" in line
    assert "64" in line


def test_a_batch_as_large_as_the_buffer(script, tmp_path):
    """As much as can be stored is not refused."""
    assert quick_train(script, tmp_path / "run", batch_size=64, buffer_size=64, total_timesteps=65).exists()


def test_a_buffer_larger_than_memory(script, refusal):
    """It says how many bytes were wanted: 4 for each of s, a, r, s', d."""
    line = refusal(script, buffer_size=10**12)
    assert "--buffer-size" in line
    assert str(4 * (4 + 2 + 1 + 4 + 1) * 10**12) in line.replace(",", "").replace("_", "")


def test_compile_without_a_compiler(script, refusal, tmp_path, monkeypatch):
    """At once, and not when the first update is compiled, thousands of steps later."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "--compile" in refusal(script, compile=True)


def test_a_graph_without_a_gpu(script, refusal):
    """--cudagraphs is refused where training is on the CPU, and not ignored."""
    assert "--cudagraphs needs --cuda" in refusal(script, cudagraphs=True)


def test_cuda_where_there_is_none(script, refusal):
    """CUDA asked for and absent is refused."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "--cuda" in refusal(script, cuda=True)


# ---- The run's folder ----


def test_a_folder_that_holds_a_run(script, tmp_path, refusal):
    """A second run into a run's folder is refused, whether it has ended or not, and changes nothing."""
    run_dir = quick_train(script, tmp_path / "run", total_timesteps=65)
    assert "run" in refusal(script)
    for name in ("checkpoint.pt", "losses.csv"):  # as a run that was killed early leaves it
        (run_dir / name).unlink()
    line = refusal(script)
    assert "--run-dir" in line
    assert "--resume" in line
    assert json.loads((run_dir / "args.json").read_text())["args"]["total_timesteps"] == 65


def test_an_empty_folder_that_exists_is_used(script, tmp_path):
    """A folder alone holds no run, and what else lies in it is left alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run_dir = quick_train(script, tmp_path / "run", total_timesteps=65)
    assert (run_dir / "args.json").exists()
    assert (run_dir / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("run_dir", ["file", "file/run"])
def test_a_folder_that_cannot_be_made(script, run_dir, tmp_path, refusal):
    (tmp_path / "file").write_text("mine")
    assert f"--run-dir {run_dir}" in refusal(script, run_dir=run_dir)


def test_no_folder_to_resume_in(script, refusal):
    assert "--run-dir" in refusal(script, run_dir="", resume=True)


def test_arguments_that_one_of_two_scripts_has(script, tmp_path, refusal):
    """Another script's run, or one of a copy that has a flag less, is not gone on with."""
    run_dir = quick_train(script, tmp_path / "run", total_timesteps=65)
    old = json.loads((run_dir / "args.json").read_text())
    del old["args"]["tau"]
    (run_dir / "args.json").write_text(json.dumps(old))
    same = json.loads((run_dir / "args.json").read_text())["args"] | {"resume": True, "run_dir": "run"}
    assert "--resume: --tau was different" in refusal(script, **same)


def test_rows_that_were_lost(script, tmp_path, capfd):
    """After a power cut a file may be shorter than the checkpoint counts on: nothing is made up for it."""
    run_dir = quick_train(script, tmp_path / "run", total_timesteps=100)
    path = run_dir / "losses.csv"
    path.write_bytes(path.read_bytes()[:-3])
    before = path.read_bytes()
    with pytest.raises(SystemExit) as end:
        quick_train(script, run_dir, resume=True)
    assert end.value.code == 2
    assert "losses.csv is shorter" in capfd.readouterr().err
    assert path.read_bytes() == before


# ---- From the command line ----

COMMANDS = {
    "unknown task": ("ddpg_continuous", "--env-id Hoper-v4", ["Hoper", "Hopper"]),
    "discrete actions": ("td3_continuous", "--env-id CartPole-v1", ["CartPole-v1", "Discrete"]),
    "gamma": ("sac_continuous", "--env-id Pendulum-v1 --gamma 1.5", ["--gamma", "1.5"]),
    "buffer": ("ddpg_continuous", "--env-id Pendulum-v1 --buffer-size 1000000000000", ["36,000,000,000,000"]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_from_the_command_line(case, tmp_path):
    """The process ends with status 2 and one line on stderr, and does not even make the folder runs/."""
    script, options, words = COMMANDS[case]
    done = run(script, *options.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flag", ["--reward-scale", "--policy-frequenzy", "--n-envs"])
def test_unknown_flags(name, flag, tmp_path, monkeypatch, capfd):
    """A flag that the script does not have is refused by name, by tyro, and never ignored."""
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", flag, "3"])
    with pytest.raises(SystemExit) as end:
        script.tyro.cli(script.Args)
    assert end.value.code == 2
    assert flag in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags_from_the_command_line(tmp_path):
    """So does the whole program, which starts nothing."""
    done = run("sac_continuous", "--env-id", "Pendulum-v1", "--n-critics", 3, cwd=tmp_path)
    assert done.returncode == 2
    assert "--n-critics" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_one_algorithms_flag_is_refused_by_another(tmp_path):
    """What belongs to TD3 alone is unknown to SAC."""
    done = run("sac_continuous", "--env-id", "Pendulum-v1", "--policy-noise", 0.1, cwd=tmp_path)
    assert done.returncode == 2
    assert "--policy-noise" in done.stderr
    assert list(tmp_path.iterdir()) == []
