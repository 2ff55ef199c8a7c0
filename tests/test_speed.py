"""benchmark/speed.py: what a turn times, that the others stand still, the table, and that our scripts run."""

import csv
import io
import subprocess
import sys
import time

import gymnasium as gym
import pandas as pd
import pytest
import speed
import speed_contestant as contestant
from speed import Options

import sac_continuous as sac

# Stands in for the peers' interpreter: says that it does 50 or 100 steps per second, and notes when it ran.
FAKE = """#!{python}
import sys, threading, time

name, speeds = sys.argv[3], {{"SB3": 50, "SBX": 100}}
if name not in speeds:
    sys.exit("no such thing")


def breathe():
    with open("{folder}/" + name, "a", buffering=1) as file:
        while True:
            print(time.monotonic(), file=file)
            time.sleep(0.002)


threading.Thread(target=breathe, daemon=True).start()
print(0, flush=True)
for line in sys.stdin:
    time.sleep(0.05)
    print(int(line) / speeds[name], flush=True)
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options with which the fake is the peers' interpreter."""
    monkeypatch.chdir(tmp_path)
    fake = tmp_path / "fake"
    fake.write_text(FAKE.format(python=sys.executable, folder=tmp_path))
    fake.chmod(0o755)
    return Options(algorithms=("sac",), peer_python="./fake", rounds=4, csv=str(tmp_path / "speed.csv"))


def test_a_turn_counts_its_steps_and_not_the_wait_before_it(monkeypatch):
    class SlowInput(io.StringIO):
        def readline(self):
            time.sleep(0.2)
            return super().readline()

    monkeypatch.setattr(sys, "stdin", SlowInput("3\n2\n"))
    monkeypatch.setattr(contestant.Clock, "reports", io.StringIO())
    env = contestant.Clock(gym.make("Pendulum-v1"))
    env.reset()
    for _ in range(4):
        env.step([0.0])
        time.sleep(0.02)
    _, turn = map(float, contestant.Clock.reports.getvalue().split())
    assert 0.06 <= turn < 0.2


def test_turns_of_contestants(options, tmp_path, monkeypatch, capsys):
    """They never run at the same time; who cannot take part is named; nothing is left running."""
    started, popen = [], subprocess.Popen

    def note(*arguments, **keywords):
        started.append(popen(*arguments, **keywords))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    options = Options(**vars(options) | {"contestants": ("SB3", "unknown", "SBX"), "busy": 1})
    speed.main(options)
    assert len(started) == 4
    assert all(process.poll() is not None for process in started)
    output, error = capsys.readouterr()
    assert "sac, unknown: left out: no such thing" in error
    assert "| sac | SB3 | 50 (50 to 50) | 0.50 (0.50 to 0.50) |" in output
    assert speed.cpu() in output
    with open(options.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4
    found = {(row["contestant"], float(row["steps_per_second"]), row["busy"]) for row in rows}
    assert found == {("SB3", 50, "1"), ("SBX", 100, "1")}
    files = {name: (tmp_path / name).read_text() for name in ("SB3", "SBX")}
    moments = [(float(line), name) for name, text in files.items() for line in text.splitlines()]
    names = [name for _, name in sorted(moments)]
    changes = sum(one != other for one, other in zip(names, names[1:], strict=False))
    assert 2 <= changes <= 3 + 2 * options.rounds  # from one to the other, in each round and before the first
    assert len(names) > 10 * changes


def test_table_has_medians_and_quartiles_of_ratios_within_rounds():
    speeds = {"SBX": [100, 200, 400, 100, 50], "ours": [100, 400, 1200, 400, 250]}
    rows = [
        {"algorithm": "td3", "contestant": name, "round": turn, "steps_per_second": values[turn]}
        for turn in range(5)
        for name, values in speeds.items()
    ]
    assert "| td3 | ours | 400 (250 to 400) | 3.00 (2.00 to 4.00) |" in speed.table(pd.DataFrame(rows))
    other = rows[0] | {"algorithm": "sac", "contestant": "SB3"}
    assert "nan" not in speed.table(pd.DataFrame([*rows, other]))
    assert "| td3 | ours | 400 (250 to 400) |  |" in speed.table(pd.DataFrame(rows[1::2]))  # without SBX


def test_our_scripts_are_trained_with_their_defaults(monkeypatch):
    trained = []
    monkeypatch.setattr(sac, "train", trained.append)
    monkeypatch.setattr(sac, "COMPILE_AFTER", sac.COMPILE_AFTER)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("ours", "ours --no-compile"):
        contestant.train_ours("sac", name, Options(threads=1))
    for args, compiled in zip(trained, (sac.CAN_COMPILE, False), strict=True):
        expected = sac.Args(
            env_id="HalfCheetah-v4", compile=compiled, cuda=False, threads=1, eval_frequency=0
        )
        expected.learning_starts, expected.total_timesteps = 100, args.total_timesteps
        assert args == expected
        assert args.total_timesteps > 10**8


def test_our_scripts_take_part(options):
    small = {"env_id": "Pendulum-v1", "threads": 1, "batch_size": 16, "hidden_dim": 16, "warm_up": 120}
    small |= {"contestants": ("ours --no-compile",), "rounds": 2, "steps": 20}
    turns = speed.race(Options(**vars(options) | small))
    assert list(turns["round"]) == [0, 1]
    assert turns["steps_per_second"].between(1, 5000).all()
