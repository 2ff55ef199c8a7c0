"""The environment: spaces, what is stored of an episode's end, random actions, warnings, and evaluation.

Most tests train on tiny environments made here, whose every step can be worked out by hand. Other test files
import these environments and `quick_train`.
"""

import contextlib
import csv
import math
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import run
from gymnasium import spaces
from scipy import stats

LOW, HIGH = np.float32([-1.0, 2.0]), np.float32([3.0, 2.5])  # asymmetric, and unlike in the two dimensions
MUJOCO = {  # the observations' and actions' widths, from Gymnasium's documentation
    "Hopper-v4": (11, 3),
    "Walker2d-v4": (17, 6),
    "HalfCheetah-v4": (17, 6),
    "Ant-v4": (27, 8),
    "Humanoid-v4": (376, 17),
    "Hopper-v5": (11, 3),
    "Walker2d-v5": (17, 6),
    "HalfCheetah-v5": (17, 6),
    "Ant-v5": (105, 8),
    "Humanoid-v5": (348, 17),
}


class Counter(gym.Env):
    """An environment whose observation tells where in which episode it is: (episode, step, last action).

    Episodes end in three ways, by turns: terminated at step 5; out of time at step 7, by Gymnasium's limit;
    terminated at step 7, just as the time is out. A reward is 100 × episode + step, counted before the step.
    Observations are written into one array again and again, as some simulators do.
    """

    history: list[
        tuple[int, int, np.ndarray, bool]
    ] = []  # every step of every Counter: also the action and d

    def __init__(self, render_mode=None):
        self.action_space = spaces.Box(LOW, HIGH)
        self.observation_space = spaces.Box(-1e6, 1e6, (4,))
        self.observation = np.zeros(4, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        episode = self.observation[0] + 1
        self.observation[:] = 0
        self.observation[0] = episode
        return self.observation, {}

    def step(self, action):
        episode, step = int(self.observation[0]), int(self.observation[1])
        terminated = (episode % 3 == 0 and step == 4) or (episode % 3 == 2 and step == 6)
        self.history.append((episode, step, action.copy(), terminated))
        self.observation[1] += 1
        self.observation[2:] = action
        return self.observation, 100.0 * episode + step, terminated, False, {}


class Steady(gym.Env):
    """Observation 1 for ever; the reward is the action; an episode has four steps."""

    def __init__(self, render_mode=None):
        self.action_space = spaces.Box(-1.0, 1.0, (1,))
        self.observation_space = spaces.Box(0.0, 2.0, (1,))
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.ones(1, np.float32), float(action[0]), self.steps == 4, False, {}


class Lottery(Steady):
    """The reward of its one step is drawn at the reset."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.prize = self.np_random.random()
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), self.prize, True, False, {}


class Plain(Steady):
    """One that knows nothing of rendering."""

    def __init__(self):
        super().__init__()


class Anything(gym.Env):
    """Samples of any observation space; keeps the actions that it gets; an episode has ten steps."""

    def __init__(self, observation_space=None, action_space=None, render_mode=None):
        self.observation_space = observation_space or spaces.Box(-1.0, 1.0, (3,))
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (2,))
        self.received = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.latest = self.observation_space.sample()
        return self.latest, {}

    def step(self, action):
        self.received.append(action)
        self.latest = self.observation_space.sample()
        return self.latest, 1.0, len(self.received) % 10 == 0, False, {}


def register(entry_point, **options) -> str:
    """Registers an environment under a name of its own, which it returns."""
    env_id = f"Tiny{len(gym.registry)}-v0"
    gym.register(env_id, entry_point, disable_env_checker=True, **options)
    return env_id


COUNTER = register(Counter, max_episode_steps=7)
STEADY = register(Steady)


@contextlib.contextmanager
def process_as_it_was():
    """Puts back what training changes for the whole process, for the sake of the tests that come later."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.backends.mkldnn.matmul.fp32_precision
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.mkldnn.matmul.fp32_precision = precision


def quick_train(script, run_dir: Path, **changes) -> Path:
    """Trains in this process, small and short unless `changes` say otherwise; returns the run's folder."""
    quick = {
        "env_id": COUNTER,
        "total_timesteps": 130,
        "learning_starts": 60,
        "hidden_dim": 8,
        "batch_size": 8,
    }
    quick |= {"buffer_size": 1000, "threads": 1, "eval_frequency": 0, "log_frequency": 20, "cuda": False}
    with process_as_it_was():
        return script.train(script.Args(**(quick | changes), run_dir=str(run_dir)))


def rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file by column; fails on a row that is longer or shorter than the header."""
    header, *lines = csv.reader(path.read_text().splitlines())
    return [dict(zip(header, map(float, line), strict=True)) for line in lines]


@pytest.fixture
def buffers(script, monkeypatch) -> list:
    """The replay buffers that a training makes."""
    made = []

    class Kept(script.ReplayBuffer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(script, "ReplayBuffer", Kept)
    return made


def test_an_environment_without_rendering_trains(script, tmp_path):
    """A constructor that takes no render_mode is no reason to refuse a task."""
    run_dir = quick_train(script, tmp_path / "run", env_id=register(Plain))
    assert rows(run_dir / "losses.csv")[-1]["global_step"] == 120


# ---- Actions (E0) ----

BOXES = {
    "float32": spaces.Box(-1.0, 1.0, (2,)),
    "not whole, as Humanoid's": spaces.Box(-0.4, 0.4, (17,)),
    "asymmetric": spaces.Box(0.0, 2 * math.pi, (12,)),
    "unlike per dimension": spaces.Box(np.float32([-1, 0, 5]), np.float32([3, 0.5, 9])),
    "float64": spaces.Box(np.array([-1e-3, 7.0]), np.array([1e-3, 11.0]), dtype=np.float64),
    "float16": spaces.Box(-0.7, 0.1, (2,), np.float16),
    "int64": spaces.Box(np.array([-3, 0]), np.array([4, 1]), dtype=np.int64),
    "uint8": spaces.Box(0, 255, (3,), np.uint8),
    "matrix": spaces.Box(np.float32([[-1, -2, -3], [0, 0, 0]]), np.float32([[1, 2, 3], [4, 5, 6]])),
}


def mapped(box: spaces.Box, action: np.ndarray) -> np.ndarray:
    """(E0), one element after the other in Python's floats, rounded where the box is integer."""
    flat = []
    for low, high, value in zip(box.low.flat, box.high.flat, action, strict=True):
        exact = float(low) + (float(high) - float(low)) * (float(value) + 1) / 2
        flat.append(round(exact) if box.dtype.kind in "iu" else exact)
    return np.array(flat).reshape(box.shape)


@pytest.mark.parametrize("kind", BOXES)
def test_actions_are_mapped_onto_any_bounded_box(script, kind):
    """The environment gets (u + l)/2 + (u - l)/2 · a, per dimension, in its shape and dtype and bounds."""
    box = BOXES[kind]
    env = script.make_env(register(Anything, kwargs={"action_space": box}))
    size = int(np.prod(box.shape))
    assert isinstance(env.action_space, spaces.Box)
    assert env.action_space.shape == (size,)
    assert (env.action_space.low == -1).all()
    assert (env.action_space.high == 1).all()

    env.reset(seed=0)
    generator = np.random.default_rng(0)
    actions = generator.uniform(-0.999, 0.999, (50, size)).astype(np.float32)
    actions[:3] = np.float32([[-1], [1], [0.001]])  # 0.001 rather than 0, for no integer is to be a tie
    for action in actions:
        env.step(action)
    received = env.unwrapped.received
    assert all(action.dtype == box.dtype and box.contains(action) for action in received)
    np.testing.assert_array_equal(received[0], box.low)
    np.testing.assert_array_equal(received[1], box.high)
    # An element has the relative precision of its dtype, and of its float32 action before the mapping.
    finest = max(np.finfo(np.float32).eps, 0 if box.dtype.kind in "iu" else np.finfo(box.dtype).eps)
    scale = np.maximum(np.abs(box.low.astype(float)), np.abs(box.high.astype(float)))
    for action, result in zip(actions, received, strict=True):
        error = np.abs(result.astype(float) - mapped(box, action))
        assert (error <= (0 if box.dtype.kind in "iu" else 2 * finest * scale)).all()


@pytest.mark.parametrize("kind", ["int64", "uint8", "float64", "matrix"])
def test_training_on_other_action_spaces(script, kind, tmp_path, buffers):
    """Integer, float64 and matrix actions train; what is stored is the flat normalised action."""
    env_id = register(Anything, kwargs={"action_space": BOXES[kind]})
    quick_train(script, tmp_path / "run", env_id=env_id)
    actions = buffers[0].sample(1000).actions
    assert actions.shape == (1000, int(np.prod(BOXES[kind].shape)))
    assert -1 <= actions.min() < -0.5
    assert 0.5 < actions.max() <= 1


# ---- Observations ----

OBSERVATIONS = {
    "uint8 image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "float64 matrix": spaces.Box(-5.0, 5.0, (2, 3), np.float64),
    "dictionary": spaces.Dict(
        {
            "position": spaces.Box(-2.0, 2.0, (2, 2)),
            "goal": spaces.Box(-1.0, 1.0, (3,)),
            "gear": spaces.Discrete(4),
        }
    ),
    "tuple": spaces.Tuple([spaces.Box(-2.0, 2.0, (2,)), spaces.Box(0, 9, (2, 2), np.int64)]),
}


def flat(space: spaces.Space, value) -> list[float]:
    """An observation's numbers in order: a dictionary's in its space's order, a Discrete as one-hot."""
    if isinstance(space, spaces.Dict):
        return [number for key in space for number in flat(space[key], value[key])]
    if isinstance(space, spaces.Tuple):
        return [number for part, item in zip(space, value, strict=True) for number in flat(part, item)]
    if isinstance(space, spaces.Discrete):
        return [float(item == value) for item in range(space.n)]
    return [float(item) for item in value.ravel()]


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_are_flattened(script, kind, tmp_path, buffers):
    """Whatever Gymnasium can flatten becomes (O,) with every number in its place, and trains."""
    space = OBSERVATIONS[kind]
    env_id = register(Anything, kwargs={"observation_space": space})
    env = script.make_env(env_id)
    for _ in range(5):
        observation, _ = env.reset()
        wanted = flat(space, env.unwrapped.latest)
        assert observation.shape == env.observation_space.shape == (len(wanted),)
        np.testing.assert_array_equal(observation.astype(float), wanted)

    quick_train(script, tmp_path / "run", env_id=env_id)
    batch = buffers[0].sample(1000)
    assert batch.observations.shape == batch.next_observations.shape == (1000, len(wanted))
    assert batch.observations.dtype == torch.float32
    assert batch.observations.std() > 0.3  # and they are the numbers, not zeros


# ---- MuJoCo ----


@pytest.mark.parametrize("env_id", MUJOCO)
def test_mujoco_tasks_of_both_versions(script, env_id):
    """Both versions of the five tasks exist, in the documented sizes, and 1 is the actuators' upper bound."""
    observations, actions = MUJOCO[env_id]
    env = script.make_env(env_id)
    assert env.observation_space.shape == (observations,)
    assert env.action_space.shape == (actions,)
    env.reset(seed=0)
    action = np.linspace(-1, 1, actions, dtype=np.float32)
    env.step(action)
    bound = 0.4 if "Humanoid" in env_id else 1.0
    np.testing.assert_allclose(env.unwrapped.data.ctrl, bound * action, rtol=1e-6)
    env.close()


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Humanoid-v5"])
def test_mujoco_tasks_train(script, env_id, tmp_path, buffers):
    """Both versions train; on Humanoid, whose bounds are ±0.4, what is stored spans [-1, 1]."""
    quick_train(
        script, tmp_path / "run", env_id=env_id, total_timesteps=30, learning_starts=20, log_frequency=5
    )
    actions = buffers[0].sample(1000).actions
    assert -1 <= actions.min() < -0.8
    assert 0.8 < actions.max() <= 1
    assert rows(tmp_path / "run" / "losses.csv")[-1]["global_step"] == 30


NOISY = """
import warnings
import gymnasium as gym
import mujoco

warnings.warn("the robot is hot")
gym.logger.warn("the floor is wet")
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><body><freejoint/><geom size='1'/></body></worldbody></mujoco>"
)
data = mujoco.MjData(model)
data.qvel[:] = float("nan")
mujoco.mj_step(model, data)  # MuJoCo warns of this
"""


def test_warnings_that_are_meant_and_those_that_are_not(tmp_path, monkeypatch):
    """No "out of date", no "deprecated", no MUJOCO_LOG.TXT; but any other warning shows."""
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(
        *("sac_continuous", "--env-id", "noisy:HalfCheetah-v4", "--run-dir", "run", "--total-timesteps", 40),
        *("--learning-starts", 20, "--eval-frequency", 40, "--eval-episodes", 1, "--threads", 1),
        *("--hidden-dim", 8, "--batch-size", 8, "--no-cuda"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    terminal = done.stdout + done.stderr
    assert "out of date" not in terminal
    assert "deprecated" not in terminal
    assert "the robot is hot" in done.stderr
    assert "the floor is wet" in done.stderr
    assert "QVEL" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"noisy.py", "run"}


def test_one_version_of_a_task_alone_is_quiet(tmp_path):
    """A v4 run prints nothing at all on stderr."""
    done = run(
        *("td3_continuous", "--env-id", "HalfCheetah-v4", "--run-dir", "run", "--total-timesteps", 5),
        *("--eval-frequency", 0, "--threads", 1, "--no-cuda"),
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- What is stored ----


@pytest.mark.parametrize("capacity", [1000, 50])
def test_what_is_stored_of_each_step(script, capacity, tmp_path, buffers):
    """Every stored transition is one that happened: also at an episode's end, and after the ring wraps.

    s' is never a reset observation, d = 1 for a termination alone, and the action is the one that the
    environment got, normalised. The buffer holds the last `capacity` transitions and nothing else.
    """
    Counter.history.clear()
    quick_train(script, tmp_path / "run", buffer_size=capacity)
    happened = {(episode, step): (action, end) for episode, step, action, end in Counter.history[-capacity:]}
    ends = [end for _, end in happened.values()]
    assert len(happened) == min(capacity, 130)
    assert 3 <= sum(ends) < len(ends)

    batch = buffers[0].sample(5000)
    seen = set()
    for s, a, r, s2, d in zip(*(field.numpy().astype(float) for field in batch), strict=True):
        episode, step = int(s[0]), int(s[1])
        action, terminated = happened[episode, step]
        assert tuple(s2[:2]) == (episode, step + 1)
        assert r == 100 * episode + step
        assert d == terminated
        # The bounds' float32 values have a resolution of 2e-7, and the narrow range is 0.25 to either side.
        np.testing.assert_allclose(a, (action - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2), atol=3e-6)
        np.testing.assert_array_equal(s2[2:], action)
        seen.add((episode, step))
    assert seen == happened.keys()


def test_episodes_are_recorded_as_they_were(script, tmp_path):
    """episodes.csv has each whole episode's last step, return and length, worked out by hand."""
    Counter.history.clear()
    quick_train(script, tmp_path / "run")
    first = Counter.history[0][0]
    wanted, global_step, episode = [], 0, first
    while True:
        length = 5 if episode % 3 == 0 else 7
        global_step += length
        if global_step > 130:
            break
        total = 100.0 * episode * length + sum(range(length))
        wanted.append({"global_step": global_step, "episodic_return": total, "episodic_length": length})
        episode += 1
    assert rows(tmp_path / "run" / "episodes.csv") == wanted


# ---- Exploration ----


def test_random_actions_are_uniform(script, tmp_path):
    """Before learning_starts actions are uniform over the task's own bounds, and independent."""
    Counter.history.clear()
    quick_train(script, tmp_path / "run", total_timesteps=4000, learning_starts=4000)
    actions = np.array([action for _, _, action, _ in Counter.history])
    unit = (actions - LOW) / (HIGH - LOW)
    for values in unit.T:
        assert stats.kstest(values, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05  # three standard errors of 4000
    assert abs(np.corrcoef(unit.T)[0, 1]) < 0.05


def test_the_policy_acts_from_learning_starts_on(script, tmp_path, monkeypatch):
    """The first learning_starts actions are random, and each one after them is the agent's."""
    chosen, explore = [], script.Agent.explore

    def noting(self, observation):
        chosen.append(explore(self, observation))
        return chosen[-1]

    monkeypatch.setattr(script.Agent, "explore", noting)
    Counter.history.clear()
    quick_train(script, tmp_path / "run", total_timesteps=90, learning_starts=70)
    assert len(chosen) == 20
    assert len(Counter.history) == 90
    for action, (_, _, received, _) in zip(chosen, Counter.history[70:], strict=True):
        np.testing.assert_allclose(received, mapped(spaces.Box(LOW, HIGH), action.numpy()), rtol=1e-6)


# ---- Evaluation ----


def evaluated(run_dir: Path) -> np.ndarray:
    """Each episode's return in evaluations.csv: (evaluations, episodes)."""
    return np.array(
        [[row[key] for key in row if key.startswith("return_")] for row in rows(run_dir / "evaluations.csv")]
    )


def test_evaluation_is_free_of_noise(script, tmp_path):
    """On a task without chance all evaluation episodes are one, that of actor(s); training's are not."""
    noise = {"exploration_noise": 0.5} if "exploration_noise" in vars(script.Args()) else {}
    run_dir = quick_train(
        script, tmp_path / "run", env_id=STEADY, eval_frequency=26, eval_episodes=3, **noise
    )
    returns = evaluated(run_dir)
    assert returns.shape == (5, 3)
    np.testing.assert_array_equal(returns, returns[:, :1].repeat(3, axis=1))
    assert len(np.unique(returns[:, 0])) >= 3  # the policy did change in between

    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    agent = script.Agent(1, 1, script.Args(hidden_dim=8))
    agent.load_state_dict(checkpoint["agent"])
    assert returns[-1, 0] == pytest.approx(4 * float(agent.actor(torch.ones(1, 1))), abs=1e-5)
    explored = [row["episodic_return"] for row in rows(run_dir / "episodes.csv") if row["global_step"] > 60]
    assert len(set(explored)) == len(explored)


def test_evaluation_starts_from_the_same_seeds_every_time(script, tmp_path):
    """An evaluation's episodes start differently, but as those of every other evaluation of the run."""
    env_id = register(Lottery)
    run_dir = quick_train(script, tmp_path / "run", env_id=env_id, eval_frequency=40, eval_episodes=4)
    returns = evaluated(run_dir)
    assert returns.shape == (3, 4)
    np.testing.assert_array_equal(returns, returns[:1].repeat(3, axis=0))
    assert len(np.unique(returns)) == 4
    training = [row["episodic_return"] for row in rows(run_dir / "episodes.csv")]
    assert not set(training) & set(returns.ravel())


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1"])
def test_evaluation_leaves_training_alone(script, env_id, tmp_path):
    """With evaluation on or off, in the middle of episodes too, training is the same bit for bit."""
    options = {"env_id": env_id, "total_timesteps": 250, "learning_starts": 100, "eval_episodes": 2}
    off = quick_train(script, tmp_path / "off", **options, eval_frequency=0)
    on = quick_train(script, tmp_path / "on", **options, eval_frequency=43)
    assert len(rows(on / "evaluations.csv")) == 5
    assert not (off / "evaluations.csv").exists() or (off / "evaluations.csv").read_text() == ""
    for name in ("losses.csv", "episodes.csv"):
        assert (off / name).stat().st_size > 50
        assert (off / name).read_bytes() == (on / name).read_bytes(), name
    weights = [torch.load(path / "checkpoint.pt", weights_only=True)["agent"] for path in (off, on)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_evaluate_draws_no_random_numbers(script):
    """`evaluate` leaves Python's, NumPy's and PyTorch's generators, and the actor, as they were."""
    torch.manual_seed(0)
    env = script.make_env("Pendulum-v1")
    actor = script.Agent(3, 1, script.Args(hidden_dim=8)).actor
    python = sys.modules["random"].getstate() if "random" in sys.modules else None
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), [p.clone() for p in actor.parameters()]
    first = script.evaluate(actor, env, 2, 7, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert all(torch.equal(new, old) for new, old in zip(actor.parameters(), before[2], strict=True))
    assert python is None or sys.modules["random"].getstate() == python
    assert script.evaluate(actor, env, 2, 7, torch.device("cpu")) == first
    assert script.evaluate(actor, env, 2, 8, torch.device("cpu")) != first
