"""The sweeps in benchmark/: what they print, and that failing, stopping and starting again loses nothing."""

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

ALGORITHMS = ["ddpg", "td3", "sac"]
TASKS = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"]
VARIABLES = ["ALGORITHMS", "ENVS", "SEEDS", "TOTAL_TIMESTEPS", "RESULTS", "PYTHON", "JOBS"]

# Stands in for Python with a training script. Its checkpoint takes long enough to see a second signal.
STAND_IN = f"""#!{sys.executable}
import signal, sys, time

flags = dict(zip(sys.argv[2:], sys.argv[3:]))
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append("signal"))
with open(flags["--run-dir"] + "/events", "a", buffering=1) as events:
    print("start", file=events)
    if flags["--env-id"] == "Broken":
        sys.exit(255)
    end = time.time() + float(flags.get("--seconds", 0))
    while time.time() < end and not signals:
        time.sleep(0.01)
    if signals:
        time.sleep(0.7)
        print(*signals, "checkpoint", sep="\\n", file=events)
        sys.exit(143)
    print("end", file=events)
"""


def install(folder: Path, programs: dict[str, str]) -> str:
    """Writes programs into a folder; returns a PATH that finds them there first."""
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(params=["GNU parallel", "xargs"])
def variables(request, tmp_path):
    """Variables for a sweep of stand-ins with either runner, into a folder with a space in its name."""
    programs = {"python": STAND_IN}
    if request.param == "xargs":
        programs["parallel"] = "#!/bin/sh\necho the one of moreutils\n"
    elif "GNU" not in os.popen("parallel --version 2>&1").read():
        pytest.skip("GNU parallel is not installed")
    return {"PATH": install(tmp_path, programs), "RESULTS": tmp_path / "my results", "JOBS": 2}


def start(*command: str | Path, **variables) -> subprocess.Popen:
    """Starts a script of benchmark/ with these variables of a sweep and no others."""
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    environment |= {name: str(value) for name, value in variables.items()}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore it
    return subprocess.Popen(
        command,
        cwd=ROOT / "benchmark",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def sweep(*command: str | Path, **variables) -> tuple[int, str]:
    """Runs it to its end: the exit status and all that it said."""
    process = start(*command, **variables)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def events(results: Path) -> dict[str, list[str]]:
    """What happened to each cell that was started."""
    return {path.parent.as_posix(): path.read_text().split() for path in sorted(results.rglob("events"))}


def wait_for(condition) -> None:
    end = time.time() + 60
    while not condition():
        assert time.time() < end, "this took too long"
        time.sleep(0.02)


def test_the_grid_is_every_algorithm_on_every_task_with_every_seed():
    commands = sweep("./all.sh")[1].splitlines()
    cells = [(seed, task, algorithm) for seed in "123" for task in TASKS for algorithm in ALGORITHMS]
    for command, (seed, task, algorithm) in zip(commands, cells, strict=True):
        expected = f"python {algorithm}_continuous.py --env-id {task} --seed {seed} --total-timesteps 1000000"
        folder = f"runs/sweep/{algorithm}/{task}/seed{seed}"
        assert command == f"{expected} --no-cuda --run-dir {folder} --resume"
    for algorithm in ALGORITHMS:
        own = [command for command in commands if f" {algorithm}_continuous.py " in command]
        assert sweep(f"./{algorithm}.sh")[1].splitlines() == own
        script = importlib.import_module(f"{algorithm}_continuous")
        tyro.cli(script.Args, args=own[0].split()[2:])  # it understands them


def test_variables_and_further_flags_shape_the_grid():
    variables = {"SEEDS": "7 8", "ENVS": "A", "TOTAL_TIMESTEPS": 5000, "RESULTS": "/my out", "PYTHON": "py"}
    commands = sweep("./sac.sh", "--exp-name", "a; $b", **variables)[1].splitlines()
    for command, seed in zip(commands, "78", strict=True):
        words = shlex.split(command)
        assert words[:8] == f"py sac_continuous.py --env-id A --seed {seed} --total-timesteps 5000".split()
        assert words[words.index("--run-dir") + 1] == f"/my out/sac/A/seed{seed}"
        assert words[-2:] == ["--exp-name", "a; $b"]
    assert sweep("./sac.sh", "--seed", "9")[0] == 2  # it would be the seed of every cell


def test_a_failing_cell_is_named_and_stops_no_other(variables, tmp_path):
    folder = tmp_path / "my project" / "benchmark"
    folder.mkdir(parents=True)
    for path in (ROOT / "benchmark").glob("*.sh"):
        shutil.copy(path, folder)
    status, output = sweep(folder / "all.sh", "run", ENVS="Broken Fine", SEEDS="1 2", **variables)
    assert status != 0
    happened = events(variables["RESULTS"])
    assert len(happened) == 12
    for cell, what in happened.items():
        assert what == (["start"] if "Broken" in cell else ["start", "end"])
        assert (cell in output.replace("\\", "")) == ("Broken" in cell)


@pytest.mark.parametrize("command", ["", "echo hello"])
def test_a_command_without_a_folder_is_refused(command):
    status, output = sweep("./run_commands.sh", "one", command)
    assert (status, len(output.splitlines())) == (2, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_waits_for_checkpoints_and_the_same_command_goes_on(variables, number):
    variables |= {"ENVS": "Fine", "SEEDS": "1 2 3 4"}
    process = start("./sac.sh", "run", "--seconds", "60", **variables)
    wait_for(lambda: list(events(variables["RESULTS"]).values()) == [["start"]] * 2)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal signals the whole group
    else:
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert list(events(variables["RESULTS"]).values()) == [["start", "signal", "checkpoint"]] * 2

    assert sweep("./sac.sh", "run", **variables)[0] == 0
    assert [what[-2:] for what in events(variables["RESULTS"]).values()] == [["start", "end"]] * 4


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (143, True)])
def test_a_task_of_the_job_array_runs_its_line_and_is_requeued_after_a_signal(tmp_path, status, requeued):
    programs = {"srun": '"$@"', "scontrol": 'echo "$@" >"$RESULTS/scontrol"', "python": f"exit {status}"}
    path = install(tmp_path, {name: f"#!/bin/sh\n{text}\n" for name, text in programs.items()})
    variables = {"PATH": path, "RESULTS": tmp_path / "out", "ENVS": "A B", "SEEDS": "1"}
    array = {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 5}
    command = ["sh", "-c", "cd .. && bash benchmark/slurm.sbatch"]
    assert sweep(*command, **variables, **array)[0] == status
    assert [log.parent for log in tmp_path.rglob("output.log")] == [tmp_path / "out" / "td3" / "B" / "seed1"]
    calls = [path.read_text() for path in tmp_path.glob("out/scontrol")]
    assert calls == ["requeue 7_5\n"] * requeued
