"""What learning does to an agent: whole updates against a reference, gradients, traps, the replay buffer.

The reference is NumPy in float64 with every derivative worked out on paper and Adam written out, so that it
shares no code with the scripts. It takes over only the drawn actions, which hooks on the critics note, and
checks those.
"""

import copy
import importlib
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from scipy import stats

import ddpg_continuous as ddpg
import sac_continuous as sac
import td3_continuous as td3

OBS, ACTIONS, SIZE = 4, 3, 12  # dimensions of an observation and of an action; transitions in a minibatch
RARE = 1e-3  # a statistic rarer than this fails its test; seeds are fixed, so a test that passes always does


def make_agent(script, seed=0, dtype=torch.float64, **changes):
    """An agent of small, clearly non-linear networks, whose targets are already away from them."""
    torch.manual_seed(seed)
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8, **changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name != "log_alpha":
                parameter.mul_(2)
            if "_target" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return agent


def transitions(script, seed=0, size=SIZE, dtype=torch.float64):
    """A Batch of noise in which every third transition terminates."""
    generator = torch.Generator().manual_seed(seed)
    normal = [
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in [(size, OBS)] * 2 + [(size,)]
    ]
    actions = 2 * torch.rand(size, ACTIONS, generator=generator, dtype=dtype) - 1
    terminations = (torch.arange(size) % 3 == 0).to(dtype)
    return script.Batch(normal[0], actions, normal[2], normal[1], terminations)


def snapshot(agent):
    """A copy of every parameter and buffer of an agent."""
    return {name: value.detach().clone() for name, value in agent.state_dict().items()}


def changed(before, after):
    """The networks, by name, of which any weight differs between two snapshots."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def note_actions(agent):
    """A dict that will hold the actions about which Q1' and Q1 were last asked."""
    asked = {}
    for name in ("qf1_target", "qf1"):

        def hook(module, inputs, output, name=name):
            asked[name] = inputs[1].detach().numpy().copy()

        getattr(agent, name).register_forward_hook(hook)
    return asked


# A reference in NumPy


class Net:
    """A network of two hidden layers of rectified units, with its derivatives and its Adam."""

    def __init__(self, module, learning_rate=None):
        self.weights = [parameter.detach().numpy().copy() for parameter in module.parameters()]
        self.learning_rate, self.steps = learning_rate, 0
        self.first_moments = [np.zeros_like(weight) for weight in self.weights]
        self.second_moments = [np.zeros_like(weight) for weight in self.weights]

    def __call__(self, x):
        """The output (B, out) for inputs (B, in), which the next call of gradients() refers to."""
        w1, b1, w2, b2, w3, b3 = self.weights
        self.x = x
        self.h1 = np.maximum(0, x @ w1.T + b1)
        self.h2 = np.maximum(0, self.h1 @ w2.T + b2)
        return self.h2 @ w3.T + b3

    def gradients(self, d_out):
        """From dL/d output (B, out): dL/d weights, and dL/d input (B, in)."""
        w1, _, w2, _, w3, _ = self.weights
        d2 = (d_out @ w3) * (self.h2 > 0)
        d1 = (d2 @ w2) * (self.h1 > 0)
        pairs = (d1, self.x), (d2, self.h1), (d_out, self.h2)
        return [g for d, h in pairs for g in (np.einsum("bo,bi->oi", d, h), d.sum(0))], d1 @ w1

    def descend(self, gradients):
        """One step of Adam (Kingma & Ba 2015, algorithm 1), with its customary constants."""
        self.last_gradients = gradients
        self.steps += 1
        for i, gradient in enumerate(gradients):
            self.first_moments[i] = 0.9 * self.first_moments[i] + 0.1 * gradient
            self.second_moments[i] = 0.999 * self.second_moments[i] + 0.001 * gradient**2
            mean = self.first_moments[i] / (1 - 0.9**self.steps)
            variance = self.second_moments[i] / (1 - 0.999**self.steps)
            self.weights[i] = self.weights[i] - self.learning_rate * mean / (np.sqrt(variance) + 1e-8)

    def follow(self, online, tau):
        """(E1)"""
        pairs = zip(self.weights, online.weights, strict=True)
        self.weights = [(1 - tau) * old + tau * new for old, new in pairs]


class Scalar:
    """A module of one parameter, so that Net's Adam serves log α too."""

    def __init__(self, parameter):
        self.parameters = lambda: [parameter]


class Reference:
    """The updates of DDPG (one critic) and TD3 (two), in NumPy. SAC's differ in three methods."""

    def __init__(self, agent, args):
        self.args, self.critics = args, [name for name in ("qf1", "qf2") if hasattr(agent, name)]
        actor_rate, q_rate = self.learning_rates()
        self.nets = {"actor": Net(agent.actor, actor_rate)}
        for name in self.critics:
            self.nets |= {
                name: Net(getattr(agent, name), q_rate),
                f"{name}_target": Net(getattr(agent, f"{name}_target")),
            }
        if hasattr(agent, "actor_target"):
            self.nets["actor_target"] = Net(agent.actor_target)

    def learning_rates(self):
        return self.args.learning_rate, self.args.learning_rate

    def is_delayed(self, gradient_step):
        return gradient_step % getattr(self.args, "policy_frequency", 1) != 0

    def q_value(self, name, observations, actions):
        return self.nets[name](np.concatenate([observations, actions], axis=1))[:, 0]

    def next_value(self, batch, actions):
        """Q'(s', a') (E2) or the smaller one (E6), after a look at a'."""
        means, c = np.tanh(self.nets["actor_target"](batch.next_observations)), self.noise_clip()
        assert np.abs(actions - means).max() <= c + 1e-12
        targets = self.critics if getattr(self.args, "clipped_double_q", False) else ["qf1"]
        return np.minimum.reduce(
            [self.q_value(f"{q}_target", batch.next_observations, actions) for q in targets]
        )

    def noise_clip(self):
        return self.args.noise_clip if getattr(self.args, "policy_noise", 0) else 0.0

    def improve_actor(self, batch, actions):
        """Descends (E4), (E7): -mean Q1(s, tanh z), so dL/dz = -dQ1/da (1 - a²) / B."""
        means = np.tanh(self.nets["actor"](batch.observations))
        np.testing.assert_allclose(actions, means, rtol=1e-9, atol=1e-12)
        loss = -self.q_value("qf1", batch.observations, means).mean()
        _, d_input = self.nets["qf1"].gradients(np.full((SIZE, 1), -1 / SIZE))
        self.nets["actor"].descend(self.nets["actor"].gradients(d_input[:, OBS:] * (1 - means**2))[0])
        return {"actor_loss": loss}

    def update(self, batch, gradient_step, asked):
        """One update with the noted actions; returns the metrics that it expects."""
        batch = type(batch)(*(field.numpy() for field in batch))
        y = batch.rewards + self.args.gamma * np.where(
            batch.terminations == 1, 0, self.next_value(batch, asked["qf1_target"])
        )
        metrics = {"target_q": y.mean()}
        for name in self.critics:
            q_values = self.q_value(name, batch.observations, batch.actions)
            metrics |= {f"{name}_values": q_values.mean(), f"{name}_loss": np.square(q_values - y).mean()}
            self.nets[name].descend(self.nets[name].gradients(2 / SIZE * (q_values - y)[:, None])[0])
        if not self.is_delayed(gradient_step):
            metrics |= self.improve_actor(batch, asked["qf1"])
            if gradient_step % self.args.target_network_frequency == 0:
                for name in self.nets:
                    if name.endswith("_target"):
                        self.nets[name].follow(self.nets[name.removesuffix("_target")], self.args.tau)
        return metrics


class SoftReference(Reference):
    """SAC's updates in NumPy. The draws behind the noted actions gather in `draws`."""

    def __init__(self, agent, args):
        super().__init__(agent, args)
        self.nets["log_alpha"] = Net(Scalar(agent.log_alpha), args.q_lr)
        self.draws = []

    def learning_rates(self):
        return self.args.policy_lr, self.args.q_lr

    @property
    def alpha(self):
        return math.exp(self.nets["log_alpha"].weights[0])

    def policy(self, observations, actions):
        """log π at actions; the pieces that its derivatives need."""
        mean, pre = np.split(self.nets["actor"](observations), 2, axis=1)
        std, u = np.exp(3.5 * np.tanh(pre) - 1.5), np.arctanh(actions)
        self.draws.append((u - mean) / std)
        log_prob = stats.norm.logpdf(u, mean, std).sum(1) - np.log(1 - actions**2).sum(1)
        return log_prob, pre, std, (u - mean) / std

    def next_value(self, batch, actions):
        log_prob, *_ = self.policy(batch.next_observations, actions)
        values = [self.q_value(f"{q}_target", batch.next_observations, actions) for q in self.critics]
        return np.minimum(*values) - self.alpha * log_prob

    def improve_actor(self, batch, actions):
        """Descends (E11), then (E12) with the log π from before.

        With the draw ξ fixed, log π = Σ log N(ξ; 0, 1) - log σ - log(1 - tanh² u) and u = m + σ ξ, so
        d log π/du = 2 tanh u, du/dm = 1, du/d log σ = σ ξ, and log σ has -1 of its own.
        """
        alpha, size = self.alpha, SIZE
        log_prob, pre, std, noise = self.policy(batch.observations, actions)
        values, slopes = [], []
        for name in self.critics:
            values.append(self.q_value(name, batch.observations, actions))
            slopes.append(self.nets[name].gradients(np.ones((size, 1)))[1][:, OBS:])
        slope = np.where((values[0] < values[1])[:, None], *slopes)
        d_u = (alpha * 2 * actions - slope * (1 - actions**2)) / size
        d_log_std = d_u * std * noise - alpha / size
        d_pre = d_log_std * 3.5 * (1 - np.tanh(pre) ** 2)
        self.nets["actor"].descend(self.nets["actor"].gradients(np.concatenate([d_u, d_pre], axis=1))[0])
        metrics = {"actor_loss": (alpha * log_prob - np.minimum(*values)).mean(), "entropy": -log_prob.mean()}
        metrics |= {"std": std.mean(), "alpha": alpha}
        if self.args.autotune:
            target_entropy = -ACTIONS if self.args.target_entropy is None else self.args.target_entropy
            gap = (log_prob + target_entropy).mean()
            metrics["alpha_loss"] = -math.log(alpha) * gap
            self.nets["log_alpha"].descend([np.array(-gap)])
        return metrics


RATES = {"learning_rate": 0.01, "tau": 0.1, "gamma": 0.9}
SOFT_RATES = {"policy_lr": 0.01, "q_lr": 0.02, "tau": 0.1, "gamma": 0.9}
CASES = {
    "ddpg": (ddpg, RATES),
    "ddpg, targets every 3": (ddpg, RATES | {"target_network_frequency": 3}),
    "td3": (td3, RATES | {"noise_clip": 0.02}),
    "td3, no noise": (td3, RATES | {"policy_noise": 0.0}),
    "td3, one critic": (td3, RATES | {"policy_noise": 0.0, "clipped_double_q": False}),
    "td3, policy every step": (td3, RATES | {"noise_clip": 0.02, "policy_frequency": 1}),
    "td3, policy every 3": (td3, RATES | {"noise_clip": 0.02, "policy_frequency": 3}),
    "td3, targets every 4": (td3, RATES | {"noise_clip": 0.02, "target_network_frequency": 4}),
    "sac": (sac, SOFT_RATES),
    "sac, fixed temperature": (sac, SOFT_RATES | {"autotune": False}),
    "sac, given target entropy": (sac, SOFT_RATES | {"target_entropy": 1.5}),
    "sac, targets every 3": (sac, SOFT_RATES | {"target_network_frequency": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_reference(case):
    """Every weight, every gradient that a step used, and every metric, through seven consecutive updates."""
    script, changes = CASES[case]
    agent = make_agent(script, **changes)
    reference = (SoftReference if script is sac else Reference)(agent, agent.args)
    asked = note_actions(agent)
    for gradient_step in range(1, 8):
        batch = transitions(script, seed=gradient_step)
        metrics = agent.update(batch, gradient_step)
        expected = reference.update(batch, gradient_step, asked)
        for name, net in reference.nets.items():
            module = getattr(agent, name)
            parameters = [module] if name == "log_alpha" else list(module.parameters())
            for parameter, weight in zip(parameters, net.weights, strict=True):
                np.testing.assert_allclose(parameter.detach(), weight, rtol=1e-7, atol=1e-9, err_msg=name)
            if net.steps:
                for parameter, gradient in zip(parameters, net.last_gradients, strict=True):
                    np.testing.assert_allclose(parameter.grad, gradient, rtol=1e-7, atol=1e-9, err_msg=name)
            else:
                assert all(parameter.grad is None for parameter in parameters)
        assert metrics.keys() >= expected.keys()
        for name, value in metrics.items():
            assert value.shape == ()
            assert not value.requires_grad
            assert value.item() == pytest.approx(expected[name], rel=1e-8, abs=1e-10), name
    if script is sac:
        assert stats.kstest(np.concatenate(reference.draws).reshape(-1), stats.norm.cdf).pvalue > RARE


def test_td3_without_its_fixes_is_ddpg():
    """--policy-frequency 1 --policy-noise 0 --no-clipped-double-q: equal weights stay equal."""
    off = {"policy_frequency": 1, "policy_noise": 0.0, "clipped_double_q": False}
    plain, twin = make_agent(ddpg, **RATES), make_agent(td3, seed=1, **RATES, **off)
    shared = ("actor", "actor_target", "qf1", "qf1_target")
    for name in shared:
        getattr(twin, name).load_state_dict(getattr(plain, name).state_dict())
    start = snapshot(plain)
    for gradient_step in range(1, 21):
        batch = transitions(ddpg, seed=gradient_step)
        metrics, twin_metrics = plain.update(batch, gradient_step), twin.update(batch, gradient_step)
        for name in shared:
            for one, other in zip(
                getattr(plain, name).parameters(), getattr(twin, name).parameters(), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
        for name, value in metrics.items():
            torch.testing.assert_close(value, twin_metrics[name], rtol=1e-11, atol=1e-13)
    assert changed(start, snapshot(plain)) == set(shared)


@pytest.mark.parametrize(
    "fix", [{"policy_frequency": 2}, {"policy_noise": 0.2}, {"clipped_double_q": True}], ids=str
)
def test_each_fix_of_td3_alone_changes_the_update(fix):
    off = {"policy_frequency": 1, "policy_noise": 0.0, "clipped_double_q": False}
    plain, fixed = make_agent(td3, **RATES, **off), make_agent(td3, **RATES, **off | fix)
    for agent in (plain, fixed):
        agent.qf2_target.head.bias.sub_(5)  # so that the second critic's value is the smaller one
    for gradient_step in range(1, 4):
        for agent in (plain, fixed):
            agent.update(transitions(td3, seed=gradient_step), gradient_step)
    assert {"actor", "actor_target", "qf1", "qf1_target"} <= changed(snapshot(plain), snapshot(fixed))


# When networks change, and by what


@pytest.mark.parametrize("policy_frequency", [1, 2, 3])
def test_policy_delay_counts_gradient_steps(policy_frequency):
    agent = make_agent(td3, policy_frequency=policy_frequency)
    for gradient_step in range(1, 13):
        before = snapshot(agent)
        metrics = agent.update(transitions(td3, seed=gradient_step), gradient_step)
        moved = changed(before, snapshot(agent))
        if gradient_step % policy_frequency == 0:
            assert moved == {"actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target"}
        else:
            assert moved == {"qf1", "qf2"}
        assert ("actor_loss" in metrics) == (gradient_step % policy_frequency == 0)


@pytest.mark.parametrize(("frequency", "steps"), [(1, [2, 4, 6, 8, 10, 12]), (3, [6, 12]), (4, [4, 8, 12])])
def test_td3_targets_move_only_with_the_policy(frequency, steps):
    agent = make_agent(td3, target_network_frequency=frequency)
    moved = []
    for gradient_step in range(1, 13):
        before = snapshot(agent)
        agent.update(transitions(td3, seed=gradient_step), gradient_step)
        networks = {name for name in changed(before, snapshot(agent)) if name.endswith("_target")}
        assert networks in ({"actor_target", "qf1_target", "qf2_target"}, set())
        if networks:
            moved.append(gradient_step)
    assert moved == steps


def test_targets_change_by_e1_alone(script):
    """With no update of targets due, none of them moves, or has a gradient, or asks for one."""
    rates = SOFT_RATES if script is sac else RATES
    agent = make_agent(script, **rates, target_network_frequency=10**9)
    before = snapshot(agent)
    for gradient_step in range(1, 7):
        agent.update(transitions(script, seed=gradient_step), gradient_step)
    online = {"actor", "qf1"} | ({"qf2"} if script is not ddpg else set())
    assert changed(before, snapshot(agent)) - {"log_alpha"} == online
    for name, parameter in agent.named_parameters():
        assert parameter.requires_grad == ("_target" not in name)
        assert (parameter.grad is None) == ("_target" in name)


def test_updates_leave_no_graph_behind(script):
    """Targets stay leaves that ask for no gradient: a history of their moves would grow with every update."""
    agent = make_agent(script)
    for gradient_step in (1, 2):
        agent.update(transitions(script), gradient_step)
    for name, parameter in agent.named_parameters():
        assert parameter.is_leaf
        assert parameter.requires_grad == ("_target" not in name)


def test_no_gradient_through_y(script):
    """Not even into targets that ask for gradients, nor, in SAC, into the actor that draws a'."""
    agent, batch = make_agent(script), transitions(script)
    for parameter in agent.parameters():
        parameter.requires_grad_(True)
    if script is ddpg:
        target_q = ddpg.td_target(batch, agent.actor_target, agent.qf1_target, agent.args)
    elif script is td3:
        target_q = td3.td_target(batch, agent.actor_target, agent.qf1_target, agent.qf2_target, agent.args)
    else:
        networks = agent.actor, agent.qf1_target, agent.qf2_target
        target_q = sac.td_target(batch, *networks, agent.log_alpha.exp(), agent.args)
    assert target_q.shape == (SIZE,)
    assert not target_q.requires_grad
    loss, _ = script.critic_loss(batch, agent.qf1, target_q)
    loss.backward()
    touched = {name.split(".")[0] for name, value in agent.named_parameters() if value.grad is not None}
    assert touched == {"qf1"}
    agent.zero_grad()
    agent.update(batch, 2)
    assert not any("_target" in name and value.grad is not None for name, value in agent.named_parameters())


def test_actor_loss_leaves_the_critics_alone(script, monkeypatch):
    """From the critics' step to the end of an update, their weights and gradients stay as they are."""
    agent, after_step, descend = make_agent(script), {}, script.descend

    def noting(optimizer, gradients):
        descend(optimizer, gradients)
        for name, parameter in agent.named_parameters():
            if optimizer is agent.q_optimizer and name.startswith("qf") and "_target" not in name:
                after_step[name] = (parameter.detach().clone(), copy.deepcopy(parameter.grad))

    monkeypatch.setattr(script, "descend", noting)
    for gradient_step in (1, 2):
        agent.update(transitions(script, seed=gradient_step), gradient_step)
        for name, parameter in agent.named_parameters():
            if name.startswith("qf") and "_target" not in name:
                weight, gradient = after_step[name]
                assert gradient.abs().sum() > 0
                assert torch.equal(parameter, weight)
                assert torch.equal(parameter.grad, gradient)


def test_descend_is_a_step_of_the_optimizer(script):
    """To the bit, with other settings than its own; and its state is what PyTorch's own would be."""
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    one, other = (torch.optim.Adam(net.parameters(), fused=True, **settings) for net in (ours, theirs))
    for _ in range(3):
        gradients = tuple(torch.randn_like(parameter) for parameter in ours.parameters())
        script.descend(one, gradients)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        other.step()
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, yours)
            assert torch.equal(mine.grad, yours.grad)
            assert one.state[mine].keys() == other.state[yours].keys()
            assert all(torch.equal(one.state[mine][key], other.state[yours][key]) for key in one.state[mine])
    with pytest.raises(ValueError, match="zip"):
        script.descend(one, gradients[:1])
    with pytest.raises(RuntimeError, match="max_exp_avg_sqs"):  # not silently another algorithm
        script.descend(torch.optim.Adam(ours.parameters(), amsgrad=True), gradients)


def test_all_numbers_on_the_device_are_float32(script):
    """MPS has no float64."""
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8))
    buffer = script.ReplayBuffer(9, OBS, ACTIONS, torch.device("cpu"))
    for _ in range(3):
        buffer.add(np.ones(OBS), np.ones(ACTIONS), np.ones(OBS), 1.0, False)
    batch = buffer.sample(4)
    metrics = [agent.update(batch, gradient_step) for gradient_step in (1, 2)]
    optimizers = [value for value in vars(agent).values() if isinstance(value, torch.optim.Optimizer)]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    found = [buffer.rows, *batch, *agent.state_dict().values(), agent.explore(batch.observations[0])]
    found += [value for values in (*metrics, *states) for value in values.values()]
    assert {value.dtype for value in found} == {torch.float32}


def test_every_learning_parameter_has_one_optimizer(script):
    agent = make_agent(script)
    optimizers = [value for value in vars(agent).values() if isinstance(value, torch.optim.Optimizer)]
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    learning = [id(parameter) for parameter in agent.parameters() if parameter.requires_grad]
    assert sorted(owned) == sorted(learning)


def test_state_dict_holds_the_targets(script):
    """Targets are loaded as they were saved, not rebuilt from the online networks."""
    saved, other = make_agent(script), make_agent(script, seed=1)
    saved.update(transitions(script), 2)
    other.load_state_dict(saved.state_dict())
    assert changed(snapshot(saved), snapshot(other)) == set()
    assert changed(snapshot(saved.qf1), snapshot(saved.qf1_target))


def test_float32_updates_are_finite_and_log_what_they_should(script):
    agent = make_agent(script, dtype=torch.float32)
    for gradient_step in (1, 2):
        metrics = agent.update(transitions(script, dtype=torch.float32), gradient_step)
    names = {"target_q", "qf1_values", "qf1_loss", "actor_loss"}
    names |= {"qf2_values", "qf2_loss"} if script is not ddpg else set()
    names |= {"alpha", "alpha_loss", "entropy", "std"} if script is sac else set()
    assert metrics.keys() == names
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("size", [1, ACTIONS, SIZE])
def test_shapes_do_not_broadcast(script, size):
    """Q, y and log π are (B,), for one transition and for as many as there are action dimensions too."""
    agent, batch = make_agent(script), transitions(script, size=size)
    q_values = agent.qf1(batch.observations, batch.actions)
    assert q_values.shape == (size,)
    if script is ddpg:
        target_q = ddpg.td_target(batch, agent.actor_target, agent.qf1_target, agent.args)
    elif script is td3:
        target_q = td3.td_target(batch, agent.actor_target, agent.qf1_target, agent.qf2_target, agent.args)
    else:
        networks = agent.actor, agent.qf1_target, agent.qf2_target
        target_q = sac.td_target(batch, *networks, torch.tensor(0.2), agent.args)
        assert agent.actor.sample(batch.observations)[1].shape == (size,)
    assert target_q.shape == (size,)
    loss, values = script.critic_loss(batch, agent.qf1, target_q)
    assert values.shape == (size,)
    total = sum((q - y) ** 2 for q, y in zip(q_values.tolist(), target_q.tolist(), strict=True))
    assert loss.item() == pytest.approx(total / size, rel=1e-12)
    assert agent.actor(batch.observations).shape == (size, ACTIONS)
    with torch.no_grad():
        assert agent.explore(batch.observations[0]).shape == (ACTIONS,)


# SAC's temperature


def test_target_entropy_is_minus_the_number_of_dimensions():
    """Not minus its square: the gradient of log α says -(mean log π + H̄), and so H̄."""
    for dimensions in (1, 2, 6):
        torch.manual_seed(0)
        agent = sac.Agent(OBS, dimensions, sac.Args(hidden_dim=8)).double()
        batch = transitions(sac)._replace(actions=torch.zeros(SIZE, dimensions, dtype=torch.float64))
        metrics = agent.update(batch, 1)
        assert -agent.log_alpha.grad.item() + metrics["entropy"].item() == pytest.approx(
            -dimensions, rel=1e-9
        )


def test_temperature_stays_without_autotune():
    agent = make_agent(sac, autotune=False, alpha=0.37)
    before = agent.log_alpha.detach().clone()
    for gradient_step in range(1, 4):
        metrics = agent.update(transitions(sac, seed=gradient_step), gradient_step)
        assert metrics["alpha"].item() == pytest.approx(0.37, rel=1e-6)
        assert "alpha_loss" not in metrics
    assert torch.equal(agent.log_alpha, before)
    assert agent.log_alpha.grad is None


def test_alpha_starts_where_it_is_told_and_weighs_the_entropy():
    """The same draws under two temperatures: the losses differ by just that times the entropy."""
    metrics = {}
    for alpha in (0.1, 0.9):
        agent, batch = make_agent(sac, alpha=alpha, q_lr=1e-12), transitions(sac)
        torch.manual_seed(1)
        metrics[alpha] = agent.update(batch, 1)
        assert metrics[alpha]["alpha"].item() == pytest.approx(alpha, rel=1e-6)
    cold, warm = metrics[0.1], metrics[0.9]
    assert warm["entropy"].item() == pytest.approx(cold["entropy"].item())
    gap = (cold["actor_loss"] - warm["actor_loss"]).item()
    assert gap == pytest.approx(0.8 * warm["entropy"].item(), rel=1e-5)


def test_alpha_is_not_moved_by_the_actor_loss():
    """log α gets the gradient of (E12) alone, even if the actor loss is given an α that could pass one on."""
    agent, batch = make_agent(sac), transitions(sac)
    metrics = agent.update(batch, 1)
    assert agent.log_alpha.grad.item() == pytest.approx(metrics["entropy"].item() + ACTIONS, rel=1e-9)


# Replay buffer


def fill(script, capacity, count, obs_dim=2):
    """A buffer; transition i is s = (i, -i), a = i / 1000, r = 2 i, s' = (i + ½, 0), d = 1 if i is odd."""
    buffer = script.ReplayBuffer(capacity, obs_dim, 1, torch.device("cpu"))
    for i in range(count):
        observation, next_observation = np.array([i, -i], np.float64), np.array([i + 0.5, 0], np.float32)
        buffer.add(
            observation=observation,
            action=np.array([i / 1000], np.float32),
            reward=2.0 * i,
            next_observation=next_observation,
            terminated=bool(i % 2),
        )
        observation[:], next_observation[:] = np.nan, np.nan  # an environment may use its arrays again
    return buffer


@pytest.mark.parametrize(("capacity", "count"), [(7, 3), (7, 7), (7, 8), (7, 19), (7, 21), (1, 4), (5000, 7)])
def test_buffer_keeps_the_latest_transitions_whole(script, capacity, count):
    torch.manual_seed(0)
    batch = fill(script, capacity, count).sample(400)
    assert [tuple(field.shape) for field in batch] == [(400, 2), (400, 1), (400,), (400, 2), (400,)]
    assert {field.dtype for field in batch} == {torch.float32}
    seen = batch.observations[:, 0]
    assert set(seen.tolist()) == set(range(max(0, count - capacity), count))
    assert torch.equal(batch.observations[:, 1], -seen)
    torch.testing.assert_close(batch.actions[:, 0], seen / 1000)
    assert torch.equal(batch.rewards, 2 * seen)
    assert torch.equal(batch.next_observations[:, 0], seen + 0.5)
    assert torch.equal(batch.terminations, seen % 2)


@pytest.mark.parametrize(("capacity", "count"), [(50, 30), (50, 50), (50, 77)])
def test_buffer_samples_uniformly(script, capacity, count):
    torch.manual_seed(0)
    buffer = fill(script, capacity, count)
    drawn = torch.cat([buffer.sample(256).observations[:, 0] for _ in range(40)]).long()
    stored = min(capacity, count)
    counts = np.bincount(drawn.numpy() - (count - stored), minlength=stored)
    assert len(counts) == stored
    assert stats.chisquare(counts).pvalue > RARE
    # Independent draws with replacement: as many in common with the next one as chance has it.
    repeats = int((drawn[1:] == drawn[:-1]).sum())
    assert stats.binomtest(repeats, len(drawn) - 1, 1 / stored).pvalue > RARE


# Training: what reaches the buffer, when updates come, and what memory is touched


class Diary(gym.Env):
    """A task that writes down where and when it is, so that a transition can be recognised anywhere.

    Observation: episode, step in it, second action in the task's own units, steps ever. Reward: the first
    action in the task's own units. Every third episode terminates at its third step. Of the others, which run
    out of time at five steps, one in two terminates at that very step.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gym.spaces.Box(np.float32([0, -3]), np.float32([10, 1]))

    def __init__(self, render_mode=None):
        self.episode, self.ever = -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self.observe(0.0), {}

    def observe(self, action):
        return np.array([self.episode, self.step_in_episode, action, self.ever], np.float32)

    def step(self, action):
        self.step_in_episode, self.ever = self.step_in_episode + 1, self.ever + 1
        terminated = self.step_in_episode == {0: 3, 1: 5}.get(self.episode % 3)
        return self.observe(action[1]), float(action[0]), terminated, False, {}


STEPS, STARTS, CAPACITY, TRAIN_FREQUENCY, GRADIENT_STEPS = 160, 20, 32, 3, 2
HUGE = 10_000_000  # transitions in a buffer that would take long to fill


def train_on_diary(script, **changes):
    """A short run that never writes a row of losses but evaluates often."""
    if "Diary-v0" not in gym.registry:
        gym.register("Diary-v0", Diary, max_episode_steps=5)
    sizes = {"total_timesteps": STEPS, "learning_starts": STARTS, "batch_size": 16, "hidden_dim": 8}
    frequencies = {
        "log_frequency": 10**6,
        "eval_frequency": 7,
        "eval_episodes": 1,
        "threads": 1,
        "cuda": False,
    }
    script.train(script.Args(env_id="Diary-v0", **sizes, **frequencies, **changes))


def train_and_note(name: str, folder: str) -> list[dict]:
    """Trains a script on Diary; returns what each update was given and which networks it moved."""
    script, notes = importlib.import_module(name), []

    class Noting(script.Agent):
        def update(self, batch, gradient_step):
            before = snapshot(self)
            metrics = super().update(batch, gradient_step)
            fields = {field: value.numpy().copy() for field, value in batch._asdict().items()}
            notes.append({"gradient_step": gradient_step, "moved": changed(before, snapshot(self)), **fields})
            return metrics

    plain, script.Agent = script.Agent, Noting
    phases = {"train_frequency": TRAIN_FREQUENCY, "gradient_steps": GRADIENT_STEPS}
    train_on_diary(script, run_dir=f"{folder}/{name}", buffer_size=CAPACITY, **phases)
    script.Agent = plain
    return notes


def touched_memory(name: str, folder: str) -> list[int]:
    """Bytes touched at the peak of a run with a tiny replay buffer, and then of one with a huge buffer."""
    script, peaks = importlib.import_module(name), []
    for buffer_size in (1000, HUGE):
        train_on_diary(script, run_dir=f"{folder}/{buffer_size}", buffer_size=buffer_size)
        peaks.append(1024 * int(Path("/proc/self/status").read_text("ascii").split("VmHWM:")[1].split()[0]))
    return peaks


@pytest.fixture(scope="module")
def process():
    """A process to train in, which sets PyTorch's and the process's global state."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        yield executor


@pytest.fixture(scope="module", params=SCRIPTS)
def notes(request, process, tmp_path_factory):
    """What each update of a short training run was given and did, for each script in turn."""
    folder = str(tmp_path_factory.mktemp("runs"))
    return request.param, process.submit(train_and_note, request.param, folder).result(timeout=300)


def test_training_counts_gradient_steps(notes):
    """Every --train-frequency steps after learning starts, --gradient-steps updates, counted from 1 on."""
    _, updates = notes
    phases = sum(step % TRAIN_FREQUENCY == 0 for step in range(STARTS + 1, STEPS + 1))
    assert [update["gradient_step"] for update in updates] == list(range(1, GRADIENT_STEPS * phases + 1))


def test_training_moves_policy_and_targets_where_nothing_is_logged(notes):
    """--log-frequency is beyond the end of this run; --train-frequency is odd, TD3's delay even."""
    name, updates = notes
    everything = {"ddpg_continuous": {"actor", "qf1", "actor_target", "qf1_target"}}
    everything["td3_continuous"] = everything["ddpg_continuous"] | {"qf2", "qf2_target"}
    everything["sac_continuous"] = everything["td3_continuous"] - {"actor_target"} | {"log_alpha"}
    for update in updates:
        delayed = name == "td3_continuous" and update["gradient_step"] % 2
        assert update["moved"] == ({"qf1", "qf2"} if delayed else everything[name])


def test_training_stores_the_true_transitions(notes):
    """Through resets, evaluations, turns of the ring: true s', d only at terminations, a in [-1, 1]."""
    _, updates = notes
    terminated = timed_out = 0
    for update in updates:
        rows = zip(*(update[field].tolist() for field in ddpg.Batch._fields), strict=True)
        for observation, action, reward, next_observation, termination in rows:
            episode, step, _, ever = observation
            # The task's units from the stored action, by E0.
            assert reward == pytest.approx(5 + 5 * action[0], abs=1e-5)
            assert next_observation == pytest.approx(
                [episode, step + 1, -1 + 2 * action[1], ever + 1], abs=1e-5
            )
            ends = {0: 3, 1: 5}.get(episode % 3)
            assert termination == (step + 1 == ends)
            terminated += step + 1 == ends
            timed_out += step + 1 == 5 and ends is None
            assert max(map(abs, action)) <= 1
    assert terminated > 50
    assert timed_out > 50


def test_training_draws_fresh_minibatches_of_the_latest_transitions(notes):
    _, updates = notes
    ages = []
    for i, update in enumerate(updates):
        now = next(s for s in range(STARTS + 1, STEPS + 1) if s % TRAIN_FREQUENCY == 0)
        now += TRAIN_FREQUENCY * (i // GRADIENT_STEPS)
        ages.append(now - 1 - update["observations"][:, 3])
        assert ages[-1].min() >= 0
        assert ages[-1].max() < min(CAPACITY, now)
    assert all(one.tolist() != other.tolist() for one, other in pairwise(ages))
    full = np.concatenate(ages[2 * GRADIENT_STEPS * math.ceil((CAPACITY - STARTS) / TRAIN_FREQUENCY) :])
    assert stats.chisquare(np.bincount(full.astype(int), minlength=CAPACITY)).pvalue > RARE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_an_empty_buffer_touches_no_memory(process, tmp_path):
    """Ten million transitions of 12 numbers are 480 MB, of which only a few rows are used."""
    small, huge = process.submit(touched_memory, SCRIPTS[0], str(tmp_path)).result(timeout=300)
    assert huge - small < 100e6
