"""What learning does to an agent: whole updates against a reference, the replay buffer, the loop around them.

The reference is NumPy in float64 with every derivative worked out on paper and Adam written out, so that it
shares no code with the scripts. It takes over only the drawn actions, which hooks on the critics note, and
checks those.
"""

import copy
import io
import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import stats
from test_equations import ACTIONS, OBS, RARE, transitions

import ddpg_continuous as ddpg
import sac_continuous as sac
import td3_continuous as td3

SIZE = 12  # transitions in a minibatch

# CleanRL's values, so that a user of it knows what a run without flags does.
SHARED = {"seed": 1, "total_timesteps": 1_000_000, "gamma": 0.99, "tau": 0.005, "batch_size": 256}
SHARED |= {"buffer_size": 1_000_000, "hidden_dim": 256, "target_network_frequency": 1}
SHARED |= {"torch_deterministic": True, "capture_video": False, "track": False, "wandb_entity": None}
# What CleanRL has no flags for: one update a step, as there, and regular evaluations.
SHARED |= {"train_frequency": 1, "gradient_steps": 1, "eval_frequency": 10_000, "eval_episodes": 10}
DETERMINISTIC = {"learning_rate": 3e-4, "learning_starts": 25_000, "exploration_noise": 0.1}
FIXES = {"policy_noise": 0.2, "noise_clip": 0.5, "policy_frequency": 2, "clipped_double_q": True}
TEMPERATURE = {"alpha": 0.2, "autotune": True, "target_entropy": None}
DEFAULTS = {
    ddpg: DETERMINISTIC | {"ou_noise": False, "ou_dt": 1.0, "random_action_prob": 0.0},
    td3: DETERMINISTIC | FIXES,
    sac: {"policy_lr": 3e-4, "q_lr": 1e-3, "learning_starts": 5000} | TEMPERATURE,
}


def test_defaults_are_the_published_ones(script):
    expected = SHARED | DEFAULTS[script]
    assert {name: value for name, value in vars(script.Args()).items() if name in expected} == expected


def make_agent(script, seed=0, **changes):
    """A float64 agent of small networks, steep critics, and targets that are already away from them.

    Of two critics, and of their targets, each is the smaller one for about half of the actor's actions.
    """
    torch.manual_seed(seed)
    agent = script.Agent(OBS, ACTIONS, script.Args(hidden_dim=8, **changes)).double()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name.startswith("qf"):
                parameter.mul_(2)
            if "_target" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        observations = transitions(script, 500).observations
        actions = agent.actor(observations)
        for second in ("qf2", "qf2_target"):
            if hasattr(agent, second):
                qf1, qf2 = getattr(agent, second.replace("2", "1")), getattr(agent, second)
                qf2.net[-1].bias.sub_((qf2(observations, actions) - qf1(observations, actions)).median())
    return agent


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


# Whole updates against a reference in NumPy


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
        self.squared_norm = sum(np.square(gradient).sum() for gradient in gradients)
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


class Reference:
    """The updates of DDPG (one critic) and TD3 (two), in NumPy. SAC's differ in two methods."""

    def __init__(self, agent, args):
        self.args, self.critics = args, [name for name in ("qf1", "qf2") if hasattr(agent, name)]
        actor_rate, q_rate = (getattr(args, name, 0) or args.learning_rate for name in ("policy_lr", "q_lr"))
        rates = {"actor": actor_rate, "qf1": q_rate, "qf2": q_rate}
        self.nets = {name: Net(module, rates.get(name)) for name, module in agent.named_children()}
        self.second_is_smaller = {"target": [], "actor": []}  # of the two critics, there, for each transition

    def q_value(self, name, observations, actions):
        return self.nets[name](np.concatenate([observations, actions], axis=1))[:, 0]

    def q_values(self, where, observations, actions):
        """Q_i(s, a) or, where is "target", Q_i'(s, a) of each critic: (critics, B)."""
        suffix = "_target" if where == "target" else ""
        values = np.array([self.q_value(f"{q}{suffix}", observations, actions) for q in self.critics])
        self.second_is_smaller[where].extend(values[-1] < values[0])
        return values

    def next_value(self, batch, actions):
        """Q'(s', a') (E2) or the smaller one (E6), after a look at a'."""
        means = np.tanh(self.nets["actor_target"](batch.next_observations))
        noise_clip = self.args.noise_clip if getattr(self.args, "policy_noise", 0) else 0
        assert np.abs(actions - means).max() <= noise_clip + 1e-12
        values = self.q_values("target", batch.next_observations, actions)
        return values.min(axis=0) if getattr(self.args, "clipped_double_q", False) else values[0]

    def improve_actor(self, batch, actions):
        """Descends (E4), (E7): -mean Q1(s, tanh z), so dL/dz = -dQ1/da (1 - a²) / B."""
        means = np.tanh(self.nets["actor"](batch.observations))
        np.testing.assert_allclose(actions, means, rtol=1e-9, atol=1e-12)
        loss = -self.q_values("actor", batch.observations, means)[0].mean()
        _, d_input = self.nets["qf1"].gradients(np.full((SIZE, 1), -1 / SIZE))
        self.nets["actor"].descend(self.nets["actor"].gradients(d_input[:, OBS:] * (1 - means**2))[0])
        return {"actor_loss": loss}

    def update(self, batch, gradient_step, asked):
        """One update with the noted actions; returns the metrics that it expects."""
        batch = type(batch)(*(field.numpy() for field in batch))
        next_value = self.next_value(batch, asked["qf1_target"])
        y = batch.rewards + self.args.gamma * np.where(batch.terminations == 1, 0, next_value)
        metrics, losses = {"target_q": y.mean()}, []
        for name in self.critics:
            q_values = self.q_value(name, batch.observations, batch.actions)
            losses.append(np.square(q_values - y).mean())
            metrics |= {f"{name}_values": q_values.mean(), f"{name}_loss": losses[-1]}
            self.nets[name].descend(self.nets[name].gradients(2 / SIZE * (q_values - y)[:, None])[0])
        squared_norm = sum(self.nets[name].squared_norm for name in self.critics)
        metrics |= {"q_gradient_norm": math.sqrt(squared_norm)}
        metrics |= {"qf_loss": np.mean(losses)} if len(losses) == 2 else {}
        if gradient_step % getattr(self.args, "policy_frequency", 1) == 0:
            metrics |= self.improve_actor(batch, asked["qf1"])
            metrics |= {"actor_gradient_norm": math.sqrt(self.nets["actor"].squared_norm)}
            if gradient_step % self.args.target_network_frequency == 0:
                for name in self.nets:
                    if name.endswith("_target"):
                        self.nets[name].follow(self.nets[name.removesuffix("_target")], self.args.tau)
        return metrics


class SoftReference(Reference):
    """SAC's updates in NumPy. The draws behind the noted actions gather in `draws`."""

    def __init__(self, agent, args):
        super().__init__(agent, args)
        self.nets["log_alpha"] = Net(torch.nn.ParameterList([agent.log_alpha]), args.q_lr)
        self.draws = []
        assert self.alpha == pytest.approx(args.alpha)

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
        values = self.q_values("target", batch.next_observations, actions)
        return values.min(axis=0) - self.alpha * log_prob

    def improve_actor(self, batch, actions):
        """Descends (E11), then (E12) with the log π from before.

        With the draw ξ fixed, log π = Σ log N(ξ; 0, 1) - log σ - log(1 - tanh² u) and u = m + σ ξ, so
        d log π/du = 2 tanh u, du/dm = 1, du/d log σ = σ ξ, and log σ has -1 of its own.
        """
        alpha = self.alpha
        log_prob, pre, std, noise = self.policy(batch.observations, actions)
        values = self.q_values("actor", batch.observations, actions)
        slopes = [self.nets[name].gradients(np.ones((SIZE, 1)))[1][:, OBS:] for name in self.critics]
        slope = np.where((values[0] < values[1])[:, None], *slopes)
        d_u = (alpha * 2 * actions - slope * (1 - actions**2)) / SIZE
        d_log_std = d_u * std * noise - alpha / SIZE
        d_pre = d_log_std * 3.5 * (1 - np.tanh(pre) ** 2)
        self.nets["actor"].descend(self.nets["actor"].gradients(np.concatenate([d_u, d_pre], axis=1))[0])
        target_entropy = -ACTIONS if self.args.target_entropy is None else self.args.target_entropy
        gap = (log_prob + target_entropy).mean()
        if self.args.autotune:
            self.nets["log_alpha"].descend([np.array(-gap)])
        metrics = {"actor_loss": (alpha * log_prob - values.min(axis=0)).mean(), "alpha": alpha}
        return metrics | {"alpha_loss": -math.log(alpha) * gap, "entropy": -log_prob.mean()}


RATES = {"learning_rate": 0.01, "tau": 0.1, "gamma": 0.9}
SOFT_RATES = {"policy_lr": 0.01, "q_lr": 0.02, "tau": 0.1, "gamma": 0.9}
TD3_RATES = RATES | {"noise_clip": 0.02}
NO_FIXES = {"policy_noise": 0.0, "clipped_double_q": False, "policy_frequency": 1}
CASES = {
    "ddpg": (ddpg, RATES),
    "ddpg, targets copied every 3": (ddpg, RATES | {"target_network_frequency": 3, "tau": 1.0}),
    "td3": (td3, TD3_RATES),
    "td3, no noise": (td3, RATES | {"policy_noise": 0.0}),
    "td3, target of one critic": (td3, TD3_RATES | {"clipped_double_q": False}),
    "td3, without its fixes, as ddpg": (td3, RATES | NO_FIXES),
    "td3, policy every 3": (td3, TD3_RATES | {"policy_frequency": 3}),
    "td3, targets every 3 if due": (td3, TD3_RATES | {"target_network_frequency": 3}),
    "sac": (sac, SOFT_RATES),
    "sac, fixed temperature": (sac, SOFT_RATES | {"autotune": False, "alpha": 0.37}),
    "sac, given target entropy": (sac, SOFT_RATES | {"target_entropy": 1.5}),
    "sac, targets every 3": (sac, SOFT_RATES | {"target_network_frequency": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_reference(case):
    """Every weight, every moment of Adam, and every metric, through seven consecutive updates."""
    script, changes = CASES[case]
    agent = make_agent(script, seed=3, **changes)
    reference = (SoftReference if script is sac else Reference)(agent, agent.args)
    asked, optimizers = note_actions(agent), {}
    for optimizer in vars(agent).values():
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizers |= dict.fromkeys(optimizer.param_groups[0]["params"], optimizer)
    for gradient_step in range(1, 8):
        batch = transitions(script, SIZE)
        metrics = agent.update(batch, gradient_step)
        expected = reference.update(batch, gradient_step, asked)
        for name, net in reference.nets.items():
            parameters = [agent.log_alpha] if name == "log_alpha" else getattr(agent, name).parameters()
            for parameter, weight, moment in zip(parameters, net.weights, net.first_moments, strict=True):
                np.testing.assert_allclose(parameter.detach(), weight, rtol=1e-6, atol=1e-9, err_msg=name)
                if net.steps:
                    ours = optimizers[parameter].state[parameter]["exp_avg"]
                    np.testing.assert_allclose(ours, moment, rtol=1e-6, atol=1e-9, err_msg=name)
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            assert not value.requires_grad
            assert value.item() == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    if script is sac:
        assert stats.kstest(np.concatenate(reference.draws).reshape(-1), stats.norm.cdf).pvalue > RARE
    if script is not ddpg:  # or the minimum would go untested
        assert all(0.2 < np.mean(smaller) < 0.8 for smaller in reference.second_is_smaller.values())
    for name, parameter in agent.named_parameters():  # no history of updates, which would grow
        assert parameter.is_leaf
        assert parameter.requires_grad == ("_target" not in name)


def test_state_dict_holds_the_targets(script):
    """Targets are loaded as they were saved, not rebuilt from the online networks."""
    saved, other = make_agent(script), make_agent(script, seed=1)
    other.load_state_dict(saved.state_dict())
    assert changed(snapshot(saved), snapshot(other)) == set()
    assert changed(snapshot(other.qf1), snapshot(other.qf1_target))


def test_descend_is_a_step_of_adam_over_its_own_parameters():
    """To the bit as torch.optim.Adam, whatever its settings; the loss's other parameters are left alone."""
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "fused": True}
    layer, head = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    twin, head_before = copy.deepcopy(layer), snapshot(head)
    ours, theirs = (torch.optim.Adam(module.parameters(), **settings) for module in (layer, twin))
    for _ in range(3):
        inputs = torch.randn(5, 3)
        norm = sac.descend(head(layer(inputs)).square().mean(), ours)
        theirs.zero_grad()
        head(twin(inputs)).square().mean().backward(inputs=list(twin.parameters()))
        theirs.step()
        total = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in twin.parameters()))
        assert norm.item() == pytest.approx(total, rel=1e-6)
        for mine, yours in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, yours)
            assert ours.state[mine].keys() == theirs.state[yours].keys()
            assert all(
                torch.equal(ours.state[mine][key], theirs.state[yours][key]) for key in ours.state[mine]
            )
    assert changed(head_before, snapshot(head)) == set()
    assert all(parameter.grad is None for parameter in [*layer.parameters(), *head.parameters()])


# Replay buffer


def fill(capacity, count, start=0, buffer=None):
    """A buffer; transition i is s = (i, -i), a = i / 1000, r = 2 i, s' = (i + ½, 0), d = 1 if i is odd."""
    buffer = buffer or sac.ReplayBuffer(capacity, 2, 1, torch.device("cpu"))
    for i in range(start, start + count):
        observation, next_observation = np.array([i, -i], np.float64), np.array([i + 0.5, 0], np.float32)
        action = np.array([i / 1000], np.float32)
        buffer.add(observation, action, 2.0 * i, next_observation, bool(i % 2))
        for array in (observation, action, next_observation):
            array[:] = np.nan  # an environment may use its arrays again
    return buffer


@pytest.mark.parametrize(("capacity", "count"), [(7, 3), (7, 7), (7, 8), (7, 19), (7, 21), (1, 4)])
def test_buffer_keeps_the_latest_transitions_whole(capacity, count):
    torch.manual_seed(0)
    batch = fill(capacity, count).sample(400)
    assert [tuple(field.shape) for field in batch] == [(400, 2), (400, 1), (400,), (400, 2), (400,)]
    assert {field.dtype for field in batch} == {torch.float32}
    seen = batch.observations[:, 0]
    assert set(seen.tolist()) == set(range(max(0, count - capacity), count))
    assert torch.equal(batch.observations[:, 1], -seen)
    torch.testing.assert_close(batch.actions[:, 0], seen / 1000)
    assert torch.equal(batch.rewards, 2 * seen)
    assert torch.equal(batch.next_observations[:, 0], seen + 0.5)
    assert torch.equal(batch.terminations, seen % 2)


@pytest.mark.parametrize("count", [30, 77])
def test_buffer_samples_uniformly(count):
    torch.manual_seed(0)
    buffer, stored = fill(50, count), min(50, count)
    drawn = torch.cat([buffer.sample(256).observations[:, 0] for _ in range(40)]).long()
    counts = np.bincount(drawn.numpy() - (count - stored), minlength=stored)
    assert len(counts) == stored
    assert stats.chisquare(counts).pvalue > RARE
    # Independent draws with replacement: as many in common with the next one as chance has it.
    repeats = int((drawn[1:] == drawn[:-1]).sum())
    assert stats.binomtest(repeats, len(drawn) - 1, 1 / stored).pvalue > RARE


@pytest.mark.parametrize("count", [0, 30, 50, 77])
def test_buffer_goes_on_from_a_file_as_if_never_saved(count):
    buffer, file = fill(50, count), io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = sac.ReplayBuffer(50, 2, 1, torch.device("cpu"))
    other.load_state_dict(torch.load(file, weights_only=True))
    batches = []
    for each in (buffer, other):
        fill(50, 9, start=count, buffer=each)
        torch.manual_seed(0)
        batches.append(each.sample(400))
    assert all(map(torch.equal, *batches))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_an_empty_buffer_touches_no_memory(restored):
    """300,000 of Humanoid's transitions are 0.9 GB, of which a few are used: in memory, and in a file."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sac.configure_torch(sac.Args())
    before, file = resident(), io.BytesIO()
    buffer = sac.ReplayBuffer(300_000, 376, 17, torch.device("cpu"))
    for _ in range(5):
        buffer.add(np.ones(376), np.ones(17), 1.0, np.ones(376), False)
    buffer.sample(256)
    torch.save(buffer.state_dict(), file)
    assert resident() - before < 50e6
    assert len(file.getvalue()) < 50e3


# Training: what reaches the buffer, what explores, and when updates come


class Diary(gym.Env):
    """A task that writes down where and when it is, so that a transition can be recognised anywhere.

    Observation: episode, step in it, second action in the task's own units, steps ever. Reward: the first
    action in the task's own units. Of three episodes, one terminates at its third step, one at its fifth, at
    which its time runs out too, and one runs out of time alone. All observations are in one array.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gym.spaces.Box(np.float32([0, -3]), np.float32([10, 1]))

    def __init__(self, render_mode=None):
        self.episode, self.ever, self.observation = -1, 0, np.zeros(4, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self.observe(0.0), {}

    def observe(self, action):
        self.observation[:] = self.episode, self.step_in_episode, action, self.ever
        return self.observation

    def step(self, action):
        self.step_in_episode, self.ever = self.step_in_episode + 1, self.ever + 1
        terminated = self.step_in_episode == {0: 3, 1: 5}.get(self.episode % 3)
        return self.observe(action[1]), float(action[0]), terminated, False, {}


gym.register("Diary-v0", Diary, max_episode_steps=5, disable_env_checker=True)
STEPS, STARTS, CAPACITY, TRAIN_FREQUENCY, GRADIENT_STEPS = 160, 21, 32, 3, 3


@pytest.fixture(scope="module")
def restored():
    """Puts back what training sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_flush_denormal(False)


def train_on_diary(script, run_dir, **changes):
    """A short run that never writes a row of losses but evaluates often; returns its notes.

    They hold the `buffer`; each `explored` observation, with what the policy's noise remembered before it and
    after it; and what each of the `updates` was given, and which networks it moved.
    """
    notes = SimpleNamespace(explored=[], updates=[])

    class Buffer(script.ReplayBuffer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            notes.buffer = self

    class Agent(script.Agent):
        def explore(self, observation):
            memory = getattr(self, "ou_state", torch.zeros(())).tolist()
            action = super().explore(observation)
            after = getattr(self, "ou_state", torch.zeros(())).tolist()
            notes.explored.append((observation.tolist(), memory, after))
            return action

        def update(self, batch, gradient_step):
            before = snapshot(self)
            metrics = super().update(batch, gradient_step)
            moved = changed(before, snapshot(self))
            notes.updates.append(SimpleNamespace(step=notes.buffer.added, batch=batch, moved=moved))
            return metrics

    args = {"total_timesteps": STEPS, "learning_starts": STARTS, "batch_size": 16, "hidden_dim": 8}
    args |= {"log_frequency": 10**6, "eval_frequency": 7, "eval_episodes": 1, "threads": 1}
    args |= {"buffer_size": CAPACITY, "compile": False, "cuda": False, "run_dir": str(run_dir)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "ReplayBuffer", Buffer)
        patch.setattr(script, "Agent", Agent)
        script.train(script.Args(env_id="Diary-v0", **args | changes))
    return notes


@pytest.fixture(scope="module")
def notes(restored, tmp_path_factory):
    """A run of TD3, as its updates are of three kinds."""
    phases = {"train_frequency": TRAIN_FREQUENCY, "gradient_steps": GRADIENT_STEPS}
    run_dir = tmp_path_factory.mktemp("runs") / "td3"
    return train_on_diary(td3, run_dir, **phases, policy_frequency=2, target_network_frequency=4)


def test_training_explores_and_learns_when_it_should(notes):
    """After --learning-starts steps; every --train-frequency steps, --gradient-steps updates."""
    assert [observation[3] for observation, *_ in notes.explored] == list(range(STARTS, STEPS))
    phases = [step for step in range(STARTS + 1, STEPS + 1) if step % TRAIN_FREQUENCY == 0]
    assert [update.step for update in notes.updates] == [
        step for step in phases for _ in range(GRADIENT_STEPS)
    ]


def test_training_delays_policy_and_targets_by_gradient_steps(notes):
    """Not by steps of the environment, of which a phase has as many; nor where only a log would see it."""
    for gradient_step, update in enumerate(notes.updates, start=1):
        moved = {"qf1", "qf2"}
        if gradient_step % 2 == 0:
            moved |= {"actor"}
        if gradient_step % 4 == 0:
            moved |= {"actor_target", "qf1_target", "qf2_target"}
        assert update.moved == moved


def test_training_stores_the_true_transitions(notes):
    """Through resets, evaluations, turns of the ring: true s', d only at terminations, a in [-1, 1]."""
    ends = []
    for update in notes.updates:
        for observation, action, reward, next_observation, termination in zip(*update.batch, strict=True):
            episode, step, _, ever = observation.tolist()
            # The task's units from the stored action, by E0.
            assert reward.item() == pytest.approx(5 + 5 * action[0].item(), abs=1e-5)
            second = -1 + 2 * action[1].item()
            assert next_observation.tolist() == pytest.approx([episode, step + 1, second, ever + 1], abs=1e-5)
            terminated = step + 1 == {0: 3, 1: 5}.get(episode % 3)
            assert termination.item() == terminated
            if terminated or step + 1 == 5:
                ends.append((step + 1, terminated))
            assert action.abs().max() <= 1
    assert min(ends.count(end) for end in [(3, True), (5, True), (5, False)]) > 50


def test_training_draws_fresh_minibatches_of_the_latest_transitions(notes):
    ages = [update.step - 1 - update.batch.observations[:, 3] for update in notes.updates]
    assert all(one.tolist() != other.tolist() for one, other in pairwise(ages))
    late = torch.cat([age for age, update in zip(ages, notes.updates, strict=True) if update.step > CAPACITY])
    assert set(late.tolist()) == set(range(CAPACITY))


def test_actions_are_uniform_until_learning_starts(restored, tmp_path):
    """(E0) Over the task's own bounds, and one independent of the next and of the other dimension."""
    changes = {"total_timesteps": 2000, "learning_starts": 2000, "buffer_size": 2000}
    notes = train_on_diary(ddpg, tmp_path / "run", **changes)
    assert not notes.explored
    stored = notes.buffer.transitions
    for values, low, high in ((stored.rewards, 0, 10), (stored.next_observations[:, 2], -3, 1)):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > RARE
        assert abs(stats.pearsonr(values[1:], values[:-1]).statistic) < 0.07  # three standard errors
    assert abs(stats.pearsonr(stored.rewards, stored.next_observations[:, 2]).statistic) < 0.07


def test_ornstein_uhlenbeck_noise_starts_afresh_with_each_episode_of_training(restored, tmp_path):
    """And with these alone: evaluations in the middle of an episode leave it as it is."""
    notes = train_on_diary(ddpg, tmp_path / "run", ou_noise=True)
    for (_, _, after), (observation, memory, _) in pairwise(notes.explored):
        assert any(after)
        assert memory == ([0, 0] if observation[1] == 0 else after)
