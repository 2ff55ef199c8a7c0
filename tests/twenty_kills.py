"""Kills one short run of each script at random moments, resumes it each time with the same command, and
compares what it ends with, byte for byte, with a run that was left alone.

Usage: python tests/twenty_kills.py                                        twenty SIGKILLs for each script
       python tests/twenty_kills.py --scripts sac_continuous --flags="--env-id Hopper-v4 --cuda"

Ends with status 0 only if every run was killed as often as asked and its files do not differ.
"""

import argparse
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["ddpg_continuous", "td3_continuous", "sac_continuous"]

# A run that evaluates, writes checkpoints and overwrites its oldest transitions, in a few seconds.
SHORT = "--env-id InvertedPendulum-v4 --hidden-dim 16 --batch-size 32 --learning-starts 100 --buffer-size 250"
SHORT += " --log-frequency 10 --eval-frequency 150 --eval-episodes 2 --checkpoint-frequency 50 --threads 1"
SHORT += " --no-cuda"


def tensors(value, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, with the path to it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}/{index}")


def results(run_dir: Path) -> dict[str, bytes]:
    """What a run must reproduce: its CSV files, except the clock's, and every tensor of its last checkpoint,
    that is weights, optimizers, replay buffer and generators, under a name with its type and shape."""
    names = ("episodes.csv", "evaluations.csv", "losses.csv")
    found = {name: (run_dir / name).read_bytes() for name in names}
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    for path, tensor in tensors(checkpoint):
        found[f"{path} {tensor.dtype} {list(tensor.shape)}"] = tensor.numpy().tobytes()
    return found


def differences(run_dir: Path, expected: dict[str, bytes]) -> list[str]:
    """Names of the results of a run that are not the expected ones, or that only one of the two has."""
    found = results(run_dir)
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


def progress(run_dir: Path, record: str = "episodes.csv") -> int:
    """The step of the last row that a run has put on record; 0 if there is none."""
    path = run_dir / record
    rows = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []  # no header, no row half written
    return int(rows[-1].split(b",")[0]) if rows else 0


def kill_and_resume(
    start: Callable, run_dir: Path, kills: int, total_timesteps: int, generator: random.Random
) -> tuple[int, int]:
    """Starts a run again and again, sends it SIGKILL at random moments spread over its steps, then lets it
    end. `start(run_dir)` gives the run's process: a Popen, or what has its poll, wait and kill.

    Returns how many processes were killed, and how many of those were writing a checkpoint just then.
    """
    killed = writing = 0
    for kill in range(kills):
        moment = 0.95 * total_timesteps * (kill + generator.random()) / kills
        delay = generator.uniform(0, 0.02)  # seconds, so that it can be anywhere within a step
        process = start(run_dir)
        while progress(run_dir, "timing.csv") < moment and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        killed += process.wait() == -9
        writing += len(list(run_dir.glob("checkpoint*"))) > len(list(run_dir.glob("checkpoint*.pt")))
    if status := start(run_dir).wait():
        raise RuntimeError(f"the process that was left alone at last ended with status {status}")
    return killed, writing


def main() -> int:
    """Prints a line for each script; returns 0 if all are as they should be, else 1."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each script")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--total-timesteps", type=int, default=2000, help="length of each run")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, help="names without .py")
    parser.add_argument("--flags", default="", help="further flags of the scripts, in quotes")
    arguments = parser.parse_args()

    failed = False
    for script in arguments.scripts:
        command = [sys.executable, str(ROOT / f"{script}.py"), *SHORT.split(), *shlex.split(arguments.flags)]
        command += ["--total-timesteps", str(arguments.total_timesteps), "--resume", "--run-dir"]

        def start(run_dir: Path, command: list[str] = command) -> subprocess.Popen:
            with open(run_dir.with_suffix(".log"), "a") as output:
                return subprocess.Popen([*command, str(run_dir)], stdout=output, stderr=output)

        with tempfile.TemporaryDirectory() as folder:
            alone, often_killed = Path(folder, "alone"), Path(folder, "often_killed")
            try:
                if status := start(alone).wait():
                    raise RuntimeError(f"even the run that was never killed ended with status {status}")
                moments = random.Random(f"{script} {arguments.seed}")
                steps = arguments.total_timesteps
                killed, writing = kill_and_resume(start, often_killed, arguments.kills, steps, moments)
                different = differences(often_killed, results(alone))
                verdict = f"differs in {', '.join(different)}" if different else "ended byte-identical"
                times = f"killed {killed} times, {writing} of them in a checkpoint's write"
                print(f"{script}: {times}; {verdict}", flush=True)
                failed |= bool(different) or killed < arguments.kills
            except RuntimeError as error:
                logs = [path.read_text()[-2000:] for path in sorted(Path(folder).glob("*.log"))]
                print(f"{script}: {error}", *logs, sep="\n")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
