"""Deep Deterministic Policy Gradient (DDPG) for continuous control, in one file.

Lillicrap et al. 2016, "Continuous Control with Deep Reinforcement Learning", arXiv 1509.02971

    start from an actor μ, a critic Q, targets μ', Q' equal to them, and an empty buffer
    at each environment step:
        act with clip(μ(s) + noise, -1, 1), or uniformly until learning starts                        (E5)
        store (s, a, r, s', d); d = 1 only where the episode terminated
        every --train-frequency steps, --gradient-steps times, on a fresh minibatch:
            y = r + γ (1-d) Q'(s', μ'(s'))                                                            (E2)
            descend  mean (Q(s, a) - y)²                                         over Q               (E3)
            descend  -mean Q(s, μ(s))                                            over μ               (E4)
            μ', Q' ← (1-τ) μ' + τ μ, (1-τ) Q' + τ Q                                                   (E1)

Usage: python ddpg_continuous.py --env-id Hopper-v4
"""
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1"]
# ///

# ======== 2. Imports: shared ========
import contextlib
import ctypes.util
import json
import math
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch._dynamo  # now, as Triton's LLVM crashes if it comes after OSMesa's
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco.mujoco_env import mujoco
from torch import Tensor, nn
from torch.optim.adam import adam
from tqdm import tqdm


# ======== 3. Arguments: this algorithm's own ========
@dataclass
class Args:
    """Trains Deep Deterministic Policy Gradient on a Gymnasium task, or plays what it learned (--watch)."""

    learning_rate: float = 1e-3  # Adam's step size for the actor and the critic; lower it if losses blow up
    learning_starts: int = 25_000  # steps of uniform actions first; more where the task is hard to explore
    exploration_noise: float = 0.1  # std of the Gaussian noise on actions, which reach from -1 to 1
    ou_noise: bool = False  # the paper's Ornstein-Uhlenbeck noise instead: correlated in time, θ 0.15, σ 0.2
    ou_dt: float = 1.0  # time step of that noise; smaller is slower and smoother
    random_action_prob: float = 0.0  # probability of a uniform action instead, the ε-uniform policy
    # ======== 3. Arguments: shared ========
    env_id: str = "Hopper-v4"  # any Gymnasium task whose actions are a bounded Box
    seed: int = 1  # of networks, noise and environment; report several, not the best
    total_timesteps: int = 1_000_000  # environment steps; 100,000 already show whether returns rise
    gamma: float = 0.99  # discount γ: what comes later than 1/(1-γ) steps hardly counts
    tau: float = 0.005  # Polyak step τ of the targets (E1); larger is faster and less stable
    target_network_frequency: int = 1  # targets move at its multiples, if due; 200 with --tau 1 copies hard
    batch_size: int = 256  # transitions in a minibatch
    buffer_size: int = 1_000_000  # transitions kept for replay, the latest; lower it if memory is short
    hidden_dim: int = 256  # width of the two hidden layers of every network
    train_frequency: int = 1  # environment steps between gradient phases
    gradient_steps: int = 1  # updates in a gradient phase: more learn more from each step, and cost more
    eval_frequency: int = 10_000  # steps between noise-free evaluations; 0 for none, as endless tasks need
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
    compile: bool = False  # torch.compile the update: on a CPU 1.4 times as fast; needs a C++ compiler
    cudagraphs: bool = False  # on a GPU, replay each update as one CUDA graph; tried on an emulated GPU only
    threads: int = 2  # CPU threads of PyTorch: 2 suit one run alone, 1 several side by side
    torch_deterministic: bool = True  # have PyTorch choose deterministic kernels
    track: bool = False  # mirror the CSV files to Weights & Biases; WANDB_MODE=offline needs no account
    wandb_project_name: str = "continuous-control"  # where wandb files the run
    wandb_entity: str | None = None  # the wandb team or user that owns the project


# ======== 4. Networks: shared ========
class Linear(nn.Linear):
    """x Wᵀ + b: (B, input_dim) -> (B, output_dim), in two operations, as PyTorch's one is slower on a CPU."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight) + self.bias


def mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    """Two hidden layers of rectified units: (B, input_dim) -> (B, output_dim)."""
    first, second = Linear(input_dim, hidden_dim), Linear(hidden_dim, hidden_dim)
    relu = nn.ReLU(inplace=True)  # in place, to spare a copy
    return nn.Sequential(first, relu, second, relu, Linear(hidden_dim, output_dim))


class QNetwork(nn.Module):
    """Action value Q(s, a): observations (B, O), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        *hidden, head = mlp(obs_dim + action_dim, hidden_dim, 1)
        self.hidden, self.head = nn.Sequential(*hidden), head

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        hidden = self.hidden(torch.cat([observations, actions], dim=1))
        return torch.mv(hidden, self.head.weight[0]) + self.head.bias  # compiled, quicker than self.head


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
def td_target(batch: Batch, actor_target: Actor, qf1_target: QNetwork, args: Args) -> Tensor:
    """(E2) y = r + γ (1-d) Q'(s', μ'(s')): (B,)."""
    next_actions = actor_target(batch.next_observations)
    next_q = qf1_target(batch.next_observations, next_actions)
    return batch.rewards + args.gamma * (1 - batch.terminations) * next_q


def actor_loss(observations: Tensor, actor: Actor, qf1: QNetwork) -> Tensor:
    """(E4) -mean Q(s, μ(s)): its gradient is the chain rule ∇θ μ(s) · ∇a Q(s, a) at a = μ(s)."""
    return -qf1(observations, actor(observations)).mean()


# ======== 6. Agent: this algorithm's own ========
class Agent(nn.Module):
    """The networks of DDPG, how they explore and how they learn."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args.hidden_dim)
        self.qf1 = QNetwork(obs_dim, action_dim, args.hidden_dim)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.qf1_target = deepcopy(self.qf1).requires_grad_(False)
        self.register_buffer("ou_state", torch.zeros(action_dim))

        self.actor_parameters = list(self.actor.parameters())
        self.q_parameters = list(self.qf1.parameters())
        self.online_parameters = [*self.actor_parameters, *self.q_parameters]
        self.target_parameters = [*self.actor_target.parameters()]
        self.target_parameters += [*self.qf1_target.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(self.q_parameters, lr=args.learning_rate, fused=True)

    def start_episode(self) -> None:
        """The Ornstein-Uhlenbeck process starts afresh."""
        self.ou_state.zero_()

    def explore(self, observation: Tensor) -> Tensor:
        """(E5) clip(μ(s) + N, -1, 1), N Gaussian or dx = θ (0-x) dt + σ √dt ξ: (O,) -> (A,)."""
        args, action = self.args, self.actor(observation)
        noise = torch.randn_like(action)
        if args.ou_noise:
            self.ou_state += 0.15 * (0 - self.ou_state) * args.ou_dt + 0.2 * math.sqrt(args.ou_dt) * noise
            action = action + self.ou_state
        else:
            action = action + args.exploration_noise * noise
        if torch.rand(()) < args.random_action_prob:
            action = 2 * torch.rand_like(action) - 1
        return action.clamp(-1, 1)

    def update(self, batch: Batch, gradient_step: int) -> dict[str, Tensor]:
        """One gradient step on each network; returns the metrics to log, not yet read off the device."""
        args = self.args

        target_q = td_target(batch, self.actor_target, self.qf1_target, args)
        qf1_loss, qf1_values = critic_loss(batch, self.qf1, target_q)
        metrics = {"qf1_values": qf1_values.mean(), "qf1_loss": qf1_loss.detach()}
        metrics["target_q"] = target_q.mean()
        descend(self.q_optimizer, torch.autograd.grad(qf1_loss, self.q_parameters))

        loss = actor_loss(batch.observations, self.actor, self.qf1)
        metrics["actor_loss"] = loss.detach()
        descend(self.actor_optimizer, torch.autograd.grad(loss, self.actor_parameters))

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
        self.filled = torch.zeros((), dtype=torch.int64, device=device)  # a CUDA graph freezes numbers

    def add(self, observation, action, next_observation, reward: float, terminated: bool) -> None:
        """Stores a transition of NumPy arrays (O,), (A,), (O,); a full buffer loses its oldest."""
        row = np.concatenate((observation, action, next_observation, (reward, terminated)), dtype=np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1
        self.filled.fill_(min(self.added, len(self.rows)))

    def sample(self, batch_size: int) -> Batch:
        """A minibatch drawn uniformly, with replacement."""
        indices = torch.randint(2**62, (batch_size,), device=self.rows.device) % self.filled
        columns = self.rows.index_select(0, indices).split(self.widths, dim=1)
        observations, actions, next_observations, rewards, terminations = columns
        return Batch(observations, actions, rewards.squeeze(1), next_observations, terminations.squeeze(1))


# ======== 8. Environment and evaluation: shared ========
def make_env(env_id: str, **options) -> gym.Env:
    """The task with observations flattened to (O,) and actions in [-1, 1]^A, mapped onto its bounds (E0)."""
    warnings.filterwarnings("ignore", message=".*is out of date")  # the v4 tasks are meant
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or warnings.warn(text, stacklevel=2))
    with one_line(f"--env-id {env_id}", gym.error.Error, ImportError, ValueError, fatal=True):
        env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, **options))
    box, seen = env.action_space, env.observation_space
    bounded = isinstance(box, gym.spaces.Box) and box.is_bounded()
    refuse(not bounded, f"--env-id {env_id}: its actions are {box}, not a bounded Box")
    refuse(not seen.is_np_flattenable, f"--env-id {env_id}: its observations, {seen}, cannot be flattened")
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)

    def rescale(action: np.ndarray) -> np.ndarray:
        weight = (1 + action.reshape(box.shape).astype(np.float64)) / 2  # so -1 and 1 are the bounds exactly
        action = ((1 - weight) * low + weight * high).clip(low, high)
        return (action.round() if box.dtype.kind in "iu" else action).astype(box.dtype)

    env = gym.wrappers.TransformAction(env, rescale, gym.spaces.Box(-1.0, 1.0, (low.size,)))
    return gym.wrappers.FlattenObservation(env)


@torch.no_grad()
def act(policy: Callable, observation: np.ndarray, device: torch.device) -> np.ndarray:
    """What a policy on tensors does at one observation: (O,) -> (A,)."""
    return policy(torch.tensor(observation, dtype=torch.float32, device=device)).cpu().numpy()


def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: int, device: torch.device) -> list[float]:
    """Returns of noise-free episodes, from the same starts for the same seed; random generators stay."""
    returns, state = [], np.random.get_state()
    for episode in range(episodes):
        observation, info = env.reset(seed=seed + episode)
        while "episode" not in info:
            observation, *_, info = env.step(act(actor, observation, device))
        returns.append(float(info["episode"]["r"]))
    np.random.set_state(state)
    return returns


# ======== 9. Logging: shared ========
def refuse(condition: object, reason: str) -> None:
    """Where the condition holds, ends the program with one line and exit status 2."""
    if condition:
        tqdm.write(f"{Path(__file__).name}: error: {' '.join(reason.split())}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def one_line(text: str, *errors: type[Exception], fatal: bool = False):
    """Makes one line of such errors, which cost what failed and no more unless they are fatal."""
    try:
        yield
    except errors as error:
        refuse(fatal, f"{text}: {error}")
        tqdm.write(f"{text}: {error!r}", file=sys.stderr)


class Run:
    """A run's folder, locked while this process lives: CSV files, which wandb mirrors, and checkpoints."""

    def __init__(self, args: Args):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.args, self.track, self.dir = args, args.track, Path(args.run_dir or f"runs/{name}")
        path = self.dir / "args.json"
        old = json.loads(path.read_text())["args"] if path.exists() else {}
        refuse(old and not args.resume, f"--run-dir {self.dir} already holds a run; --resume continues it")
        free = ("run", "exp_", "resume", "checkpoint", "capture", "video", "watch", "track", "wandb", "total")
        changed = [k for k in old | vars(args) if old.get(k) != vars(args).get(k) and not k.startswith(free)]
        changed += ["total_timesteps"] * (args.total_timesteps < old.get("total_timesteps", 0))
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        refuse(old and changed, f"--resume: {flags} was different in {path}")
        with one_line(f"--run-dir {self.dir} is in use or no folder", OSError, sqlite3.Error, fatal=True):
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = sqlite3.connect(self.dir / "lock", timeout=0).execute("BEGIN EXCLUSIVE")
        self.saved = load_checkpoint(self.dir, repair=True)
        git = f'git -C "{Path(__file__).resolve().parent}" describe --always --dirty --abbrev=40'
        failed, commit = subprocess.getstatusoutput(git)
        device = torch.cuda.get_device_name() if args.cuda else f"CPU, {platform.platform()}"
        versions = {package.__name__: package.__version__ for package in (gym, mujoco, np, torch)}
        record = {"args": vars(args), "versions": versions, "device": device}
        record["git_commit"] = "" if failed else commit
        if self.saved.get("global_step") != args.total_timesteps:  # a finished run keeps its record
            path.with_suffix(".new").write_text(json.dumps(record, indent=2))
            path.with_suffix(".new").replace(path)
        self.wandb_id = self.saved.get("wandb_id") or os.urandom(4).hex()
        for name in ("episodes.csv", "evaluations.csv", "losses.csv", "timing.csv"):
            with open(self.dir / name, "ab") as file:
                size = self.saved.get("csv_bytes", {}).get(name, 0)
                refuse(file.tell() < size, f"--resume: {file.name} is shorter than it was at the checkpoint")
                file.truncate(size)  # later rows will come again

    def write(self, path: str, global_step: int, row: dict[str, float]) -> None:
        """Appends a row to {name}.csv, where path is {wandb's prefix}/{name}; columns' names come first."""
        (prefix, name), row = path.split("/"), {"global_step": global_step} | row
        file_path = self.dir / f"{name}.csv"
        size = file_path.stat().st_size
        lines = [",".join(map(str, values)) + "\n" for values in (row, row.values())][size > 0 :]
        with one_line(f"step {global_step}: no row in {file_path}", OSError):
            with open(file_path, "a", newline="") as file:
                file.writelines(lines)
            size += sum(map(len, lines))
        os.truncate(file_path, size)  # a full disk costs whole rows
        self.mirror({f"{prefix}/{key}": value for key, value in row.items()}, global_step)

    def mirror(self, metrics: dict, global_step: int) -> None:
        """Sends metrics to wandb; the first failure turns it off, as the CSV files are the record."""
        track, self.track = self.track, False
        with one_line("Weights & Biases failed, and is off from here on", Exception):
            if track:
                import wandb

                if wandb.run is None:
                    where = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
                    where |= {"dir": self.dir, "id": self.wandb_id, "name": self.dir.name}
                    wandb.init(**where, config=vars(self.args), resume="allow")
                films = {k: wandb.Video(str(v)) for k, v in metrics.items() if isinstance(v, Path)}
                wandb.log({"global_step": global_step} | metrics | films, step=global_step)
            self.track = track

    # ======== 10. Checkpoint: shared ========
    def save(self, global_step: int, state: dict) -> None:
        """Puts a checkpoint in place at one stroke and keeps the one before; a full disk costs neither."""
        path, previous, new = (self.dir / f"checkpoint.{suffix}" for suffix in ("pt", "previous.pt", "new"))
        state |= {"global_step": global_step, "wandb_id": self.wandb_id, "csv_bytes": {}}
        with one_line(f"step {global_step}: no checkpoint", OSError, RuntimeError):  # torch's for a full disk
            for record in self.dir.glob("*.csv"):
                with open(record, "ab") as file:
                    os.fsync(file.fileno())  # a power cut must not make it shorter than is said here
                    state["csv_bytes"][record.name] = file.tell()
            with open(new, "wb") as file:
                torch.save(state, file)
                os.fsync(file.fileno())
            if path.exists():
                path.replace(previous)
            new.replace(path)
        new.unlink(missing_ok=True)


def load_checkpoint(run_dir: Path, repair: bool = False) -> dict:
    """The newest sound checkpoint, {} if there never was one. It is data: loading it runs no code."""
    paths = [run_dir / "checkpoint.pt", run_dir / "checkpoint.previous.pt"]
    for path in filter(Path.exists, paths):
        with one_line(f"{path} is damaged", Exception):
            if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the CRC-32
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if repair:
                path.replace(paths[0])  # or the next checkpoint would take the place of the only sound one
            return saved
    refuse(any(run_dir.glob("*.pt")), f"no checkpoint in {run_dir} is sound; delete them to start over")
    return {}


# ======== 11. Watching: shared ========
def play(actor: Actor, env_id: str, episodes: int, seed: int, folder: Path | None, device) -> list | None:
    """Returns of noise-free episodes in a window, or {folder}/rl-video-episode-{n}.mp4; None if it fails."""
    needed = "libegl1 and libopengl0, or libosmesa6"
    with one_line(f"cannot show {env_id}; MuJoCo needs {needed}", Exception, SystemExit):
        if folder and sys.platform == "linux":
            egl = all(map(ctypes.util.find_library, ("EGL", "OpenGL")))
            os.environ.setdefault("MUJOCO_GL", "egl" if egl else "osmesa")
        env = make_env(env_id, render_mode="rgb_array" if folder else "human")
        if renderer := getattr(env.unwrapped, "mujoco_renderer", None):
            follow = {"trackbodyid": 1} | (renderer.default_cam_config or {})  # 1 is the torso
            renderer.default_cam_config = follow | {"type": mujoco.mjtCamera.mjCAMERA_TRACKING}
            renderer.camera_id = None  # by itself Gymnasium's camera stands still
        env = gym.wrappers.RecordVideo(env, str(folder), lambda episode: True) if folder else env
        with contextlib.closing(env):
            return evaluate(actor, env, episodes, seed, device)


def watch(args: Args) -> None:
    """Plays the policy of the run in --watch in a window or, without a display, into mp4 files."""
    check(args)
    run_dir, cpu = Path(args.watch), torch.device("cpu")
    saved, path = load_checkpoint(run_dir), run_dir / "args.json"
    refuse(not saved or not path.exists(), f"--watch {run_dir}: no run with a checkpoint there")
    old = json.loads(path.read_text())["args"]
    refuse(old.keys() != vars(args).keys(), f"--watch {run_dir}: that run is another script's")
    agent = Agent(*saved["dimensions"], Args(**old))
    agent.load_state_dict(saved["agent"])
    window = sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}
    folder = None if window else run_dir / "videos" / f"watch-{saved['global_step']}"
    returns = play(agent.actor, old["env_id"], args.watch_episodes, args.seed, folder, cpu) or sys.exit(2)
    print("returns:", *(f"{episodic_return:.1f}" for episodic_return in returns))
    print(*(folder / f"rl-video-episode-{n}.mp4" for n in range(len(returns)) if folder), sep="\n")


# ======== 12. Training: shared ========
@torch.no_grad()
def descend(optimizer: torch.optim.Adam, gradients: tuple[Tensor, ...]) -> None:
    """optimizer.step() along these gradients of its own parameters, in a form that --compile can trace."""
    group, compiling = optimizer.param_groups[0], torch.compiler.is_compiling()
    parameters, (beta1, beta2) = group["params"], group["betas"]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad, state = gradient, optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    steps, means, squares = map(list, zip(*(optimizer.state[p].values() for p in parameters), strict=True))
    settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
    settings |= {"beta1": beta1, "beta2": beta2, "capturable": compiling, "fused": not compiling}
    adam(parameters, list(gradients), means, squares, [], steps, **settings)


def replayed(learn: Callable, agent: Agent, args: Args) -> Callable[[int], dict[str, Tensor]]:
    """learn(gradient_step) recorded as a CUDA graph, which launches all of its kernels at one stroke.

    A replay runs no Python: each way through the branches on gradient_step, which these periods decide, has a
    graph, and in it a place for its metrics and gradients. Noise is new, from the device's own generator.
    """
    periods = args.target_network_frequency, getattr(args, "policy_frequency", 1)
    calls, graphs = {}, {}
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())  # as nothing can be recorded on the default one

    def replay(gradient_step: int) -> dict[str, Tensor]:
        way = tuple(gradient_step % period == 0 for period in periods)
        calls[way] = calls.get(way, 0) + 1
        if calls[way] <= 3:  # what is compiled or set up at first must not be recorded
            return learn(gradient_step)
        if way not in graphs:
            graph, before = torch.cuda.CUDAGraph(), {p: p.grad for p in agent.parameters()}
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                metrics = learn(gradient_step)
            graphs[way] = graph, metrics, {p: p.grad for p in before if p.grad is not before[p]}
        graph, metrics, gradients = graphs[way]
        graph.replay()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return metrics

    return replay


def check(args: Args) -> None:
    """Refuses values that cannot be meant."""
    zero = ("seed", "starts", "eval_frequency", "checkpoint_frequency", "gamma", "noise", "clip", "prob")
    one = ("gamma", "tau", "prob", "rate", "lr")
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = -(2**32) if name == "target_entropy" else 0 if name.endswith(zero) else sys.float_info.min
            most = 1 if name.endswith(one) else {"seed": 2**32 - 1, "threads": 2**10}.get(name, 2**63)
            refuse(not least <= value <= most, f"--{name.replace('_', '-')} {value} is out of range")
    batch, size = args.batch_size, args.buffer_size
    refuse(batch > size, f"--batch-size {batch} is more than --buffer-size {size} can hold")
    refuse(args.cuda and not torch.cuda.is_available(), "--cuda: PyTorch finds no CUDA device here")
    refuse(args.cudagraphs and not args.cuda, "--cudagraphs needs --cuda")
    compiler = any(map(shutil.which, ("c++", os.environ.get("CXX", "cl"))))
    refuse(args.compile and not compiler, "--compile: there is no C++ compiler on the PATH")
    refuse(args.resume and not args.run_dir, "--resume needs the --run-dir of the run")


def train(args: Args) -> Path:
    """Trains an agent, or resumes; returns the run's folder. FloatingPointError names what is not finite."""
    check(args)
    device, steps = torch.device("cuda" if args.cuda else "cpu"), args.total_timesteps
    torch.set_flush_denormal(True)  # they are slow; the threads, still to be started, will inherit it
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch the whole buffer
    products, precision = torch.backends.mkldnn.matmul, "ieee"
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        # On AMD, oneDNN multiplies float32 matrices twice as fast as MKL. PyTorch gives it those that it may
        # round to bfloat16. Kept from instructions for that, oneDNN computes them in float32 all the same.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
        precision = "bf16"
    env, eval_env, eval_seed = make_env(args.env_id), make_env(args.env_id), 10_000 * (1 + args.seed)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    needed = 4 * args.buffer_size * (2 * obs_dim + action_dim + 2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    memory = torch.cuda.mem_get_info()[1] if args.cuda else memory
    refuse(needed > memory, f"--buffer-size needs {needed:,} bytes of the {memory:,} there are")

    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env.reset(seed=args.seed)
    env.action_space.seed(args.seed)
    generator, uniform = env.unwrapped.np_random.bit_generator, env.action_space.np_random.bit_generator
    agent = Agent(obs_dim, action_dim, args).to(device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    run = Run(args)
    saved = run.saved
    update = agent.update
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad would split the graph
        options = {"fallback_random": True, "cpp_wrapper": not args.cuda}  # eager code's noise; less Python
        options |= {"pattern_matcher": False, "size_asserts": False}  # biases apart from products; no checks
        update = torch.compile(update, options=options)

    def learn(gradient_step: int) -> dict[str, Tensor]:
        return update(buffer.sample(args.batch_size), gradient_step)

    learn = replayed(learn, agent, args) if args.cudagraphs else learn
    optimizers = {name: value for name, value in vars(agent).items() if name.endswith("_optimizer")}
    gradient_step, elapsed, latest = 0, 0.0, {"return": math.nan, "evaluation": math.nan}
    metrics = dict.fromkeys(("actor_loss", "actor_gradient_norm"), math.nan)  # where the first are late
    if saved:
        gradient_step, elapsed, latest, metrics = saved["progress"]
        for name, part in {"agent": agent, **optimizers}.items():
            part.load_state_dict(deepcopy(saved[name]))  # a copy, as Adam would go on in the mapped file
        buffer.rows[: len(saved["rows"])], buffer.added = saved["rows"], saved["added"]
        generator.state, uniform.state = saved["environment"]
        np.random.set_state(saved["numpy"][0])
        torch.set_rng_state(saved["torch"])
        torch.cuda.set_rng_state_all(saved["cuda"])
    # The generator's state before a reset and the actions since determine the environment's state. So a run
    # may stop anywhere: on resuming, its last episode is played again up to there.
    episode_start = generator.state, np.random.get_state()
    actions = list(saved["actions"].numpy()) if saved else []
    observation, _ = env.reset()
    for action in actions:
        observation, *_ = env.step(action)
    if saved:
        np.random.set_state(saved["numpy"][1])

    signals, stopping, filming = [], False, args.capture_video  # a signal asks for a checkpoint and an end
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    signal.signal(signal.SIGINT, lambda number, _: os._exit(130) if signals else signals.append(number))
    sizes = f"two hidden layers of {args.hidden_dim} on {device}, buffer of {needed:,} bytes"
    print(f"{args.env_id}: {obs_dim} observations, {action_dim} actions, {sizes}")
    global_step = last_step = saved.get("global_step", 0)
    bar = tqdm(total=steps, initial=global_step, unit="step", disable=None, dynamic_ncols=True)
    started = time.perf_counter() - elapsed

    while global_step < steps and not stopping:
        global_step += 1
        learning = global_step > args.learning_starts
        action = act(agent.explore, observation, device) if learning else env.action_space.sample()
        next_observation, reward, terminated, truncated, info = env.step(action)
        buffer.add(observation, action, next_observation, reward, terminated)
        actions.append(action)
        seen = observation.sum(dtype=float) + next_observation.sum(dtype=float)
        checked = {"observation": seen, "action": action.sum(), "reward": reward}
        observation = next_observation
        bar.update()

        products.fp32_precision = precision
        for _ in range(args.gradient_steps if learning and global_step % args.train_frequency == 0 else 0):
            gradient_step += 1
            updated = learn(gradient_step)
            metrics |= updated
            checked |= {} if args.cuda else updated  # a GPU is not waited for: there the next action tells
        products.fp32_precision = "ieee"  # for acting, as MKL is the faster with a single row
        stopping = bool(signals)
        saving = stopping or global_step == steps or global_step % (args.checkpoint_frequency or steps) == 0
        evaluating = global_step % (args.eval_frequency or math.inf) == 0
        if saving or evaluating or not all(map(math.isfinite, checked.values())):
            checked |= {name: value.sum() for name, value in agent.state_dict().items()}
        if broken := [name for name, value in checked.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"step {global_step}: not finite: {', '.join(broken)}")

        if "episode" in info:
            latest["return"] = float(info["episode"]["r"])
            row = {"episodic_return": latest["return"], "episodic_length": info["episode"]["l"]}
            run.write("charts/episodes", global_step, row)
            episode_start, actions = (generator.state, np.random.get_state()), []
            observation, _ = env.reset()
            agent.start_episode()
        if evaluating:
            returns = evaluate(agent.actor, eval_env, args.eval_episodes, eval_seed, device)
            latest["evaluation"] = float(np.mean(returns))
            row = {"episodic_return": latest["evaluation"], "episodic_return_std": float(np.std(returns))}
            row |= {f"return_{episode}": value for episode, value in enumerate(returns)}
            run.write("eval/evaluations", global_step, row)
        logging = global_step % args.log_frequency == 0
        if logging or saving:
            for name, optimizer in optimizers.items():
                if gradients := [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]:
                    metrics[name.replace("optimizer", "gradient_norm")] = nn.utils.get_total_norm(gradients)
        if logging:
            elapsed, last_elapsed = time.perf_counter() - started, elapsed
            speed, last_step = (global_step - last_step) / (elapsed - last_elapsed), global_step
            run.write("charts/timing", global_step, {"SPS": speed, "elapsed": elapsed})
            if gradient_step:
                row = {name: float(value) for name, value in metrics.items()}
                row["buffer_size"] = min(buffer.added, args.buffer_size)
                run.write("losses/losses", global_step, row)
            bar.set_postfix(latest)
            if bar.disable:
                left = tqdm.format_interval((steps - global_step) / speed)
                figures = ", ".join(f"{name} {value:.1f}" for name, value in latest.items())
                print(f"step {global_step:,}: {speed:.0f} steps/s, {left} left, {figures}", flush=True)
        if filming and global_step % args.video_frequency == 0:
            folder = run.dir / "videos" / f"step-{global_step}"
            if filming := play(agent.actor, args.env_id, 1, eval_seed, folder, device):  # or never again
                run.mirror({"videos/evaluation": folder / "rl-video-episode-0.mp4"}, global_step)
        if saving:
            state = {name: part.state_dict() for name, part in {"agent": agent, **optimizers}.items()}
            state |= {"dimensions": (obs_dim, action_dim), "added": buffer.added}
            state["actions"] = torch.from_numpy(np.array(actions, np.float32))
            state["progress"] = (gradient_step, time.perf_counter() - started, latest, metrics)
            filled = buffer.rows[: buffer.added].numpy(force=True)  # as torch saves all that a slice is of
            state |= {"rows": torch.from_numpy(filled), "torch": torch.get_rng_state()}
            numpy = episode_start[1], np.random.get_state()
            state["numpy"] = [(kind, words.tolist(), *rest) for kind, words, *rest in numpy]
            state["environment"] = episode_start[0], uniform.state
            state["cuda"] = [torch.cuda.get_rng_state()] if args.cuda else []
            run.save(global_step, state)

    bar.close()
    run.lock.connection.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"{global_step:,} of {steps:,} steps are done; the results are in {run.dir}")
    if global_step < steps:
        sys.exit(128 + signals[0])
    return run.dir


# ======== 13. Command line: shared ========
if __name__ == "__main__":
    arguments = tyro.cli(Args)
    try:
        watch(arguments) if arguments.watch else train(arguments)
    except FloatingPointError as error:
        sys.exit(f"stopped at {error}")
