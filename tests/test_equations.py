"""Equations E0 to E12 as the scripts compute them, against float64 references written another way.

The references are plain Python loops, SciPy, or torch.distributions. No random function is replaced: critics
that note what they are asked tell which actions were drawn, so the tests hold for any way of drawing them.
"""

import math
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

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
    terminations = torch.tensor([float(row % 3 == 0) for row in range(size)], dtype=torch.float64)
    return script.Batch(
        torch.randn(size, OBS, dtype=torch.float64),
        2 * torch.rand(size, ACTIONS, dtype=torch.float64) - 1,
        torch.randn(size, dtype=torch.float64),
        torch.randn(size, OBS, dtype=torch.float64),
        terminations,
    )


def network(kind, gain=3.0):
    """A float64 Actor or QNetwork; larger weights than PyTorch's make it far from linear."""
    module = kind(OBS, ACTIONS, 8).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(gain)
    return module


def critics(script, batch):
    """Two float64 critics, each the smaller one for about half of the next observations."""
    qf1, qf2 = network(script.QNetwork), network(script.QNetwork)
    with torch.no_grad():
        gaps = qf2(batch.next_observations, batch.actions) - qf1(batch.next_observations, batch.actions)
        qf2.net[-1].bias.sub_(gaps.median())
    return qf1, qf2


def by_hand(module, values):
    """The output of a network for one row of numbers, summed one product at a time."""
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    for depth, layer in enumerate(layers):
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        values = [b + sum(w * v for w, v in zip(row, values, strict=True)) for row, b in rows]
        if depth < len(layers) - 1:
            values = [max(0.0, value) for value in values]
    return values


def q_by_hand(qf, observation, action):
    """Q(s, a) for one row."""
    (value,) = by_hand(qf, [*observation, *action])
    return value


def min_by_hand(qfs, observations, actions):
    """min_i Q_i(s, a), row by row. Each critic has to be the smaller one somewhere."""
    rows = zip(observations.tolist(), actions.tolist(), strict=True)
    values = [[q_by_hand(qf, observation, action) for qf in qfs] for observation, action in rows]
    assert {row.index(min(row)) for row in values} == {0, 1}  # or the minimum would go untested
    return [min(row) for row in values]


def squashed(mean, log_std):
    """The distribution of tanh(u), u ~ N(mean, exp(log_std)), as PyTorch's own library has it."""
    return TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])


def policy_by_hand(actor, observations):
    """m and log σ (B, A) of SAC's actor, from its network one product at a time."""
    rows = [by_hand(actor, row) for row in observations.tolist()]
    means = [row[:ACTIONS] for row in rows]
    # tanh goes from -1 to 1 while log σ goes from -5 to 2.
    log_stds = [
        [((1 - math.tanh(x)) * -5 + (1 + math.tanh(x)) * 2) / 2 for x in row[ACTIONS:]] for row in rows
    ]
    return torch.tensor(means, dtype=torch.float64), torch.tensor(log_stds, dtype=torch.float64)


def constant_actor(script, mean, log_std=None):
    """An Actor whose answer does not depend on the observation: tanh(mean), and for SAC this log σ (A,)."""
    actor = script.Actor(OBS, ACTIONS, 8).double()
    bias = torch.as_tensor(mean, dtype=torch.float64).expand(ACTIONS)
    if log_std is not None:
        bias = torch.cat([bias, torch.atanh((torch.as_tensor(log_std).double() + 5) / 3.5 - 1)])
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(bias)
    return actor


class Noting:
    """A critic, or a stand-in for one, that notes the observations and actions it is asked about."""

    def __init__(self, critic=lambda observations, actions: actions[:, 0]):
        self.critic = critic

    def __call__(self, observations, actions):
        self.observations, self.actions = observations, actions
        return self.critic(observations, actions)


def many(size):
    """A batch of zeros, for draws in bulk."""
    zeros, observations = torch.zeros(size, dtype=torch.float64), torch.zeros(size, OBS, dtype=torch.float64)
    return td3.Batch(observations, torch.zeros(size, ACTIONS).double(), zeros, observations, zeros)


def assert_independent(draws):
    """No column of draws (N, A) tells anything about another one, or about its own next row."""
    count, width = draws.shape
    limit = stats.norm.isf(RARE / 2) / math.sqrt(count)  # of a correlation of independent columns
    for one in range(width):
        assert abs(stats.pearsonr(draws[1:, one], draws[:-1, one]).statistic) < limit
        for other in range(one):
            assert abs(stats.pearsonr(draws[:, one], draws[:, other]).statistic) < limit


# Networks


def test_networks_are_two_hidden_layers_of_rectified_units(script):
    batch, qf, actor = transitions(script), network(script.QNetwork), network(script.Actor)
    actor_outputs = 2 * ACTIONS if script is sac else ACTIONS
    for module, inputs, outputs in ((qf, OBS + ACTIONS, 1), (actor, OBS, actor_outputs)):
        shapes = [tuple(weight.shape) for weight in module.parameters()]
        assert shapes == [(8, inputs), (8,), (8, 8), (8,), (outputs, 8), (outputs,)]
    q_values, actions = qf(batch.observations, batch.actions), actor(batch.observations)
    assert q_values.shape == (9,)
    assert actions.shape == (9, ACTIONS)
    for row, observation in enumerate(batch.observations.tolist()):
        assert q_values[row].item() == pytest.approx(q_by_hand(qf, observation, batch.actions[row].tolist()))
        means = by_hand(actor, observation)[:ACTIONS]
        assert actions[row].tolist() == pytest.approx([math.tanh(mean) for mean in means])


# E0: actions rescaled onto the bounds of the environment


class Bounded(gym.Env):
    """Notes the actions it gets. Its action space is whatever it was made with."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, space, render_mode=None):
        self.action_space, self.received = space, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.received.append(action)
        return np.zeros(2, np.float32), 0.0, False, False, {}


gym.register("Bounded-v0", Bounded)
SPACES = {
    "asymmetric": gym.spaces.Box(np.float32([-3, 0, 5, -0.1]), np.float32([1, 7, 6, 100])),
    "two_pi": gym.spaces.Box(0.0, 2 * math.pi, (12,)),
    "float64": gym.spaces.Box(np.array([-0.4, 0.1]), np.array([0.4, 0.3]), dtype=np.float64),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", SPACES)
def test_e0_maps_each_dimension_affinely(name):
    """Onto its own bounds, -1 onto the lower and 1 onto the upper one, in its own precision; no warning."""
    space = SPACES[name]
    env = sac.make_env("Bounded-v0", 0, space=space)
    assert env.action_space == gym.spaces.Box(-1, 1, space.shape, space.dtype)
    actions = np.random.default_rng(0).uniform(-1, 1, (50, *space.shape)).astype(space.dtype)
    actions[0], actions[1] = -1, 1
    for action in actions:
        env.step(action)
        received = env.unwrapped.received[-1]
        assert received.dtype == space.dtype
        numbers = (space.low.tolist(), space.high.tolist(), action.tolist(), received.tolist())
        for low, high, a, got in zip(*numbers, strict=True):
            share = (a + 1) / 2  # the way from low to high, as a weighted mean: E0 in another form
            rounding = 2 * float(np.finfo(space.dtype).eps) * max(abs(low), abs(high))
            assert got == pytest.approx((1 - share) * low + share * high, rel=0, abs=rounding)


def test_e0_actions_stay_within_the_bounds():
    """Not a rounding error beyond them, which a task that checks its actions would not take."""
    space = SPACES["asymmetric"]
    env = sac.make_env("Bounded-v0", 0, space=space)
    for end in (-1, 1):
        env.step(np.full(4, end, np.float32))
        assert space.contains(env.unwrapped.received[-1])


def test_e0_humanoid_gets_its_own_bounds():
    env = sac.make_env("Humanoid-v4", 0)
    env.step(np.linspace(-1, 1, 17, dtype=np.float32))
    assert env.unwrapped.data.ctrl.tolist() == pytest.approx(np.linspace(-0.4, 0.4, 17), rel=1e-6, abs=1e-7)


# E1: targets


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_e1_targets_move_by_tau(tau):
    """In place, each towards its own network, which stays as it is."""
    kinds = (sac.Actor, sac.QNetwork)
    networks, targets = [network(kind) for kind in kinds], [network(kind) for kind in kinds]
    weights = [weight for target in targets for weight in target.parameters()]
    old = [weight.flatten().tolist() for weight in weights]
    new = [weight.flatten().tolist() for online in networks for weight in online.parameters()]
    sac.polyak(targets, networks, tau)
    for weight, before, online in zip(weights, old, new, strict=True):
        expected = [(1 - tau) * o + tau * n for o, n in zip(before, online, strict=True)]
        assert weight.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert [weight.flatten().tolist() for online in networks for weight in online.parameters()] == new


def test_e1_targets_start_equal(script):
    state = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8)).state_dict()
    targets = {name for name in state if "_target" in name}
    expected = {
        ddpg: {"actor_target", "qf1_target"},
        td3: {"actor_target", "qf1_target", "qf2_target"},
        sac: {"qf1_target", "qf2_target"},
    }
    assert {name.split(".")[0] for name in targets} == expected[script]
    for name in targets:
        assert torch.equal(state[name], state[name.replace("_target", "")])
    if script is not ddpg:
        assert not torch.equal(state["qf1.net.0.weight"], state["qf2.net.0.weight"])


# E2, E6, E10: targets of the temporal difference


def check_target(batch, target_q, next_values):
    """y is r + 0.9 times the next value in each row, and r where the episode terminated."""
    assert target_q.shape == batch.rewards.shape
    assert not target_q.requires_grad
    rewards, terminations = batch.rewards.tolist(), batch.terminations.tolist()
    for y, r, d, value in zip(target_q.tolist(), rewards, terminations, next_values, strict=True):
        assert y == pytest.approx(r if d else r + 0.9 * value, rel=1e-9)


def test_e2_ddpg_target():
    batch, actor, qf = transitions(ddpg), network(ddpg.Actor), network(ddpg.QNetwork)
    next_values = []
    for observation in batch.next_observations.tolist():
        action = [math.tanh(mean) for mean in by_hand(actor, observation)]
        next_values.append(q_by_hand(qf, observation, action))
    check_target(batch, ddpg.td_target(batch, actor, qf, ddpg.Args(gamma=0.9)), next_values)


@pytest.mark.parametrize("double", [True, False])
def test_e6_td3_target(double):
    batch, actor = transitions(td3, 30), network(td3.Actor)
    qf1, qf2 = critics(td3, batch)
    asked = [Noting(qf1), Noting(qf2)]
    args = td3.Args(gamma=0.9, noise_clip=0.3, clipped_double_q=double)
    target_q = td3.td_target(batch, actor, asked, args)
    actions, observations = asked[0].actions, batch.next_observations
    for row, observation in zip(actions.tolist(), observations.tolist(), strict=True):
        for a, mean in zip(row, by_hand(actor, observation), strict=True):
            assert abs(a) <= 1
            assert abs(a - math.tanh(mean)) <= 0.3 + 1e-12
    next_values = min_by_hand([qf1, qf2], observations, actions)
    if not double:
        next_values = list(map(q_by_hand, [qf1] * 30, observations.tolist(), actions.tolist()))
    check_target(batch, target_q, next_values)


def test_e6_noise_is_clipped_gaussian_of_each_sample_and_dimension():
    asked, size = Noting(), 20_000
    args = td3.Args(policy_noise=0.2, noise_clip=0.3)
    td3.td_target(many(size), constant_actor(td3, 0.0), [asked, asked], args)
    noise = asked.actions.numpy()
    assert noise.shape == (size, ACTIONS)
    assert np.abs(noise).max() == 0.3
    for column in noise.T:
        for end in (-0.3, 0.3):
            share = stats.norm.sf(0.3 / 0.2)
            assert stats.binomtest(int((column == end).sum()), size, share).pvalue > RARE
        inside = column[np.abs(column) < 0.3]
        assert stats.kstest(inside, stats.truncnorm(-1.5, 1.5, scale=0.2).cdf).pvalue > RARE
    assert_independent(noise)


@pytest.mark.parametrize("sign", [-1, 1])
def test_e6_noisy_actions_are_clipped_to_the_space(sign):
    asked, args = Noting(), td3.Args(policy_noise=0.2, noise_clip=0.5)
    td3.td_target(many(5000), constant_actor(td3, sign * math.atanh(0.9)), [asked, asked], args)
    actions = sign * asked.actions
    assert actions.max() == 1
    assert actions.min() == pytest.approx(0.4)
    assert stats.binomtest(int((actions == 1).sum()), actions.numel(), stats.norm.sf(0.5)).pvalue > RARE


def test_e10_sac_target():
    batch, actor = transitions(sac, 30), network(sac.Actor, gain=1.5)
    qf1, qf2 = critics(sac, batch)
    asked, alpha = [Noting(qf1), Noting(qf2)], torch.tensor(0.7, dtype=torch.float64)
    target_q = sac.td_target(batch, actor, asked, alpha, sac.Args(gamma=0.9))
    observations, actions = batch.next_observations, asked[0].actions
    log_prob = squashed(*policy_by_hand(actor, observations)).log_prob(actions).tolist()
    values = zip(min_by_hand([qf1, qf2], observations, actions), log_prob, strict=True)
    check_target(batch, target_q, [value - 0.7 * log_p for value, log_p in values])


# E3, E4, E7, E11: losses


@pytest.mark.parametrize("size", [1, 9])
def test_e3_critic_loss(script, size):
    batch, qf = transitions(script, size), network(script.QNetwork)
    target_q = torch.randn(size, dtype=torch.float64)
    loss, q_values = script.critic_loss(batch, qf, target_q)
    assert loss.shape == ()
    assert q_values.shape == (size,)
    total = 0.0
    for row in range(size):
        value = q_by_hand(qf, batch.observations[row].tolist(), batch.actions[row].tolist())
        assert q_values[row].item() == pytest.approx(value, rel=1e-12)
        total += (value - target_q[row].item()) ** 2
    assert loss.item() == pytest.approx(total / size, rel=1e-12)


@pytest.mark.parametrize("module", [ddpg, td3], ids=["E4", "E7"])
def test_e4_e7_actor_loss(module):
    batch, actor, qf = transitions(module), network(module.Actor), network(module.QNetwork)
    loss = module.actor_loss(batch.observations, actor, qf)
    values = []
    for observation in batch.observations.tolist():
        action = [math.tanh(value) for value in by_hand(actor, observation)]
        values.append(q_by_hand(qf, observation, action))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-sum(values) / 9, rel=1e-12)


def test_e11_actor_loss():
    batch, actor = transitions(sac, 30), network(sac.Actor, gain=1.5)
    qf1, qf2 = critics(sac, batch)
    asked, alpha = [Noting(qf1), Noting(qf2)], torch.tensor(0.7, dtype=torch.float64)
    loss, log_prob = sac.actor_loss(batch.observations, actor, asked, alpha)
    assert loss.shape == ()
    assert log_prob.shape == (30,)
    assert asked[0].actions.requires_grad  # reparameterised: the gradient of Q flows through the action
    actions = asked[0].actions.detach()
    expected = squashed(*policy_by_hand(actor, batch.observations)).log_prob(actions).tolist()
    assert log_prob.tolist() == pytest.approx(expected, rel=1e-9)
    values = zip(min_by_hand([qf1, qf2], batch.observations, actions), expected, strict=True)
    assert loss.item() == pytest.approx(sum(0.7 * log_p - value for value, log_p in values) / 30, rel=1e-9)


# How agents act; E5: exploration of the deterministic policies


def test_act_is_the_noise_free_action(script):
    """tanh of the network's mean, whatever the noise is, and without a draw."""
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8))
    observations = transitions(script).observations
    before = torch.get_rng_state()
    for observation in observations.tolist():
        means = by_hand(agent.actor, observation)[:ACTIONS]
        expected = pytest.approx([math.tanh(mean) for mean in means], rel=1e-4, abs=1e-6)
        assert agent.act(np.array(observation)).tolist() == expected
    assert torch.equal(torch.get_rng_state(), before)


def explore_often(agent, count):
    """Actions (count, A) of one agent at one observation, in float64."""
    actions = [agent.explore(np.zeros(OBS)) for _ in range(count)]
    assert actions[0].shape == (ACTIONS,)
    assert actions[0].dtype == np.float32
    return np.array(actions, np.float64)


def exploring(module, mean=0.0, log_std=None, **changes):
    """An agent whose actor always answers with the action `mean`."""
    agent = module.Agent(OBS, ACTIONS, module.Args(hidden_dim=8, **changes))
    actor = constant_actor(module, torch.as_tensor(mean, dtype=torch.float64).atanh(), log_std)
    agent.actor.load_state_dict(actor.state_dict())
    agent.start_episode()
    return agent


@pytest.mark.parametrize("module", [ddpg, td3])
def test_e5_gaussian_noise(module):
    means = [-0.3, 0.0, 0.2]
    actions = explore_often(exploring(module, means, exploration_noise=0.1), 4000)
    for column, mean in zip(actions.T, means, strict=True):
        assert stats.kstest(column, stats.norm(mean, 0.1).cdf).pvalue > RARE
    assert_independent(actions)


@pytest.mark.parametrize("module", [ddpg, td3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_e5_noisy_actions_are_clipped(module, sign):
    actions = sign * explore_often(exploring(module, sign * 0.9, exploration_noise=0.2), 500)
    assert actions.max() == 1
    assert stats.binomtest(int((actions == 1).sum()), actions.size, stats.norm.sf(0.5)).pvalue > RARE


@pytest.mark.parametrize("dt", [1.0, 0.01])
def test_e5_ornstein_uhlenbeck(dt):
    """dx = θ (0 - x) dt + σ √dt ξ: first steps give each seed's σ √dt ξ, later ones follow."""
    mean = [-0.1, 0.0, 0.05]
    agent, pushes = exploring(ddpg, mean, ou_noise=True, ou_dt=dt), []
    for seed in range(400):
        torch.manual_seed(seed)
        agent.start_episode()
        pushes.append(explore_often(agent, 1)[0] - mean)
    pushes = np.array(pushes)
    for column in pushes.T:
        assert stats.kstest(column, stats.norm(0, 0.2 * math.sqrt(dt)).cdf).pvalue > RARE
    assert_independent(pushes)

    agent.start_episode()
    state, unclipped = [0.0] * ACTIONS, 0
    for seed in range(200):
        torch.manual_seed(seed)
        action = agent.explore(np.zeros(OBS)).tolist()
        for i in range(ACTIONS):
            state[i] += 0.15 * (0 - state[i]) * dt + pushes[seed][i]
            unclipped += abs(mean[i] + state[i]) < 1
            assert action[i] == pytest.approx(min(1.0, max(-1.0, mean[i] + state[i])), abs=1e-5)
    assert unclipped > 500  # of 600: it is the recursion that was compared, not the clipping


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_e5_random_actions(probability):
    """With this probability a whole action is uniform over the space, or else none of it is."""
    agent = exploring(ddpg, 0.5, random_action_prob=probability, exploration_noise=0.0)
    actions = explore_often(agent, 3000)
    random = np.abs(actions - 0.5) > 1e-6
    assert (random.all(axis=1) == random.any(axis=1)).all()
    assert stats.binomtest(int(random[:, 0].sum()), 3000, probability).pvalue > RARE
    for column in actions[random[:, 0]].T:
        assert stats.kstest(column, stats.uniform(-1, 2).cdf).pvalue > RARE
    assert_independent(actions[random[:, 0]])


# E8, E9: the squashed Gaussian


def test_e8_explore_samples_the_policy():
    means, log_stds = [-0.5, 0.0, 0.8], [-2.0, -0.5, 0.0]
    u = np.arctanh(explore_often(exploring(sac, np.tanh(means), log_stds), 4000))
    for column, mean, log_std in zip(u.T, means, log_stds, strict=True):
        assert stats.kstest(column, stats.norm(mean, math.exp(log_std)).cdf).pvalue > RARE
    assert_independent(u)


@pytest.mark.parametrize(("output", "std"), [(-50, math.exp(-5)), (0, math.exp(-1.5)), (50, math.exp(2))])
def test_e8_log_std_has_bounds(output, std):
    """σ stays between e⁻⁵ and e², and halfway it is their geometric mean: it is log σ that is bounded."""
    actor = constant_actor(sac, 0.0, torch.zeros(ACTIONS))
    with torch.no_grad():
        actor.net[-1].bias[ACTIONS:] = output
    actions, _ = actor.sample(torch.zeros(20_000, OBS, dtype=torch.float64))
    below = (actions < math.tanh(std)).sum().item()  # one standard deviation above the mean, before tanh
    assert stats.binomtest(below, actions.numel(), stats.norm.cdf(1)).pvalue > RARE


def test_e9_log_prob_is_that_of_the_normal_over_the_slope_of_tanh():
    """One dimension after the other, with SciPy's normal and 1 - a² as it stands."""
    mean, noise = torch.randn(2, 200, ACTIONS, dtype=torch.float64)
    log_std = torch.empty(200, ACTIONS, dtype=torch.float64).uniform_(-3, 0)
    actions, log_prob = sac.squashed_gaussian(mean, log_std, noise)
    assert actions.shape == (200, ACTIONS)
    assert log_prob.shape == (200,)
    for row in range(200):
        expected = 0.0
        for i in range(ACTIONS):
            m, std = mean[row, i].item(), math.exp(log_std[row, i].item())
            u = m + std * noise[row, i].item()
            assert actions[row, i].item() == pytest.approx(math.tanh(u), rel=1e-12)
            expected += stats.norm.logpdf(u, m, std) - math.log(1 - math.tanh(u) ** 2)
        assert log_prob[row].item() == pytest.approx(expected, rel=1e-8, abs=1e-8)


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


# E12: the temperature


def test_e12_alpha_loss():
    log_alpha = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    log_prob = torch.randn(9, dtype=torch.float64, requires_grad=True)
    loss = sac.alpha_loss(log_alpha, log_prob, -3.0)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.4 * sum(value - 3.0 for value in log_prob.tolist()) / 9, rel=1e-12)
    loss.backward()
    assert log_prob.grad is None


@pytest.mark.parametrize(("target_entropy", "direction"), [(50.0, 1), (-50.0, -1)])
def test_e12_entropy_under_its_target_raises_alpha(target_entropy, direction):
    agent = sac.Agent(OBS, ACTIONS, sac.Args(hidden_dim=8, target_entropy=target_entropy)).double()
    alphas = [0.2]
    for gradient_step in range(1, 6):
        agent.update(transitions(sac), gradient_step)
        alphas.append(agent.log_alpha.exp().item())
    assert all(direction * (after - before) > 1e-7 for before, after in pairwise(alphas))
