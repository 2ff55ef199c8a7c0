"""benchmark/robustness.py: trained policies under other conditions."""

import json

import pytest
import robustness
import torch

import sac_continuous as sac


def write_policy(folder, env_id="Hopper-v4", sizes=(11, 3), exp_name="sac_continuous", **foreign):
    """An untrained policy."""
    folder.mkdir(parents=True)
    args = sac.Args(env_id=env_id, exp_name=exp_name, hidden_dim=8, cuda=False)
    (folder / "args.json").write_text(json.dumps({"args": vars(args) | foreign}))
    torch.manual_seed(0)
    torch.save(sac.Agent(*sizes, args).actor.state_dict(), folder / "policy.pt")


def test_every_policy_plays_the_same_episodes_under_every_condition(tmp_path, capsys):
    policy = tmp_path / "sac" / "seed1"
    write_policy(policy)
    robustness.main((policy.parent,), tmp_path / "figures", episodes=3)
    returns = robustness.pd.read_csv(tmp_path / "figures" / "robustness.csv")
    assert len(returns) == 18
    original = returns[returns["mass"] == 1].set_index(["actions", "episode"])["return"]
    agent, env = sac.load_policy(policy), sac.make_env("Hopper-v4", 1)
    first = robustness.FIRST_SEED
    for seed in range(first, first + 3):
        assert original["noise-free", seed] == pytest.approx(sum(sac.play(agent, env, seed)))
    assert (original["noise-free"] != original["exploring"]).all()
    heavy = returns[returns["mass"] == 1.5].set_index("episode")["return"]
    assert (heavy != original["noise-free"]).all()

    mean, exploring = original["noise-free"].mean(), original["exploring"].mean()
    row = capsys.readouterr().out.splitlines()[-3].split(" | ")
    assert float(row[3]) == pytest.approx(mean, rel=0.01)
    assert float(row[4]) == pytest.approx(exploring, rel=0.01)
    assert float(row[5].split(" ±")[0]) == pytest.approx(exploring - mean, rel=0.02)
    (axes,) = robustness.mass_figure(returns).axes
    assert axes.lines[0].get_ydata()[2] == pytest.approx(mean)


def test_variants_keep_their_names_and_what_cannot_play_is_left_out(tmp_path, capsys):
    write_policy(tmp_path / "sac")
    write_policy(tmp_path / "variant", exp_name="fixed_alpha")
    write_policy(tmp_path / "other_script", exp_name="other", target_lr=0.1)
    write_policy(tmp_path / "no_masses", "Pendulum-v1", sizes=(3, 1))
    robustness.main((tmp_path,), tmp_path / "figures", episodes=2)
    returns = robustness.pd.read_csv(tmp_path / "figures" / "robustness.csv")
    assert set(returns["algorithm"]) == {"SAC", "fixed_alpha"}
    assert set(returns["task"]) == {"Hopper-v4"}
    assert capsys.readouterr().err.count("left out: ") == 2


def test_two_runs_with_the_same_seed_are_refused(tmp_path):
    for name in ("one", "another"):
        write_policy(tmp_path / name)
    with pytest.raises(SystemExit, match="of another run"):
        robustness.main((tmp_path,), tmp_path / "figures", episodes=1)


def test_a_heavier_body_weighs_more_and_is_harder_to_turn():
    env = sac.make_env("Hopper-v4", 1).unwrapped
    mass, inertia = env.model.body_subtreemass[0], env.model.dof_M0.copy()
    robustness.multiply_mass(env, 1.5)
    assert env.model.body_subtreemass[0] == pytest.approx(1.5 * mass)
    assert (env.model.dof_M0 > inertia).all()
