"""The compiled update against the eager one: equal within rounding, begun in mid-run, and never needed."""

import csv
import functools
import importlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tyro
from conftest import SCRIPTS
from torch._dynamo.callback import callback_handler
from torch._inductor.utils import fresh_cache
from twenty_kills import differences, results

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
FLAGS = "--env-id Pendulum-v1 --seed 3 --total-timesteps 32 --learning-starts 20"  # 12 gradient steps
FLAGS += " --hidden-dim 8 --batch-size 16 --log-frequency 1 --eval-frequency 0 --threads 1 --no-cuda --resume"
EAGER = 6  # of them come before the update is compiled


def train(name: str, run_dir: Path, flags: str, meanwhile: Callable = int) -> str:
    """Trains in this process, as if it were a new one, and calls `meanwhile` when compiling begins; returns
    what it printed."""
    script = importlib.import_module(name)
    torch._dynamo.reset()
    callback_handler.register_start_callback(lambda _: meanwhile())
    output = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "COMPILE_AFTER", EAGER)
        patch.setattr(script.tqdm, "write", lambda line, **_: output.append(line))
        script.train(tyro.cli(script.Args, args=f"{FLAGS} --run-dir {run_dir} {flags}".split()))
    return "\n".join(output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable:
    """runs(script) is the folders of a run that is not compiled and of one that is, and what that printed."""

    @functools.cache
    def both(name: str) -> tuple[Path, Path, str]:
        folder = tmp_path_factory.mktemp(name)
        train(name, folder / "eager", "--no-compile")
        torch._dynamo.utils.counters.clear()
        return folder / "eager", folder / "compiled", train(name, folder / "compiled", "--compile")

    return both


def rows(run_dir: Path) -> list[dict[str, float]]:
    with open(run_dir / "losses.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_compiled_updates_equal_eager_ones(name, runs):
    """With the same noise, drawn anew in every call; in one graph, or two where the actor is delayed."""
    counters = torch._dynamo.utils.counters
    eager, compiled, output = runs(name)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1 + name.startswith("td3")
    begins, ends = output.lower().index("compiling"), output.lower().index("compiled in")
    assert begins < ends

    ours, theirs = rows(compiled), rows(eager)
    assert len(ours) == len(theirs) == 12
    assert str(ours[:EAGER]) == str(theirs[:EAGER])
    assert str(ours) != str(theirs)  # rounding tells that something was compiled
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)
    for file in ("checkpoint.pt", "policy.pt"):
        one, other = (torch.load(folder / file, weights_only=True) for folder in (compiled, eager))
        weights = one.get("agent", one), other.get("agent", other)
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_resumed_across_the_compilation(runs, tmp_path):
    """Once before it begins, and again as soon as it has ended, by a SIGTERM that came in the middle of it.
    A Ctrl-C in a terminal goes to the compiler too, which must outlive it."""
    _, compiled, _ = runs("sac_continuous")
    train("sac_continuous", tmp_path / "run", "--compile --total-timesteps 24")
    survived = []

    def interrupt() -> None:
        compiler = subprocess.Popen(["sleep", "0.1"])
        compiler.send_signal(signal.SIGINT)
        survived.append(compiler.wait() == 0)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        train("sac_continuous", tmp_path / "run", "--compile", interrupt)
    assert survived == [True]
    assert len(rows(tmp_path / "run")) == EAGER + 1
    train("sac_continuous", tmp_path / "run", "--compile")
    assert not differences(tmp_path / "run", results(compiled))


def test_without_a_working_compiler_training_goes_on(runs, tmp_path):
    """With one line, and the bytes of a run that was not meant to be compiled."""
    eager, _, _ = runs("ddpg_continuous")
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": (None, "false")}):
        output = train("ddpg_continuous", tmp_path / "run", "--compile")
    _, _, failure = output.splitlines()
    assert "fail" in failure
    assert not differences(tmp_path / "run", results(eager))
