"""The ablations: two more scripts like the three, the grid of comparisons, and what is made of its results.

What holds for the three scripts holds for these two, so their tests are called on these too.
"""

import csv
import dataclasses
import importlib.util
import json
import math
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import test_equations
import test_shape
import test_update
import torch
import tyro
from conftest import ROOT, run
from test_equations import Noting, by_hand, critics, network, policy_by_hand, q_by_hand, squashed
from test_sweeps import interruptible, sweep, value  # noqa: F401, a fixture for all tests here
from test_update import ACTIONS, OBS, SIZE, SOFT_RATES, Net, Reference, SoftReference, make_agent, snapshot

import ddpg_continuous as ddpg
import sac_continuous as sac

FOLDER = ROOT / "benchmark" / "ablations"
NAMES = ["benchmark/ablations/sac_value_network", "benchmark/ablations/sac_deterministic"]
VARIABLES = ["BUDGET", "ENV_ID", "SEARCH_SEEDS", "TRIALS"]  # besides those of sweep.sh
COMPARISONS = ["deterministic", "mean-action", "reward-scale", "tau", "temperature", "value-network"]
COMPARISONS += ["tuned-ddpg", "exploration", "gradient-steps"]


def load(path: Path, name: str):
    """A Python file as a module that importlib.import_module finds by this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


v1, deterministic = (load(ROOT / f"{name}.py", name) for name in NAMES)
random_search, sampled_actions, plot_ablations = (
    load(FOLDER / f"{name}.py", name) for name in ("random_search", "sampled_actions", "plot_ablations")
)
SCRIPTS = {"value network": v1, "deterministic": deterministic}


@pytest.fixture(params=SCRIPTS)
def module(request):
    """Each of the two scripts in turn."""
    return SCRIPTS[request.param]


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """Fixed seeds; no variable of a sweep set; after a training in this process, what it set is as before."""
    torch.manual_seed(0)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)


# ======== The shape of the two scripts ========


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "check",
    [
        test_shape.test_sections_stand_in_order,
        test_shape.test_shared_parts_are_identical,
        test_shape.test_shared_parts_name_no_algorithm,
        test_shape.test_a_reader_may_stop_after_the_agent,
        test_shape.test_length,
        test_shape.test_inline_metadata_equals_requirements,
        test_shape.test_every_argument_is_read,
        test_shape.test_imports_are_few,
    ],
)
def test_shape_is_that_of_the_three(name, check):
    check(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_explained(name, capsys):
    test_shape.test_every_argument_is_explained(name, capsys)


@pytest.mark.parametrize("name", NAMES)
def test_diff_against_sac_is_the_ablation(name):
    test_shape.test_diff_is_the_algorithms_difference(("sac_continuous", name))


@pytest.mark.parametrize(
    ("name", "equations"),
    list(zip(NAMES, ["E1 E3 E8 E9 E11 E13 E14", "E1 E3 E5 E10 E11"], strict=True)),
)
def test_equations_of_the_pseudocode_are_cited_in_the_code(name, equations, monkeypatch):
    monkeypatch.setitem(test_shape.EQUATIONS, name, set(equations.split()))
    test_shape.test_equations_of_the_pseudocode_are_cited_in_the_code(name)


def test_policy_of_v1_is_that_of_v2():
    """Its tests of (E8) and (E9) hold for the same lines here."""
    parts = [
        "\n".join(test_shape.source(name).split("\n")[numbers.start : numbers.stop])
        for name in ("sac_continuous", NAMES[0])
        for title, numbers in test_shape.sections(name)
        if title == ("4. Networks", "this algorithm's own")
    ]
    assert parts[0].partition("class Actor")[2] == parts[1].partition("class Actor")[2] != ""


# ======== Equations ========


@pytest.mark.parametrize("size", [1, 9])
def test_e3_critic_loss(module, size):
    test_equations.test_e3_critic_loss(module, size)


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_e1_targets_move_by_tau(module, tau):
    test_equations.test_e1_targets_move_by_tau_towards_the_new_weights(module, tau)


def test_e1_hard_copy_every_so_many_gradient_steps(module):
    test_equations.test_e1_hard_copy_every_so_many_gradient_steps(module)


def test_e1_targets_start_equal(module):
    state = module.Agent(OBS, ACTIONS, module.Args(hidden_dim=8)).state_dict()
    targets = [name for name in state if "_target" in name]
    expected = {"vf_target"} if module is v1 else {"qf1_target", "qf2_target"}
    assert {name.split(".")[0] for name in targets} == expected
    for name in targets:
        assert torch.equal(state[name], state[name.replace("_target", "")])
    assert not torch.equal(state["qf1.hidden.0.weight"], state["qf2.hidden.0.weight"])


def value_network():
    """A float64 VNetwork that is far from linear."""
    module = v1.VNetwork(OBS, 8).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0)
    return module


def test_value_network_is_two_hidden_layers_of_rectified_units():
    vf, observations = value_network(), torch.randn(9, OBS, dtype=torch.float64)
    assert [tuple(weight.shape) for weight in vf.parameters()] == [(8, OBS), (8,), (8, 8), (8,), (1, 8), (1,)]
    values = vf(observations)
    assert values.shape == (9,)
    assert values.tolist() == pytest.approx([by_hand(vf, row)[0] for row in observations.tolist()], rel=1e-12)


def test_e14_target():
    batch, vf = test_equations.transitions(v1), value_network()
    target_q = v1.td_target(batch, vf, v1.Args(gamma=0.9))
    assert target_q.shape == (9,)
    assert not target_q.requires_grad
    for row, y in enumerate(target_q.tolist()):
        (next_value,) = by_hand(vf, batch.next_observations[row].tolist())
        assert y == pytest.approx(batch.rewards[row].item() + (0.9 * next_value if row % 3 else 0), rel=1e-12)


def test_e11_and_what_v_learns_from():
    batch, actor = test_equations.transitions(v1, 30), network(v1.Actor, gain=1.5)
    qf1, qf2 = critics(v1, batch)
    asked = Noting(qf1), Noting(qf2)
    loss, log_prob, soft_values = v1.actor_loss(batch.observations, actor, *asked, 0.7)
    assert loss.shape == ()
    assert log_prob.shape == soft_values.shape == (30,)
    assert loss.requires_grad
    assert not log_prob.requires_grad
    assert not soft_values.requires_grad
    assert asked[0].actions.requires_grad  # reparameterised
    actions = asked[0].actions.detach()
    assert torch.equal(actions, asked[1].actions)
    expected = squashed(*policy_by_hand(actor, batch.observations)).log_prob(actions).tolist()
    assert log_prob.tolist() == pytest.approx(expected, rel=1e-9)
    soft, smaller = [], set()
    for row, log_p in enumerate(expected):
        observation, action = batch.observations[row].tolist(), actions[row].tolist()
        values = [q_by_hand(qf1, observation, action), q_by_hand(qf2, observation, action)]
        smaller.add(values.index(min(values)))
        soft.append(min(values) - 0.7 * log_p)
    assert smaller == {0, 1}  # or the minimum would have gone untested
    assert soft_values.tolist() == pytest.approx(soft, rel=1e-9)
    assert loss.item() == pytest.approx(-sum(soft) / 30, rel=1e-9)


@pytest.mark.parametrize("size", [1, 9])
def test_e13_value_loss(size):
    vf, observations = value_network(), torch.randn(size, OBS, dtype=torch.float64)
    soft_values = torch.randn(size, dtype=torch.float64)
    loss, values = v1.value_loss(observations, vf, soft_values)
    assert loss.shape == ()
    assert values.shape == (size,)
    assert not values.requires_grad
    total = 0.0
    for row, observation in enumerate(observations.tolist()):
        (v,) = by_hand(vf, observation)
        assert values[row].item() == pytest.approx(v, rel=1e-12)
        total += 0.5 * (v - soft_values[row].item()) ** 2
    assert loss.item() == pytest.approx(total / size, rel=1e-12)


def test_deterministic_target():
    batch, actor = test_equations.transitions(deterministic, 30), network(deterministic.Actor)
    qf1, qf2 = critics(deterministic, batch)
    target_q = deterministic.td_target(batch, actor, qf1, qf2, deterministic.Args(gamma=0.9))
    assert target_q.shape == (30,)
    assert not target_q.requires_grad
    smaller = set()
    for row, y in enumerate(target_q.tolist()):
        observation = batch.next_observations[row].tolist()
        action = [math.tanh(x) for x in by_hand(actor, observation)]
        values = [q_by_hand(qf1, observation, action), q_by_hand(qf2, observation, action)]
        smaller.add(values.index(min(values)))
        assert y == pytest.approx(
            batch.rewards[row].item() + (0.9 * min(values) if row % 3 else 0), rel=1e-12
        )
    assert smaller == {0, 1}


def test_deterministic_actor_loss():
    batch, actor = test_equations.transitions(deterministic, 30), network(deterministic.Actor)
    qf1, qf2 = critics(deterministic, batch)
    loss = deterministic.actor_loss(batch.observations, actor, qf1, qf2)
    total, smaller = 0.0, set()
    for observation in batch.observations.tolist():
        action = [math.tanh(x) for x in by_hand(actor, observation)]
        values = [q_by_hand(qf1, observation, action), q_by_hand(qf2, observation, action)]
        smaller.add(values.index(min(values)))
        total += min(values)
    assert smaller == {0, 1}
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-total / 30, rel=1e-12)


def test_deterministic_losses_are_those_of_sac_without_noise_and_entropy():
    """SAC's actor with σ at its least, e⁻⁵, and α = 0, against a deterministic one with the same m(s)."""
    noisy, plain = network(sac.Actor, gain=1.0), network(deterministic.Actor)
    with torch.no_grad():
        noisy.net[-1].bias[ACTIONS:] = -50
        noisy.net[-1].weight[ACTIONS:] = 0
        for old, new in zip(noisy.net.parameters(), plain.net.parameters(), strict=True):
            new.copy_(old[: len(new)])
    batch = test_equations.transitions(sac)
    qf1, qf2 = network(sac.QNetwork, gain=1.0), network(sac.QNetwork, gain=1.0)
    ours = deterministic.td_target(batch, plain, qf1, qf2, deterministic.Args())
    theirs = sac.td_target(batch, noisy, qf1, qf2, torch.tensor(0.0), sac.Args())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    assert not torch.equal(ours, theirs)
    ours = deterministic.actor_loss(batch.observations, plain, qf1, qf2)
    theirs, _ = sac.actor_loss(batch.observations, noisy, qf1, qf2, torch.tensor(0.0))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "check",
    [
        test_equations.test_e5_gaussian_noise,
        test_equations.test_e5_noise_around_the_actor_at_this_observation,
        lambda module: test_equations.test_e5_noisy_actions_are_clipped(module, -1),
    ],
)
def test_e5_deterministic_exploration(check):
    check(deterministic)


def test_e8_v1_explores_by_sampling(monkeypatch):
    monkeypatch.setattr(test_equations, "sac", v1)
    test_equations.test_e8_explore_samples_the_policy()


# ======== Whole updates ========


class ValueReference(SoftReference):
    """SAC v1's updates in NumPy."""

    def __init__(self, agent, args):
        self.args, self.critics, self.draws = args, ["qf1", "qf2"], []
        self.nets = {"actor": Net(agent.actor, args.policy_lr), "vf_target": Net(agent.vf_target)}
        self.nets |= {name: Net(getattr(agent, name), args.q_lr) for name in ("qf1", "qf2", "vf")}

    @property
    def alpha(self):
        return self.args.alpha

    def next_value(self, batch, actions):
        return self.nets["vf_target"](batch.next_observations)[:, 0]

    def improve_actor(self, batch, actions):
        """Descends (E11), and (E13) with what the same ã was worth before."""
        log_prob, *_ = self.policy(batch.observations, actions)
        values = [self.q_value(name, batch.observations, actions) for name in self.critics]
        soft_values = np.minimum(*values) - self.alpha * log_prob
        metrics = super().improve_actor(batch, actions)
        del metrics["alpha"]
        values = self.nets["vf"](batch.observations)[:, 0]
        self.nets["vf"].descend(self.nets["vf"].gradients((values - soft_values)[:, None] / SIZE)[0])
        error = np.square(values - soft_values).mean() / 2
        return metrics | {"vf_values": values.mean(), "vf_loss": error}


class DeterministicReference(Reference):
    """Deterministic SAC's updates in NumPy."""

    def learning_rates(self):
        return self.args.policy_lr, self.args.q_lr

    def next_value(self, batch, actions):
        means = np.tanh(self.nets["actor"](batch.next_observations))
        np.testing.assert_allclose(actions, means, rtol=1e-9, atol=1e-12)
        return np.minimum(
            *(self.q_value(f"{q}_target", batch.next_observations, means) for q in self.critics)
        )

    def improve_actor(self, batch, actions):
        means = np.tanh(self.nets["actor"](batch.observations))
        np.testing.assert_allclose(actions, means, rtol=1e-9, atol=1e-12)
        values, slopes = [], []
        for name in self.critics:
            values.append(self.q_value(name, batch.observations, means))
            slopes.append(self.nets[name].gradients(np.full((SIZE, 1), -1 / SIZE))[1][:, OBS:])
        slope = np.where((values[0] < values[1])[:, None], *slopes)
        self.nets["actor"].descend(self.nets["actor"].gradients(slope * (1 - means**2))[0])
        return {"actor_loss": -np.minimum(*values).mean()}


def note_actions(agent):
    """A dict that will hold the actions about which Q1' (where there is one) and Q1 were last asked."""
    asked = {"qf1_target": None}
    for name, critic in agent.named_children():
        if name in ("qf1", "qf1_target"):

            def hook(critic, inputs, output, name=name):
                asked[name] = inputs[1].detach().numpy().copy()

            critic.register_forward_hook(hook)
    return asked


@pytest.mark.parametrize("frequency", [1, 3])
def test_updates_equal_the_reference(module, frequency):
    """Every weight, every gradient that a step used, and every metric, through seven consecutive updates."""
    rates = SOFT_RATES | {"target_network_frequency": frequency}
    agent = make_agent(module, **rates | ({"alpha": 0.4} if module is v1 else {}))
    args = SimpleNamespace(**vars(agent.args), autotune=False)
    reference = (ValueReference if module is v1 else DeterministicReference)(agent, args)
    asked = note_actions(agent)
    for gradient_step in range(1, 8):
        batch = test_update.transitions(module, seed=gradient_step)
        metrics = agent.update(batch, gradient_step)
        expected = reference.update(batch, gradient_step, asked)
        for name, net in reference.nets.items():
            parameters = list(getattr(agent, name).parameters())
            for parameter, weight in zip(parameters, net.weights, strict=True):
                np.testing.assert_allclose(parameter.detach(), weight, rtol=1e-7, atol=1e-9, err_msg=name)
            if net.steps:
                for parameter, gradient in zip(parameters, net.last_gradients, strict=True):
                    np.testing.assert_allclose(parameter.grad, gradient, rtol=1e-7, atol=1e-9, err_msg=name)
            else:
                assert all(parameter.grad is None for parameter in parameters)
        assert metrics.keys() == expected.keys()
        for name, metric in metrics.items():
            assert metric.shape == ()
            assert not metric.requires_grad
            assert metric.item() == pytest.approx(expected[name], rel=1e-8, abs=1e-10), name
    if module is v1:
        draws = np.concatenate(reference.draws).reshape(-1)
        assert abs(draws.mean()) < 4 / math.sqrt(draws.size / 2)  # each was noted twice
        assert 0.7 < draws.std() < 1.3


@pytest.mark.parametrize(
    "check",
    [
        test_update.test_updates_leave_no_graph_behind,
        test_update.test_actor_loss_leaves_the_critics_alone,
        test_update.test_every_learning_parameter_has_one_optimizer,
    ],
)
def test_gradients_land_where_they_should(module, check, monkeypatch):
    check(module, monkeypatch) if "monkeypatch" in check.__code__.co_varnames else check(module)


def test_targets_change_by_e1_alone(module):
    """With no update of targets due, none of them moves, or has a gradient, or asks for one."""
    agent = make_agent(module, **SOFT_RATES, target_network_frequency=10**9)
    before = snapshot(agent)
    for gradient_step in range(1, 7):
        agent.update(test_update.transitions(module, seed=gradient_step), gradient_step)
    online = {"actor", "qf1", "qf2"} | ({"vf"} if module is v1 else set())
    assert test_update.changed(before, snapshot(agent)) == online
    for name, parameter in agent.named_parameters():
        assert parameter.requires_grad == ("_target" not in name)
        assert (parameter.grad is None) == ("_target" in name)


def test_no_gradient_through_y_nor_through_what_v_learns_from(module):
    """Not even into targets that ask for gradients."""
    agent, batch = make_agent(module), test_update.transitions(module)
    for parameter in agent.parameters():
        parameter.requires_grad_(True)
    if module is v1:
        target_q = v1.td_target(batch, agent.vf_target, agent.args)
    else:
        target_q = deterministic.td_target(batch, agent.actor, agent.qf1_target, agent.qf2_target, agent.args)
    module.critic_loss(batch, agent.qf1, target_q)[0].backward()
    assert {name.split(".")[0] for name, value in agent.named_parameters() if value.grad is not None} == {
        "qf1"
    }
    if module is v1:
        agent.zero_grad()
        _, _, soft_values = v1.actor_loss(batch.observations, agent.actor, agent.qf1, agent.qf2, 0.2)
        v1.value_loss(batch.observations, agent.vf, soft_values)[0].backward()
        touched = {name.split(".")[0] for name, value in agent.named_parameters() if value.grad is not None}
        assert touched == {"vf"}


# ======== Runs ========

TINY = (
    "--env-id Pendulum-v1 --learning-starts 50 --hidden-dim 8 --batch-size 8 --buffer-size 1000 --threads 1"
)
TINY += " --log-frequency 20 --eval-frequency 60 --eval-episodes 1 --no-cuda"
TINY = TINY.split()
RECORDS = ["episodes.csv", "evaluations.csv", "losses.csv"]


@pytest.mark.parametrize("name", NAMES)
def test_run_from_the_command_line_and_resume(name, tmp_path):
    """Past learning_starts, logging and evaluation; resumed from the command line it is the run in one go."""
    module = sys.modules[name]
    for steps, folder in ((240, "one"), (130, "two")):
        words = [*TINY, "--total-timesteps", str(steps), "--run-dir", str(tmp_path / folder)]
        module.train(tyro.cli(module.Args, args=words))
    done = run(name, *TINY, "--total-timesteps", 240, "--run-dir", tmp_path / "two", "--resume")
    assert done.returncode == 0, done.stderr
    assert "240 of 240 steps are done" in done.stdout
    for file in RECORDS:
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    losses = pd.read_csv(tmp_path / "two" / "losses.csv").set_index("global_step")
    assert list(losses.index) == list(range(60, 241, 20))
    own = ["entropy", "std", "vf_values", "vf_loss", "v_gradient_norm"] if module is v1 else []
    metrics = ["target_q", "qf1_values", "qf1_loss", "qf2_values", "qf2_loss", "actor_loss", *own]
    metrics += ["actor_gradient_norm", "q_gradient_norm", "buffer_size"]
    assert sorted(losses) == sorted(metrics)
    assert np.isfinite(losses.to_numpy()).all()
    assert len(pd.read_csv(tmp_path / "two" / "evaluations.csv")) == 4
    assert json.loads((tmp_path / "two" / "args.json").read_text())["args"]["exp_name"] == Path(name).name


def test_sampled_actions_leave_training_as_it_is(tmp_path):
    """Whatever is evaluated with samples in between, and however often it is started."""
    words = [*TINY, "--total-timesteps", "240", "--run-dir"]
    sac.train(tyro.cli(sac.Args, args=[*words, str(tmp_path / "alone")]))
    args = tyro.cli(sac.Args, args=[*words, str(tmp_path / "sampled")])
    sampled_actions.main(dataclasses.replace(args, total_timesteps=120))
    sampled_actions.main(args)
    before = (tmp_path / "sampled" / "sampled.csv").read_bytes()
    sampled_actions.main(args)
    assert (tmp_path / "sampled" / "sampled.csv").read_bytes() == before
    for file in RECORDS:
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "sampled" / file).read_bytes()
    sampled = pd.read_csv(tmp_path / "sampled" / "sampled.csv")
    means = pd.read_csv(tmp_path / "sampled" / "evaluations.csv")
    assert list(sampled["global_step"]) == list(means["global_step"]) == [60, 120, 180, 240]
    assert (sampled["episodic_return"] != means["episodic_return"]).all()


def test_sampled_returns_are_those_of_samples_from_the_same_starts(tmp_path):
    args = tyro.cli(sac.Args, args=[*TINY, "--total-timesteps", "60", "--run-dir", str(tmp_path)])
    sac.train(args)
    args.eval_episodes = 2
    returns = sampled_actions.evaluate_samples(tmp_path, args)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    agent = sac.Agent(*saved["dimensions"], args)
    agent.load_state_dict(saved["agent"])
    torch.manual_seed(args.seed)
    env = sac.make_env("Pendulum-v1")
    for episode, expected in enumerate(returns):
        observation, _ = env.reset(seed=20_000 + episode)
        total = 0.0
        for _ in range(200):
            with torch.no_grad():
                action, _ = agent.actor.sample(torch.as_tensor(observation, dtype=torch.float32))
            observation, reward, *_ = env.step(action.numpy())
            total += float(reward)
        assert total == pytest.approx(expected, rel=1e-6)


# ======== The grid ========


def grid(*arguments, **variables):
    """What ablations.sh prints, in words."""
    status, output = sweep(ROOT / "benchmark" / "ablations.sh", *arguments, **variables)
    assert status == 0, output
    return [shlex.split(line) for line in output.splitlines()]


def arguments_of(command):
    """The Args that a printed command trains with, by its script's own command line."""
    assert command[0] == sys.executable
    assert (ROOT / command[1]).exists()
    module, flags = sys.modules.get(command[1].removesuffix(".py")), command[2:]
    if command[1].endswith("_continuous.py"):
        module = sys.modules[Path(command[1]).stem]
    elif command[1].endswith("sampled_actions.py"):
        module = sac
    elif command[1].endswith("random_search.py"):
        assert command[2] == "best"
        module, flags = ddpg, command[4:]
    return tyro.cli(module.Args, args=flags)


def test_grid_of_all_comparisons():
    """Every command is accepted by its script, no folder is used twice, and each variant has its settings."""
    commands = grid()
    assert commands == grid("print") == grid("print", *COMPARISONS) == grid(*map(str, range(2, 11)))
    found, prefix = {}, "benchmark/ablations/results/"
    for command in commands:
        args = arguments_of(command)
        assert args.run_dir.startswith(prefix)
        assert args.run_dir not in found
        assert args.run_dir.endswith(f"/seed{args.seed}")
        assert (args.env_id, args.total_timesteps) == ("Pendulum-v1", 6000)
        assert (args.resume, args.cuda) == (True, False)
        assert args.learning_starts + 2 * args.log_frequency < args.total_timesteps
        found[args.run_dir] = args
    variants = {}
    for place, args in found.items():
        variants.setdefault(str(Path(place.removeprefix(prefix)).parent), []).append(args)
    trials = {name: members for name, members in variants.items() if name.startswith("tuned-ddpg/trials/")}
    assert len(trials) == 8
    for name, members in variants.items():
        seeds = [101, 102] if name in trials else [1, 2, 3]
        assert [args.seed for args in members] == seeds
        settings = [dataclasses.replace(args, seed=0, run_dir="") for args in members]
        assert all(other == settings[0] for other in settings)
    drawn = {
        place for comparison in plot_ablations.COMPARISONS.values() for place in comparison.variants.values()
    }
    assert {place.partition(":")[0] for place in drawn} == variants.keys() - trials.keys()
    one = {name: members[0] for name, members in variants.items()}
    for scale in ("0.01", "1", "3", "10", "30", "100"):
        args = one[f"reward-scale/{scale}"]
        assert not args.autotune
        assert float(scale) * args.alpha == pytest.approx(1, rel=1e-3)
    taus = {
        name[4:]: (a.tau, a.target_network_frequency) for name, a in one.items() if name.startswith("tau/")
    }
    assert taus.pop("hard") == (1, 200)
    assert taus == {name: (float(name), 1) for name in ("0.0001", "0.001", "0.01", "0.1")}
    assert one["shared/sac"].tau == 0.005
    assert one["exploration/ornstein-uhlenbeck"].ou_noise
    uniform = one["exploration/epsilon-uniform"]
    assert (uniform.exploration_noise, uniform.random_action_prob) == (0, 0.2)
    assert [one[f"gradient-steps/{n}"].gradient_steps for n in (2, 4)] == [2, 4]
    assert one["value-network/v1"].alpha == one["shared/sac-fixed"].alpha == 0.2
    assert one["shared/sac"].autotune > one["shared/sac-fixed"].autotune


def test_variables_and_further_flags_shape_the_grid(tmp_path):
    commands = grid("exploration", "5", "--eval-episodes", "3", BUDGET="paper", SEEDS="7 8", RESULTS=tmp_path)
    assert len(commands) == 2 * (3 + 6)
    for command in commands:
        args = arguments_of(command)
        assert (args.env_id, args.total_timesteps, args.hidden_dim) == ("Hopper-v4", 1_000_000, 256)
        assert (args.eval_episodes, args.seed in (7, 8)) == (3, True)
        assert args.run_dir.startswith(f"{tmp_path}/")
    paper = grid("deterministic", BUDGET="paper")
    assert [value(command, "--seed") for command in paper] == [
        str(seed) for seed in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    ]
    assert value(paper[0], "--run-dir") == "benchmark/ablations/results_paper/shared/sac/seed1"
    (command,) = grid("3", SEEDS=4, ENV_ID="Ant-v5", TOTAL_TIMESTEPS=2000, PYTHON="python3", GPU=1)
    assert command[0] == "python3"
    assert "--cuda" in command
    assert [value(command, flag) for flag in ("--env-id", "--total-timesteps")] == ["Ant-v5", "2000"]


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        (["1"], {}, "benchmark/all.sh"),
        (["11"], {}, "no comparison 11"),
        (["run", "taus"], {}, "no comparison taus"),
        (["tau", "--seed", "3"], {}, "--seed is the sweep's own"),
        (["tau"], {"BUDGET": "large"}, "BUDGET=large"),
        (["tau"], {"TOTAL_TIMESTEPS": "1e6"}, "TOTAL_TIMESTEPS=1e6"),
        (["tau"], {"PYTHON": "no-such-python"}, "no-such-python"),
    ],
)
def test_refusals(arguments, variables, reason):
    status, output = sweep(ROOT / "benchmark" / "ablations.sh", *arguments, **variables)
    assert status == 2
    assert reason in output
    assert len(output.splitlines()) == 1


STAND_IN = """
import json, sys
from pathlib import Path


def value(flag, default=None):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default


folder, steps = Path(value("--run-dir")), int(value("--total-timesteps"))
with open(folder / "starts", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
(folder / "args.json").write_text(json.dumps({"args": {"total_timesteps": steps}}, indent=2))
score = -abs(float(value("--learning-rate", 0)) - 0.00158) - int(value("--seed")) / 1e9
text = "".join(f"{step},{score}\\n" for step in (500, steps))
(folder / "evaluations.csv").write_text("global_step,episodic_return\\n" + text)
(folder / "timing.csv").write_text(f"global_step,SPS\\n{steps},1.0\\n")
"""


def test_random_search_tunes_and_trains_with_fresh_seeds(tmp_path):
    """The best trial's flags go to the final runs, which follow all trials; a second sweep repeats none."""
    root = tmp_path / "a project"
    (root / "benchmark" / "ablations").mkdir(parents=True)
    for name in ("sweep.sh", "ablations.sh", "ablations/random_search.py"):
        shutil.copy(ROOT / "benchmark" / name, root / "benchmark" / name)
    for name in ("ddpg", "sac"):
        (root / f"{name}_continuous.py").write_text(STAND_IN)
    script, results = root / "benchmark" / "ablations.sh", root / "benchmark" / "ablations" / "results"
    variables = {"SEEDS": "1 2", "TRIALS": 6, "JOBS": 4, "cwd": root}
    status, output = sweep(script, "run", "tuned-ddpg", **variables)
    assert status == 0, output
    assert "16 of 16 cells are done" in output
    assert "2 of 2 cells are done" in output
    with open(results / "tuned-ddpg" / "trials" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{flag: row[flag] for flag in row if flag.startswith("--")} for row in rows] == list(
        random_search.draw(6).values()
    )
    best = max(rows, key=lambda row: float(row["mean"]))
    assert best["--learning-rate"] == "0.00158"  # which the stand-in thinks best
    assert float(best["mean"]) == pytest.approx((float(best["seed101"]) + float(best["seed102"])) / 2)
    for seed in (1, 2):
        (started,) = (results / "tuned-ddpg" / "tuned" / f"seed{seed}" / "starts").read_text().splitlines()
        words = started.split()
        assert all(value(words, flag) == best[flag] for flag in best if flag.startswith("--"))
        assert value(words, "--seed") == str(seed)
    status, output = sweep(script, "run", "tuned-ddpg", **variables)
    assert status == 0, output
    assert all(len(path.read_text().splitlines()) == 1 for path in results.rglob("starts"))
    status, output = sweep(script, "run", "tuned-ddpg", TOTAL_TIMESTEPS=7000, **variables)
    assert status == 2
    assert "ended at step 6000 and has no checkpoint" in output


def test_trials_are_the_same_however_many():
    eight = random_search.draw(8)
    assert eight == random_search.draw(8)
    assert list(random_search.draw(20).items())[:8] == list(eight.items())
    assert len({tuple(flags.values()) for flags in random_search.draw(20).values()}) == 20


# ======== Figures and tables ========


def record(folder: Path, seed: int, returns: list[float], **changes):
    """A run's files, as a script leaves them."""
    args = dataclasses.asdict(
        sac.Args(env_id="Pendulum-v1", seed=seed, total_timesteps=8000, eval_frequency=1000)
    )
    args |= {"learning_starts": 1000, "exp_name": "sac_continuous"} | changes
    folder.mkdir(parents=True)
    other = {"versions": {"torch": "2"}, "device": "CPU", "git_commit": "abc"}
    (folder / "args.json").write_text(json.dumps({"args": args} | other))
    steps = [1000 * (place + 1) for place in range(len(returns))]
    tables = {
        "evaluations.csv": {"episodic_return": returns},
        "sampled.csv": {"episodic_return": [value - 1 for value in returns]},
        "episodes.csv": {"episodic_return": returns},
        "losses.csv": {"entropy": returns, "qf1_values": returns},
        "timing.csv": {"elapsed": [60.0 * step / 1000 for step in steps]},
    }
    for name, columns in tables.items():
        pd.DataFrame({"global_step": steps} | columns).to_csv(folder / name, index=False)


def test_plot_scores_runs_and_fills_the_readme(tmp_path, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    for seed, last in ((1, 10.0), (2, 30.0)):
        record(results / "shared" / "sac" / f"seed{seed}", seed, [-100, 0, 0, 0, 0, 0, last, last + 2])
    record(results / "mean-action" / "sac" / "seed1", 1, [-100, 0, 0, 0, 0, 0, 5, 7])
    readme.write_text(
        "Before\n<!-- results tau -->\nold\n<!-- end -->\n<!-- results cost -->\n<!-- end -->\nAfter\n"
    )
    texts = plot_ablations.main(plot_ablations.Args(results, tmp_path / "figures", readme=readme))
    assert "no finished runs of deterministic SAC" in capsys.readouterr().err
    lines = texts["deterministic"].splitlines()
    assert lines[2:] == ["| SAC | 2 | 21.0 ± 14.1 | 11.0 | 31.0 | 6.0 ± 4.0 |"]
    assert texts["mean-action"].splitlines()[3].startswith("| sampled actions | 1 | 5.0 ± – |")
    assert "3 runs, 24,000 environment steps, 24 minutes" in texts["cost"]
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"Before\n<!-- results tau -->\n\n{texts['tau']}\n<!-- end -->\n")
    assert text.endswith("<!-- end -->\nAfter\n")
    final = pd.read_csv(tmp_path / "figures" / "final.csv").set_index(["comparison", "variant", "seed"])
    assert final.loc[("tau", "τ = 0.005", 2), "final"] == 31
    again = plot_ablations.Args(results, tmp_path / "two", only=("tau", "temperature"), readme=None)
    assert plot_ablations.main(again) == {name: texts[name] for name in ("tau", "temperature", "cost")}
    for name in ("deterministic", "mean-action", "tau", "temperature", "tuned-ddpg"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_plot_refuses_runs_of_different_lengths(tmp_path):
    record(tmp_path / "shared" / "sac" / "seed1", 1, [0.0] * 8)
    record(tmp_path / "gradient-steps" / "2" / "seed1", 1, [0.0] * 4, total_timesteps=4000)
    with pytest.raises(plot_ablations.plot.Refusal, match="cannot be compared"):
        plot_ablations.main(plot_ablations.Args(tmp_path, tmp_path / "figures", readme=None))
