"""The sweeps in benchmark/: failing, stopping and starting again lose and repeat nothing.

Most tests run them on stand-ins for the three training scripts, which take milliseconds and write down when
they ran and which signals they got. The last ones take the real scripts.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

ALGORITHMS = ["ddpg", "td3", "sac"]
TASKS = ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4"]
VARIABLES = ["SEEDS", "ENVS", "TOTAL_TIMESTEPS", "JOBS", "RESULTS", "PYTHON", "GPU", "ALGORITHMS"]

# Runs for --seconds. On the first signal it goes on for half a second, so that a second one would be seen.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path


def value(flag, default=None):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default


def note(name, text):
    with open(run_dir / name, "a") as file:
        file.write(f"{text}\\n")


run_dir, steps, signals = Path(value("--run-dir")), int(value("--total-timesteps")), []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(number))
note("starts", time.time())
(run_dir / "args.json").write_text(json.dumps({"args": {"total_timesteps": steps}}, indent=2))
if value("--env-id") == "Broken":
    print("it broke", flush=True)
    os._exit(255)
end = time.time() + float(value("--seconds", 0))
while time.time() < end and not signals:
    time.sleep(0.01)
if signals:
    time.sleep(0.5)
    note("signals", *signals)
    sys.exit(143)
note("ends", time.time())
(run_dir / "timing.csv").write_text(f"global_step,SPS\\n{steps},1.0\\n")
(run_dir / "checkpoint.pt").touch()
"""


@pytest.fixture(autouse=True)
def interruptible():
    """Lets what a test starts react to SIGINT, which a shell has its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["GNU parallel", "xargs"])
def runner(request, tmp_path):
    """Either way to run a grid, and a PATH that leads to it: xargs where `parallel` is not GNU's."""
    path = os.environ["PATH"]
    if request.param == "xargs":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "parallel").write_text("#!/bin/sh\necho parallel of moreutils\n")
        (tmp_path / "bin" / "parallel").chmod(0o755)
        path = f"{tmp_path / 'bin'}:{path}"
    elif not (shutil.which("parallel") and "GNU parallel" in output_of(["parallel", "--version"])):
        pytest.skip("GNU parallel is not installed")
    return Runner(request.param, path)


@pytest.fixture
def project(tmp_path):
    """A folder like this repository's root, with stand-ins for the three scripts; its name has a space."""
    root = tmp_path / "a project"
    (root / "benchmark").mkdir(parents=True)
    for path in [*(ROOT / "benchmark").glob("*.sh"), ROOT / "benchmark" / "slurm.sbatch"]:
        shutil.copy(path, root / "benchmark")
    for algorithm in ALGORITHMS:
        (root / f"{algorithm}_continuous.py").write_text(STAND_IN)
    return root


class Runner(NamedTuple):
    name: str
    path: str


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def default_signals() -> None:
    """In a new process: a suite started by nohup, or in the background, ignores what a sweep must hear."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(script: Path, *arguments: str, cwd: Path = ROOT, **variables) -> subprocess.Popen:
    """Starts a sweep with these variables of it, and no others, set; standard output and error are one."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHON": sys.executable} | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [str(script), *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,  # noqa: PLW1509, as the tests have no threads
    )


def sweep(script: Path, *arguments: str, **options) -> tuple[int, str]:
    """Runs a sweep to its end: the exit status and all that it said."""
    process = start(script, *arguments, **options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def lines(script: str, *arguments: str, **options) -> list[list[str]]:
    """The commands that a sweep prints, in words."""
    status, output = sweep(ROOT / "benchmark" / script, *arguments, **options)
    assert status == 0, output
    return [shlex.split(line) for line in output.splitlines()]


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def wait_for(condition, seconds: float = 300) -> None:
    """Waits until the condition holds; fails after so many seconds."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "this took too long"
        time.sleep(0.02)


def count(root: Path, name: str) -> int:
    """Lines in all files of this name under a folder."""
    return sum(len(path.read_text().splitlines()) for path in root.rglob(name))


# ======== What they print ========


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_grid_is_every_task_with_every_seed(algorithm):
    grid = lines(f"{algorithm}.sh")
    cells = [(value(command, "--env-id"), value(command, "--seed")) for command in grid]
    assert sorted(cells) == sorted((task, seed) for task in TASKS for seed in "123")
    assert grid == lines(f"{algorithm}.sh", "print")
    folder = f"benchmark/results/{algorithm}/Hopper-v4/seed1"
    expected = (
        f"{sys.executable} {algorithm}_continuous.py --env-id Hopper-v4 --seed 1 --total-timesteps 1000000"
    )
    assert grid[0] == f"{expected} --threads 1 --no-cuda --run-dir {folder} --resume".split()


def test_all_is_the_three_grids_interleaved():
    grid = lines("all.sh")
    assert sorted(grid) == sorted(sum((lines(f"{algorithm}.sh") for algorithm in ALGORITHMS), []))
    for i in range(0, 45, 3):
        assert [command[1] for command in grid[i : i + 3]] == [f"{name}_continuous.py" for name in ALGORITHMS]


def test_variables_and_further_flags_shape_the_grid(tmp_path):
    variables = {"SEEDS": "7 8", "ENVS": "Pendulum-v1 Ant-v5", "TOTAL_TIMESTEPS": 5000, "RESULTS": tmp_path}
    grid = lines("sac.sh", "--no-autotune", "--exp-name", "fixed α; $HOME", PYTHON="py", GPU=1, **variables)
    cells = [(value(command, "--env-id"), value(command, "--seed")) for command in grid]
    assert cells == [("Pendulum-v1", "7"), ("Ant-v5", "7"), ("Pendulum-v1", "8"), ("Ant-v5", "8")]
    for command, (task, seed) in zip(grid, cells, strict=True):
        assert value(command, "--total-timesteps") == "5000"
        assert value(command, "--run-dir") == f"{tmp_path}/sac/{task}/seed{seed}"
        assert command[0] == "py"
        assert "--cuda" in command
        assert "--no-cuda" not in command
        assert command[-3:] == ["--no-autotune", "--exp-name", "fixed α; $HOME"]


def test_paths_hold_in_the_folder_where_the_sweep_is_called(tmp_path):
    for folder, results in [(tmp_path, None), (ROOT / "benchmark", None), (tmp_path, "here/")]:
        command = lines("td3.sh", cwd=folder, **({"RESULTS": results} if results else {}))[0]
        assert not [word for word in command if "//" in word]
        assert (folder / command[1]).resolve() == ROOT / "td3_continuous.py"
        expected = folder / "here" if results else ROOT / "benchmark" / "results"
        assert (folder / value(command, "--run-dir")).resolve() == expected / "td3" / "Hopper-v4" / "seed1"


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        (["rnu"], {}, "rnu"),
        (["run", "--seed", "3"], {}, "SEEDS"),
        (["--run_dir=x"], {}, "RESULTS"),
        (["print"], {"TOTAL_TIMESTEPS": "1e6"}, "TOTAL_TIMESTEPS=1e6"),
        (["print"], {"ALGORITHMS": "ppo"}, "ppo_continuous.py"),
        (["run"], {"JOBS": "0"}, "JOBS=0"),
        (["run"], {"PYTHON": "no-such-python"}, "no-such-python"),
        (["cell", "45"], {}, "no cell 45"),
        (["cell"], {}, "cell needs"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, variables, reason, project):
    status, output = sweep(project / "benchmark" / "all.sh", *arguments, **variables)
    assert status == 2
    assert "error: " in output
    assert reason in output
    assert not list(project.rglob("output.log"))


def test_help_names_every_variable():
    status, output = sweep(ROOT / "benchmark" / "ddpg.sh", "--help")
    assert status == 0
    assert all(f"  {name} " in output for name in VARIABLES)
    assert "set -" not in output


# ======== Running a grid ========


def test_a_failing_cell_stops_no_other_and_is_named(runner, project):
    out, variables = project / "out", {"ENVS": "Broken Fine", "SEEDS": "1 2", "PATH": runner.path}
    status, output = sweep(project / "benchmark" / "all.sh", "run", RESULTS=out, **variables)
    assert status == 1
    failed = [f"{algorithm}/Broken/seed{seed}" for seed in "12" for algorithm in ALGORITHMS]
    summary = output[output.index("6 of 12 cells are done; 6 failed:") :].splitlines()[1:]
    assert [line.strip() for line in summary] == [
        f"{out}/{cell}: exit status 255: it broke" for cell in failed
    ]
    assert count(out, "ends") == 6

    status, output = sweep(project / "benchmark" / "all.sh", "run", RESULTS=out, **variables)
    assert status == 1
    assert "6 of 12 cells are done; 6 failed:" in output
    assert all(count(out / cell, "starts") == 2 for cell in failed)
    # GNU parallel's job log tells that the others are done; xargs starts them, and they end at once.
    assert count(out, "starts") == {"GNU parallel": 18, "xargs": 24}[runner.name]


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_is_the_number_of_runs_at_a_time(runner, project, jobs):
    variables = {"ENVS": "A B", "SEEDS": "1", "JOBS": jobs, "RESULTS": project / "out", "PATH": runner.path}
    status, output = sweep(project / "benchmark" / "all.sh", "run", "--seconds", "0.5", **variables)
    assert status == 0
    assert "6 of 6 cells are done\n" in output
    events = [(float(path.read_text()), +1) for path in (project / "out").rglob("starts")]
    events += [(float(path.read_text()), -1) for path in (project / "out").rglob("ends")]
    running = [sum(step for _, step in sorted(events)[:i]) for i in range(1, 13)]
    assert max(running) == jobs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_sweep_signals_each_run_once_and_goes_on_later(runner, project, number):
    out, script = project / "out", project / "benchmark" / "sac.sh"
    variables = {"ENVS": "A", "SEEDS": "1 2 3 4", "JOBS": 2, "RESULTS": out, "PATH": runner.path}
    process = start(script, "run", "--seconds", "60", **variables)
    wait_for(lambda: count(out, "starts") == 2)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal signals the whole group
    else:
        process.send_signal(number)
    output, _ = process.communicate(
        timeout=300
    )  # and so nothing that it started has its output open any more
    assert process.returncode == 128 + number
    assert "cells are done" not in output
    assert count(out, "starts") == 2
    assert [path.read_text() for path in out.rglob("signals")] == ["15\n", "15\n"]

    status, output = sweep(script, "run", **variables)
    assert status == 0
    assert "4 of 4 cells are done\n" in output
    assert count(out, "starts") == 6


def test_a_job_log_hides_no_run_that_is_still_to_do(project):
    """More steps, other flags and a deleted folder are work to do; the same sweep once more is not."""
    if not shutil.which("parallel"):
        pytest.skip("GNU parallel is not installed")
    script, out = project / "benchmark" / "sac.sh", project / "out"

    def started(steps: int, *flags: str) -> int:
        variables = {"ENVS": "A B", "SEEDS": "1", "RESULTS": out, "TOTAL_TIMESTEPS": steps}
        status, output = sweep(script, "run", *flags, **variables)
        assert status == 0
        assert "2 of 2 cells are done\n" in output
        return output.count(" starts\n")

    assert [started(10), started(10)] == [2, 0]
    assert [started(20), started(20)] == [2, 0]
    assert [started(20, "--gamma", "0.9"), started(20)] == [2, 0]
    shutil.rmtree(out / "sac" / "B")
    assert [started(20), started(20)] == [1, 0]
    (joblog,) = [path for path in out.glob("*.joblog") if "--gamma" in path.read_text()]
    head, first, second = joblog.read_text().splitlines()
    joblog.write_text(f"{head}\n{first}\n{second[:9]}")  # as a power cut leaves it
    assert started(20, "--gamma", "0.9") == 1
    joblog.write_text("")
    assert started(20, "--gamma", "0.9") == 2


def test_a_finished_run_without_its_checkpoint_is_never_overwritten(runner, project):
    """As `git clone` brings it: the CSV files alone, from which a script could only start over."""
    out, script = project / "out", project / "benchmark" / "sac.sh"
    variables = {"ENVS": "A", "SEEDS": "1 2", "RESULTS": out, "PATH": runner.path}
    assert sweep(script, "run", TOTAL_TIMESTEPS=3000, **variables)[0] == 0
    (out / "sac" / "A" / "seed1" / "checkpoint.pt").unlink()

    status, output = sweep(script, "run", "--gamma", "0.9", TOTAL_TIMESTEPS=3000, **variables)
    assert status == 0
    assert "seed1 has all its 3000 steps, and no checkpoint: left as it is\n" in output
    status, output = sweep(script, "run", TOTAL_TIMESTEPS=4000, **variables)
    assert status == 1
    assert "1 of 2 cells are done; 1 failed:" in output
    assert "seed1 ended at step 3000 and has no checkpoint to continue from" in output.splitlines()[-1]
    assert [count(out / "sac" / "A" / f"seed{seed}", "starts") for seed in "12"] == [1, 3]

    # A run that was killed before its first checkpoint has not all its rows, and does start over.
    (out / "sac" / "A" / "seed1" / "timing.csv").write_text("global_step,SPS\n2000,1.0\n")
    assert sweep(script, "run", TOTAL_TIMESTEPS=4000, **variables)[0] == 0
    assert count(out / "sac" / "A" / "seed1", "starts") == 2


# ======== On a cluster: slurm.sbatch as Slurm would start it (slurm_test.sh has a real one) ========


def start_task(project: Path, task: int, *flags: str, **variables) -> subprocess.Popen:
    """Starts the batch script as this task of array job 7; `scontrol` writes its arguments to a file."""
    (project / "bin").mkdir()
    (project / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >>scontrol-calls\n')
    (project / "bin" / "scontrol").chmod(0o755)
    variables |= {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": task, "RESULTS": "out", "ENVS": "A"}
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    return start(project / "benchmark" / "slurm.sbatch", *flags, cwd=project, PATH=path, **variables)


def test_an_array_task_runs_its_line_of_the_grid(project):
    process = start_task(project, 4, "--gamma", "0.9", SEEDS="1 2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [path.relative_to(project) for path in project.rglob("ends")] == [Path("out/td3/A/seed2/ends")]
    assert not (project / "scontrol-calls").exists()


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_an_array_task_requeues_itself_at_its_time_limit_only(project, number, requeued):
    """Before the limit Slurm signals the batch script alone; to end a task, every process of it."""
    process = start_task(project, 0, "--seconds", "60")
    wait_for(lambda: count(project, "starts") == 1)
    if number == signal.SIGTERM:
        os.killpg(process.pid, number)
    else:
        for _ in range(2):  # Slurm may repeat it
            process.send_signal(number)
            time.sleep(0.1)
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert (project / "out" / "ddpg" / "A" / "seed1" / "signals").read_text() == "15\n"
    assert (project / "scontrol-calls").exists() == requeued
    if requeued:
        assert (project / "scontrol-calls").read_text() == "requeue 7_0\n"


def test_an_array_task_outside_the_repository_says_what_to_do(project):
    script = project / "benchmark" / "slurm.sbatch"
    status, output = sweep(script, cwd=project / "benchmark", SLURM_ARRAY_TASK_ID=0)
    assert status == 2
    assert "from the root of the repository" in output


# ======== With the real scripts ========

REAL = {"ALGORITHMS": "ddpg sac", "ENVS": "Pendulum-v1", "SEEDS": "3", "TOTAL_TIMESTEPS": 800, "JOBS": 2}
FLAGS = "--learning-starts 100 --batch-size 16 --hidden-dim 16 --buffer-size 1000 --eval-frequency 400"
FLAGS = f"{FLAGS} --eval-episodes 1 --log-frequency 50".split()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of two runs that were never stopped, each started by its printed line."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for command in lines("all.sh", *FLAGS, **REAL | {"RESULTS": folder}):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder


def test_a_sweep_stopped_and_started_again_gives_the_same_bytes(runner, uninterrupted, tmp_path):
    variables = REAL | {"RESULTS": tmp_path / "out", "PATH": runner.path}
    folders = [tmp_path / "out" / algorithm / "Pendulum-v1" / "seed3" for algorithm in ("ddpg", "sac")]
    process = start(ROOT / "benchmark" / "all.sh", "run", *FLAGS, **variables)
    wait_for(lambda: all(count(folder, "losses.csv") > 2 for folder in folders))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert all((folder / "checkpoint.pt").exists() for folder in folders)
    # On a busy machine the quicker run may have ended before the other began; it will say so a second time.
    ended = ["800 of 800 steps are done" in (folder / "output.log").read_text() for folder in folders]
    assert not all(ended)

    status, output = sweep(ROOT / "benchmark" / "all.sh", "run", *FLAGS, **variables)
    assert status == 0, output
    for folder, had_ended in zip(folders, ended, strict=True):
        twin = uninterrupted / folder.relative_to(tmp_path / "out")
        for name in ("episodes.csv", "evaluations.csv", "losses.csv"):
            assert (folder / name).read_bytes() == (twin / name).read_bytes()
        steps = [int(line.split(",")[0]) for line in (folder / "timing.csv").read_text().splitlines()[1:]]
        assert steps == list(range(50, 801, 50))
        assert (folder / "output.log").read_text().count("800 of 800 steps are done") == 1 + had_ended


def test_a_task_that_does_not_exist_is_named_with_the_reason(tmp_path):
    variables = REAL | {"ALGORITHMS": "sac", "ENVS": "NoSuchTask-v0", "RESULTS": tmp_path}
    status, output = sweep(ROOT / "benchmark" / "all.sh", "run", **variables)
    assert status == 1
    assert "0 of 1 cells are done; 1 failed:" in output
    last = output.splitlines()[-1]
    assert f"{tmp_path}/sac/NoSuchTask-v0/seed3: exit status 2: sac_continuous.py: error:" in last
    assert "NoSuchTask" in last.split("error:")[1]
