"""Compiled updates, and updates on a GPU, against eager ones on the CPU: the same within float32 rounding."""

import shutil

import pytest
import torch
from conftest import run
from test_environment import rows

OBS_DIM, ACTION_DIM, STEPS = 5, 2, 6
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def learn(script, device: str, compiled: bool) -> list[dict]:
    """Weights and metrics after each of some gradient steps from the same start, batches and generator."""
    torch.manual_seed(3)
    agent = script.Agent(OBS_DIM, ACTION_DIM, script.Args(hidden_dim=32)).to(device)
    batches = []
    for _ in range(STEPS):
        observations, next_observations = torch.randn(2, 16, OBS_DIM)
        actions, rewards = torch.rand(16, ACTION_DIM) * 2 - 1, torch.randn(16)
        batches.append(script.Batch(observations, actions, rewards, next_observations, rewards.gt(1).float()))
    options = {"fallback_random": True, "cpp_wrapper": device == "cpu"}  # as train has them
    options |= {"pattern_matcher": False, "size_asserts": False}
    update = torch.compile(agent.update, options=options) if compiled else agent.update
    history = []
    for step, batch in enumerate(batches, 1):
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            metrics = update(script.Batch(*(column.to(device) for column in batch)), step)
        state = {name: value.detach().cpu().double().clone() for name, value in agent.state_dict().items()}
        history.append(state | {name: value.detach().cpu().double() for name, value in metrics.items()})
    return history


def compare(ours: list[dict], theirs: list[dict]) -> None:
    """Adam divides by the root of the squared gradient, so rounding of small ones is the largest error."""
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5), (step, name)


@needs_compiler
def test_compiled_updates_match_eager_ones(script):
    """With the same noise, so it is drawn anew in every call; and without a break in the graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = learn(script, "cpu", False)
    compare(learn(script, "cpu", True), eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    moved = [name for name in eager[0] if not torch.equal(eager[0][name], eager[-1][name])]
    assert any(name.startswith("actor.") for name in moved)
    assert any(name.startswith("qf1.") for name in moved)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_updates_on_a_gpu_match_those_on_the_cpu(script, compiled, monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(4)
    noise = {"cpu": torch.randn(16, ACTION_DIM)}  # always the same, as a GPU has another generator
    noise["cuda"] = noise["cpu"].cuda()
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise[tensor.device.type][: len(tensor)])
    eager = learn(script, "cpu", False)
    compare(learn(script, "cuda", compiled), eager)


@needs_compiler
def test_a_compiled_run_resumes_exactly_and_learns_as_an_eager_one(tmp_path):
    flags = "--env-id Pendulum-v1 --learning-starts 40 --batch-size 16 --hidden-dim 16 --log-frequency 10 "
    flags += "--threads 1 --no-cuda --eval-frequency 50 --eval-episodes 1 --resume"
    for name, steps, flag in (
        ("whole", 100, "--compile"),
        ("parts", 70, "--compile"),
        ("parts", 100, "--compile"),
        ("eager", 100, "--no-compile"),
    ):
        ended = run(
            "sac_continuous", *flags.split(), flag, "--total-timesteps", steps, "--run-dir", tmp_path / name
        )
        assert ended.returncode == 0, ended.stderr
    for name in ("losses.csv", "evaluations.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    compiled, eager = (rows(tmp_path / name / "losses.csv") for name in ("whole", "eager"))
    assert len(compiled) == len(eager) == 6
    for ours, theirs in zip(compiled, eager, strict=True):
        for name, value in ours.items():
            assert float(value) == pytest.approx(float(theirs[name]), rel=1e-2, abs=1e-3), name
