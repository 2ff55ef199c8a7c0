"""benchmark/robustness.py: trained policies under other conditions."""

import json
import shutil

import pytest
import torch

import sac_continuous as sac

robustness = pytest.importorskip("robustness", reason="benchmark/requirements.txt is not installed")


@pytest.fixture
def policy(tmp_path):
    """The folder of an untrained policy."""
    folder = tmp_path / "sac" / "seed1"
    folder.mkdir(parents=True)
    args = sac.Args(env_id="Hopper-v4", exp_name="sac_continuous", hidden_dim=8, cuda=False)
    (folder / "args.json").write_text(json.dumps({"args": vars(args)}))
    torch.manual_seed(0)
    torch.save(sac.Agent(11, 3, args).actor.state_dict(), folder / "policy.pt")
    return folder


def test_every_policy_plays_the_same_episodes_under_every_condition(policy, tmp_path, capsys):
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


def test_curves_keep_their_names_and_foreign_policies_are_left_out(policy, tmp_path, capsys):
    args = json.loads((policy / "args.json").read_text())["args"]
    for name, changes in (("fixed", {}), ("foreign", {"target_lr": 0.1})):
        folder = tmp_path / "sac" / name
        shutil.copytree(policy, folder)
        (folder / "args.json").write_text(json.dumps({"args": args | {"exp_name": name} | changes}))
    robustness.main((policy.parent,), tmp_path / "figures", episodes=2)
    returns = robustness.pd.read_csv(tmp_path / "figures" / "robustness.csv")
    assert set(returns["algorithm"]) == {"SAC", "fixed"}
    assert capsys.readouterr().err.startswith("left out: ")


def test_a_heavier_body_weighs_more_and_is_harder_to_turn():
    env = sac.make_env("Hopper-v4", 1).unwrapped
    mass, inertia = env.model.body_subtreemass[0], env.model.dof_M0.copy()
    robustness.multiply_mass(env, 1.5)
    assert env.model.body_subtreemass[0] == pytest.approx(1.5 * mass)
    assert (env.model.dof_M0 > inertia).all()
