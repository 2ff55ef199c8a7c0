"""The job array of benchmark/slurm.sbatch on a real Slurm; test_sweeps.py has what needs none."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(
    os.environ.get("RUN_SLURM_TEST") != "1",
    reason="takes minutes, and as root installs Slurm if it is not there; RUN_SLURM_TEST=1 runs it",
)
def test_every_cell_finishes_once_whatever_slurm_does_to_it():
    result = subprocess.run(
        [ROOT / "tests" / "slurm_test.sh"],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(result.stdout)
    if result.returncode == 77:
        pytest.skip(result.stdout.splitlines()[-1].removeprefix("SKIP: "))
    assert result.returncode == 0
    assert result.stdout.endswith("PASSED: every cell finished once\n")
