"""Updates as CUDA graphs: on a GPU where there is one, and everywhere on an emulated one.

The emulation does to operators on a CPU what a CUDA graph does to kernels: recording runs none of them, and a
replay runs them all again, without Python, on the memory that they were recorded with. Noise comes from the
CPU's generator in the same order, so replayed training has to be eager training to the last bit. It cannot
show whether a GPU can record these operators; reading a number is the one thing that it refuses.
"""

import pytest
import torch
from test_environment import quick_train, rows
from test_training import record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OBS_DIM, ACTION_DIM = 5, 2
WAYS = {"ddpg_continuous": 2, "td3_continuous": 4, "sac_continuous": 2}  # through the branches of an update
OPTIONS = {"env_id": "InvertedPendulum-v4", "total_timesteps": 150, "buffer_size": 100, "eval_frequency": 50}
OPTIONS |= {"cuda": True, "eval_episodes": 1, "log_frequency": 1, "target_network_frequency": 3}


class EmulatedGraph(TorchDispatchMode):
    """torch.cuda.CUDAGraph on a CPU; within it, operators are recorded and leave memory as it was."""

    made: list["EmulatedGraph"] = []

    def __init__(self):
        super().__init__()
        self.calls, self.overwritten, self.replays = [], {}, 0
        self.made.append(self)

    def __enter__(self):
        self.generator = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, operator, _, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in operator.tags:
            raise RuntimeError(f"{operator} reads a number, which cannot be recorded")
        kwargs, arguments = kwargs or {}, operator._schema.arguments
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        for tensor in tree_leaves([given[a.name] for a in arguments if a.is_write and a.name in given]):
            self.overwritten.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.generator)
        for tensor, value in self.overwritten.values():
            tensor.detach().copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operator, args, kwargs, recorded in self.calls:
            results = operator(*args, **kwargs)
            if not any(argument.alias_info for argument in operator._schema.arguments):  # it made new memory
                for old, new in zip(tree_leaves(recorded), tree_leaves(results), strict=True):
                    old.detach().copy_(new)


class EmulatedTorch:
    """PyTorch as a script sees it, with a GPU that is the CPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def device(self, name):
        return torch.device("cpu")


@pytest.fixture
def graphs(script, monkeypatch) -> list[EmulatedGraph]:
    """An emulated GPU; returns the list of the graphs that a training records."""
    here = {"is_available": True, "get_device_name": "emulated", "mem_get_info": (2**40, 2**40)}
    for name in ("synchronize", "set_stream", "current_stream", "Stream"):
        here[name] = None
    for name, answer in here.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: [*map(torch.set_rng_state, states)])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(script, "torch", EmulatedTorch())
    monkeypatch.setattr(EmulatedGraph, "made", [])
    return EmulatedGraph.made


def test_replayed_training_is_eager_training(script, graphs, tmp_path):
    """To the last bit, in every metric and gradient norm of every step, as the buffer fills and wraps."""
    eager = record(quick_train(script, tmp_path / "eager", **OPTIONS))
    assert not graphs
    replayed = record(quick_train(script, tmp_path / "replayed", **OPTIONS, cudagraphs=True))
    assert replayed == eager
    assert len(graphs) == WAYS[script.__name__]
    warm_up = 3 * len(graphs)
    assert sum(graph.replays for graph in graphs) == 150 - 60 - warm_up


def test_replayed_training_resumes_exactly(script, graphs, tmp_path):
    """What warms up again, in eager code, continues what was replayed."""
    for name, stops in (("whole", [150]), ("parts", [101, 150])):
        for steps in stops:
            changes = OPTIONS | {"total_timesteps": steps, "cudagraphs": True, "resume": True}
            changes["gradient_steps"] = 3
            quick_train(script, tmp_path / name, **changes)
    assert record(tmp_path / "parts") == record(tmp_path / "whole")


def test_what_python_decides_would_be_frozen(graphs, script, tmp_path, monkeypatch):
    """The emulation tells: a minibatch drawn below a Python number keeps to the rows of the recording."""

    def sample(self, batch_size):
        self.filled = torch.tensor(self.added)
        return original(self, batch_size)

    original = script.ReplayBuffer.sample
    monkeypatch.setattr(script.ReplayBuffer, "sample", sample)
    eager = record(quick_train(script, tmp_path / "eager", **OPTIONS | {"buffer_size": 1000}))
    options = OPTIONS | {"buffer_size": 1000, "cudagraphs": True}
    assert record(quick_train(script, tmp_path / "replayed", **options)) != eager


def test_an_update_reads_no_number_off_the_device(script):
    """On PyTorch's device without data, it samples and updates: nothing is read, or mixed with the CPU's."""
    with torch.device("meta"):
        agent = script.Agent(OBS_DIM, ACTION_DIM, script.Args(hidden_dim=8))
    buffer = script.ReplayBuffer(100, OBS_DIM, ACTION_DIM, torch.device("meta"))
    for gradient_step in range(1, 5):
        metrics = agent.update(buffer.sample(16), gradient_step)
        assert len(metrics) > 2
        assert all(metric.is_meta for metric in metrics.values())
    assert all(parameter.grad.is_meta for parameter in [*agent.actor_parameters, *agent.q_parameters])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_replayed_training_on_a_gpu(script, compiled, tmp_path):
    """As eager training there within rounding, with the same noise; resumed, it gives the same bytes."""
    quick_train(script, tmp_path / "eager", **OPTIONS)
    options = OPTIONS | {"cudagraphs": True, "compile": compiled, "resume": True}
    for name, steps in (("whole", 150), ("parts", 101), ("parts", 150)):
        quick_train(script, tmp_path / name, **options | {"total_timesteps": steps})
    assert record(tmp_path / "parts") == record(tmp_path / "whole")
    eager, replayed = (rows(tmp_path / name / "losses.csv")[:30] for name in ("eager", "whole"))
    for ours, theirs in zip(replayed, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)
