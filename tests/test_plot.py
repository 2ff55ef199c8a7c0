"""benchmark/plot.py: what it reads and refuses, the numbers of its table, and what its figures show."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plot
import pytest
from conftest import ROOT


def write_run(folder: Path, returns=(100.0,), every=10_000, discounted=None, losses=None, **args) -> Path:
    """A run as the scripts leave it: an evaluation now and then, 100 steps a second, two rows of losses."""
    folder.mkdir(parents=True)
    args = {"env_id": "Hopper-v4", "exp_name": "sac_continuous", "seed": 1, "gamma": 0.99} | args
    (folder / "args.json").write_text(json.dumps({"args": args, "versions": {}, "device": "cpu"}))
    steps = every * np.arange(1, len(returns) + 1)
    evaluations = {"global_step": steps, "episodic_return": returns}
    if discounted:
        evaluations["discounted_return"] = discounted
    logged = {"global_step": [1000, 2000], "qf1_values": [1.0, 3.0], "qf1_loss": [0.5, 0.25]} | (losses or {})
    timing = {"global_step": steps, "SPS": 100.0, "elapsed": steps / 100}
    for name, columns in {"evaluations": evaluations, "losses": logged, "timing": timing}.items():
        pd.DataFrame(columns).to_csv(folder / f"{name}.csv", index=False)
    return folder


def table(*folders) -> list[dict[str, str]]:
    """The rows of the table that plot.py makes of the runs in these folders."""
    text = plot.make_table(plot.read_runs(folders))
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def returns_panel(folder):
    """The axes of returns.png for the runs of one task."""
    return plot.returns_figure(plot.read_runs((folder,))).axes[0]


def bold(axes, colour, style="-"):
    """The means that a panel shows in a colour and style."""
    lines = [line for line in axes.lines if line.get_linewidth() == 2 and line.get_color() == colour]
    return [line for line in lines if line.get_linestyle() == style]


def refused(capsys, *folders) -> str:
    """The one line with which plot.py refuses the runs in these folders."""
    with pytest.raises(SystemExit) as stop:
        plot.check(plot.read_runs(folders))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


# ======== Reading ========
def test_runs_are_found_at_any_depth_once_and_named_by_args_json(tmp_path):
    write_run(tmp_path / "a" / "b" / "c", exp_name="td3_continuous")
    write_run(tmp_path / "a" / "d", exp_name="td3_no_delay")
    write_run(tmp_path / "e", exp_name="mine_continuous", env_id="Pendulum-v1")
    rows = table(tmp_path / "a", tmp_path / "a" / "b", tmp_path / "e")
    names = [("Hopper-v4", "TD3"), ("Hopper-v4", "td3_no_delay"), ("Pendulum-v1", "mine")]
    assert [(row["Task"], row["Algorithm"]) for row in rows] == names


def test_runs_that_have_only_begun(tmp_path):
    evaluated = write_run(tmp_path / "1", returns=(10.0, 20.0))
    (evaluated / "losses.csv").unlink()
    (evaluated / "timing.csv").write_text("")
    write_run(tmp_path / "2", seed=2, returns=(30.0, 40.0, 900.0))
    just_started = write_run(tmp_path / "3", seed=3)
    (just_started / "evaluations.csv").write_text("global_step,episodic_return\n")
    plot.main((tmp_path,), tmp_path / "new" / "figures")
    (row,) = table(tmp_path)
    assert (row["Steps"], row["Each seed"], row["Return"]) == ("20,000", "20; 40", "30")


def test_compressed_files_are_read(tmp_path):
    folder = write_run(tmp_path / "1", returns=(10.0, 20.0), discounted=[1.0, 2.0])
    plot.main((tmp_path,), tmp_path / "plain")
    for name in ("evaluations", "losses", "timing"):
        path = folder / f"{name}.csv"
        path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    plot.main((tmp_path,), tmp_path / "compressed")
    names = ["losses.png", "q_values.png", "returns.png", "table.md"]
    assert sorted(path.name for path in (tmp_path / "compressed").iterdir()) == names
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compressed" / name).read_bytes()


# ======== Refusals ========
def test_no_runs_are_refused_on_the_command_line(tmp_path):
    just_started = write_run(tmp_path / "1")
    (just_started / "evaluations.csv").write_text("")
    script, output = ROOT / "benchmark" / "plot.py", tmp_path / "out"
    command = [sys.executable, str(script), str(tmp_path), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(tmp_path) in done.stderr
    assert not output.exists()


def test_the_same_seed_twice_is_refused(tmp_path, capsys):
    for name in ("first", "second"):
        write_run(tmp_path / name, seed=7)
    error = refused(capsys, tmp_path)
    assert all(word in error for word in ("seed 7", "first", "second"))


@pytest.mark.parametrize(("name", "value"), [("gamma", 0.9), ("target_entropy", None)])
def test_seeds_with_other_arguments_are_refused(tmp_path, capsys, name, value):
    write_run(tmp_path / "1", target_entropy=-3.0)
    write_run(tmp_path / "2", seed=2, **{"target_entropy": -3.0} | {name: value})
    assert name in refused(capsys, tmp_path)


def test_seeds_may_differ_in_what_does_not_change_learning(tmp_path):
    write_run(tmp_path / "1", run_dir="1", total_timesteps=1, compile=True, threads=1, watch=None)
    write_run(tmp_path / "2", seed=2, run_dir="2", total_timesteps=2, compile=False, threads=4, new_flag=1)
    write_run(tmp_path / "3", exp_name="sac_slow", gamma=0.9)  # another curve
    plot.check(plot.read_runs((tmp_path,)))


# ======== The table ========
def test_final_evaluation_and_running_time(tmp_path):
    # The last tenth of the 20 evaluations is two: seed 1's mean is 105.5, seed 2's is twice that.
    returns = np.array([9000] * 18 + [105, 106])
    write_run(tmp_path / "1", returns=returns)
    write_run(tmp_path / "2", seed=2, returns=2 * returns)
    (row,) = table(tmp_path)
    assert (row["Seeds"], row["Each seed"], row["Return"]) == ("2", "106; 211", "158")
    assert (row["Steps"], row["Hours"], row["Steps/s"]) == ("200,000", "0.556", "100")  # 2,000 s


def test_published_returns_are_of_the_same_number_of_steps(tmp_path):
    write_run(tmp_path / "long", exp_name="ddpg_continuous", every=500_000, returns=(1.0, 2.0))
    rows = table(tmp_path)[1:]
    assert len(rows) == 5
    assert {row["Steps"] for row in rows} == {"1,000,000"}
    returns = {row["Source"]: (row["Return"], row["Seeds"]) for row in rows}
    assert returns["tianshou-0.4 (max-average)"] == ("2,197 ± 972", "10")
    assert returns["td3-paper (max-average)"] == ("1,860", "10")  # OurDDPG, without a deviation
    write_run(tmp_path / "more", exp_name="td3_continuous", every=1_100_000)
    assert [row["Source"] for row in table(tmp_path) if row["Algorithm"] == "TD3"] == ["these runs"]


def test_published_numbers_are_never_edited():
    committed = (ROOT / "benchmark" / "reference_returns.csv").read_bytes()
    digest = "a49165d617fdc5e55d1da75505f642abec5910e53b4f127209bbd27e584a6fb3"
    assert hashlib.sha256(committed).hexdigest() == digest


# ======== The figures ========
def test_every_seed_and_their_mean(tmp_path):
    write_run(tmp_path / "1", returns=(10.0, 20.0, 60.0))
    write_run(tmp_path / "2", seed=2, returns=(30.0, 40.0))
    axes = returns_panel(tmp_path)
    (mean,) = bold(axes, plot.COLOURS["SAC"])
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([10_000, 20_000], [20, 30])
    thin = [list(line.get_ydata()) for line in axes.lines if line is not mean]
    assert thin == [[10, 20, 60], [30, 40]]


def test_a_few_points_have_markers_and_many_do_not(tmp_path):
    write_run(tmp_path / "1", exp_name="td3_continuous", returns=range(11))
    write_run(tmp_path / "2", returns=range(12))
    axes = returns_panel(tmp_path)
    assert bold(axes, plot.COLOURS["TD3"])[0].get_marker() == "o"
    assert bold(axes, plot.COLOURS["SAC"])[0].get_marker() == ""


def test_algorithms_keep_their_colours_among_ablations(tmp_path):
    for name in ("a", "b", "c", "sac_continuous", "td3_continuous"):
        write_run(tmp_path / name, exp_name=name)
    colours = plot.colours_of(plot.read_runs((tmp_path,)))
    assert list(colours) == ["TD3", "SAC", "a", "b", "c"]
    assert len(set(colours.values())) == 5
    assert {name: colours[name] for name in ("TD3", "SAC")} == {"TD3": "#0072B2", "SAC": "#009E73"}


def test_published_returns_are_drawn_where_the_curve_reaches_them(tmp_path):
    write_run(tmp_path / "short", exp_name="ddpg_continuous", every=25_000, returns=(1.0, 2.0))
    assert not returns_panel(tmp_path).containers
    write_run(tmp_path / "long", seed=2, exp_name="ddpg_continuous", every=500_000, returns=(1.0, 2.0))
    drawn = returns_panel(tmp_path).containers
    assert len(drawn) == 5
    places = [mark.lines[0].get_xdata()[0] for mark in drawn]
    assert min(places) > 1_000_000
    assert len(set(places)) == 5
    assert drawn[0].lines[0].get_ydata() == [2197.0]
    np.testing.assert_allclose(drawn[0].lines[2][0].get_segments()[0][:, 1], [1225.4, 3168.6])  # ± 971.6


def test_losses_have_a_panel_for_what_was_logged(tmp_path):
    losses = {"entropy": [np.nan, -2.0], "q_gradient_norm": [1.0, 2.0], "actor_gradient_norm": [3.0, 4.0]}
    write_run(tmp_path / "1", losses=losses)
    write_run(tmp_path / "2", exp_name="ddpg_continuous", env_id="Ant-v4")
    panels = {axes.get_title(): axes for axes in plot.losses_figure(plot.read_runs((tmp_path,))).axes}
    assert [title.split("\n")[0] for title in panels] == 2 * ["Ant-v4"] + 4 * ["Hopper-v4"]
    (entropy,) = bold(panels["Hopper-v4\nentropy"], plot.COLOURS["SAC"])
    assert (list(entropy.get_xdata()), list(entropy.get_ydata())) == ([2000], [-2])
    norms = list(panels.values())[-1]
    assert list(bold(norms, plot.COLOURS["SAC"], "--")[0].get_ydata()) == [3, 4]
    assert norms.get_yscale() == panels["Hopper-v4\nqf1_loss"].get_yscale() == "log"


def test_q_values_are_drawn_of_runs_that_recorded_both(tmp_path):
    write_run(tmp_path / "new", returns=(1.0, 2.0), discounted=[0.5, 0.75])
    write_run(tmp_path / "old", env_id="Ant-v4")
    (axes,) = plot.q_values_figure(plot.read_runs((tmp_path,))).axes
    assert list(bold(axes, plot.COLOURS["SAC"])[0].get_ydata()) == [1, 3]
    assert list(bold(axes, plot.COLOURS["SAC"], "--")[0].get_ydata()) == [0.5, 0.75]
    plot.main((tmp_path / "old",), tmp_path / "figures")
    assert not (tmp_path / "figures" / "q_values.png").exists()
