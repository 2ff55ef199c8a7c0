"""Deep Deterministic Policy Gradient (DDPG) for continuous control, in one file.

Lillicrap et al. 2016, "Continuous Control with Deep Reinforcement Learning", arXiv 1509.02971

    start from an actor μ, a critic Q, targets μ', Q' equal to them, and an empty buffer
    at each environment step:
        act with clip(μ(s) + n, -1, 1), or uniformly in the first --learning-starts steps             (E5)
        store (s, a, r, s', d); d = 1 only where the episode terminated
        after that, every --train-frequency steps, --gradient-steps times, on a fresh minibatch:
            y = r + γ (1-d) Q'(s', μ'(s'))                                                            (E2)
            descend  mean (Q(s, a) - y)²                                         over Q               (E3)
            descend  -mean Q(s, μ(s))                                            over μ               (E4)
            μ', Q' ← (1-τ) μ' + τ μ, (1-τ) Q' + τ Q                                                   (E1)

Shapes: B transitions in a minibatch, O numbers in an observation, A numbers in an action.

Usage: python ddpg_continuous.py --env-id Hopper-v4
"""

# `uv run` installs these by itself:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1", "filelock==4.2.11"]
# ///
# ======== 2. Imports: shared ========
import contextlib
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco.mujoco_env import mujoco
from torch import Tensor, nn
from torch.optim.adam import adam
from tqdm import tqdm

CAN_COMPILE = sys.platform == "linux" and bool(shutil.which("c++")) and not torch.cuda.is_available()


# ======== 3. Arguments: this algorithm's own ========
@dataclass
class Args:
    """Trains Deep Deterministic Policy Gradient on a Gymnasium task, or plays what it learned (--watch)."""

    learning_rate: float = 3e-4  # Adam's learning rate for all networks; lower it if the losses blow up
    learning_starts: int = 25_000  # steps of uniform actions first; more where the task is hard to explore
    exploration_noise: float = 0.1  # std of the Gaussian noise on actions, which reach from -1 to 1
    ou_noise: bool = False  # the paper's Ornstein-Uhlenbeck noise instead: correlated in time, θ 0.15, σ 0.2
    ou_dt: float = 1.0  # time step of that noise; smaller is slower and smoother
    random_action_prob: float = 0.0  # probability of a uniform action instead, the ε-uniform policy
    # ======== 3. Arguments: shared ========
    env_id: str = "Hopper-v4"  # any Gymnasium task whose actions are a bounded Box
    seed: int = 1  # of networks, noise and environment; report several, not the best
    total_timesteps: int = 1_000_000  # environment steps; 100,000 already show whether returns rise
    gamma: float = 0.99  # discount γ; a reward 1/(1-γ) steps ahead counts for a third
    tau: float = 0.005  # Polyak step τ of the targets (E1); larger is faster and less stable
    target_network_frequency: int = 1  # gradient steps between target updates; hard copies: 200 with --tau 1
    batch_size: int = 256  # transitions in a minibatch
    buffer_size: int = 1_000_000  # transitions kept for replay, the latest; lower it if memory is short
    hidden_dim: int = 256  # width of the two hidden layers of every network
    train_frequency: int = 1  # environment steps between gradient phases
    gradient_steps: int = 1  # updates in a gradient phase; more use the data better but take longer
    eval_frequency: int = 10_000  # steps between noise-free evaluations; 0 for none, as endless tasks need
    eval_episodes: int = 10  # episodes in an evaluation, from the same seeds every time
    log_frequency: int = 1_000  # steps between the rows of losses.csv and timing.csv
    exp_name: str = Path(__file__).stem  # names the run in the default --run-dir, and its curve in a figure
    run_dir: str | None = None  # for the results; None is runs/{env_id}__{exp_name}__{seed}__{unix time}
    resume: bool = False  # continue the run in --run-dir; start it if there is none yet
    checkpoint_frequency: int = 50_000  # steps between checkpoints; 0 for one at the end only
    capture_video: bool = False  # film an episode into videos/ first and every --checkpoint-frequency steps
    watch: str | None = None  # a run's folder: play its policy in a window, or into an mp4 without a display
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    compile: bool = CAN_COMPILE  # torch.compile the update, 1.1 to 1.4 times as fast; off by default on GPUs
    threads: int = 1  # CPU threads of PyTorch; 2 are faster if nothing else runs, otherwise much slower
    torch_deterministic: bool = True  # have PyTorch choose deterministic kernels
    track: bool = False  # mirror the CSV files to Weights & Biases; WANDB_MODE=offline needs no account
    wandb_project_name: str = "continuous-control"  # where wandb files the run
    wandb_entity: str | None = None  # the wandb team or user that owns the project


# ======== 4. Networks: shared ========
def mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    """Two hidden layers of rectified units: (B, input_dim) -> (B, output_dim)."""
    hidden = [nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(hidden_dim, output_dim))


class QNetwork(nn.Module):
    """Action value Q(s, a): observations (B, O), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, hidden_dim, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([observations, actions], dim=1)).squeeze(1)


# ======== 4. Networks: this algorithm's own ========
class Actor(nn.Module):
    """Deterministic policy μ(s): observations (B, O) -> actions (B, A) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, hidden_dim, action_dim)

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.net(observations))


# ======== 5. Losses: shared ========
class Batch(NamedTuple):
    """B transitions (s, a, r, s', d)."""

    observations: Tensor  # (B, O)
    actions: Tensor  # (B, A), in [-1, 1]
    rewards: Tensor  # (B,)
    next_observations: Tensor  # (B, O), as they were before any reset
    terminations: Tensor  # (B,), 1 where the episode terminated; 0 where it went on or its time ran out


def critic_loss(batch: Batch, qf: QNetwork, target_q: Tensor) -> tuple[Tensor, Tensor]:
    """(E3) mean (Q(s, a) - y)²: the loss, and the values Q(s, a) (B,) for the log."""
    q_values = qf(batch.observations, batch.actions)
    return F.mse_loss(q_values, target_q), q_values


@torch.no_grad()
def polyak(targets: list[nn.Module], networks: list[nn.Module], tau: float) -> None:
    """(E1) θ' ← (1-τ) θ' + τ θ, in place."""
    for target, network in zip(targets, networks, strict=True):
        for target_parameter, parameter in zip(target.parameters(), network.parameters(), strict=True):
            target_parameter.lerp_(parameter, tau)


# ======== 5. Losses: this algorithm's own ========
@torch.no_grad()
def td_target(batch: Batch, actor_target: Actor, qf1_target: QNetwork, args: Args) -> Tensor:
    """(E2) y = r + γ (1-d) Q'(s', μ'(s')): (B,)."""
    next_actions = actor_target(batch.next_observations)
    next_q = qf1_target(batch.next_observations, next_actions)
    return batch.rewards + args.gamma * (1 - batch.terminations) * next_q


def actor_loss(observations: Tensor, actor: Actor, qf1: QNetwork) -> Tensor:
    """(E4) -mean Q(s, μ(s)); by the chain rule its gradient is -mean ∇θ μ(s) ∇a Q(s, a) at a = μ(s)."""
    return -qf1(observations, actor(observations)).mean()


# ======== 6. Agent: this algorithm's own ========
class Agent(nn.Module):
    """The networks of DDPG, how they explore and how they learn."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.device = torch.device("cuda" if args.cuda else "cpu")
        self.actor = Actor(obs_dim, action_dim, args.hidden_dim)
        self.qf1 = QNetwork(obs_dim, action_dim, args.hidden_dim)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.qf1_target = deepcopy(self.qf1).requires_grad_(False)
        self.register_buffer("ou_state", torch.zeros(action_dim))
        self.to(self.device)

        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(self.qf1.parameters(), lr=args.learning_rate, fused=True)

    def start_episode(self) -> None:
        """The Ornstein-Uhlenbeck process starts afresh."""
        self.ou_state.zero_()

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """The noise-free action: (O,) -> (A,)."""
        observation = torch.as_tensor(observation, dtype=torch.float32, device=self.device)
        return self.actor(observation).cpu().numpy()

    @torch.no_grad()
    def explore(self, observation: np.ndarray) -> np.ndarray:
        """(E5) clip(μ(s) + n, -1, 1), n Gaussian or n ← n - θ n dt + σ √dt ξ; or uniform: (O,) -> (A,)."""
        observation = torch.as_tensor(observation, dtype=torch.float32, device=self.device)
        args, action = self.args, self.actor(observation)
        noise = torch.randn_like(action)
        if args.ou_noise:
            self.ou_state += 0.15 * (0 - self.ou_state) * args.ou_dt + 0.2 * math.sqrt(args.ou_dt) * noise
            action = action + self.ou_state
        else:
            action = action + args.exploration_noise * noise
        if torch.rand(()) < args.random_action_prob:
            action = 2 * torch.rand_like(action) - 1
        return action.clamp(-1, 1).cpu().numpy()

    def update(self, batch: Batch, gradient_step: int) -> dict[str, Tensor]:
        """One gradient step (`descend`, below) on each network; returns what to log."""
        args = self.args

        target_q = td_target(batch, self.actor_target, self.qf1_target, args)
        qf1_loss, qf1_values = critic_loss(batch, self.qf1, target_q)
        q_gradient_norm = descend(qf1_loss, self.q_optimizer)
        metrics = {
            "qf1_values": qf1_values.mean(),
            "qf1_loss": qf1_loss,
            "q_gradient_norm": q_gradient_norm,
            "target_q": target_q.mean(),
        }

        policy_loss = actor_loss(batch.observations, self.actor, self.qf1)
        actor_gradient_norm = descend(policy_loss, self.actor_optimizer)
        metrics |= {"actor_loss": policy_loss, "actor_gradient_norm": actor_gradient_norm}

        if gradient_step % args.target_network_frequency == 0:
            polyak([self.actor_target, self.qf1_target], [self.actor, self.qf1], args.tau)
        return {name: value.detach() for name, value in metrics.items()}


# ======== 7. Replay buffer: shared ========
class ReplayBuffer:
    """The last `capacity` transitions."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.capacity = capacity
        self.added = 0  # transitions ever added, including overwritten ones
        self.transitions = Batch(
            observations=torch.empty(capacity, obs_dim, device=device),
            actions=torch.empty(capacity, action_dim, device=device),
            rewards=torch.empty(capacity, device=device),
            next_observations=torch.empty(capacity, obs_dim, device=device),
            terminations=torch.empty(capacity, device=device),
        )

    def add(self, *transition: np.ndarray | float | bool) -> None:
        """Stores s (O,), a (A,), r, s' (O,) and d; a full buffer loses its oldest transition."""
        row = self.added % self.capacity
        for field, value in zip(self.transitions, transition, strict=True):
            field[row] = torch.as_tensor(value)
        self.added += 1

    def sample(self, batch_size: int) -> Batch:
        """A minibatch drawn uniformly, with replacement."""
        filled = min(self.added, self.capacity)
        rows = torch.randint(filled, (batch_size,), device=self.transitions.rewards.device)
        return Batch(*(field[rows] for field in self.transitions))

    def state_dict(self) -> dict:
        """The filled rows; through NumPy, because torch.save would write the whole tensor behind a slice."""
        filled = [torch.from_numpy(field[: self.added].numpy(force=True)) for field in self.transitions]
        return {"added": self.added, "transitions": filled}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for field, filled in zip(self.transitions, state["transitions"], strict=True):
            field[: self.added] = filled


# ======== 8. Training: shared ========
def train(args: Args) -> Path:
    """Trains an agent; returns the run's folder. Raises FloatingPointError where a number is not finite."""
    check(args)
    configure_torch(args)
    env = make_env(args.env_id, args.seed)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, agent.device)
    run = Run(args, agent, buffer, env)
    update = CompiledUpdate(agent.update, args)

    observation = env.observation  # the first one, or that at which a resumed run goes on
    for global_step in run.steps():
        learning = global_step > args.learning_starts
        if learning:
            action = agent.explore(observation)
        else:
            action = env.action_space.sample()
        next_observation, reward, terminated, truncated, info = env.step(action)
        buffer.add(observation, action, reward, next_observation, terminated)
        observation = next_observation

        if learning and global_step % args.train_frequency == 0:
            for _ in range(args.gradient_steps):
                run.gradient_step += 1
                run.losses |= update(buffer.sample(args.batch_size), run.gradient_step)

        if terminated or truncated:
            episode = info["episode"]
            run.log("episodes", {"episodic_return": episode["r"], "episodic_length": episode["l"]})
            observation, _ = env.reset()
            agent.start_episode()

        if run.evaluation_is_due():
            run.evaluate()
    return run.dir


# ######## A reader may stop here: what follows is plumbing, the same in all three scripts. ########
# `descend` takes a step of Adam, `make_env` maps actions from [-1, 1] onto the task's bounds,
# `CompiledUpdate` only makes `update` faster, and `Run` keeps the time, the record and the checkpoints.


# ======== 9. Environment and evaluation: shared ========
class ResumableEnv(gym.Wrapper):
    """An environment that can be saved at any step; it stops at numbers that are not finite.

    The state of its random generator before the last reset, and the actions since, determine where it is.
    """

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        env.reset(seed=seed)
        self.action_space.seed(seed)
        self.reset()

    def reset(self, **options) -> tuple[np.ndarray, dict]:
        self.generator_state = self.unwrapped.np_random.bit_generator.state
        self.actions = []
        self.observation, info = self.env.reset(**options)
        check_finite(observation=self.observation)
        return self.observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        check_finite(action=action)
        self.actions.append(action)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        check_finite(observation=self.observation, reward=reward)
        return self.observation, reward, terminated, truncated, info

    def state_dict(self) -> dict:
        return {
            "generator": self.generator_state,
            "actions": torch.from_numpy(np.array(self.actions)),
            "random_actions": self.action_space.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict) -> None:
        """Plays the episode again, as far as it went."""
        self.unwrapped.np_random.bit_generator.state = state["generator"]
        self.reset()
        for action in state["actions"].numpy():
            self.step(action)
        self.action_space.np_random.bit_generator.state = state["random_actions"]


def make_env(env_id: str, seed: int, **options) -> ResumableEnv:
    """The task with observations flattened to (O,) and actions in [-1, 1]^A, mapped onto its bounds (E0)."""
    # Two known warnings: v4 is not the newest version, and HalfCheetah's model has a deprecated setting.
    warnings.filterwarnings("ignore", message=".*is out of date")
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or warnings.warn(text, stacklevel=2))
    with refusing(f"--env-id {env_id}", gym.error.Error, ImportError, ValueError):
        env = gym.make(env_id, **options)

    actions, observations = env.action_space, env.observation_space
    bounded = isinstance(actions, gym.spaces.Box) and actions.is_bounded()
    if not bounded or actions.dtype.kind != "f" or len(actions.shape) != 1:
        refuse(f"--env-id {env_id}: its actions are {actions}, not a bounded Box of (A,) real numbers")
    if not observations.is_np_flattenable:
        refuse(f"--env-id {env_id}: its observations, {observations}, cannot be flattened")

    env = gym.wrappers.RecordEpisodeStatistics(env)
    env = gym.wrappers.TransformAction(env, lambda action: action.clip(actions.low, actions.high), actions)
    env = gym.wrappers.RescaleAction(env, actions.dtype.type(-1), actions.dtype.type(1))  # rounds: so clip
    env = gym.wrappers.FlattenObservation(env)
    return ResumableEnv(env, seed)


def play(agent: Agent, env: gym.Env, seed: int) -> list[float]:
    """The rewards of one noise-free episode."""
    observation, _ = env.reset(seed=seed)
    rewards, over = [], False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        rewards.append(float(reward))
        over = terminated or truncated
    return rewards


def discounted_returns(rewards: list[float], gamma: float) -> list[float]:
    """The discounted sum of the rewards from each step of an episode on, which Q should predict."""
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return returns


def check_finite(**values: np.ndarray | float) -> None:
    """Raises FloatingPointError with the names of the values that hold NaN or infinity."""
    broken = [name for name, value in values.items() if not np.isfinite(value).all()]
    if broken:
        raise FloatingPointError(f"not finite: {', '.join(broken)}")


# ======== 10. Run: shared ========
WANDB_PREFIXES = {"episodes": "charts", "timing": "charts", "losses": "losses", "evaluations": "eval"}
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}, random actions{postfix}]"
ROUNDING = {"threads", "compile"}  # arguments that change results by rounding alone
MAY_CHANGE = ROUNDING | {"total_timesteps", "run_dir", "resume", "checkpoint_frequency"}  # on resuming
MAY_CHANGE |= {"capture_video", "watch", "track", "wandb_project_name", "wandb_entity"}


class Run:
    """A run: its clock, and its folder with arguments, record and checkpoint."""

    def __init__(self, args: Args, agent: Agent, buffer: ReplayBuffer, env: ResumableEnv):
        self.args, self.agent = args, agent
        self.eval_env, self.eval_seed = make_env(args.env_id, args.seed), 10_000 * (1 + args.seed)
        optimizers = {k: v for k, v in vars(agent).items() if isinstance(v, torch.optim.Optimizer)}
        self.parts = {"agent": agent, "buffer": buffer, "env": env, "run": self, **optimizers}

        self.global_step, self.gradient_step = 0, 0
        self.evaluated_step = 0  # the last one that was evaluated
        self.elapsed = 0.0  # seconds of training, those of earlier processes too
        self.losses = {"actor_loss": math.nan, "actor_gradient_norm": math.nan}  # the latest of each
        self.returns = {}  # the latest, for the progress bar
        self.signal = 0  # the number of a signal that asks to stop

        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.run_dir or f"runs/{name}")
        self.record = self.open_folder()
        self.load_checkpoint()
        if self.global_step < args.total_timesteps:
            self.write_arguments()
        self.wandb = self.start_wandb() if args.track else None

    def steps(self) -> Iterator[int]:
        """Numbers the environment steps. In between: progress, films, checkpoints, signals."""
        total, self.started = self.args.total_timesteps, time.perf_counter() - self.elapsed
        handlers = {n: signal.signal(n, self.ask_to_stop) for n in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(total=total, initial=self.global_step, unit="step", disable=None, bar_format=BAR)
        try:
            stopping = self.start()
            while self.global_step < total and not stopping:
                self.global_step += 1
                yield self.global_step
                stopping = self.finish_step()
        finally:
            self.bar.close()
            self.lock.release()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        print(f"{self.global_step:,} of {total:,} steps are done; the results are in {self.dir}")
        if stopping:
            sys.exit(128 + self.signal)

    def ask_to_stop(self, number: int, _: object) -> None:
        """Handles SIGTERM and Ctrl-C, which wait for the end of the step. A second Ctrl-C does not."""
        if self.signal and number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        os.write(2, b"\nstopping after a checkpoint; Ctrl-C again stops at once, without one\n")

    def start(self) -> bool:
        """Says what is to come, films once to see that it works, and makes up for a missed evaluation.

        Returns whether a signal prevented that again.
        """
        args = self.args
        self.logged_step, self.logged_time = self.global_step, self.elapsed
        tqdm.write(f"{args.env_id} on {self.agent.device}; the results go to {self.dir}")
        if args.total_timesteps <= args.learning_starts:
            tqdm.write("nothing will be learned, as --total-timesteps is not above --learning-starts")
        if args.capture_video and self.global_step == 0:
            self.film()
        if self.evaluation_is_due():
            self.evaluate()
            self.save_checkpoint()
        return self.evaluation_is_due()

    def finish_step(self) -> bool:
        """What follows a step, each at its own frequency. Returns whether a signal asks to stop."""
        args, step, stopping = self.args, self.global_step, self.signal > 0
        self.bar.update()
        if step % args.log_frequency == 0:
            self.log_progress()
        saving = args.checkpoint_frequency > 0 and step % args.checkpoint_frequency == 0
        if saving or stopping or step == args.total_timesteps:
            self.save_checkpoint()
        if args.capture_video and saving:
            self.film()
        return stopping

    def log_progress(self) -> None:
        """Rows of timing.csv and losses.csv, and the progress bar, or a line where there is no terminal."""
        elapsed = time.perf_counter() - self.started
        speed = (self.global_step - self.logged_step) / (elapsed - self.logged_time)
        self.logged_step, self.logged_time = self.global_step, elapsed
        self.log("timing", {"SPS": speed, "elapsed": elapsed})
        left = "random actions"
        if self.gradient_step > 0:
            self.log("losses", {name: float(value) for name, value in self.losses.items()})
            self.bar.bar_format = None  # tqdm's own, with the time left
            left = tqdm.format_interval((self.args.total_timesteps - self.global_step) / speed) + " left"
        self.bar.set_postfix(self.returns)
        if self.bar.disable:
            returns = "".join(f", {name} {value:.1f}" for name, value in self.returns.items())
            print(f"step {self.global_step:,}: {speed:.0f} steps/s, {left}{returns}", flush=True)

    def log(self, name: str, row: dict[str, float]) -> None:
        """Appends a row to {name}.csv, below the columns' names, and mirrors it to wandb."""
        row = {"global_step": self.global_step} | row
        with open(self.dir / f"{name}.csv", "a", newline="") as file:
            writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        if "episodic_return" in row:
            self.returns[name] = float(row["episodic_return"])
        if self.wandb:
            mirrored = {f"{WANDB_PREFIXES[name]}/{key}": value for key, value in row.items()}
            self.wandb.log(mirrored, step=self.global_step)

    def evaluation_is_due(self) -> bool:
        """Every --eval-frequency steps and after the last one; never if it is 0."""
        frequency, last = self.args.eval_frequency, self.global_step == self.args.total_timesteps
        if frequency == 0 or self.evaluated_step == self.global_step:
            return False
        return last or self.global_step % frequency == 0

    def evaluate(self) -> None:
        """Logs noise-free episodes, from the same starts every time; a signal puts them off till --resume."""
        episodes = []
        for episode in range(self.args.eval_episodes):
            if self.signal:
                return
            episodes.append(play(self.agent, self.eval_env, self.eval_seed + episode))
        self.evaluated_step = self.global_step
        returns = [sum(rewards) for rewards in episodes]
        values = [value for rewards in episodes for value in discounted_returns(rewards, self.args.gamma)]
        row = {
            "episodic_return": np.mean(returns),
            "episodic_return_std": np.std(returns),
            "discounted_return": np.mean(values),  # over all states of the episodes
        }
        self.log("evaluations", row | {f"return_{n}": value for n, value in enumerate(returns)})

    def film(self) -> None:
        """Films a noise-free episode into videos/."""
        folder = self.dir / "videos" / f"step-{self.global_step}"
        show(self.agent, self.args.env_id, self.eval_seed, folder)

    def open_folder(self) -> dict:
        """Makes and locks the folder; returns its args.json, {} in a new one."""
        path, record = self.dir / "args.json", {}
        if path.exists():
            if not self.args.resume:
                refuse(f"--run-dir {self.dir} already holds a run; --resume continues it")
            record = json.loads(path.read_text())
            self.compare_arguments(record["args"])
        with refusing(f"--run-dir {self.dir} is in use or no folder", OSError, filelock.Timeout):
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.dir / "lock")
            self.lock.acquire(timeout=0)
        return record

    def compare_arguments(self, old: dict) -> None:
        """Refuses to resume with arguments that would have changed what is already learned."""
        new = vars(self.args)
        changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        if changed - MAY_CHANGE:
            refuse(f"--resume: {flags(changed - MAY_CHANGE)} was different in {self.dir / 'args.json'}")
        if changed & ROUNDING:
            tqdm.write(f"{flags(changed & ROUNDING)} was different: results may differ by rounding")

    def write_arguments(self) -> None:
        """args.json: every argument, and what the run began with."""
        if not self.record:
            git = f'git -C "{Path(__file__).resolve().parent}" describe --always --dirty --abbrev=40'
            failed, commit = subprocess.getstatusoutput(git)
            self.record = {
                "args": {},
                "versions": {module.__name__: module.__version__ for module in (gym, mujoco, np, torch)},
                "device": torch.cuda.get_device_name() if self.args.cuda else "cpu",
                "git_commit": "" if failed else commit,
                "wandb_id": os.urandom(4).hex(),
            }
        self.record["args"] = vars(self.args)
        with replacing(self.dir / "args.json") as file:
            file.write(json.dumps(self.record, indent=2).encode())

    def start_wandb(self) -> object:
        """The run of Weights & Biases that mirrors this one."""
        import wandb

        where = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "dir": self.dir}
        identity = {"id": self.record["wandb_id"], "name": self.dir.name, "resume": "allow"}
        return wandb.init(**where, **identity, config=vars(self.args))

    def save_checkpoint(self) -> None:
        """Replaces policy.pt and checkpoint.pt, each at one stroke."""
        check_finite(**{name: value.numpy(force=True) for name, value in self.agent.state_dict().items()})
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with replacing(self.dir / "policy.pt") as file:
            torch.save(self.agent.actor.state_dict(), file)
        with replacing(self.dir / "checkpoint.pt") as file:
            torch.save(state, file)

    def load_checkpoint(self) -> None:
        """Puts every part back to where the checkpoint has it; CSV rows from after it will come again."""
        path, csv_bytes = self.dir / "checkpoint.pt", {}
        if path.exists():
            with refusing(f"{path} is damaged; delete it to start over", Exception):
                state = read_checkpoint(path)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            csv_bytes = state["run"]["csv_bytes"]
        for path in self.csv_files():
            os.truncate(path, csv_bytes.get(path.name, 0))

    def csv_files(self) -> list[Path]:
        """Those that there are by now."""
        return [path for name in WANDB_PREFIXES if (path := self.dir / f"{name}.csv").exists()]

    def state_dict(self) -> dict:
        """The counts, PyTorch's generators, and the lengths of the CSV files, which are then on the disk."""
        csv_bytes = {}
        for path in self.csv_files():
            with open(path, "ab") as file:
                os.fsync(file.fileno())
                csv_bytes[path.name] = file.tell()
        return {
            "steps": (self.global_step, self.gradient_step, self.evaluated_step),
            "elapsed": time.perf_counter() - self.started,
            "losses": {name: float(value) for name, value in self.losses.items()},
            "csv_bytes": csv_bytes,
            "generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if self.args.cuda else [],
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes up the counts and PyTorch's generators."""
        self.global_step, self.gradient_step, self.evaluated_step = state["steps"]
        self.elapsed, self.losses = state["elapsed"], state["losses"]
        torch.set_rng_state(state["generator"])
        if self.args.cuda:
            torch.cuda.set_rng_state_all(state["cuda_generators"])


def read_checkpoint(path: Path) -> dict:
    """What torch.save wrote, its checksums compared. It is data: reading it runs no code."""
    damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare them
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of another at one stroke, once it is whole and on the disk."""
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except RuntimeError as error:  # torch.save raises it after the OSError of a full disk
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from error
    finally:
        new.unlink(missing_ok=True)


# ======== 11. Watching: shared ========
def show(agent: Agent, env_id: str, seed: int, folder: Path | None) -> float:
    """Plays a noise-free episode in a window, or into {folder}/rl-video-episode-0.mp4; its return."""
    if folder and sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "egl"
    needed = "MuJoCo's films need libegl1 and libopengl0, or libosmesa6 and MUJOCO_GL=osmesa"
    with refusing(f"cannot show {env_id} ({needed})", Exception):
        env = make_env(env_id, seed, render_mode="rgb_array" if folder else "human")
        if hasattr(env.unwrapped, "mujoco_renderer"):
            follow_the_robot(env.unwrapped)
        if folder:
            env = gym.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda episode: True)
        with contextlib.closing(env):
            return sum(play(agent, env, seed))


def follow_the_robot(env: gym.Env) -> None:
    """Has the camera follow the torso, and makes the floor endless, which a runner leaves after 40 m."""
    renderer = env.mujoco_renderer
    camera = {"trackbodyid": 1} | (renderer.default_cam_config or {})
    renderer.default_cam_config = camera | {"type": mujoco.mjtCamera.mjCAMERA_TRACKING}
    renderer.camera_id = None
    planes = env.model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    env.model.geom_size[planes, :2] = 0
    materials = env.model.geom_matid[planes]  # -1 for none
    env.model.mat_texrepeat[materials[materials >= 0]] = 1  # its pattern repeats each metre there


def load_policy(run_dir: str | Path) -> Agent:
    """The agent of a run, its trained actor from policy.pt: agent.act(observation) is noise-free.

    The observations and actions are those of make_env(agent.args.env_id, seed). The critics are untrained.
    """
    arguments = json.loads((Path(run_dir) / "args.json").read_text())["args"]
    args = Args(**arguments | {"cuda": False})
    env = make_env(args.env_id, args.seed)
    agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    agent.actor.load_state_dict(read_checkpoint(Path(run_dir) / "policy.pt"))
    return agent


def watch(args: Args) -> None:
    """Plays the policy of the run in --watch in a window or, without a display, into an mp4 file."""
    run_dir, folder = Path(args.watch), None
    with refusing(f"--watch {run_dir}: no run of this script with a sound policy.pt", Exception):
        agent = load_policy(run_dir)
    if sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        folder = run_dir / "videos" / "watch"
    print(f"return: {show(agent, agent.args.env_id, args.seed, folder):.1f}")
    if folder:
        print(f"film: {folder}/rl-video-episode-0.mp4")


# ======== 12. Settings of PyTorch, and the optimizer's step: shared ========
COMPILE_AFTER = 10_000  # gradient steps; a shorter run would lose more time by compiling than it gains


def configure_torch(args: Args) -> None:
    """Seeds the generators, and has PyTorch compute fast and reproducibly."""
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # denormal numbers are slow; later threads inherit it
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch the whole buffer
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic


def descend(loss: Tensor, optimizer: torch.optim.Adam) -> Tensor:
    """A step of Adam down the loss, of the optimizer's parameters alone; returns the gradient's norm.

    It is loss.backward() and optimizer.step() in a form that torch.compile takes as a whole, for a plain Adam
    with one group of parameters. No .grad is written: to clip gradients, do it here.
    """
    group, compiling = optimizer.param_groups[0], torch.compiler.is_compiling()
    parameters, (beta1, beta2) = group["params"], group["betas"]
    gradients = torch.autograd.grad(loss, parameters)
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    states = [optimizer.state[parameter] for parameter in parameters]
    steps, means, squares = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
    settings = {key: group[key] for key in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
    settings |= {"beta1": beta1, "beta2": beta2, "capturable": compiling, "fused": not compiling}
    with torch.no_grad():
        adam(parameters, list(gradients), means, squares, [], steps, **settings)
        return torch.stack([gradient.norm() for gradient in gradients]).norm()


class CompiledUpdate:
    """agent.update, compiled after COMPILE_AFTER gradient steps; if that fails, training goes on without."""

    def __init__(self, update: Callable, args: Args):
        self.update, self.compiling, self.calls = update, args.compile, 0
        if self.compiling:
            # Here Triton is loaded, before any film: its LLVM would crash beside OSMesa's if loaded second.
            torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad splits the graph
            torch.compiler.config.dynamic_sources = "L['gradient_step']"  # else it is compiled twice
            options = {"fallback_random": True, "cpp_wrapper": True}  # the same noise; less Python
            self.compiled = torch.compile(update, options=options)

    def __call__(self, batch: Batch, gradient_step: int) -> dict[str, Tensor]:
        if not self.compiling or gradient_step <= COMPILE_AFTER:
            return self.update(batch, gradient_step)
        if self.calls == 0:
            self.started = time.perf_counter()
            tqdm.write("compiling the update; the first time this can take a minute, and Ctrl-C waits for it")
        try:
            with signals_later():  # they would end the compiler too
                metrics = self.compiled(batch, gradient_step)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.compiling = False
            tqdm.write(f"compiling failed, training goes on without it: {str(error).splitlines()[0]}")
            return self.update(batch, gradient_step)
        self.calls += 1
        if self.calls == 2:  # with a delayed actor's step and without it
            tqdm.write(f"compiled in {time.perf_counter() - self.started:.0f} s")
        return metrics


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Holds back SIGTERM and Ctrl-C, also from programs started here."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


# ======== 13. Refusals: shared ========
MAY_BE_ZERO = {"seed", "learning_starts", "gamma", "eval_frequency", "checkpoint_frequency"}
MAY_BE_ZERO |= {"exploration_noise", "policy_noise", "noise_clip", "random_action_prob"}
AT_MOST_ONE = {"gamma", "tau", "random_action_prob", "learning_rate", "policy_lr", "q_lr"}


def check(args: Args) -> None:
    """Refuses values that cannot be meant."""
    for name, value in vars(args).items():
        if type(value) in (int, float):
            enough = value > 0 or (value == 0 and name in MAY_BE_ZERO) or name == "target_entropy"
            too_much = value > 1 and name in AT_MOST_ONE
            if too_much or not enough or not math.isfinite(value):
                refuse(f"{flags({name})} {value} is out of range")
    if args.batch_size > args.buffer_size:
        refuse(f"--batch-size {args.batch_size} is more than --buffer-size {args.buffer_size} can hold")
    if args.cuda and not torch.cuda.is_available():
        refuse("--cuda: PyTorch finds no CUDA device here")
    if args.resume and not args.run_dir:
        refuse("--resume needs the --run-dir of the run")


def refuse(reason: str) -> None:
    """Ends the program with one line and exit status 2."""
    tqdm.write(f"{Path(__file__).name}: error: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def refusing(subject: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into refusals."""
    try:
        yield
    except errors as error:
        refuse(f"{subject}: {error}")


def flags(names: set[str]) -> str:
    """Arguments as one types them."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


# ======== 14. Command line: shared ========
if __name__ == "__main__":
    arguments = tyro.cli(Args)
    try:
        if arguments.watch:
            watch(arguments)
        else:
            train(arguments)
    except (FloatingPointError, OSError) as error:
        sys.exit(f"stopped: {error}")
