"""Twin Delayed DDPG (TD3) for continuous control, in one file.

Fujimoto et al. 2018, "Addressing Function Approximation Error in Actor-Critic Methods", arXiv 1802.09477

    start from an actor μ, critics Q1, Q2, targets μ', Q1', Q2' equal to them, and an empty buffer
    at each environment step:
        act with clip(μ(s) + noise, -1, 1), or uniformly until learning starts                        (E5)
        store (s, a, r, s', d); d = 1 only where the episode terminated
        every --train-frequency steps, --gradient-steps times, on a fresh minibatch:
            a' = clip(μ'(s') + clip(ε, -c, c), -1, 1),  ε ~ N(0, σ̃²)
            y = r + γ (1-d) min_i Q_i'(s', a')                                                        (E6)
            descend  Σ_i mean (Q_i(s, a) - y)²                                   over Q1, Q2          (E3)
            every --policy-frequency gradient steps:
                descend  -mean Q1(s, μ(s))                                       over μ               (E7)
                μ', Q_i' ← (1-τ) μ' + τ μ, (1-τ) Q_i' + τ Q_i                                         (E1)

Usage: python td3_continuous.py --env-id Hopper-v4
"""
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1"]
# ///

# ======== 2. Imports: shared ========
import contextlib
import csv
import ctypes.util
import importlib.metadata
import json
import math
import os
import platform
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
import zipfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm


# ======== 3. Arguments: this algorithm's own ========
@dataclass
class Args:
    """Trains Twin Delayed DDPG on a Gymnasium task, or plays what it learned (--watch)."""

    learning_rate: float = 3e-4  # Adam's step size for the actor and the critics; lower it if losses blow up
    learning_starts: int = 25_000  # steps of uniform actions first; more where the task is hard to explore
    exploration_noise: float = 0.1  # std of the Gaussian noise on actions, which reach from -1 to 1
    policy_noise: float = 0.2  # σ̃, std of the noise on the target's actions; 0 for DDPG's target
    noise_clip: float = 0.5  # c, the most that the noise on the target's actions can be
    policy_frequency: int = 2  # gradient steps on the critics to one on the actor and targets; 1 for DDPG's
    clipped_double_q: bool = True  # target the smaller of two critics; --no-clipped-double-q for DDPG's one
    # ======== 3. Arguments: shared ========
    env_id: str = "Hopper-v4"  # any Gymnasium task whose actions are a bounded Box
    seed: int = 1  # of networks, noise and environment; report several, not the best
    total_timesteps: int = 1_000_000  # environment steps; 100,000 already show whether returns rise
    gamma: float = 0.99  # discount γ: what comes later than 1/(1-γ) steps hardly counts
    tau: float = 0.005  # Polyak step τ of the targets (E1); larger is faster and less stable
    target_network_frequency: int = 1  # gradient steps between target updates; 200 with --tau 1 copies hard
    batch_size: int = 256  # transitions in a minibatch
    buffer_size: int = 1_000_000  # transitions kept for replay, the latest; lower it if memory is short
    hidden_dim: int = 256  # width of the two hidden layers of every network
    train_frequency: int = 1  # environment steps between gradient phases
    gradient_steps: int = 1  # updates in a gradient phase: more learn more from each step, and cost more
    eval_frequency: int = 10_000  # steps between noise-free evaluations; 0 for none
    eval_episodes: int = 10  # episodes in an evaluation, from the same seeds every time
    log_frequency: int = 1_000  # steps between the rows of losses.csv and timing.csv
    exp_name: str = Path(__file__).stem  # names the run in the default --run-dir
    run_dir: str | None = None  # for the results; None is runs/{env_id}__{exp_name}__{seed}__{unix time}
    resume: bool = False  # continue the run in --run-dir; start it if there is none yet
    checkpoint_frequency: int = 50_000  # steps between checkpoints; 0 for one at the end only
    capture_video: bool = False  # record an evaluation episode now and then into the run's videos/
    video_frequency: int = 50_000  # steps between videos
    watch: str | None = None  # a run's folder: play its policy in a window, or into an mp4 without a display
    watch_episodes: int = 1  # episodes to play
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    compile: bool = False  # torch.compile the update; networks this small gain nothing by it on a CPU
    threads: int = 2  # CPU threads of PyTorch: 2 suit one run alone, 1 several side by side
    torch_deterministic: bool = True  # have PyTorch choose deterministic kernels
    track: bool = False  # mirror the CSV files to Weights & Biases; WANDB_MODE=offline needs no account
    wandb_project_name: str = "continuous-control"  # where wandb files the run
    wandb_entity: str | None = None  # the wandb team or user that owns the project


# ======== 4. Networks: shared ========
def mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    """Two hidden layers of rectified units: (B, input_dim) -> (B, output_dim)."""
    first, second = nn.Linear(input_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
    relu = nn.ReLU(inplace=True)  # in place, to spare a copy
    return nn.Sequential(first, relu, second, relu, nn.Linear(hidden_dim, output_dim))


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
    return F.mse_loss(q_values, target_q), q_values.detach()


@torch.no_grad()
def polyak(target_parameters: list[Tensor], online_parameters: list[Tensor], tau: float) -> None:
    """(E1) θ' ← (1-τ) θ' + τ θ, in place."""
    torch._foreach_lerp_(target_parameters, online_parameters, tau)


# ======== 5. Losses: this algorithm's own ========
@torch.no_grad()
def td_target(
    batch: Batch, actor_target: Actor, qf1_target: QNetwork, qf2_target: QNetwork, args: Args
) -> Tensor:
    """(E6) y = r + γ (1-d) min_i Q_i'(s', clip(μ'(s') + clip(ε, -c, c), -1, 1)), ε ~ N(0, σ̃²): (B,)."""
    noise = args.policy_noise * torch.randn_like(batch.actions)  # one draw per sample and dimension
    noise = noise.clamp(-args.noise_clip, args.noise_clip)
    next_actions = (actor_target(batch.next_observations) + noise).clamp(-1, 1)
    next_q = qf1_target(batch.next_observations, next_actions)
    if args.clipped_double_q:
        next_q = torch.min(next_q, qf2_target(batch.next_observations, next_actions))
    return batch.rewards + args.gamma * (1 - batch.terminations) * next_q


def actor_loss(observations: Tensor, actor: Actor, qf1: QNetwork) -> Tensor:
    """(E7) -mean Q1(s, μ(s)): its gradient is the chain rule ∇θ μ(s) · ∇a Q1(s, a) at a = μ(s)."""
    return -qf1(observations, actor(observations)).mean()


# ======== 6. Agent: this algorithm's own ========
class Agent(nn.Module):
    """The networks of TD3, how they explore and how they learn."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args.hidden_dim)
        self.qf1 = QNetwork(obs_dim, action_dim, args.hidden_dim)
        self.qf2 = QNetwork(obs_dim, action_dim, args.hidden_dim)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.qf1_target = deepcopy(self.qf1).requires_grad_(False)
        self.qf2_target = deepcopy(self.qf2).requires_grad_(False)

        self.actor_parameters = list(self.actor.parameters())
        self.q_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.online_parameters = [*self.actor_parameters, *self.q_parameters]
        self.target_parameters = [*self.actor_target.parameters()]
        self.target_parameters += [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        self.actor_optimizer = Adam(self.actor_parameters, lr=args.learning_rate, fused=True)
        self.q_optimizer = Adam(self.q_parameters, lr=args.learning_rate, fused=True)

    def start_episode(self) -> None:
        """Nothing to do: the noise of this policy has no memory."""

    def explore(self, observation: Tensor) -> Tensor:
        """(E5) clip(μ(s) + N, -1, 1), N Gaussian: observation (O,) -> action (A,)."""
        action = self.actor(observation)
        noise = self.args.exploration_noise * torch.randn_like(action)
        return (action + noise).clamp(-1, 1)

    def update(self, batch: Batch, gradient_step: int) -> dict[str, Tensor]:
        """One gradient step on each network; returns the metrics to log, not yet read off the device."""
        args = self.args

        target_q = td_target(batch, self.actor_target, self.qf1_target, self.qf2_target, args)
        qf1_loss, qf1_values = critic_loss(batch, self.qf1, target_q)
        qf2_loss, qf2_values = critic_loss(batch, self.qf2, target_q)
        self.q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        self.q_optimizer.step()
        metrics = {"target_q": target_q.mean()}
        metrics |= {"qf1_values": qf1_values.mean(), "qf1_loss": qf1_loss.detach()}
        metrics |= {"qf2_values": qf2_values.mean(), "qf2_loss": qf2_loss.detach()}

        if gradient_step % args.policy_frequency == 0:
            loss = actor_loss(batch.observations, self.actor, self.qf1)
            self.actor_optimizer.zero_grad()
            loss.backward(inputs=self.actor_parameters)  # no gradient reaches the critics' weights
            self.actor_optimizer.step()
            metrics["actor_loss"] = loss.detach()

            if gradient_step % args.target_network_frequency == 0:
                polyak(self.target_parameters, self.online_parameters, args.tau)
        return metrics


# ######## A reader may stop here: what follows is plumbing, the same in all three scripts. ########


# ======== 7. Replay buffer: shared ========
class ReplayBuffer:
    """The last `capacity` transitions, one contiguous float32 row each, so that a minibatch is one gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # on a CPU, untouched until filled
        self.added = 0  # transitions ever added, those overwritten since too

    def add(self, observation, action, next_observation, reward: float, terminated: bool) -> None:
        """Stores a transition of NumPy arrays (O,), (A,), (O,); a full buffer loses its oldest."""
        row = np.concatenate((observation, action, next_observation, (reward, terminated)), dtype=np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, batch_size: int) -> Batch:
        """A minibatch drawn uniformly, with replacement."""
        indices = torch.randint(min(self.added, len(self.rows)), (batch_size,), device=self.rows.device)
        columns = self.rows.index_select(0, indices).split(self.widths, dim=1)
        observations, actions, next_observations, rewards, terminations = columns
        return Batch(observations, actions, rewards.squeeze(1), next_observations, terminations.squeeze(1))


# ======== 8. Environment and evaluation: shared ========
def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The task with observations flattened to (O,) and actions in [-1, 1]^A, mapped onto its bounds (E0)."""
    warnings.filterwarnings("ignore", message=".*is out of date")  # the v4 tasks are meant
    with contextlib.suppress(ImportError):  # Pendulum-v1 needs no MuJoCo
        from gymnasium.envs.mujoco.mujoco_env import mujoco

        mujoco.set_mju_user_warning(lambda text: "deprecated" in text or warnings.warn(text, stacklevel=2))
    try:
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except (gym.error.Error, ImportError) as error:
        refuse(f"--env-id {env_id}: {error}")
    space = env.action_space
    if not (isinstance(space, gym.spaces.Box) and space.is_bounded()):
        refuse(f"--env-id {env_id}: its actions are {space}, not a bounded Box")
    if not env.observation_space.is_np_flattenable:
        refuse(f"--env-id {env_id}: its observations are {env.observation_space}, which cannot be flattened")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)

    def rescale(action: np.ndarray) -> np.ndarray:
        weight = (
            1 + action.reshape(space.shape).astype(np.float64)
        ) / 2  # so -1 and 1 are the bounds exactly
        action = ((1 - weight) * low + weight * high).clip(low, high)
        return (action.round() if space.dtype.kind in "iu" else action).astype(space.dtype)

    env = gym.wrappers.TransformAction(env, rescale, gym.spaces.Box(-1.0, 1.0, (low.size,)))
    return gym.wrappers.FlattenObservation(env)


@torch.no_grad()
def act(policy, observation: np.ndarray, device: torch.device) -> np.ndarray:
    """What a policy on tensors does at one observation: (O,) -> (A,)."""
    return policy(torch.tensor(observation, dtype=torch.float32, device=device)).cpu().numpy()


def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: int, device: torch.device) -> list[float]:
    """Returns of noise-free episodes, from the same starts for the same seed; draws no random numbers."""
    returns = [0.0] * episodes
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        terminated = truncated = False
        while not (terminated or truncated):
            observation, reward, terminated, truncated, _ = env.step(act(actor, observation, device))
            returns[episode] += float(reward)
    return returns


# ======== 9. Logging: shared ========
def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # clear of the progress bar


def refuse(reason: str) -> NoReturn:
    """Ends the program with one line and exit status 2."""
    say(f"{Path(__file__).name}: error: {' '.join(reason.split())}")
    raise SystemExit(2)


def stop_unless_finite(agent: Agent, global_step: int, **quantities) -> None:
    """Raises FloatingPointError with the step, the quantity and any parameters that are not finite."""
    for name, value in quantities.items():
        if not (np.isfinite(value).all() if isinstance(value, np.ndarray) else math.isfinite(value)):
            broken = [key for key, values in agent.state_dict().items() if not values.isfinite().all()]
            raise FloatingPointError(
                f"step {global_step}: {name} is not finite (parameters: {broken or 'all are'})"
            )


class Log:
    """The CSV files of a run, written row by row so that a killed run keeps them; wandb mirrors them."""

    def __init__(self, run_dir: Path, args: Args, checkpoint: dict):
        self.run_dir, self.args, self.track = run_dir, args, args.track
        self.wandb_id = checkpoint.get("wandb_id")
        for name in ("episodes.csv", "evaluations.csv", "losses.csv", "timing.csv"):
            with open(run_dir / name, "ab") as file:
                file.truncate(checkpoint.get("csv_bytes", {}).get(name, 0))  # later rows will come again

    def write(self, path: str, global_step: int, row: dict[str, float]) -> None:
        """Appends a row to {name}.csv, where path is {wandb's prefix}/{name}; columns' names come first."""
        prefix, name = path.split("/")
        file_path, row = self.run_dir / f"{name}.csv", {"global_step": global_step} | row
        size = file_path.stat().st_size
        try:
            with open(file_path, "a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [row.values()] if size else [row, row.values()]
                )
        except OSError as error:  # a full disk costs the row, not the run
            os.truncate(file_path, size)
            say(f"step {global_step}: no row in {file_path}: {error}")
        self.mirror({f"{prefix}/{key}": value for key, value in row.items()}, global_step)

    def mirror(self, metrics: dict, global_step: int) -> None:
        """Sends metrics to wandb; the first failure turns it off, as the CSV files are the record."""
        try:
            if self.track:
                import wandb

                if wandb.run is None:
                    self.wandb_id = self.wandb_id or secrets.token_hex(4)
                    names = {"entity": self.args.wandb_entity, "project": self.args.wandb_project_name}
                    names |= {"id": self.wandb_id, "name": self.run_dir.name, "dir": self.run_dir}
                    wandb.init(**names, config=vars(self.args), resume="allow")
                films = {
                    key: wandb.Video(str(path)) for key, path in metrics.items() if isinstance(path, Path)
                }
                wandb.log({"global_step": global_step} | metrics | films, step=global_step)
        except Exception as error:
            self.track = False
            say(f"Weights & Biases failed, and is off from here on: {error!r}")


# ======== 10. Checkpoint: shared ========
def save_checkpoint(path: Path, state: dict) -> None:
    """Puts the checkpoint in place at one stroke and keeps the one before; a full disk costs neither."""
    try:
        with open(path.with_suffix(".new"), "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        if path.exists():
            path.replace(path.with_suffix(".previous.pt"))
        path.with_suffix(".new").replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError is how torch.save says that the disk is full
        path.with_suffix(".new").unlink(missing_ok=True)
        say(f"step {state['global_step']}: no checkpoint: {error}")


def load_checkpoint(path: Path) -> dict:
    """The newest sound checkpoint, {} if there never was one. It is data: loading it runs no code."""
    previous, complete = (
        path.with_suffix(".previous.pt"),
        path.with_suffix(".new"),
    )  # all but renamed, if sound
    for candidate in filter(Path.exists, (path, complete, previous)):
        try:
            if damaged := zipfile.ZipFile(candidate).testzip():  # torch.load does not look at the CRC-32
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True, mmap=True)
            if candidate == complete:
                complete.replace(path)
            return checkpoint
        except Exception as error:
            say(f"{candidate} is damaged: {error}")
    if path.exists() or previous.exists():
        refuse(f"no checkpoint in {path.parent} is sound; delete them to start over")
    return {}


def open_run(args: Args) -> tuple[Path, sqlite3.Connection]:
    """The run's folder, and a lock that keeps others out of it for as long as this process lives."""
    run_dir = Path(args.run_dir or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    path = run_dir / "args.json"
    if path.exists() and not args.resume:
        refuse(f"--run-dir {run_dir} already holds a run; --resume continues it")
    before = json.loads(path.read_text())["args"] if path.exists() else vars(args)
    free = "run_dir exp_name resume checkpoint_frequency capture_video video_frequency watch watch_episodes"
    free = f"{free} track wandb_project_name wandb_entity total_timesteps".split()
    changed = [name for name in vars(args) if vars(args)[name] != before.get(name) and name not in free]
    if changed or args.total_timesteps < before["total_timesteps"]:
        flags = [f"--{name.replace('_', '-')}" for name in changed or ["total_timesteps"]]
        refuse(f"--resume: {', '.join(flags)} was different in {path}")
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(run_dir / "lock", timeout=0, isolation_level=None)  # let go when the process dies
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        refuse(f"--run-dir {run_dir} is in use by another process")
    git = {"args": "git describe --always --dirty --abbrev=40", "cwd": Path(__file__).resolve().parent}
    commit = subprocess.run(**git, shell=True, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if args.cuda else f"CPU, {platform.platform()}"
    packages = ("torch", "gymnasium", "mujoco", "numpy")
    installed = importlib.metadata.distributions()
    versions = {package.name: package.version for package in installed if package.name in packages}
    record = {"args": vars(args), "versions": versions, "device": device, "git_commit": commit}
    path.with_suffix(".new").write_text(json.dumps(record, indent=2))
    path.with_suffix(".new").replace(path)
    return run_dir, lock


# ======== 11. Watching: shared ========
def play(actor: Actor, env_id: str, episodes: int, seed: int, folder: Path | None, device) -> list[float]:
    """Plays noise-free episodes into {folder}/rl-video-episode-{n}.mp4, or in a window if there is no folder.

    Raises RuntimeError, with what to install, where nothing can be rendered.
    """
    try:
        if folder:
            os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")
            env = gym.wrappers.RecordVideo(make_env(env_id, "rgb_array"), str(folder), lambda episode: True)
        else:
            env = make_env(env_id, "human")
        returns = evaluate(actor, env, episodes, seed, device)
        env.close()
    except Exception as error:
        raise RuntimeError(f"cannot show {env_id} ({error!r}); MuJoCo needs libegl1 or libosmesa6") from error
    return returns


def watch(args: Args) -> None:
    """Plays the policy of the run in --watch in a window or, without a display, into mp4 files."""
    run_dir = Path(args.watch)
    checkpoint = load_checkpoint(run_dir / "checkpoint.pt") or refuse(
        f"--watch {run_dir}: no checkpoint there"
    )
    saved = json.loads((run_dir / "args.json").read_text())["args"]
    if saved.keys() != vars(args).keys():
        refuse(f"--watch {run_dir}: that run is another script's")
    agent = Agent(*checkpoint["dimensions"], Args(**saved))
    agent.load_state_dict(checkpoint["agent"])
    window = sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}
    folder = None if window else run_dir / "videos" / f"watch-{checkpoint['global_step']}"
    env_id, device = saved["env_id"], torch.device("cpu")
    try:
        returns = play(agent.actor, env_id, args.watch_episodes, args.seed, folder, device)
    except RuntimeError as error:
        refuse(f"--watch {run_dir}: {error}")
    print("returns:", *(f"{episodic_return:.1f}" for episodic_return in returns))
    if folder:
        print(*(folder / f"rl-video-episode-{episode}.mp4" for episode in range(len(returns))), sep="\n")


# ======== 12. Training: shared ========
def check(args: Args) -> None:
    """Refuses values that cannot be meant."""
    may_be_zero = "seed learning_starts eval_frequency checkpoint_frequency gamma random_action_prob"
    may_be_zero = f"{may_be_zero} exploration_noise policy_noise noise_clip target_entropy".split()
    at_most_one = ["gamma", "tau", "random_action_prob", "learning_rate", "policy_lr", "q_lr"]
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = -sys.float_info.max if name == "target_entropy" else 0
            most = {"seed": 2**32 - 1}.get(name, 1 if name in at_most_one else sys.float_info.max)
            if not least <= value <= most or (value == 0 and name not in may_be_zero):
                refuse(f"--{name.replace('_', '-')} {value} is out of range")
    if args.batch_size > args.buffer_size:
        refuse(f"--batch-size {args.batch_size} is more than --buffer-size {args.buffer_size} can hold")
    if args.cuda and not torch.cuda.is_available():
        refuse("--cuda: PyTorch finds no CUDA device here")
    if args.resume and args.run_dir is None:
        refuse("--resume needs the --run-dir of the run")


def train(args: Args) -> Path:
    """Trains an agent, from its last checkpoint if the run is resumed; returns the run's folder.

    Raises FloatingPointError where an observation, action, reward, metric or parameter is not finite.
    """
    check(args)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch the whole buffer
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        # On AMD, oneDNN multiplies float32 matrices twice as fast as MKL. PyTorch gives it those that it may
        # round to bfloat16. Kept from instructions for that, oneDNN computes them in float32 all the same.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    env, eval_env, eval_seed = make_env(args.env_id), make_env(args.env_id), 10_000 * (1 + args.seed)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    needed = 4 * args.buffer_size * (2 * obs_dim + action_dim + 2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    memory = torch.cuda.mem_get_info()[1] if args.cuda else memory
    if needed > memory:
        refuse(f"--buffer-size {args.buffer_size} needs {needed:,} bytes of the {memory:,} there are")
    run_dir, lock = open_run(args)
    checkpoint = load_checkpoint(run_dir / "checkpoint.pt")
    log = Log(run_dir, args, checkpoint)

    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env.reset(seed=args.seed)
    env.action_space.seed(args.seed)
    generator, uniform = env.unwrapped.np_random.bit_generator, env.action_space.np_random.bit_generator
    agent = Agent(obs_dim, action_dim, args).to(device)
    update = torch.compile(agent.update) if args.compile else agent.update
    optimizers = {
        name: value for name, value in vars(agent).items() if isinstance(value, torch.optim.Optimizer)
    }
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    global_step, gradient_step, elapsed, actions, episodic_return = 0, 0, 0.0, [], 0.0
    latest, metrics = {"return": math.nan, "evaluation": math.nan}, {"actor_loss": torch.tensor(math.nan)}
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(deepcopy(checkpoint["optimizers"][name]))  # a copy, not the mapped file
        for parameter, gradient in zip(agent.parameters(), checkpoint["gradients"], strict=True):
            parameter.grad = (
                None if gradient is None else gradient.to(device, copy=True)
            )  # for the next log row
        buffer.rows[: len(checkpoint["rows"])], buffer.added = checkpoint["rows"], checkpoint["added"]
        global_step, gradient_step, elapsed, latest, metrics = checkpoint["progress"]
        generator.state, uniform.state = checkpoint["environment"]
        np.random.set_state(checkpoint["numpy"])
        torch.set_rng_state(checkpoint["torch"])
        torch.cuda.set_rng_state_all(checkpoint["cuda"])
    # The generator's state before a reset and the actions since determine the environment's state. So a run
    # may stop anywhere: on resuming, its last episode is played again up to there.
    episode_start = generator.state
    observation, _ = env.reset()
    for action in checkpoint.get("actions", []):
        actions.append(action.numpy())
        observation, reward, *_ = env.step(actions[-1])
        episodic_return += float(reward)
    started, last_step, last_elapsed = time.perf_counter() - elapsed, global_step, elapsed
    filming, checkpoint_due = args.capture_video, False
    signals = []  # one signal asks for a checkpoint and an end, two for an end at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number) if signals else signals.append(number))
    networks = f"two hidden layers of {args.hidden_dim} on {device}"
    print(
        f"{args.env_id}: {obs_dim} observations, {action_dim} actions, {networks}, buffer of {needed:,} bytes"
    )
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=None, dynamic_ncols=True)

    while global_step < args.total_timesteps and not signals:
        global_step += 1
        stop_unless_finite(agent, global_step, observation=observation)
        learning = global_step > args.learning_starts
        action = act(agent.explore, observation, device) if learning else env.action_space.sample()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        stop_unless_finite(agent, global_step, action=action, observation=next_observation, reward=reward)
        buffer.add(observation, action, next_observation, reward, terminated)
        observation = next_observation
        actions.append(action)
        episodic_return += float(reward)
        bar.update()

        if learning and global_step % args.train_frequency == 0:
            for _ in range(args.gradient_steps):
                gradient_step += 1
                updated = update(buffer.sample(args.batch_size), gradient_step)
                metrics |= updated
                if not args.cuda:  # a GPU would have to be waited for: there the next action or row tells
                    stop_unless_finite(agent, global_step, **updated)

        if terminated or truncated:
            latest["return"] = episodic_return
            row = {"episodic_return": episodic_return, "episodic_length": len(actions)}
            log.write("charts/episodes", global_step, row)
            episode_start, actions, episodic_return = generator.state, [], 0.0
            observation, _ = env.reset()
            agent.start_episode()
        if args.eval_frequency and global_step % args.eval_frequency == 0:
            returns = evaluate(agent.actor, eval_env, args.eval_episodes, eval_seed, device)
            latest["evaluation"] = float(np.mean(returns))
            row = {"episodic_return": latest["evaluation"], "episodic_return_std": float(np.std(returns))}
            row |= {f"return_{episode}": value for episode, value in enumerate(returns)}
            log.write("eval/evaluations", global_step, row)
        if global_step % args.log_frequency == 0:
            elapsed = time.perf_counter() - started
            speed = (global_step - last_step) / (elapsed - last_elapsed)
            last_step, last_elapsed = global_step, elapsed
            log.write("charts/timing", global_step, {"SPS": speed, "elapsed": elapsed})
            if gradient_step:
                row = {name: float(value) for name, value in metrics.items()}
                for name, optimizer in optimizers.items():
                    gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
                    row[name.replace("optimizer", "gradient_norm")] = float(
                        nn.utils.get_total_norm(gradients)
                    )
                row["buffer_size"] = min(buffer.added, args.buffer_size)
                log.write("losses/losses", global_step, row)
            bar.set_postfix(latest)
            if bar.disable:
                left = tqdm.format_interval((args.total_timesteps - global_step) / speed)
                figures = ", ".join(f"{name} {value:.1f}" for name, value in latest.items())
                print(f"step {global_step:,}: {speed:.0f} steps/s, {left} left, {figures}", flush=True)
        if filming and global_step % args.video_frequency == 0:
            folder = run_dir / "videos" / f"step-{global_step}"
            try:
                play(agent.actor, args.env_id, 1, eval_seed, folder, device)
                log.mirror({"videos/evaluation": folder / "rl-video-episode-0.mp4"}, global_step)
            except RuntimeError as error:
                filming = False
                say(f"no videos: {error}")
        checkpoint_due |= args.checkpoint_frequency > 0 and global_step % args.checkpoint_frequency == 0
        if signals or global_step == args.total_timesteps or (checkpoint_due and not actions):
            sums = {name: values.sum() for name, values in agent.state_dict().items()}
            stop_unless_finite(agent, global_step, **sums)
            kind, words, *rest = np.random.get_state()
            filled = buffer.rows.numpy(force=True)[: buffer.added]  # as torch saves all that a slice is of
            state = {
                "global_step": global_step,
                "progress": (global_step, gradient_step, time.perf_counter() - started, latest, metrics),
                "dimensions": (obs_dim, action_dim),
                "agent": agent.state_dict(),
                "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                "gradients": [parameter.grad for parameter in agent.parameters()],
                "rows": torch.from_numpy(filled),
                "added": buffer.added,
                "environment": (episode_start, uniform.state),
                "actions": [torch.from_numpy(action) for action in actions],
                "numpy": (kind, words.tolist(), *rest),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if args.cuda else [],
                "csv_bytes": {path.name: path.stat().st_size for path in run_dir.glob("*.csv")},
                "wandb_id": log.wandb_id,
            }
            save_checkpoint(run_dir / "checkpoint.pt", state)
            checkpoint_due = False

    bar.close()
    lock.close()
    print(f"{global_step:,} of {args.total_timesteps:,} steps are done; the results are in {run_dir}")
    if signals:
        sys.exit(128 + signals[0])
    return run_dir


# ======== 13. Command line: shared ========
if __name__ == "__main__":
    arguments = tyro.cli(Args)
    try:
        watch(arguments) if arguments.watch else train(arguments)
    except FloatingPointError as error:
        sys.exit(f"stopped at {error}")
