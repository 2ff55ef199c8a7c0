"""Kills one short run of each script at random moments, resumes it each time with the same command, and
compares what it ends with, byte for byte, with a run that was left alone.

Usage: python tests/twenty_kills.py                                        twenty SIGKILLs for each script
       python tests/twenty_kills.py --scripts sac_continuous --flags="--env-id Hopper-v4"

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
SHORT += " --no-cuda --no-compile"


def leaves(value, path: str) -> Iterator[tuple[str, bytes]]:
    """Everything in nested dictionaries and lists, with the path to it: a tensor's bytes, or its repr."""
    if isinstance(value, torch.Tensor):
        yield f"{path} {value.dtype} {list(value.shape)}", value.numpy().tobytes()
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{path}/{key}")
    else:
        yield path, repr(value).encode()


def results(run_dir: Path) -> dict[str, bytes]:
    """What a run must reproduce: its CSV files and all of its last checkpoint, that is weights, optimizers,
    buffer, generators and counters; but not the clock's time, nor timing.csv, which has it too."""
    records = [run_dir / f"{name}.csv" for name in ("episodes", "evaluations", "losses")]
    found = {path.name: path.read_bytes() for path in records if path.exists()}
    for name in ("checkpoint.pt", "policy.pt"):
        content = torch.load(run_dir / name, map_location="cpu", weights_only=True)
        found |= dict(leaves(content, name))
    clock = {"checkpoint.pt/run/elapsed", "checkpoint.pt/run/csv_bytes/timing.csv"}
    return {name: value for name, value in found.items() if name not in clock}


def differences(run_dir: Path, expected: dict[str, bytes]) -> list[str]:
    """Names of the results of a run that are not the expected ones, or that only one of the two has."""
    found = results(run_dir)
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


def progress(run_dir: Path) -> int:
    """The step of the last whole row of timing.csv; 0 if there is none."""
    path = run_dir / "timing.csv"
    rows = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return int(rows[-1].split(b",")[0]) if rows else 0


def kill_and_resume(start: Callable, run_dir: Path, kills: int, steps: int, generator: random.Random) -> int:
    """Starts a run again and again, sends it SIGKILL at random moments spread over its steps, then lets it
    end. `start(run_dir)` gives the run's process: a Popen, or what has its poll, wait and kill.

    Returns how many processes were killed before they had ended.
    """
    killed = 0
    for kill in range(kills):
        moment = 0.95 * steps * (kill + generator.random()) / kills
        delay = generator.uniform(0, 0.02)  # seconds, so that it can be anywhere within a step
        process = start(run_dir)
        while progress(run_dir) < moment and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        killed += process.wait() == -9
    if status := start(run_dir).wait():
        raise RuntimeError(f"the process that was left alone at last ended with status {status}")
    return killed


def torture(script: str, arguments: argparse.Namespace, folder: Path) -> bool:
    """Prints how it went with one script; whether all was as it should be."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *SHORT.split(), *shlex.split(arguments.flags)]
    command += ["--total-timesteps", str(arguments.total_timesteps), "--resume", "--run-dir"]

    def start(run_dir: Path) -> subprocess.Popen:
        with open(run_dir.with_suffix(".log"), "a") as output:
            return subprocess.Popen([*command, str(run_dir)], stdout=output, stderr=output)

    alone, often_killed = folder / "alone", folder / "often_killed"
    generator = random.Random(f"{script} {arguments.seed}")
    try:
        if status := start(alone).wait():
            raise RuntimeError(f"even the run that was never killed ended with status {status}")
        asked, steps = arguments.kills, arguments.total_timesteps
        killed = kill_and_resume(start, often_killed, asked, steps, generator)
    except RuntimeError as error:
        logs = [path.read_text()[-2000:] for path in sorted(folder.glob("*.log"))]
        print(f"{script}: {error}", *logs, sep="\n")
        return False
    different = differences(often_killed, results(alone))
    verdict = f"differs in {', '.join(different)}" if different else "ended byte-identical"
    print(f"{script}: killed {killed} times; {verdict}", flush=True)
    return killed == asked and not different


def main() -> int:
    """Status 0 if all was as it should be, else 1."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each script")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--total-timesteps", type=int, default=2000, help="length of each run")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, help="names without .py")
    parser.add_argument("--flags", default="", help="further flags of the scripts, in quotes")
    arguments = parser.parse_args()
    verdicts = []
    for script in arguments.scripts:
        with tempfile.TemporaryDirectory() as folder:
            verdicts.append(torture(script, arguments, Path(folder)))
    return int(not all(verdicts))


if __name__ == "__main__":
    sys.exit(main())
