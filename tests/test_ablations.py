"""benchmark/ablations: the variants' updates against references, their runs, the experiments' commands."""

import copy
import dataclasses
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
import tyro
from conftest import ROOT
from torch.distributions import Normal, TanhTransform

import ddpg_continuous as ddpg
import sac_continuous as sac
import td3_continuous as td3

sys.path.insert(0, str(ROOT / "benchmark" / "ablations"))
import sac_deterministic as deterministic
import sac_state_independent_std as state_independent
import sac_value_network as value_network

VARIANTS = [value_network, deterministic, state_independent]
OBS, ACTIONS, SIZE = 4, 3, 40  # dimensions of an observation and of an action; transitions in a minibatch


def plug_in(variant, monkeypatch):
    """Puts a variant's classes into sac_continuous.py, as its command line does."""
    for name in {"Args", "Actor", "Agent"} & vars(variant).keys():
        monkeypatch.setattr(sac, name, getattr(variant, name))


def make_agent(**changes):
    """A float64 agent of small, clearly non-linear networks, whose targets are away from them."""
    torch.manual_seed(0)
    agent = sac.Agent(OBS, ACTIONS, sac.Args(hidden_dim=8, cuda=False, **changes)).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(3).add_(0.3 * torch.randn_like(parameter))
    return agent


def random_batch():
    """Transitions of noise, of which some terminate."""
    normal = torch.randn(SIZE, 2 * OBS + 1, dtype=torch.float64)
    actions = 2 * torch.rand(SIZE, ACTIONS, dtype=torch.float64) - 1
    terminations = (torch.arange(SIZE) % 3 == 0).double()
    return sac.Batch(normal[:, :OBS], actions, normal[:, -1], normal[:, OBS:-1], terminations)


class Reference:
    """A variant's update written from its formulas, on copies of an agent's networks."""

    def __init__(self, variant, agent):
        self.variant, self.args, self.smaller = variant, agent.args, set()
        self.nets = SimpleNamespace(**copy.deepcopy(dict(agent.named_children())))
        self.log_alpha = copy.deepcopy(getattr(agent, "log_alpha", None))
        critics, rate = [*self.nets.qf1.parameters(), *self.nets.qf2.parameters()], agent.args.q_lr
        self.actor_optimizer = torch.optim.Adam(self.nets.actor.parameters(), lr=agent.args.policy_lr)
        self.q_optimizer = torch.optim.Adam(critics, lr=rate)
        if variant is value_network:
            self.v_optimizer = torch.optim.Adam(self.nets.vf.parameters(), lr=rate)
        if variant is state_independent:
            self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=rate)

    def policy(self, observations):
        """An action and its log-probability, 0 if the policy is deterministic."""
        out, actor = self.nets.actor.net(observations), self.nets.actor
        if self.variant is deterministic:
            return torch.tanh(out), torch.zeros(SIZE)
        mean, pre = (out, actor.raw_log_std) if self.variant is state_independent else out.chunk(2, dim=1)
        std = torch.exp(3.5 * torch.tanh(pre) - 1.5).expand_as(mean)
        u = mean + std * torch.randn(SIZE, ACTIONS, dtype=torch.float64)
        log_slope = TanhTransform().log_abs_det_jacobian(u, torch.tanh(u))
        return torch.tanh(u), (Normal(mean, std).log_prob(u) - log_slope).sum(1)

    def smaller_q(self, observations, actions, suffix=""):
        values = [getattr(self.nets, q + suffix)(observations, actions) for q in ("qf1", "qf2")]
        self.smaller |= set((values[0] < values[1]).tolist())
        return torch.minimum(*values)

    def descend(self, loss, optimizer):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update(self, batch, gradient_step):
        """One update of everything; returns metrics."""
        nets, (s, a, r, s2, d) = self.nets, batch
        alpha = self.args.alpha if self.log_alpha is None else self.log_alpha.exp().item()
        with torch.no_grad():
            if self.variant is value_network:
                next_value = nets.vf_target(s2).reshape(SIZE)
            else:
                next_actions, next_log_prob = self.policy(s2)
                next_value = self.smaller_q(s2, next_actions, "_target") - alpha * next_log_prob
            y = torch.where(d == 1, r, r + self.args.gamma * next_value)
        losses = [((qf(s, a) - y) ** 2).mean() for qf in (nets.qf1, nets.qf2)]
        self.descend(sum(losses), self.q_optimizer)

        actions, log_prob = self.policy(s)
        soft_values = self.smaller_q(s, actions) - alpha * log_prob
        metrics = {"target_q": y.mean(), "qf1_loss": losses[0], "actor_loss": -soft_values.mean()}
        self.descend(metrics["actor_loss"], self.actor_optimizer)
        if self.variant is not deterministic:
            metrics["entropy"] = -log_prob.mean()
        if self.variant is state_independent:
            self.descend(-(self.log_alpha * (log_prob.detach() - ACTIONS)).mean(), self.alpha_optimizer)
        if self.variant is value_network:
            metrics["vf_loss"] = ((nets.vf(s).reshape(SIZE) - soft_values.detach()) ** 2).mean() / 2
            self.descend(metrics["vf_loss"], self.v_optimizer)

        if gradient_step % self.args.target_network_frequency == 0:
            for name in {"vf_target", "qf1_target", "qf2_target"} & vars(nets).keys():
                online = getattr(nets, name.removesuffix("_target"))
                for old, new in zip(getattr(nets, name).parameters(), online.parameters(), strict=True):
                    old.data = (1 - self.args.tau) * old.data + self.args.tau * new.data
        return metrics


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda module: module.__name__)
def test_updates_equal_the_reference(variant, monkeypatch):
    """(E13), (E14) and what a variant shares with SAC: every weight through three updates, and the losses."""
    plug_in(variant, monkeypatch)
    agent = make_agent(policy_lr=0.01, q_lr=0.02, tau=0.1, gamma=0.9, target_network_frequency=2)
    reference, start = Reference(variant, agent), copy.deepcopy(agent.state_dict())
    for gradient_step in (1, 2, 3):
        batch = random_batch()
        torch.manual_seed(gradient_step)
        metrics = agent.update(batch, gradient_step)
        torch.manual_seed(gradient_step)
        for name, value in reference.update(batch, gradient_step).items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-8, atol=1e-10, msg=name)
        expected = {
            f"{name}.{key}": value
            for name, module in vars(reference.nets).items()
            for key, value in module.state_dict().items()
        }
        if variant is state_independent:
            expected["log_alpha"] = reference.log_alpha.detach()
            assert expected["actor.raw_log_std"].shape == (ACTIONS,)
        learned = {name: value for name, value in agent.state_dict().items() if name in expected}
        torch.testing.assert_close(learned, expected, rtol=1e-8, atol=1e-10)
    assert reference.smaller == {True, False}  # or the minimum would have gone untested
    unchanged = {name for name, value in agent.state_dict().items() if torch.equal(value, start[name])}
    assert unchanged == ({"log_alpha"} if variant is deterministic else set())


def test_deterministic_exploration():
    """(E5) clip(μ(s) + N, -1, 1), with N independent in every dimension and fresh in every step."""
    torch.manual_seed(0)
    agent = deterministic.Agent(OBS, ACTIONS, deterministic.Args(cuda=False, exploration_noise=0.3))
    agent.actor = deterministic.Actor(OBS, ACTIONS, 8)
    agent.actor.net[-1].bias.data = torch.tensor([0.0, 0.2, 9.0])
    observation = torch.zeros(OBS).numpy()
    mean = agent.act(observation)
    assert (agent.act(observation) == mean).all()
    actions = torch.tensor([agent.explore(observation).tolist() for _ in range(2000)])
    noise = (actions - torch.from_numpy(mean))[:, :2]
    assert noise.mean(0).abs().max() < 0.03
    assert (noise.std(0) - 0.3).abs().max() < 0.02
    assert noise.T.corrcoef()[0, 1].abs() < 0.1
    assert (actions[:, 2] == 1).double().mean() == pytest.approx(0.5, abs=0.05)  # half is clipped at μ = 1


@pytest.mark.parametrize("module", [value_network, deterministic])
@pytest.mark.parametrize("flags", ["--no-autotune", "--target-entropy -1"])
def test_flags_that_would_do_nothing_are_refused(module, flags):
    with pytest.raises(SystemExit):
        tyro.cli(module.Args, args=flags.split(), console_outputs=False)


# ======== Runs ========
TINY = "--env-id Pendulum-v1 --learning-starts 50 --hidden-dim 8 --batch-size 8 --buffer-size 1000 --no-cuda"
TINY += " --log-frequency 20 --eval-frequency 60 --eval-episodes 1 --no-compile --threads 1"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda module: module.__name__)
def test_command_line_runs_and_resumes(variant, monkeypatch, tmp_path):
    """A run that is stopped at step 120 and resumed gives the bytes of one in one go; its policy loads."""
    for steps, folder in ((200, "one"), (120, "two"), (200, "two")):
        words = f"{TINY} --total-timesteps {steps} --run-dir {tmp_path / folder} --resume"
        with monkeypatch.context() as patch:
            plug_in(sac, patch)  # so that what the command line replaces is put back
            patch.setattr(sys, "argv", [variant.__file__, *words.split()])
            runpy.run_path(variant.__file__, run_name="__main__")
            agent = sac.load_policy(tmp_path / folder)
    plug_in(variant, monkeypatch)
    expected = sac.Agent(3, 1, agent.args).state_dict()
    shapes = {name: value.shape for name, value in agent.state_dict().items()}
    assert shapes == {name: value.shape for name, value in expected.items()}
    assert agent.args.exp_name == variant.__name__
    assert abs(agent.act(torch.zeros(3).numpy())) <= 1
    for name in ("episodes.csv", "evaluations.csv", "losses.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len((tmp_path / "two" / "losses.csv").read_text().splitlines()) == 1 + 8


@pytest.mark.parametrize("scale", [0.01, 1, 100])
def test_scaled_pendulum(scale):
    """Pendulum's episodes, with rewards times the scale."""
    envs = gym.make(f"benchmark.ablations.scaled_pendulum:ScaledPendulum{scale}-v0"), gym.make("Pendulum-v1")
    (start, _), (expected_start, _) = (env.reset(seed=3) for env in envs)
    assert (start == expected_start).all()
    for step in range(1, 201):
        (one, reward, _, truncated, _), (other, unscaled, *_) = (env.step([0.5]) for env in envs)
        assert (one == other).all()
        assert reward == pytest.approx(scale * unscaled)
        assert truncated == (step == 200)


# ======== Experiments ========
SCRIPT = ROOT / "benchmark" / "ablations.sh"


def ablations(*arguments, script=SCRIPT, **variables):
    """What ablations.sh prints, in words; and its exit status and standard error."""
    environment = {"PATH": os.environ["PATH"]} | variables
    command = [str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return [shlex.split(line) for line in done.stdout.splitlines()], done.returncode, done.stderr


def test_commands_of_every_experiment():
    """Each is accepted by its script; the seeds of a curve share its settings, and no two curves do."""
    modules = {f"{module.__name__}.py": module for module in (ddpg, td3, sac)}
    modules |= {f"benchmark/ablations/{module.__name__}.py": module for module in VARIANTS}
    run_dirs, ((*names,), *_) = [], ablations()[0]
    assert len(names) == 8
    for name in names:
        settings, seeds = {}, {}
        for command in ablations(name)[0]:
            _, path, *words = command
            args = tyro.cli(modules[path].Args, args=words)
            assert 3 * args.learning_starts <= args.total_timesteps
            assert (args.resume, args.threads, args.cuda) == (True, 1, False)
            curve, run_dir = (args.env_id, args.exp_name), args.run_dir
            setting = path, dataclasses.replace(args, seed=0, run_dir="", exp_name="")
            assert settings.setdefault(curve, setting) == setting
            seeds.setdefault(curve, []).append(args.seed)
            run_dirs.append(run_dir)
        assert all(numbers in ([1, 2, 3], [1, 2, 3, 4, 5]) for numbers in seeds.values())
        curves = list(settings.values())
        assert len(curves) > 1
        assert all(one != other for place, one in enumerate(curves) for other in curves[:place])
    assert len(set(run_dirs)) == len(run_dirs)


def test_variables_flags_and_refusals_of_experiments(tmp_path):
    commands, *_ = ablations(
        "state_independent_std", "--gamma", "0.9", SEEDS="7 8", RESULTS="out", PYTHON="python3"
    )
    assert len(commands) == 4
    assert all(command[0] == "python3" and command[-2:] == ["--gamma", "0.9"] for command in commands)
    assert commands[0][commands[0].index("--run-dir") + 1].startswith(
        "out/state_independent_std/sac_continuous/"
    )
    for words in (["target"], ["targets", "--seed=3"]):
        printed, status, error = ablations(*words)
        assert (printed, status, len(error.splitlines())) == ([], 2, 1)
    # `run` hands the same lines to run_commands.sh.
    (tmp_path / "benchmark").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "benchmark")
    (tmp_path / "benchmark" / "run_commands.sh").write_text("#!/bin/sh\ncat\n")
    (tmp_path / "benchmark" / "run_commands.sh").chmod(0o755)
    assert ablations("value_network", "run", "--tau", "1", script=script) == ablations(
        "value_network", "--tau", "1"
    )
