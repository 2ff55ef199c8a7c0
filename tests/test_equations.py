"""Every equation E0 to E12 that the scripts compute, against a float64 reference written another way.

The references are plain Python loops, SciPy, or torch.distributions. No random function is replaced: critics
that note what they are asked tell which actions were drawn, so the tests hold for any way of drawing them.
"""

import math
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import integrate, stats
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
        qf2.head.bias.sub_(gaps.median())
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


def constant_actor(script, mean, log_std=None):
    """An Actor whose answer does not depend on the observation: tanh(mean), and for SAC this log σ (A,)."""
    actor = script.Actor(OBS, ACTIONS, 8).double()
    last = actor.net[-1]
    bias = torch.as_tensor(mean, dtype=torch.float64).expand(ACTIONS)
    if log_std is not None:
        bias = torch.cat([bias, torch.atanh((torch.as_tensor(log_std).double() + 5) / 3.5 - 1)])
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(bias)
    return actor


class Noting:
    """A critic, or a stand-in for one, that notes the observations and actions it is asked about."""

    def __init__(self, critic=lambda observations, actions: actions[:, 0]):
        self.critic = critic

    def __call__(self, observations, actions):
        self.observations, self.actions = observations, actions
        return self.critic(observations, actions)


def many(size, terminations=0.0):
    """A batch with zeros for observations and rewards, for draws in bulk."""
    zeros = torch.zeros(size, OBS, dtype=torch.float64)
    ends = torch.full((size,), terminations, dtype=torch.float64)
    return ddpg.Batch(zeros, torch.zeros(size, ACTIONS, dtype=torch.float64), ends * 0, zeros, ends)


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
    assert [tuple(weight.shape) for weight in qf.parameters()] == [
        (8, OBS + ACTIONS),
        (8,),
        (8, 8),
        (8,),
        (1, 8),
        (1,),
    ]
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


SPACES = {
    "asymmetric": gym.spaces.Box(np.float32([-3, 0, 5, -0.1]), np.float32([1, 7, 6, 100])),
    "two_pi": gym.spaces.Box(0.0, 2 * math.pi, (12,)),
    "humanoid": gym.spaces.Box(-0.4, 0.4, (17,)),
    "float64": gym.spaces.Box(np.array([-0.4, 0.1]), np.array([0.4, 0.3]), dtype=np.float64),
    "integer": gym.spaces.Box(np.array([-3, 0]), np.array([8, 255]), dtype=np.int64),
    "unsigned": gym.spaces.Box(0, 255, (3,), dtype=np.uint8),
    "matrix": gym.spaces.Box(np.float32([[-1, -2, -3], [0, 1, 2]]), np.float32([[1, 2, 3], [4, 4, 4]])),
}


def bounded(script, space):
    """The script's environment around Bounded, and the Bounded itself."""
    with gym.envs.registration.namespace("E0"):
        gym.register("Bounded-v0", Bounded, kwargs={"space": space}, order_enforce=False)
    try:
        env = script.make_env("E0/Bounded-v0")
    finally:
        del gym.registry["E0/Bounded-v0"]
    env.reset(seed=0)
    return env, env.unwrapped


@pytest.mark.parametrize("name", SPACES)
def test_e0_endpoints_are_the_bounds(script, name):
    space = SPACES[name]
    env, inner = bounded(script, space)
    size = math.prod(space.shape)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (size,))
    for end, bound in ((-1, space.low), (1, space.high)):
        env.step(np.full(size, end, np.float32))
        assert inner.received[-1].dtype == space.dtype
        assert inner.received[-1].tolist() == bound.tolist()


@pytest.mark.parametrize("name", SPACES)
def test_e0_maps_each_dimension_affinely(script, name):
    space = SPACES[name]
    env, inner = bounded(script, space)
    lows, highs = space.low.reshape(-1).tolist(), space.high.reshape(-1).tolist()
    generator = np.random.default_rng(0)
    for _ in range(50):
        action = generator.uniform(-1, 1, len(lows)).astype(np.float32)
        env.step(action)
        received = inner.received[-1]
        assert received.shape == space.shape
        assert received.dtype == space.dtype
        assert space.contains(received)
        for low, high, a, got in zip(
            lows, highs, action.tolist(), received.reshape(-1).tolist(), strict=True
        ):
            share = (a + 1) / 2  # the way from low to high, as a weighted mean: E0 in another form
            expected = (1 - share) * low + share * high
            if space.dtype.kind in "iu":
                assert isinstance(got, int)
                assert abs(got - expected) <= 0.5 + 1e-9 * (high - low)
            else:
                rounding = 2 * float(np.finfo(space.dtype).eps) * max(abs(low), abs(high))
                assert got == pytest.approx(expected, rel=0, abs=rounding)


def test_e0_float64_keeps_its_precision(script):
    env, inner = bounded(script, SPACES["float64"])
    action = np.array([0.1, -0.7])
    env.step(action)
    assert inner.received[-1].tolist() == pytest.approx([0.04, 0.13], rel=1e-15)


def test_e0_random_actions_are_uniform_over_the_bounds(script):
    env, inner = bounded(script, SPACES["asymmetric"])
    env.action_space.seed(0)
    for _ in range(2000):
        env.step(env.action_space.sample())
    received = np.array(inner.received, np.float64)
    for column, low, high in zip(
        received.T, SPACES["asymmetric"].low, SPACES["asymmetric"].high, strict=True
    ):
        assert stats.kstest(column, stats.uniform(low, high - low).cdf).pvalue > RARE
    assert_independent(received)


def test_e0_humanoid_gets_its_own_bounds(script):
    env = script.make_env("Humanoid-v4")
    env.reset(seed=0)
    for end in (-1.0, 0.5, 1.0):
        env.step(np.full(17, end, np.float32))
        assert env.unwrapped.data.ctrl.tolist() == pytest.approx([0.4 * end] * 17, rel=1e-7)
    env.close()


# E1: targets


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_e1_targets_move_by_tau_towards_the_new_weights(script, tau):
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8, tau=tau)).double()
    online = dict(agent.named_parameters())
    targets = {name: value for name, value in online.items() if "_target" in name}
    assert targets
    with torch.no_grad():
        for value in targets.values():
            value.add_(torch.randn_like(value))
    before = {name: value.detach().clone() for name, value in targets.items()}
    agent.update(transitions(script), 2)
    for name, value in targets.items():
        new = online[name.replace("_target", "")].detach().reshape(-1).tolist()
        old = before[name].reshape(-1).tolist()
        expected = [(1 - tau) * o + tau * n for o, n in zip(old, new, strict=True)]
        assert value.reshape(-1).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert value.reshape(-1).tolist() != pytest.approx(old, rel=1e-12, abs=1e-15)
        if tau == 1:
            assert value.reshape(-1).tolist() == new


def test_e1_hard_copy_every_so_many_gradient_steps(script):
    args = script.Args(hidden_dim=8, tau=1.0, target_network_frequency=4)
    agent = script.Agent(OBS, ACTIONS, args).double()
    for gradient_step in range(1, 13):
        agent.update(transitions(script), gradient_step)
        for name, online in agent.named_children():
            if hasattr(agent, f"{name}_target"):
                target = getattr(agent, f"{name}_target").state_dict()
                equal = all(torch.equal(value, target[key]) for key, value in online.state_dict().items())
                if gradient_step % 4 != 1:  # TD3 moves its actor from the second gradient step on
                    assert equal == (gradient_step % 4 == 0)


def test_e1_targets_start_equal(script):
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8))
    state = agent.state_dict()
    targets = [name for name in state if "_target" in name]
    expected = {
        ddpg: {"actor_target", "qf1_target"},
        td3: {"actor_target", "qf1_target", "qf2_target"},
        sac: {"qf1_target", "qf2_target"},
    }
    assert {name.split(".")[0] for name in targets} == expected[script]
    for name in targets:
        assert torch.equal(state[name], state[name.replace("_target", "")])
    if script is not ddpg:
        assert not torch.equal(state["qf1.hidden.0.weight"], state["qf2.hidden.0.weight"])


# E2, E6, E10: targets of the temporal difference


def test_e2_ddpg_target():
    batch, actor, qf = transitions(ddpg), network(ddpg.Actor), network(ddpg.QNetwork)
    target_q = ddpg.td_target(batch, actor, qf, ddpg.Args(gamma=0.9))
    assert target_q.shape == (9,)
    assert not target_q.requires_grad
    for row, value in enumerate(target_q.tolist()):
        observation = batch.next_observations[row].tolist()
        action = [math.tanh(value) for value in by_hand(actor, observation)]
        expected = batch.rewards[row].item()
        if row % 3:
            expected += 0.9 * q_by_hand(qf, observation, action)
        assert value == pytest.approx(expected, rel=1e-12)


def test_e6_td3_target():
    batch, actor = transitions(td3, 30), network(td3.Actor)
    qf1, qf2 = critics(td3, batch)
    asked = Noting(qf1), Noting(qf2)
    target_q = td3.td_target(batch, actor, *asked, td3.Args(gamma=0.9, noise_clip=0.3))
    assert target_q.shape == (30,)
    assert not target_q.requires_grad
    assert torch.equal(asked[0].actions, asked[1].actions)
    smaller = set()
    for row, value in enumerate(target_q.tolist()):
        observation, action = batch.next_observations[row].tolist(), asked[0].actions[row].tolist()
        for a, mean in zip(action, by_hand(actor, observation), strict=True):
            assert abs(a) <= 1
            assert abs(a - math.tanh(mean)) <= 0.3 + 1e-12
        values = [q_by_hand(qf1, observation, action), q_by_hand(qf2, observation, action)]
        smaller.add(values.index(min(values)))
        expected = batch.rewards[row].item() + (0.9 * min(values) if row % 3 else 0)
        assert value == pytest.approx(expected, rel=1e-12)
    assert smaller == {0, 1}  # or the minimum would have gone untested


def test_e6_noise_is_clipped_gaussian_of_each_sample_and_dimension():
    asked, size = Noting(), 20_000
    args = td3.Args(policy_noise=0.2, noise_clip=0.3)
    td3.td_target(many(size), constant_actor(td3, 0.0), asked, asked, args)
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
    asked = Noting()
    args = td3.Args(policy_noise=0.2, noise_clip=0.5)
    td3.td_target(many(5000), constant_actor(td3, sign * math.atanh(0.9)), asked, asked, args)
    actions = sign * asked.actions
    assert actions.max() == 1
    assert actions.min() == pytest.approx(0.4)
    assert stats.binomtest(int((actions == 1).sum()), actions.numel(), stats.norm.sf(0.5)).pvalue > RARE


def test_e6_without_the_fixes_is_e2_and_with_each_one_is_not():
    batch, actor = transitions(td3), network(td3.Actor)
    qf1, qf2 = network(td3.QNetwork), network(td3.QNetwork)
    with torch.no_grad():
        qf2.head.bias.sub_(5)  # so that the smaller one is the second one
    plain = ddpg.td_target(batch, actor, qf1, ddpg.Args())
    off = {"policy_noise": 0.0, "clipped_double_q": False}
    assert td3.td_target(batch, actor, qf1, qf2, td3.Args(**off)).tolist() == pytest.approx(
        plain.tolist(), rel=1e-13
    )
    clipped_away = off | {"policy_noise": 0.2, "noise_clip": 0.0}
    assert td3.td_target(batch, actor, qf1, qf2, td3.Args(**clipped_away)).tolist() == pytest.approx(
        plain.tolist(), rel=1e-13
    )
    for one in ({"policy_noise": 0.2}, {"clipped_double_q": True}):
        fixed = td3.td_target(batch, actor, qf1, qf2, td3.Args(**off | one))
        goes_on = batch.terminations == 0
        assert (fixed[goes_on] != plain[goes_on]).all()
        assert torch.equal(fixed[~goes_on], plain[~goes_on])


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


def test_e10_sac_target():
    batch, actor = transitions(sac, 30), network(sac.Actor, gain=1.5)
    qf1, qf2 = critics(sac, batch)
    asked, alpha = (Noting(qf1), Noting(qf2)), 0.7
    target_q = sac.td_target(
        batch, actor, *asked, torch.tensor(alpha, dtype=torch.float64), sac.Args(gamma=0.9)
    )
    assert target_q.shape == (30,)
    assert not target_q.requires_grad
    assert torch.equal(asked[0].actions, asked[1].actions)
    log_prob = squashed(*policy_by_hand(actor, batch.next_observations)).log_prob(asked[0].actions)
    smaller = set()
    for row, value in enumerate(target_q.tolist()):
        observation, action = batch.next_observations[row].tolist(), asked[0].actions[row].tolist()
        values = [q_by_hand(qf1, observation, action), q_by_hand(qf2, observation, action)]
        smaller.add(values.index(min(values)))
        expected = batch.rewards[row].item()
        if row % 3:
            expected += 0.9 * (min(values) - alpha * log_prob[row].item())
        assert value == pytest.approx(expected, rel=1e-9)
    assert smaller == {0, 1}


def test_termination_stops_bootstrapping(script):
    """Where d = 1, y is r to the last bit, however large Q' may be; elsewhere it is not."""
    batch = transitions(script)
    critics = [lambda observations, actions: torch.full((9,), 1e12, dtype=torch.float64)] * 2
    actor = network(script.Actor)
    if script is ddpg:
        target_q = ddpg.td_target(batch, actor, critics[0], ddpg.Args())
    elif script is td3:
        target_q = td3.td_target(batch, actor, *critics, td3.Args())
    else:
        target_q = sac.td_target(batch, actor, *critics, torch.tensor(0.2), sac.Args())
    ended = batch.terminations == 1
    assert torch.equal(target_q[ended], batch.rewards[ended])
    assert (target_q[~ended] > 1e11).all()


# E3, E4, E7, E11: losses


@pytest.mark.parametrize("size", [1, 9])
def test_e3_critic_loss(script, size):
    batch, qf = transitions(script, size), network(script.QNetwork)
    target_q = torch.randn(size, dtype=torch.float64)
    loss, q_values = script.critic_loss(batch, qf, target_q)
    assert loss.shape == ()
    assert q_values.shape == (size,)
    assert not q_values.requires_grad
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
    asked, alpha = (Noting(qf1), Noting(qf2)), torch.tensor(0.7, dtype=torch.float64)
    loss, log_prob = sac.actor_loss(batch.observations, actor, *asked, alpha)
    assert loss.shape == ()
    assert log_prob.shape == (30,)
    assert not log_prob.requires_grad
    assert asked[0].actions.requires_grad  # reparameterised: the gradient of Q flows through the action
    actions = asked[0].actions.detach()
    assert torch.equal(actions, asked[1].actions)
    expected = squashed(*policy_by_hand(actor, batch.observations)).log_prob(actions).tolist()
    assert log_prob.tolist() == pytest.approx(expected, rel=1e-9)
    total, smaller = 0.0, set()
    for observation, action, log_p in zip(
        batch.observations.tolist(), actions.tolist(), expected, strict=True
    ):
        values = [q_by_hand(qf1, observation, action), q_by_hand(qf2, observation, action)]
        smaller.add(values.index(min(values)))
        total += 0.7 * log_p - min(values)
    assert smaller == {0, 1}
    assert loss.item() == pytest.approx(total / 30, rel=1e-9)


# E5: exploration of the deterministic policies


def explore_often(agent, count, observation=None):
    """Actions (count, A) of one agent at one observation, as float64 NumPy."""
    observation = torch.zeros(OBS, dtype=torch.float64) if observation is None else observation
    with torch.no_grad():
        actions = [agent.explore(observation).numpy() for _ in range(count)]
    assert actions[0].shape == (ACTIONS,)
    return np.array(actions)


def exploring(module, mean=0.0, **changes):
    """An agent in float64 whose actor always answers with the action `mean`."""
    agent = module.Agent(OBS, ACTIONS, module.Args(hidden_dim=8, **changes)).double()
    mean = torch.as_tensor(mean, dtype=torch.float64)
    agent.actor.load_state_dict(constant_actor(module, mean.atanh()).state_dict())
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
def test_e5_noise_around_the_actor_at_this_observation(module):
    agent = module.Agent(OBS, ACTIONS, module.Args(hidden_dim=8, exploration_noise=0.0)).double()
    for observation in transitions(module).observations:
        expected = [math.tanh(value) for value in by_hand(agent.actor, observation.tolist())]
        assert agent.explore(observation).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("module", [ddpg, td3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_e5_noisy_actions_are_clipped(module, sign):
    actions = sign * explore_often(exploring(module, sign * 0.9, exploration_noise=0.2), 2000)
    assert actions.max() == 1
    assert stats.binomtest(int((actions == 1).sum()), actions.size, stats.norm.sf(0.5)).pvalue > RARE


@pytest.mark.parametrize("dt", [1.0, 0.01])
def test_e5_ornstein_uhlenbeck(dt):
    """dx = θ (0 - x) dt + σ √dt ξ: first steps give each seed's σ √dt ξ, later ones follow."""
    mean = [-0.1, 0.0, 0.05]
    agent, rest = exploring(ddpg, mean, ou_noise=True, ou_dt=dt), torch.zeros(OBS, dtype=torch.float64)
    pushes = []
    for seed in range(1000):
        torch.manual_seed(seed)
        agent.start_episode()
        pushes.append((agent.explore(rest) - torch.tensor(mean, dtype=torch.float64)).tolist())
    pushes = np.array(pushes)
    for column in pushes.T:
        assert stats.kstest(column, stats.norm(0, 0.2 * math.sqrt(dt)).cdf).pvalue > RARE
    assert_independent(pushes)

    agent.start_episode()
    state, unclipped = [0.0] * ACTIONS, 0
    for seed in range(200):
        torch.manual_seed(seed)
        action = agent.explore(rest).tolist()
        for i in range(ACTIONS):
            state[i] += 0.15 * (0 - state[i]) * dt + pushes[seed][i]
            unclipped += abs(mean[i] + state[i]) < 1
            assert action[i] == pytest.approx(min(1.0, max(-1.0, mean[i] + state[i])), rel=1e-9, abs=1e-12)
    assert unclipped > 500  # of 600: it is the recursion that was compared, not the clipping


def test_e5_ornstein_uhlenbeck_starts_afresh_with_each_episode():
    agent, rest = exploring(ddpg, ou_noise=True), torch.zeros(OBS, dtype=torch.float64)
    torch.manual_seed(5)
    first = agent.explore(rest)
    explore_often(agent, 10)
    torch.manual_seed(5)
    assert not torch.equal(agent.explore(rest), first)
    agent.start_episode()
    torch.manual_seed(5)
    assert torch.equal(agent.explore(rest), first)


def test_e5_gaussian_noise_has_no_memory():
    agent, rest = exploring(ddpg), torch.zeros(OBS, dtype=torch.float64)
    torch.manual_seed(5)
    first = agent.explore(rest)
    explore_often(agent, 10)
    torch.manual_seed(5)
    assert torch.equal(agent.explore(rest), first)


@pytest.mark.parametrize("ou_noise", [False, True])
def test_e5_random_actions_are_uniform(ou_noise):
    actions = explore_often(exploring(ddpg, 0.5, random_action_prob=1.0, ou_noise=ou_noise), 3000)
    for column in actions.T:
        assert stats.kstest(column, stats.uniform(-1, 2).cdf).pvalue > RARE
    assert_independent(actions)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_e5_random_action_probability(probability):
    agent = exploring(ddpg, 0.5, random_action_prob=probability, exploration_noise=0.0)
    random = np.abs(explore_often(agent, 3000) - 0.5) > 1e-9
    assert (random.all(axis=1) == random.any(axis=1)).all()  # a whole action is random, or none of it
    assert stats.binomtest(int(random[:, 0].sum()), 3000, probability).pvalue > RARE


# E8, E9: the squashed Gaussian


def test_e8_explore_samples_the_policy():
    agent = sac.Agent(OBS, ACTIONS, sac.Args(hidden_dim=8)).double()
    means, log_stds = torch.tensor([-0.5, 0.0, 0.8]), torch.tensor([-2.0, -0.5, 0.0])
    agent.actor.load_state_dict(constant_actor(sac, means, log_stds).state_dict())
    u = np.arctanh(explore_often(agent, 4000))
    for column, mean, log_std in zip(u.T, means.tolist(), log_stds.tolist(), strict=True):
        assert stats.kstest(column, stats.norm(mean, math.exp(log_std)).cdf).pvalue > RARE
    assert_independent(u)


def test_e8_samples_depend_on_the_observation_and_evaluation_takes_the_mean():
    actor, observations = network(sac.Actor, gain=1.5), torch.randn(5000, OBS, dtype=torch.float64)
    actions, log_prob = actor.sample(observations)
    assert actions.shape == (5000, ACTIONS)
    assert log_prob.shape == (5000,)
    means, log_stds = policy_by_hand(actor, observations)
    noise = ((actions.detach().atanh() - means) / log_stds.exp()).numpy()
    for column in noise.T:
        assert stats.kstest(column, stats.norm.cdf).pvalue > RARE
    assert_independent(noise)
    assert torch.equal(actor(observations), actor(observations))
    torch.testing.assert_close(actor(observations), means.tanh(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("pre_activation", "std"), [(-50.0, math.exp(-5)), (0.0, math.exp(-1.5)), (50.0, math.exp(2))]
)
def test_e8_log_std_has_bounds(pre_activation, std):
    """σ stays between e⁻⁵ and e², and halfway it is their geometric mean: it is log σ that is bounded."""
    actor = constant_actor(sac, 0.0, torch.zeros(ACTIONS))
    with torch.no_grad():
        actor.net[-1].bias[ACTIONS:] = pre_activation
    actions, _ = actor.sample(torch.zeros(20_000, OBS, dtype=torch.float64))
    below = (actions < math.tanh(std)).sum().item()  # one standard deviation above the mean, before tanh
    assert stats.binomtest(below, actions.numel(), stats.norm.cdf(1)).pvalue > RARE


def test_e9_log_prob_is_that_of_the_transformed_distribution():
    mean, noise = torch.randn(2, 200, ACTIONS, dtype=torch.float64)
    log_std = torch.empty(200, ACTIONS, dtype=torch.float64).uniform_(-3, 0)
    actions, log_prob = sac.squashed_gaussian(mean, log_std, noise)
    assert actions.shape == (200, ACTIONS)
    assert log_prob.shape == (200,)
    for row in range(200):
        for i in range(ACTIONS):
            u = mean[row, i].item() + math.exp(log_std[row, i].item()) * noise[row, i].item()
            assert actions[row, i].item() == pytest.approx(math.tanh(u), rel=1e-12)
    expected = squashed(mean, log_std).log_prob(actions)
    torch.testing.assert_close(log_prob, expected, rtol=1e-8, atol=1e-8)


def density(action, mean, log_std):
    """π(a|s) at actions (N, A) of a policy with mean and log σ (A,), through the script's log π."""
    noise = (np.arctanh(action) - mean) / np.exp(log_std)
    rows = [torch.as_tensor(np.broadcast_to(x, action.shape).copy()) for x in (mean, log_std, noise)]
    return sac.squashed_gaussian(*rows)[1].exp().numpy()


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -1.0), (0.7, -0.3), (-0.5, -4.0), (0.2, 0.0)])
def test_e9_density_integrates_to_one(mean, log_std):
    def at(action):
        return density(np.array([[action]]), np.array([mean]), np.array([log_std]))[0]

    total, error = integrate.quad(at, -1, 1, points=[math.tanh(mean)], limit=200)
    assert error < 1e-6
    assert total == pytest.approx(1, abs=1e-6)


def test_e9_density_of_two_dimensions_integrates_to_one():
    """It would not if log π were not summed over the dimensions, or their mean were taken."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    total = np.outer(weights, weights).reshape(-1) @ density(
        grid, np.array([0.3, -0.2]), np.array([-1.0, -0.7])
    )
    assert total == pytest.approx(1, abs=1e-9)


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
    precision = 1e-6 if dtype is torch.float32 else 1e-14
    assert log_prob.item() == pytest.approx(expected, rel=10 * precision)
    assert mean.grad.item() == pytest.approx(2 * math.tanh(u), rel=10 * precision)
    assert log_std.grad.item() == pytest.approx(
        -1 + 2 * math.tanh(u) * 0.5 * draw, rel=10 * precision, abs=1e-5
    )


# E12: the temperature


def test_e12_alpha_loss():
    log_alpha = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    log_prob = torch.randn(9, dtype=torch.float64, requires_grad=True)
    loss = sac.alpha_loss(log_alpha, log_prob, -3.0)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.4 * sum(value - 3.0 for value in log_prob.tolist()) / 9, rel=1e-12)
    loss.backward()
    assert log_prob.grad is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("entropy", "rises"), [(-4.0, True), (-2.0, False)])
def test_e12_entropy_under_its_target_raises_alpha(optimizer, entropy, rises):
    log_alpha = torch.nn.Parameter(torch.tensor(math.log(0.2)))
    step = optimizer([log_alpha], lr=0.01)
    log_prob = -entropy + 0.5 * torch.tensor([-1.0, 0.0, 1.0])
    sac.alpha_loss(log_alpha, log_prob, target_entropy=-3.0).backward()
    step.step()
    assert (log_alpha.exp().item() > 0.2 + 1e-6) == rises
    assert (log_alpha.exp().item() < 0.2 - 1e-6) != rises


@pytest.mark.parametrize(("target_entropy", "direction"), [(50.0, 1), (-50.0, -1)])
def test_e12_an_agent_raises_or_lowers_alpha(target_entropy, direction):
    args = sac.Args(hidden_dim=8, target_entropy=target_entropy)
    agent = sac.Agent(OBS, ACTIONS, args).double()
    alphas = []
    for gradient_step in range(1, 6):
        agent.update(transitions(sac), gradient_step)
        alphas.append(agent.log_alpha.exp().item())
    assert all(direction * (after - before) > 0 for before, after in pairwise([0.2, *alphas]))
