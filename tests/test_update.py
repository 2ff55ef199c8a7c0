"""Whole updates of an agent against a reference, the optimizer's step, and the replay buffer.

The reference is written from E1 to E12, in float64, with PyTorch's own Adam, and shares no code with the
scripts. It takes over only the actions that were drawn, which hooks on the critics note, and checks those.
"""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from test_equations import ACTIONS, OBS, RARE, transitions
from torch.distributions import Normal

import ddpg_continuous as ddpg
import sac_continuous as sac
import td3_continuous as td3

SHARED = {"total_timesteps": 1_000_000, "buffer_size": 1_000_000, "batch_size": 256, "hidden_dim": 256}
SHARED |= {"gamma": 0.99, "tau": 0.005, "target_network_frequency": 1}
SHARED |= {"train_frequency": 1, "gradient_steps": 1, "eval_frequency": 10_000, "eval_episodes": 10}
NOISY = {"learning_rate": 3e-4, "learning_starts": 25_000, "exploration_noise": 0.1}
FIXES = {"policy_noise": 0.2, "noise_clip": 0.5, "policy_frequency": 2, "clipped_double_q": True}
SOFT = {"learning_starts": 5000, "policy_lr": 3e-4, "q_lr": 1e-3, "alpha": 0.2, "autotune": True}
OWN = {ddpg: NOISY | {"ou_noise": False, "random_action_prob": 0.0}, td3: NOISY | FIXES, sac: SOFT}


def test_defaults_are_the_published_ones(script):
    """CleanRL's, so that its users know what a run without flags does; the evaluations are our own."""
    expected = SHARED | OWN[script]
    assert {name: value for name, value in vars(script.Args()).items() if name in expected} == expected


# ---- Whole updates


def make_agent(script, **changes):
    """A float64 agent of small networks, steep critics, and targets that are already away from them.

    Of two critics, and of their targets, each is the smaller one for about half of the actor's actions.
    """
    torch.manual_seed(3)
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8, cuda=False, **changes)).double()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name.startswith("qf"):
                parameter.mul_(2)
            if "_target" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        observations = transitions(script, 500).observations
        actions = agent.actor(observations)
        for suffix in ("", "_target"):
            if script is not ddpg:
                qf1, qf2 = getattr(agent, f"qf1{suffix}"), getattr(agent, f"qf2{suffix}")
                qf2.net[-1].bias.sub_((qf2(observations, actions) - qf1(observations, actions)).median())
    return agent


def note_actions(agent):
    """A dict that will hold the actions about which Q1' and Q1 were last asked."""
    asked = {}
    for name in ("qf1_target", "qf1"):

        def hook(module, inputs, output, name=name):
            asked[name] = inputs[1].detach().clone()

        getattr(agent, name).register_forward_hook(hook)
    return asked


def output(network, *inputs):
    """What two hidden layers of rectified units give: (B, in) -> (B, out)."""
    w1, b1, w2, b2, w3, b3 = network.parameters()
    h1 = (torch.cat(inputs, dim=1) @ w1.T + b1).clamp(min=0)
    h2 = (h1 @ w2.T + b2).clamp(min=0)
    return h2 @ w3.T + b3


def descend(loss, optimizer):
    """A step of Adam; the gradient's norm."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return sum(p.grad.square().sum() for group in optimizer.param_groups for p in group["params"]).sqrt()


class Reference:
    """The updates of DDPG (one critic) and TD3 (two). SAC's differ in two methods."""

    def __init__(self, agent):
        self.args, self.nets = agent.args, copy.deepcopy(dict(agent.named_children()))
        self.critics = [name for name in ("qf1", "qf2") if name in self.nets]
        settings = vars(self.args)
        actor_rate = settings.get("policy_lr", settings.get("learning_rate"))
        self.q_rate = settings.get("q_lr", settings.get("learning_rate"))
        q_parameters = [parameter for name in self.critics for parameter in self.nets[name].parameters()]
        self.q_optimizer = torch.optim.Adam(q_parameters, lr=self.q_rate)
        self.actor_optimizer = torch.optim.Adam(self.nets["actor"].parameters(), lr=actor_rate)
        self.second_is_smaller = []  # of two critics, for each action they were asked about

    def smallest_q(self, names, observations, actions):
        """min_i Q_i(s, a): (B,)."""
        values = torch.stack([output(self.nets[name], observations, actions)[:, 0] for name in names])
        self.second_is_smaller += (values[-1] < values[0]).tolist()
        return values.amin(dim=0)

    def next_value(self, observations, actions):
        """Q'(s', a') (E2) or the smaller one (E6), after a look at a'."""
        noise = actions - torch.tanh(output(self.nets["actor_target"], observations))
        noisy = getattr(self.args, "policy_noise", 0) > 0
        assert noise.abs().max() <= (self.args.noise_clip if noisy else 0) + 1e-12
        double = getattr(self.args, "clipped_double_q", False)
        names = ["qf1_target", "qf2_target"] if double else ["qf1_target"]
        return self.smallest_q(names, observations, actions)

    def improve_actor(self, observations, actions):
        """Descends (E4), (E7)."""
        means = torch.tanh(output(self.nets["actor"], observations))
        torch.testing.assert_close(actions, means)
        loss = -self.smallest_q(["qf1"], observations, means).mean()
        return {"actor_loss": loss, "actor_gradient_norm": descend(loss, self.actor_optimizer)}

    def update(self, batch, gradient_step, asked):
        """One update with the noted actions; returns the metrics that it expects."""
        args = self.args
        with torch.no_grad():
            bootstrapped = args.gamma * self.next_value(batch.next_observations, asked["qf1_target"])
            y = torch.where(batch.terminations == 1, batch.rewards, batch.rewards + bootstrapped)
        metrics, losses = {"target_q": y.mean()}, []
        for name in self.critics:
            values = output(self.nets[name], batch.observations, batch.actions)[:, 0]
            losses.append(((values - y) ** 2).mean())
            metrics |= {f"{name}_values": values.mean(), f"{name}_loss": losses[-1]}
        if len(losses) == 2:
            metrics["qf_loss"] = sum(losses) / 2
        metrics["q_gradient_norm"] = descend(sum(losses), self.q_optimizer)
        if gradient_step % getattr(args, "policy_frequency", 1) == 0:
            metrics |= self.improve_actor(batch.observations, asked["qf1"])
            if gradient_step % args.target_network_frequency == 0:
                self.move_targets()
        return metrics

    @torch.no_grad()
    def move_targets(self):
        """(E1)"""
        tau = self.args.tau
        for name in self.nets:
            if name.endswith("_target"):
                online = self.nets[name.removesuffix("_target")].parameters()
                for old, new in zip(self.nets[name].parameters(), online, strict=True):
                    old.copy_((1 - tau) * old + tau * new)


class SoftReference(Reference):
    """SAC's updates. The draws behind the noted actions gather in `draws`."""

    def __init__(self, agent):
        super().__init__(agent)
        self.log_alpha = torch.tensor(self.args.alpha).log().double().requires_grad_()
        self.alpha_optimizer, self.draws = torch.optim.Adam([self.log_alpha], lr=self.q_rate), []

    def policy(self, observations, actions):
        """(E8) and (E9): the noted actions again, with a gradient now, and log π."""
        mean, pre = output(self.nets["actor"], observations).chunk(2, dim=1)
        std = torch.exp(3.5 * torch.tanh(pre) - 1.5)  # log σ goes from -5 to 2
        self.draws.append(((torch.atanh(actions) - mean) / std).detach())
        u = mean + std * self.draws[-1]
        actions = torch.tanh(u)
        return actions, (Normal(mean, std).log_prob(u) - (1 - actions**2).log()).sum(dim=1)

    def next_value(self, observations, actions):
        """The part of (E10) in brackets."""
        _, log_prob = self.policy(observations, actions)
        values = self.smallest_q(["qf1_target", "qf2_target"], observations, actions)
        return values - self.log_alpha.exp() * log_prob

    def improve_actor(self, observations, actions):
        """Descends (E11), then (E12) with the log π from before."""
        alpha = self.log_alpha.exp().item()
        actions, log_prob = self.policy(observations, actions)
        loss = (alpha * log_prob - self.smallest_q(["qf1", "qf2"], observations, actions)).mean()
        metrics = {"actor_loss": loss, "actor_gradient_norm": descend(loss, self.actor_optimizer)}
        target_entropy = -ACTIONS if self.args.target_entropy is None else self.args.target_entropy
        alpha_loss = -self.log_alpha * (log_prob.detach().mean() + target_entropy)
        metrics |= {"alpha": self.log_alpha.exp().detach(), "alpha_loss": alpha_loss}
        if self.args.autotune:
            descend(alpha_loss, self.alpha_optimizer)
        return metrics | {"entropy": -log_prob.mean()}


RATES = {"learning_rate": 0.01, "tau": 0.1, "gamma": 0.9}
TD3_RATES = RATES | {"noise_clip": 0.02}
NO_FIXES = {"policy_noise": 0.0, "clipped_double_q": False, "policy_frequency": 1}
SOFT_RATES = {"policy_lr": 0.01, "q_lr": 0.02, "tau": 0.1, "gamma": 0.9}
CASES = {
    "ddpg": (ddpg, RATES),
    "ddpg, targets copied every 3": (ddpg, RATES | {"target_network_frequency": 3, "tau": 1.0}),
    "td3": (td3, TD3_RATES),
    "td3, without its fixes": (td3, RATES | NO_FIXES),
    "td3, targets every 3 if due": (td3, TD3_RATES | {"target_network_frequency": 3}),
    "sac": (sac, SOFT_RATES),
    "sac, fixed temperature": (sac, SOFT_RATES | {"autotune": False, "alpha": 0.37}),
    "sac, given target entropy": (sac, SOFT_RATES | {"target_entropy": 1.5, "target_network_frequency": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_reference(case):
    """Every weight and every metric, through seven consecutive updates."""
    script, changes = CASES[case]
    agent = make_agent(script, **changes)
    reference, asked = (SoftReference if script is sac else Reference)(agent), note_actions(agent)
    for gradient_step in range(1, 8):
        batch = transitions(script, 12)
        metrics = agent.update(batch, gradient_step)
        expected = reference.update(batch, gradient_step, asked)
        for name, network in reference.nets.items():
            ours = list(getattr(agent, name).parameters())
            torch.testing.assert_close(ours, list(network.parameters()), rtol=1e-6, atol=1e-9)
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            assert not value.requires_grad
            assert value.item() == pytest.approx(expected[name].item(), rel=1e-6, abs=1e-9), name
    if script is sac:
        assert stats.kstest(torch.cat(reference.draws).flatten(), stats.norm.cdf).pvalue > RARE
    if script is not ddpg and case != "td3, without its fixes":  # or the minimum would go untested
        assert 0.1 < np.mean(reference.second_is_smaller) < 0.9
    for name, parameter in agent.named_parameters():  # no history of updates, which would grow
        assert parameter.is_leaf
        assert parameter.requires_grad == ("_target" not in name)


def test_descend_is_a_step_of_adam_whatever_its_settings():
    layer = torch.nn.Linear(3, 2)
    twin, settings = copy.deepcopy(layer), {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    ours, theirs = (torch.optim.Adam(module.parameters(), **settings) for module in (layer, twin))
    for _ in range(3):
        inputs = torch.randn(5, 3)
        sac.descend(layer(inputs).square().mean(), ours)
        descend(twin(inputs).square().mean(), theirs)
    torch.testing.assert_close(list(layer.parameters()), list(twin.parameters()))


# ---- Replay buffer


@pytest.mark.parametrize(("capacity", "count"), [(7, 3), (7, 7), (7, 8), (7, 19), (1, 4)])
def test_buffer_draws_uniformly_of_the_latest_transitions(capacity, count):
    """Transition i is s = (i, -i), a = i / 1000, r = 2 i, s' = (i + ½, 0), d = 1 if i is odd."""
    torch.manual_seed(0)
    buffer = sac.ReplayBuffer(capacity, 2, 1, torch.device("cpu"))
    for i in range(count):
        observation, next_observation = np.array([i, -i], np.float64), np.array([i + 0.5, 0], np.float32)
        action = np.array([i / 1000], np.float32)
        buffer.add(observation, action, 2.0 * i, next_observation, bool(i % 2))
        for array in (observation, action, next_observation):
            array[:] = np.nan  # an environment may use its arrays again
    batch = buffer.sample(1000)
    assert [tuple(field.shape) for field in batch] == [(1000, 2), (1000, 1), (1000,), (1000, 2), (1000,)]
    assert {field.dtype for field in batch} == {torch.float32}
    seen = batch.observations[:, 0]
    latest, counts = np.unique(seen, return_counts=True)
    assert latest.tolist() == list(range(max(0, count - capacity), count))
    assert len(counts) == 1 or stats.chisquare(counts).pvalue > RARE
    assert torch.equal(batch.observations[:, 1], -seen)
    torch.testing.assert_close(batch.actions[:, 0], seen / 1000)
    assert torch.equal(batch.rewards, 2 * seen)
    assert torch.equal(batch.next_observations[:, 0], seen + 0.5)
    assert torch.equal(batch.terminations, seen % 2)
