"""What equations E1 to E12 leave to chance, to the start and to the edges; test_update.py has their values.

No random function is replaced: a stand-in for a critic tells which actions were drawn, and statistics judge.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

import ddpg_continuous as ddpg
import sac_continuous as sac
import td3_continuous as td3

OBS, ACTIONS = 4, 3  # dimensions of an observation and of an action
RARE = 1e-3  # a statistic rarer than this fails its test; seeds are fixed, so a test that passes always does


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same draws in every run of these tests."""
    torch.manual_seed(0)


def transitions(script, size=9):
    """A Batch of float64 noise in which every third transition terminates."""
    return script.Batch(
        torch.randn(size, OBS, dtype=torch.float64),
        2 * torch.rand(size, ACTIONS, dtype=torch.float64) - 1,
        torch.randn(size, dtype=torch.float64),
        torch.randn(size, OBS, dtype=torch.float64),
        (torch.arange(size) % 3 == 0).double(),
    )


def make_agent(script, mean=0.0, log_std=0.0, **changes):
    """An agent whose actor always answers with the action `mean`, and with SAC's noise of this log σ."""
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8, cuda=False, **changes))
    outputs = torch.as_tensor(mean).atanh().expand(ACTIONS)
    if script is sac:
        log_std = torch.as_tensor(log_std).expand(ACTIONS)
        outputs = torch.cat([outputs, torch.atanh((log_std + 5) / 3.5 - 1)])
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.net[-1].bias.copy_(outputs)
    return agent


def explore_often(agent, count):
    """Actions (count, A) of one agent at one observation, in float64."""
    actions = [agent.explore(np.zeros(OBS)) for _ in range(count)]
    assert actions[0].shape == (ACTIONS,)
    assert actions[0].dtype == np.float32
    return np.array(actions, np.float64)


def assert_independent(draws):
    """No column of draws (N, A) tells anything about another one, or about its own next row."""
    count, width = draws.shape
    limit = stats.norm.isf(RARE / 2) / math.sqrt(count)  # of a correlation of independent columns
    for one in range(width):
        assert abs(stats.pearsonr(draws[1:, one], draws[:-1, one]).statistic) < limit
        for other in range(one):
            assert abs(stats.pearsonr(draws[:, one], draws[:, other]).statistic) < limit


def test_targets_start_equal(script):
    """E1: to their own networks, which are not equal to each other."""
    state = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8, cuda=False)).state_dict()
    targets = [name for name in state if "_target" in name]
    assert len(targets) == 12 + 6 * (script is td3)  # two or three networks of three layers
    for name in targets:
        assert torch.equal(state[name], state[name.replace("_target", "")])
    if script is not ddpg:
        assert not torch.equal(state["qf1.net.0.weight"], state["qf2.net.0.weight"])


def test_no_gradient_flows_where_none_should():
    """Through the critics' target (E10), or from the temperature's loss into the policy (E12)."""
    agent, batch = make_agent(sac).double(), transitions(sac)
    alpha, log_prob = torch.tensor(0.2), torch.zeros(9, requires_grad=True)
    target_q = sac.td_target(batch, agent.actor, agent.critic_targets, alpha, agent.args)
    assert not target_q.requires_grad
    sac.alpha_loss(agent.log_alpha, log_prob, -3.0).backward()
    assert log_prob.grad is None


def test_a_batch_of_one_keeps_its_shape():
    qf = sac.QNetwork(OBS, ACTIONS, 8)
    assert qf(torch.zeros(1, OBS), torch.zeros(1, ACTIONS)).shape == (1,)


def test_act_is_the_noise_free_action(script):
    """The network's mean, whatever the noise is, and without a draw."""
    agent = make_agent(script, [-0.3, 0.0, 0.9])
    before = torch.get_rng_state()
    assert agent.act(np.ones(OBS)).tolist() == pytest.approx([-0.3, 0.0, 0.9])
    assert torch.equal(torch.get_rng_state(), before)


# ---- E5: exploration of the deterministic policies


@pytest.mark.parametrize("module", [ddpg, td3])
def test_e5_gaussian_noise(module):
    means = [-0.3, 0.0, 0.2]
    actions = explore_often(make_agent(module, means, exploration_noise=0.1), 4000)
    for column, mean in zip(actions.T, means, strict=True):
        assert stats.kstest(column, stats.norm(mean, 0.1).cdf).pvalue > RARE
    assert_independent(actions)


@pytest.mark.parametrize("module", [ddpg, td3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_e5_noisy_actions_are_clipped(module, sign):
    actions = sign * explore_often(make_agent(module, sign * 0.9, exploration_noise=0.2), 500)
    assert actions.max() == 1
    assert stats.binomtest(int((actions == 1).sum()), actions.size, stats.norm.sf(0.5)).pvalue > RARE


@pytest.mark.parametrize("dt", [1.0, 0.01])
def test_e5_ornstein_uhlenbeck(dt):
    """dx = θ (0 - x) dt + σ √dt ξ, from 0 at the start of each episode."""
    mean = [-0.1, 0.0, 0.05]
    agent, states, actions = make_agent(ddpg, mean, ou_noise=True, ou_dt=dt), [torch.zeros(ACTIONS)], []
    for _ in range(2000):
        actions.append(agent.explore(np.zeros(OBS)))
        states.append(agent.ou_state.clone())
    states = torch.stack(states).double().numpy()
    pushes = states[1:] - (1 - 0.15 * dt) * states[:-1]
    for column in pushes.T:
        assert stats.kstest(column, stats.norm(0, 0.2 * math.sqrt(dt)).cdf).pvalue > RARE
    assert_independent(pushes)
    np.testing.assert_allclose(actions, np.clip(mean + states[1:], -1, 1), atol=1e-6)
    agent.start_episode()
    assert not agent.ou_state.any()


def test_e5_random_actions():
    """With this probability a whole action is uniform over the space, or else none of it is."""
    agent = make_agent(ddpg, 0.5, random_action_prob=0.3, exploration_noise=0.0)
    actions = explore_often(agent, 3000)
    random = np.abs(actions - 0.5) > 1e-6
    assert (random.all(axis=1) == random.any(axis=1)).all()
    assert stats.binomtest(int(random[:, 0].sum()), 3000, 0.3).pvalue > RARE
    for column in actions[random[:, 0]].T:
        assert stats.kstest(column, stats.uniform(-1, 2).cdf).pvalue > RARE
    assert_independent(actions[random[:, 0]])


# ---- E6: the noise on the target's actions


def target_actions(mean, size=20_000, **changes):
    """The actions (size, A) that TD3's target judges where its actor answers `mean`."""
    asked, agent = [], make_agent(td3, mean, **changes)

    def critic(observations, actions):
        asked.append(actions.double().numpy())
        return actions[:, 0]

    observations, zeros = torch.zeros(size, OBS), torch.zeros(size)
    batch = td3.Batch(observations, torch.zeros(size, ACTIONS), zeros, observations, zeros)
    td3.td_target(batch, agent.actor, [critic, critic], agent.args)
    return asked[0]


def test_e6_noise_is_clipped_gaussian_of_each_sample_and_dimension():
    noise = target_actions(0.0, policy_noise=0.2, noise_clip=0.3)
    clip = np.abs(noise).max()
    assert clip == pytest.approx(0.3)
    for column in noise.T:
        for end in (-clip, clip):
            share = stats.norm.sf(0.3 / 0.2)
            assert stats.binomtest(int((column == end).sum()), len(column), share).pvalue > RARE
        inside = column[np.abs(column) < clip]
        assert stats.kstest(inside, stats.truncnorm(-1.5, 1.5, scale=0.2).cdf).pvalue > RARE
    assert_independent(noise)


@pytest.mark.parametrize("sign", [-1, 1])
def test_e6_noisy_actions_are_clipped_to_the_space(sign):
    actions = sign * target_actions(sign * 0.9, policy_noise=0.2, noise_clip=0.5)
    assert actions.max() == 1
    assert actions.min() == pytest.approx(0.4)
    assert stats.binomtest(int((actions == 1).sum()), actions.size, stats.norm.sf(0.5)).pvalue > RARE


# ---- E8, E9, E12: the squashed Gaussian and its temperature


def test_e8_explore_samples_the_policy():
    means, log_stds = [-0.5, 0.0, 0.8], [-2.0, -0.5, 0.0]
    u = np.arctanh(explore_often(make_agent(sac, np.float32(np.tanh(means)), log_stds), 4000))
    for column, mean, log_std in zip(u.T, means, log_stds, strict=True):
        assert stats.kstest(column, stats.norm(mean, math.exp(log_std)).cdf).pvalue > RARE
    assert_independent(u)


def test_e8_each_sample_of_a_batch_has_noise_of_its_own():
    actions, _ = make_agent(sac).actor.sample(torch.zeros(2000, OBS))
    assert_independent(actions.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [-20.0, 20.0])
@pytest.mark.parametrize("far", ["mean", "noise"])
def test_e9_value_and_gradient_where_tanh_saturates(dtype, u, far):
    """|u| = 20, from a far mean or from far noise: the closed forms, and nothing infinite."""
    centre, draw = (u - 0.5, 1.0) if far == "mean" else (0.0, u / 0.5)
    mean = torch.full((1, 1), centre, dtype=dtype, requires_grad=True)
    log_std = torch.full((1, 1), math.log(0.5), dtype=dtype, requires_grad=True)
    noise = torch.full((1, 1), draw, dtype=dtype)
    _, log_prob = sac.squashed_gaussian(mean, log_std, noise)
    log_prob.sum().backward()
    # 1 - tanh² u = 1 / cosh² u, and cosh 20 is a number like any other.
    expected = stats.norm.logpdf(draw) - math.log(0.5) + 2 * math.log(math.cosh(u))
    precision = 1e-5 if dtype is torch.float32 else 1e-13
    assert log_prob.item() == pytest.approx(expected, rel=precision)
    assert mean.grad.item() == pytest.approx(2 * math.tanh(u), rel=precision)
    slope = -1 + 2 * math.tanh(u) * 0.5 * draw
    assert log_std.grad.item() == pytest.approx(slope, rel=precision, abs=precision)


@pytest.mark.parametrize(("target_entropy", "direction"), [(50.0, 1), (-50.0, -1)])
def test_e12_entropy_under_its_target_raises_alpha(target_entropy, direction):
    agent = make_agent(sac, target_entropy=target_entropy).double()
    alphas = [agent.update(transitions(sac), step)["alpha"].item() for step in range(1, 6)]
    assert all(direction * (after - before) > 1e-7 for before, after in pairwise(alphas))
