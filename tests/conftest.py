"""What every test file needs: the three scripts as modules, and small runs of them as a user starts them."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["ddpg_continuous", "td3_continuous", "sac_continuous"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the three scripts in turn, imported."""
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tests are faster on one thread, and their sums are in one order everywhere."""
    torch.set_num_threads(1)


def run(script: str, *arguments, cwd: Path = ROOT, timeout: float = 300, **options):
    """`python {script}.py` with arguments, in a process of its own: a CompletedProcess with its output."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False, **options
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: the files' bytes, by their path."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
