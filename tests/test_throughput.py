"""benchmark/throughput.py: what it counts, what it writes and prints, and that it measures our scripts."""

import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import throughput
import torch
import tyro
from conftest import ROOT
from throughput import PRODUCTS, Options, Product, UnmeasuredError
from torch.utils.flop_counter import FlopCounterMode

SMALL = Options(env_id="Pendulum-v1", threads=1, batch_size=16, hidden_dim=16, steps=60, warm_up=30, rounds=1)

# A script that takes its flags, trains nothing and writes timing.csv: 10 ms for every row, of which it says
# that they were 2 s, or 3 s in a second copy.
FAKE = """
import sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run_dir, interval = Path(flags["--run-dir"]), int(flags["--log-frequency"])
content = b"x" * MEBIBYTES * 2**20
with open(run_dir / "timing.csv", "w") as file:
    print("global_step,SPS,elapsed", file=file)
    for row in range(1, 10_000):
        time.sleep(0.01)
        print(row * interval, 0, row * (2 + int(run_dir.name)), sep=",", file=file, flush=True)
"""


def run_benchmark(*arguments, **options) -> subprocess.CompletedProcess:
    """`python benchmark/throughput.py` with arguments."""
    command = [sys.executable, str(ROOT / "benchmark" / "throughput.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


# ======== The matrix products of an update ========
@pytest.mark.parametrize(
    ("algorithm", "products_of_one_sample", "updates"),
    [
        # Of one sample, a critic (5-4-4-1) has 20 + 16 + 4 = 40 forward, 40 + 16 + 4 = 60 back to its weights
        # and 40 back to its input; an actor (3-4-4-2) 12 + 16 + 8 = 36 and 36 + 16 + 8 = 60, SAC's (3-4-4-4)
        # 12 + 16 + 16 = 44 and 44 + 16 + 16 = 76.
        ("ddpg", (36 + 40) + (40 + 60) + (36 + 40 + 40 + 60), 1),
        ("td3", 2 * ((36 + 2 * 40) + 2 * (40 + 60)) + (36 + 40 + 40 + 60), 2),
        ("sac", (44 + 2 * 40) + 2 * (40 + 60) + (44 + 2 * (40 + 40) + 76), 1),
    ],
)
def test_operations_worked_by_hand(algorithm, products_of_one_sample, updates):
    needed, of_updates = throughput.products(algorithm, obs_dim=3, action_dim=2, hidden_dim=4, batch_size=5)
    assert throughput.flops(needed) == 2 * 5 * products_of_one_sample
    assert of_updates == updates


def test_operations_are_those_of_the_scripts(script):
    algorithm = throughput.algorithm_of(script.__name__.partition("_")[0])
    obs_dim, action_dim, hidden_dim, batch_size = 11, 3, 24, 40
    needed, updates = throughput.products(algorithm, obs_dim, action_dim, hidden_dim, batch_size)
    agent = script.Agent(obs_dim, action_dim, script.Args(hidden_dim=hidden_dim))
    observations, actions = torch.randn(batch_size, obs_dim), torch.rand(batch_size, action_dim)
    batch = script.Batch(
        observations=observations,
        actions=actions,
        rewards=torch.randn(batch_size),
        next_observations=observations,
        terminations=torch.zeros(batch_size),
    )

    def matrix_vector(matrix, vector, **_) -> int:
        return 2 * matrix[0] * matrix[1]

    def outer(left, right, **_) -> int:  # a gradient of the product with a vector
        return 2 * left[0] * right[0] if left[1:] == (1,) and len(right) == 1 else 0

    # PyTorch counts the products of two matrices only.
    vectors = {torch.ops.aten.mv: matrix_vector, torch.ops.aten.mul: outer}
    with FlopCounterMode(display=False, custom_mapping=vectors) as counter:
        for gradient_step in range(1, 1 + 10 * updates):
            agent.update(batch, gradient_step)
    assert counter.get_total_flops() == 10 * throughput.flops(needed)


def test_a_product_takes_as_long_as_it_takes(monkeypatch):
    """The time is that of one product: 5 ms if 5 ms are slept in each."""
    monkeypatch.setattr(torch, "mm", lambda left, right, out: time.sleep(0.005))
    seconds = throughput.time_product(Product("forward", 2, 3, 4), "cpu")
    assert 0.005 <= seconds < 0.05


@pytest.mark.parametrize("kind", ["forward", "input gradient", "weight gradient"])
def test_products_are_timed_in_the_layout_of_autograd(monkeypatch, kind):
    seen = set()
    mm = torch.mm

    def spy(left, right, out):
        seen.add((*left.shape, *right.shape, left.is_contiguous(), right.is_contiguous()))
        return mm(left, right, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    throughput.time_product(Product(kind, 20, 30, 40), "cpu")
    assert seen == {(20, 30, 30, 40, kind != "weight gradient", kind != "forward")}


def test_the_bound_sums_the_products(monkeypatch):
    """Where an operation takes 1 µs, an update takes as many µs as it has operations."""
    monkeypatch.setattr(
        throughput, "time_product", lambda product, device: 1e-6 * throughput.flops([product])
    )
    result = throughput.measure_products(dataclasses.replace(SMALL, contestants=("td3",)))
    needed, updates = throughput.products("td3", 3, 1, 16, 16)
    bound = result["algorithms"]["td3"]
    assert bound["updates_per_second"] == pytest.approx(1e6 / (throughput.flops(needed) / updates))
    assert bound["mflop_per_update"] == pytest.approx(throughput.flops(needed) / updates / 1e6)
    assert bound["gflop_per_second"] == pytest.approx(1e-3)


# ======== What is measured ========
@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Makes a Racer of the fake script, where a copy takes so many MiB, and ends it after the test."""
    racers = []

    def start(mebibytes: int = 1, **options) -> throughput.Racer:
        (tmp_path / "sac_continuous.py").write_text(FAKE.replace("MEBIBYTES", str(mebibytes)))
        monkeypatch.setattr(throughput, "ROOT", tmp_path)
        folder = tmp_path / f"race{len(racers)}"
        racers.append(throughput.Racer("sac", dataclasses.replace(SMALL, **options), folder))
        return racers[-1]

    yield start
    for racer in racers:
        racer.end()


def test_a_turn_times_its_steps_and_no_others(fake):
    """Each interval of 30 steps says that it took 2 s, so 60 steps took 4."""
    racer = fake()
    [before] = map(len, map(racer.times, racer.folders))
    assert racer.speed() == 60 / 4
    [times] = map(racer.times, racer.folders)
    assert len(times) >= before + 3  # the interval of the pause, and the two that are timed


def test_copies_add_up(fake):
    """Two copies, of which one takes 4 s for 60 steps, the other 6."""
    assert fake(processes=2).speed() == 60 / 4 + 60 / 6


def test_the_warm_up_is_over_when_the_first_turn_begins(fake):
    [times] = map((racer := fake(warm_up=100)).times, racer.folders)
    assert len(times) >= 4  # rows of 30 steps


def test_who_has_no_turn_stands_still(fake):
    racer = fake()
    seen = []
    for _ in range(2):
        time.sleep(0.1)  # ten rows' time
        seen.append((racer.folders[0] / "timing.csv").read_text())
    assert seen[0] == seen[1]


def test_times_are_of_whole_rows(fake):
    racer = fake()
    (racer.folders[0] / "timing.csv").write_text("global_step,SPS,elapsed\n30,3,10\n60,15,12\n90,10,1")
    assert racer.times(racer.folders[0]) == [10, 12]


def test_who_fails_is_named_with_the_reason(monkeypatch, tmp_path):
    (tmp_path / "sac_continuous.py").write_text("import sys\nprint('first')\nsys.exit('the reason')")
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    with pytest.raises(UnmeasuredError, match="^the reason$"):
        throughput.Racer("sac", SMALL, tmp_path / "race")


def test_all_copies_end(fake):
    racer = fake(processes=2)
    racer.end()
    for process in racer.processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_every_option_reaches_the_scripts(script):
    options = Options(env_id="Ant-v4", threads=3, batch_size=5, hidden_dim=7, gradient_steps=9)
    options = dataclasses.replace(options, steps=40, warm_up=20)  # of a turn, and before the first
    args = tyro.cli(script.Args, args=throughput.script_arguments(options, Path("there")))
    assert (args.env_id, args.run_dir, args.threads, args.cuda) == ("Ant-v4", "there", 3, False)
    assert (args.batch_size, args.hidden_dim, args.gradient_steps) == (5, 7, 9)
    assert (args.learning_starts, args.log_frequency) == (10, 20)  # two rows a turn
    assert (args.eval_frequency, args.checkpoint_frequency) == (0, 0)
    assert args.train_frequency == 1  # one gradient phase a step, as in the peers
    on_gpu = dataclasses.replace(options, device="cuda")
    assert "--cuda" in throughput.script_arguments(on_gpu, Path("there"))


def test_a_missing_peer_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(throughput, "bound", lambda options: {"sac": BOUND | {"hardware": "a machine"}})
    path = tmp_path / "a.csv"
    options = dataclasses.replace(SMALL, contestants=("sb3-sac", "sbx-sac"), csv=path)
    assert throughput.main(options) == 0
    output = capsys.readouterr().out
    assert "sb3-sac is left out: stable-baselines3 is not installed" in output
    assert "sbx-sac is left out: sbx-rl is not installed" in output
    assert [row["contestant"] for row in throughput.read(path)] == [PRODUCTS]


def test_a_script_that_fails_is_said_and_makes_the_program_fail(monkeypatch, tmp_path, capsys):
    def start(contestant, options, folder):
        raise UnmeasuredError("it broke")

    monkeypatch.setattr(throughput, "Racer", start)
    monkeypatch.setattr(throughput, "bound", lambda options: {"sac": BOUND | {"hardware": "a machine"}})
    options = dataclasses.replace(SMALL, contestants=("sac --compile",), csv=tmp_path / "a.csv")
    assert throughput.main(options) == 1
    assert "sac --compile is left out: it broke" in capsys.readouterr().out


def test_who_takes_part():
    """Each script plain and, on either device, with the flags that speed it up; and its two peers."""
    td3 = [name for name in throughput.everyone("cuda") if throughput.algorithm_of(name) == "td3"]
    assert td3 == ["td3", "td3 --cudagraphs", "td3 --compile --cudagraphs", "sb3-td3", "sbx-td3"]
    assert throughput.everyone("cpu")[4:8] == ("td3", "td3 --compile", "sb3-td3", "sbx-td3")
    assert (len(throughput.everyone("cpu")), len(throughput.everyone("cuda"))) == (12, 15)
    for name in throughput.everyone("cuda"):
        throughput.check(throughput.Options(contestants=(name,), device="cuda"))
        assert all(hasattr(throughput.load("td3")[0].Args, flag[2:]) for flag in name.split()[1:])


def test_peak_memory_is_the_childs_own():
    """Of a script that fills 200 MiB, and of one that does not; the parent is as small as the program is."""
    program = f"""
import dataclasses, sys, tempfile, throughput
from pathlib import Path
options = throughput.Options(steps=60, warm_up=30)
with tempfile.TemporaryDirectory() as folder:
    throughput.ROOT = Path(folder)
    for size in (1, 200):
        script = {FAKE!r}.replace("MEBIBYTES", str(size))
        (throughput.ROOT / "sac_continuous.py").write_text(script)
        racer = throughput.Racer("sac", options, throughput.ROOT / str(size))
        racer.end()
        print(racer.peak_mib)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmark")}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    small, large = map(float, output.split())
    assert small < 60
    assert 200 < large < 260


def test_a_process_that_fails_stops_its_neighbours(tmp_path):
    """Two processes: one says its number and waits, the other fails once it has."""
    path = tmp_path / "number"
    waits = f"import os, time; open({str(path)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(100)"
    fails = "import os, sys, time\n"
    fails += f"while not (os.path.exists({str(path)!r}) and open({str(path)!r}).read()): time.sleep(0.1)\n"
    fails += "print('first', file=sys.stderr)\nsys.exit('the reason')"
    commands = [[sys.executable, "-c", program] for program in (fails, waits)]
    with pytest.raises(UnmeasuredError, match="^the reason$"):
        throughput.run_together(commands, SMALL, tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


def test_bounds_of_copies_add_up(monkeypatch):
    """Two copies, each with four updates for an environment step."""
    outputs = []
    for updates in (100.0, 300.0):
        row = {"updates_per_second": updates, "gflop_per_second": updates / 10, "mflop_per_update": 100.0}
        outputs.append(json.dumps({"hardware": "a machine", "algorithms": {"sac": row}}))
    monkeypatch.setattr(throughput, "run_together", lambda commands, options, folder: outputs)
    options = dataclasses.replace(SMALL, contestants=("sac", "sbx-sac"), processes=2, gradient_steps=4)
    sums = {"updates_per_second": 400.0, "gflop_per_second": 40.0, "mflop_per_update": 100.0}
    assert throughput.bound(options) == {"sac": sums | {"steps_per_second": 100.0, "hardware": "a machine"}}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this operating system confines no process")
def test_processes_are_confined_to_as_many_cores_as_threads(tmp_path):
    before = os.sched_getaffinity(0)
    command = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    [output] = throughput.run_together([command], SMALL, tmp_path)
    assert output == "1"
    assert os.sched_getaffinity(0) == before


def test_physical_cores_come_first(monkeypatch, tmp_path):
    for core, siblings in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        (tmp_path / f"cpu{core}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(throughput, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    assert throughput.cores(2) == [0, 2]
    assert throughput.cores(3) == [0, 2, 1]


def test_scaling_varies_one_thing_at_a_time():
    options = Options(scaling=True, steps=200, warm_up=1_000)
    for axis, value, point in throughput.points(options):
        assert str(getattr(point, axis)) == value
        varied = {axis, "steps", "warm_up"} | ({"threads"} if axis == "processes" else set())
        base, now = dataclasses.asdict(options), dataclasses.asdict(point)
        assert {name for name in base if base[name] != now[name]} <= varied
        throughput.check(point)
    axes = {axis for axis, _, _ in throughput.points(options)}
    assert axes == {"batch_size", "hidden_dim", "gradient_steps", "env_id", "processes"}


def test_costly_points_take_fewer_steps():
    base = Options(steps=200, warm_up=1_000)

    def lengths(**changes) -> tuple[int, int]:
        point = throughput.shortened(dataclasses.replace(base, **changes), base)
        return point.warm_up, point.steps

    assert lengths(hidden_dim=512) == (250, 50)
    assert lengths(gradient_steps=5) == (200, 40)
    assert lengths(hidden_dim=64) == (1_000, 200)
    assert lengths(hidden_dim=256_000) == (20, 10)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"contestants": ("ppo",)}, "'ppo' is none of"),
        ({"contestants": ("sb3-sac --compile",)}, "'sb3-sac --compile' is none of"),
        ({"profile": "sb3-sac"}, "'sb3-sac' is none of"),
        ({"steps": 99}, "--steps must be even"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong, complaint):
    with pytest.raises(SystemExit, match=complaint):
        throughput.main(dataclasses.replace(SMALL, **wrong))


def test_a_measurement_is_never_overwritten(tmp_path):
    (tmp_path / "a.csv").write_text("precious")
    with pytest.raises(SystemExit, match="exists"):
        throughput.main(dataclasses.replace(SMALL, csv=tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_text() == "precious"


# ======== The CSV file and the tables ========
BOUND = {"steps_per_second": 400.0, "updates_per_second": 400.0}
BOUND |= {"mflop_per_update": 580.0, "gflop_per_second": 232.0}
SPEEDS = {"sac": [100.0, 300.0, 200.0], "sb3-sac": [50.0, 200.0, 200.0], "sbx-sac": [100.0]}


@pytest.fixture
def measured(monkeypatch, tmp_path) -> Path:
    """The CSV file of three rounds of a race with known speeds; sbx-sac fails in the second."""
    order = []

    class Racer:
        def __init__(self, contestant, options, folder):
            assert contestant not in order  # it is started once
            self.contestant, self.speeds, self.peak_mib = contestant, iter(SPEEDS[contestant]), math.nan

        def speed(self):
            order.append(self.contestant)
            for speed in self.speeds:
                return speed
            raise UnmeasuredError("it broke")

        def end(self):
            self.peak_mib = 301.0

    monkeypatch.setattr(throughput, "Racer", Racer)
    monkeypatch.setattr(throughput, "bound", lambda options: {"sac": BOUND | {"hardware": "a machine"}})
    options = dataclasses.replace(SMALL, contestants=tuple(SPEEDS), rounds=3, gradient_steps=2)
    left_out = throughput.race(options, tmp_path / "measured.csv")
    assert left_out == {"sbx-sac": "it broke"}
    a, b, c = SPEEDS
    assert order == [*(a, b, c), *(b, c, a), *(a, b)]  # each round starts with the next one, the last with c
    return tmp_path / "measured.csv"


def test_csv_holds_every_measurement_and_its_conditions(measured):
    with open(measured, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 3 + 3 + 1  # the bound, ours, and two peers of which one failed
    settings = {
        "env_id": "Pendulum-v1",
        "device": "cpu",
        "threads": "1",
        "processes": "1",
        "batch_size": "16",
    }
    settings |= {"hidden_dim": "16", "gradient_steps": "2", "steps": "60", "warm_up": "30"}
    for row in rows:
        assert settings.items() <= row.items()
        assert (row["algorithm"], row["hardware"]) == ("sac", "a machine")
        assert f"torch {importlib.metadata.version('torch')}," in row["versions"]
        assert row["command"].startswith("python benchmark/throughput.py")
    [ours] = [row for row in rows if (row["contestant"], row["round"]) == ("sac", "1")]
    assert float(ours["steps_per_second"]) == 300
    assert float(ours["updates_per_second"]) == 600
    assert float(ours["gflop_per_second"]) == pytest.approx(600 * 580 / 1e3)
    assert float(ours["peak_mib"]) == 301


@pytest.fixture
def steady(monkeypatch):
    """Every contestant makes one step a second."""

    class Racer:
        peak_mib = 1.0

        def __init__(self, contestant, options, folder):
            pass

        def speed(self):
            return 1.0

        def end(self):
            pass

    monkeypatch.setattr(throughput, "Racer", Racer)
    monkeypatch.setattr(throughput, "bound", lambda options: {"sac": BOUND | {"hardware": "a machine"}})


def test_csv_of_scaling_holds_the_settings_of_each_point(steady, monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "AXES", {"batch_size": [8, 32], "processes": [1, 2]})
    options = dataclasses.replace(SMALL, contestants=("sac",), scaling=True, threads=2)
    throughput.race(options, tmp_path / "a.csv")
    rows = [row for row in throughput.read(tmp_path / "a.csv") if row["contestant"] == "sac"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        *(("batch_size", "8"), ("batch_size", "32")),
        *(("processes", "1"), ("processes", "2")),
    ]
    settings = [(row["batch_size"], row["processes"], row["threads"], row["warm_up"]) for row in rows]
    assert settings == [(8, 1, 2, 30), (32, 1, 2, 20), (16, 1, 1, 30), (16, 2, 1, 30)]


def test_an_interrupted_measurement_keeps_what_it_has(monkeypatch, tmp_path):
    ended = []

    class Racer:
        peak_mib = 1.0

        def __init__(self, contestant, options, folder):
            self.turns = 0

        def speed(self):
            self.turns += 1
            if self.turns == 3:
                raise KeyboardInterrupt
            return 1.0

        def end(self):
            ended.append(self)

    monkeypatch.setattr(throughput, "Racer", Racer)
    monkeypatch.setattr(throughput, "bound", lambda options: {"sac": BOUND | {"hardware": "a machine"}})
    options = dataclasses.replace(SMALL, contestants=("sac", "sac --compile"), rounds=9)
    with pytest.raises(KeyboardInterrupt):
        throughput.race(options, tmp_path / "a.csv")
    rows = throughput.read(tmp_path / "a.csv")
    turns = [[PRODUCTS, "sac", "sac --compile"], ["sac --compile", "sac"]]
    assert [row["contestant"] for row in rows] == sum(turns, [])
    assert len(ended) == 2


def test_the_bound_is_measured_anew_in_every_tenth_round(steady, tmp_path):
    throughput.race(dataclasses.replace(SMALL, contestants=("sac",), rounds=12), tmp_path / "a.csv")
    rows = throughput.read(tmp_path / "a.csv")
    assert [row["round"] for row in rows if row["contestant"] == PRODUCTS] == [0, 10]
    assert [row["round"] for row in rows if row["contestant"] == "sac"] == list(range(12))


def test_comparison_has_medians_of_speeds_and_of_the_rounds_ratios(measured):
    table = throughput.comparison(throughput.read(measured))
    assert table.splitlines() == [
        "| contestant | steps/s | lowest | highest | × SB3 | × SBX | of the bound | peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| sac | 200 | 100 | 300 | 1.50 | 1.00 | 0.25 | 301 |",  # × SB3: of 2, 1.5 and 1
        "| sb3-sac | 200 | 50 | 200 | 1.00 | 0.50 | 0.12 | 301 |",
        "| sbx-sac | 100 | 100 | 100 | 2.00 | 1.00 | 0.25 | 301 |",
        "| sac's products alone: 580 MFLOP an update, 232 GFLOP/s "
        "| 400 | 400 | 400 | 8.00 | 4.00 | 1.00 |  |",
    ]


def test_comparison_leaves_cells_of_missing_peers_empty(measured):
    rows = [row for row in throughput.read(measured) if not row["contestant"].startswith("sb")]
    assert "| sac | 200 | 100 | 300 |  |  | 0.25 | 301 |" in throughput.comparison(rows)


def scaling_rows() -> list[throughput.Row]:
    """Two algorithms at two widths: ours four times as long an update for three times the operations."""
    rows = []
    for algorithm in ("ddpg", "sac"):
        for value, mflop, ours, limit in (("64", 30.0, 200.0, 400.0), ("128", 90.0, 50.0, 100.0)):
            for contestant, updates in ((PRODUCTS, limit), (algorithm, ours)):
                row = {"axis": "hidden_dim", "value": value, "round": 0.0, "contestant": contestant}
                row |= {"algorithm": algorithm, "mflop_per_update": mflop, "peak_mib": 300.0}
                rows.append(row | {"updates_per_second": updates, "steps_per_second": updates / 2})
    return rows


def test_growth_is_relative_to_the_first_value():
    assert throughput.growth(scaling_rows(), "hidden_dim").splitlines()[2:4] == [
        "| ddpg | 64 | 100.0 | 200.0 | 5.00 | 1.00 | 30.0 | 1.00 | 0.50 | 300 |",
        "| ddpg | 128 | 25.0 | 50.0 | 20.00 | 4.00 | 90.0 | 3.00 | 0.50 | 300 |",
    ]


def test_figure_shows_every_contestant_and_its_bound(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot

    def spy(self, x, y, *arguments, **keywords):
        drawn.append((keywords["label"], list(y)))
        return plot(self, x, y, *arguments, **keywords)

    monkeypatch.setattr(Axes, "plot", spy)
    throughput.draw(scaling_rows(), tmp_path / "a.png")
    curves = [("ddpg", [200, 50]), (PRODUCTS, [400, 100]), ("sac", [200, 50]), (PRODUCTS, [400, 100])]
    assert drawn == curves
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_report_prints_the_tables_of_a_file(measured, capsys):
    assert throughput.main(Options(report=measured)) == 0
    output = capsys.readouterr().out
    assert throughput.comparison(throughput.read(measured)) in output
    assert "a machine" in output
    assert "medians of 3 rounds" in output


@pytest.mark.parametrize("name", ["throughput.csv", "throughput_1_thread.csv"])
def test_the_readme_has_the_tables_of_what_was_measured(name):
    text = (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")
    assert throughput.comparison(throughput.read(ROOT / "benchmark" / name)) in text


# ======== End to end ========
def test_our_scripts_end_to_end(tmp_path):
    """All three, measured as a user would. The timed steps cannot have taken longer than everything."""
    options = "--contestants ddpg td3 sac --env-id Pendulum-v1 --threads 1 --batch-size 16 --hidden-dim 16"
    options += " --steps 100 --warm-up 100 --rounds 2 --csv measured.csv"
    started = time.perf_counter()
    result = run_benchmark(*options.split(), cwd=tmp_path)
    duration = time.perf_counter() - started
    assert result.returncode == 0, result.stderr
    rows = throughput.read(tmp_path / "measured.csv")
    assert throughput.comparison(rows) in result.stdout
    contestants = [row["contestant"] for row in rows]
    assert contestants == [*[PRODUCTS] * 3, "ddpg", "td3", "sac", "td3", "sac", "ddpg"]
    limits = {row["algorithm"]: row["steps_per_second"] for row in rows if row["contestant"] == PRODUCTS}
    ours = [row for row in rows if row["contestant"] != PRODUCTS]
    assert sum(100 / row["steps_per_second"] for row in ours) < duration
    for row in ours:
        assert 0 < row["steps_per_second"] < limits[row["algorithm"]]
        assert 100 < row["peak_mib"] < 2_000
    assert list(tmp_path.iterdir()) == [tmp_path / "measured.csv"]


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::mul", "other PyTorch operators"),
        ("aten::mean", "other PyTorch operators"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "other PyTorch operators"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64>(Params)", "matrix products"),
        ("aten::_fused_adam_", "optimizer and targets"),
        ("aten::_foreach_lerp_", "optimizer and targets"),
        ("environment", "environment"),
    ],
)
def test_operators_are_sorted_by_kind(name, category):
    assert throughput.category(name) == category


def test_profile_end_to_end():
    """Wide networks, so that the matrix products must be found; shares add up to the whole."""
    options = "--profile sac --env-id Pendulum-v1 --threads 1 --hidden-dim 512 --batch-size 128 --steps 20"
    options += " --warm-up 10"
    result = run_benchmark(*options.split())
    assert result.returncode == 0, result.stderr
    tables = [{}, {}]
    for table, text in zip(tables, result.stdout.split("\n\n"), strict=True):
        for line in text.splitlines()[2:]:
            name, milliseconds, _ = line.strip("| ").split(" | ")
            table[name] = float(milliseconds)
    by_clock, by_operator = tables
    assert by_clock.keys() == {
        "environment",
        "acting",
        "storing",
        "sampling",
        "update",
        "the rest of the loop",
        "all",
    }
    kinds = {
        "matrix products",
        "optimizer and targets",
        "environment",
        "other PyTorch operators",
        "Python",
        "all",
    }
    assert by_operator.keys() == kinds
    for table in tables:
        assert all(milliseconds > 0 for milliseconds in table.values())
        assert math.isclose(sum(table.values()), 2 * table["all"], abs_tol=0.01)
    assert by_clock["update"] == max(value for name, value in by_clock.items() if name != "all")
    assert by_operator["matrix products"] > by_operator["environment"]
