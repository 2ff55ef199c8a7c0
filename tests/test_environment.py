"""The environment: its spaces, what is stored and recorded of each step, random actions, and evaluation.

The tests train on small environments, made here, whose every step can be worked out by hand. Other test files
use them too, and `quick_train`. What all three scripts share is tested on DDPG's, the fastest.
"""

import csv
import os
import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import stats

import ddpg_continuous as ddpg

LOW, HIGH = np.float32([-1.0, 2.0]), np.float32([3.0, 2.5])  # asymmetric, and unlike in the two dimensions


class Counter(gym.Env):
    """An environment whose observation tells where in which episode it is: (episode, step, last action).

    Episodes end in three ways, by turns: terminated at step 5; out of time at step 7, by Gymnasium's limit;
    terminated at step 7, just as the time is out. A reward is 100 × episode + step, counted before the step.
    Observations are written into one array again and again, as some simulators do.
    """

    history: list[tuple] = []  # (episode, step, action, terminated) of every step of every Counter

    def __init__(self):
        self.action_space = spaces.Box(LOW, HIGH)
        self.observation_space = spaces.Box(-1e6, 1e6, (4,))
        self.observation = np.zeros(4, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation[:] = self.observation[0] + 1, 0, 0, 0
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
        self.render_mode, self.steps = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.ones(1, np.float32), float(action[0]), self.steps == 4, False, {}


class Doubling(Steady):
    """Rewards of 1, 2 and 4 in an episode of three steps, and of 1 in one of one step, by turns."""

    length = 1

    def reset(self, *, seed=None, options=None):
        self.length = 4 - self.length
        return super().reset(seed=seed)

    def step(self, action):
        observation, *_ = super().step(action)
        return observation, 2.0 ** (self.steps - 1), self.steps == self.length, False, {}


class Anything(gym.Env):
    """Random samples of any observation space, any space of actions; an episode has ten steps."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or spaces.Box(-1.0, 1.0, (3,))
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.latest = 0, self.observation_space.sample()
        return self.latest, {}

    def step(self, action):
        self.steps, self.latest, self.received = self.steps + 1, self.observation_space.sample(), action
        return self.latest, 1.0, self.steps == 10, False, {}


def register(entry_point, **options) -> str:
    """Registers an environment under a name of its own, which it returns."""
    env_id = f"Tiny{len(gym.registry)}-v0"
    gym.register(env_id, entry_point, disable_env_checker=True, **options)
    return env_id


COUNTER = register(Counter, max_episode_steps=7)
STEADY = register(Steady)


def quick_train(script, run_dir: Path, **changes) -> Path:
    """Trains in this process, small and short unless `changes` say otherwise; returns the run's folder."""
    quick = {"env_id": COUNTER, "total_timesteps": 130, "learning_starts": 60, "log_frequency": 20}
    quick |= {"hidden_dim": 8, "batch_size": 8, "buffer_size": 1000, "eval_frequency": 0, "threads": 1}
    quick |= {"cuda": False, "compile": False}
    return script.train(script.Args(**(quick | changes), run_dir=str(run_dir)))


def rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file by column; fails on a row that is longer or shorter than the header."""
    header, *lines = csv.reader(path.read_text().splitlines())
    return [dict(zip(header, map(float, line), strict=True)) for line in lines]


def steps(path: Path) -> list[int]:
    """The column global_step of a CSV file."""
    return [row["global_step"] for row in rows(path)]


# ---- Spaces ----

BOXES = {
    "asymmetric": spaces.Box(np.float32([-3, 0, 5, -0.1]), np.float32([1, 7, 6, 100])),
    "two_pi": spaces.Box(0.0, 2 * np.pi, (12,)),
    "float64": spaces.Box(np.array([-0.4, 0.1]), np.array([0.4, 0.3]), dtype=np.float64),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", BOXES)
def test_e0_maps_each_dimension_affinely_onto_its_own_bounds(kind):
    """In the task's own precision, and not a rounding error beyond, which a task may refuse."""
    space = BOXES[kind]
    env = ddpg.make_env(register(Anything, kwargs={"action_space": space}), 1)
    assert env.action_space == spaces.Box(-1, 1, space.shape, space.dtype)
    rounding = 4 * np.finfo(space.dtype).eps * np.abs([space.low, space.high]).max(axis=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (50, *space.shape)).astype(space.dtype)
    actions[0], actions[1] = -1, 1
    for action in actions:
        env.step(action)
        received = env.unwrapped.received
        share = (action + 1.0) / 2  # of the way from low to high: E0 in another form
        assert np.all(np.abs(received - ((1 - share) * space.low + share * space.high)) <= rounding)
        assert received.dtype == space.dtype
        assert space.contains(received)


OBSERVATIONS = {
    "image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "float64 matrix": spaces.Box(-5.0, 5.0, (2, 3), np.float64),
    "dictionary": spaces.Dict(gear=spaces.Discrete(4), goal=spaces.Box(-1.0, 1.0, (2, 2))),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_are_flattened(kind, tmp_path):
    """Every number of an image or a dictionary is in its place; and an agent learns from them."""
    env_id = register(Anything, kwargs={"observation_space": OBSERVATIONS[kind]})
    env = ddpg.make_env(env_id, 1)
    observation, *_ = env.step(np.zeros(2))
    wanted = env.unwrapped.latest
    if kind == "dictionary":
        wanted = np.append(np.eye(4)[wanted["gear"]], wanted["goal"])
    np.testing.assert_array_equal(observation, np.ravel(wanted))
    quick_train(ddpg, tmp_path / "run", env_id=env_id, total_timesteps=65)


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("task", ["Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid"])
def test_mujoco_tasks_of_both_versions(task, version):
    """They exist, and what their motors get spans the motors' own bounds."""
    env = ddpg.make_env(f"{task}-{version}", 1)
    action = np.linspace(-1, 1, env.action_space.shape[0], dtype=np.float32)
    env.step(action)
    bound = {"Humanoid": 0.4}.get(task, 1.0)
    np.testing.assert_allclose(env.unwrapped.data.ctrl, bound * action, rtol=1e-6)


def test_only_known_warnings_are_silenced(tmp_path, monkeypatch, capfd):
    """Not a word of HalfCheetah-v4's age or of its model; but what MuJoCo says of a NaN shows."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = ddpg.make_env("HalfCheetah-v4", 1).unwrapped
        assert not caught
        env.data.qvel[:] = np.nan
        mujoco.mj_step(env.model, env.data)
    assert ["QVEL" in str(warning.message) for warning in caught] == [True]
    output = capfd.readouterr()
    assert output.out + output.err == ""
    assert not os.listdir()  # MuJoCo writes MUJOCO_LOG.TXT by default


# ---- What is stored, and what is recorded ----


@pytest.mark.parametrize("capacity", [1000, 50])
def test_what_is_stored_of_each_step(capacity, tmp_path):
    """Every stored transition is one that happened: also at an episode's end, and after the ring wraps.

    s' is never a reset observation, d = 1 for a termination alone, and the action is the one that the
    environment got, normalised. The buffer holds the last `capacity` transitions and nothing else.
    """
    Counter.history.clear()
    run_dir = quick_train(ddpg, tmp_path / "run", buffer_size=capacity)
    happened = {(episode, step): (action, end) for episode, step, action, end in Counter.history[-capacity:]}
    ends = [end for _, end in happened.values()]
    assert len(happened) == min(capacity, 130)
    assert 3 <= sum(ends) < len(ends)

    buffer = ddpg.ReplayBuffer(capacity, 4, 2, torch.device("cpu"))
    buffer.load_state_dict(torch.load(run_dir / "checkpoint.pt")["buffer"])
    seen = set()
    for s, a, r, s2, d in zip(*(field.double().numpy() for field in buffer.sample(3000)), strict=True):
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


def test_episodes_are_recorded_as_they_were(tmp_path, monkeypatch):
    """episodes.csv has each whole episode's last step, return and length, and then noise starts afresh."""
    Counter.history.clear()
    fresh = []
    monkeypatch.setattr(ddpg.Agent, "start_episode", lambda agent: fresh.append(len(Counter.history)))
    recorded = rows(quick_train(ddpg, tmp_path / "run") / "episodes.csv")
    starts = [number for number, (_, step, *_) in enumerate(Counter.history) if step == 0]
    assert len(starts) > 15
    for row, start, end in zip(recorded, starts[:-1], starts[1:], strict=True):
        total = sum(100.0 * episode + step for episode, step, *_ in Counter.history[start:end])
        assert row == {"global_step": end, "episodic_return": total, "episodic_length": end - start}
    assert fresh == starts[1:]


def test_random_actions_are_uniform(tmp_path):
    """Before learning_starts actions are uniform over the task's own bounds, and independent."""
    Counter.history.clear()
    quick_train(ddpg, tmp_path / "run", total_timesteps=4000, learning_starts=4000, buffer_size=5000)
    actions = np.array([action for _, _, action, _ in Counter.history])
    unit = (actions - LOW) / (HIGH - LOW)
    for values in unit.T:
        assert stats.kstest(values, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05  # three standard errors of 4000
    assert abs(np.corrcoef(unit.T)[0, 1]) < 0.05


# ---- Evaluation ----


def evaluated(run_dir: Path) -> np.ndarray:
    """Each episode's return in evaluations.csv: (evaluations, episodes)."""
    table = rows(run_dir / "evaluations.csv")
    return np.array([[row[name] for name in row if name.startswith("return_")] for row in table])


def test_evaluation_is_free_of_noise(tmp_path):
    """On a task without chance all episodes of an evaluation are one, that of the actor alone."""
    options = {"eval_frequency": 26, "eval_episodes": 3, "exploration_noise": 0.5}
    run_dir = quick_train(ddpg, tmp_path / "run", env_id=STEADY, **options)
    returns = evaluated(run_dir)
    assert returns.shape == (5, 3)
    np.testing.assert_array_equal(returns, returns[:, :1].repeat(3, axis=1))
    assert len(np.unique(returns[:, 0])) >= 3  # the policy did change in between

    actor = ddpg.Actor(1, 1, 8)
    actor.load_state_dict(torch.load(run_dir / "policy.pt"))
    assert returns[-1, 0] == pytest.approx(4 * actor(torch.ones(1, 1)).item(), abs=1e-5)


def test_evaluation_starts_from_the_same_seeds_every_time(tmp_path):
    """Its episodes differ from each other, but are those of the run's every evaluation."""
    options = {"env_id": "Pendulum-v1", "eval_frequency": 20, "eval_episodes": 3}
    returns = evaluated(quick_train(ddpg, tmp_path / "run", total_timesteps=60, **options))
    np.testing.assert_array_equal(returns, returns[:1].repeat(3, axis=0))  # as nothing was learned yet
    assert len(np.unique(returns)) == 3


@pytest.mark.parametrize("total, wanted", [(130, [50, 100, 130]), (100, [50, 100])])
def test_when_evaluations_are_made(total, wanted, tmp_path):
    """Every eval_frequency steps and after the last one, but not twice."""
    options = {"total_timesteps": total, "eval_frequency": 50, "eval_episodes": 1}
    run_dir = quick_train(ddpg, tmp_path / "run", learning_starts=90, **options)
    assert steps(run_dir / "evaluations.csv") == wanted


def test_evaluations_are_summed_up(tmp_path):
    """With γ = 1/2 the states of an episode of 1, 2, 4 are worth 3, 4 and 4, that of 1 is worth 1."""
    options = {"env_id": register(Doubling), "gamma": 0.5, "eval_frequency": 70, "eval_episodes": 2}
    run_dir = quick_train(ddpg, tmp_path / "run", total_timesteps=70, **options)
    (row,) = rows(run_dir / "evaluations.csv")
    assert {row.pop("return_0"), row.pop("return_1")} == {1, 7}
    summary = {"episodic_return": 4, "episodic_return_std": 3, "discounted_return": 3}
    assert row == {"global_step": 70} | summary


def test_evaluation_leaves_training_alone(tmp_path):
    """With evaluation on or off, in the middle of episodes too, training is the same bit for bit."""
    options = {"env_id": "Hopper-v4", "eval_episodes": 2, "ou_noise": True}
    off = quick_train(ddpg, tmp_path / "off", **options, eval_frequency=0)
    on = quick_train(ddpg, tmp_path / "on", **options, eval_frequency=9)
    assert not (off / "evaluations.csv").exists()
    assert len(rows(on / "evaluations.csv")) == 15
    for name in ("losses.csv", "episodes.csv", "policy.pt"):
        assert (off / name).read_bytes() == (on / name).read_bytes(), name
