"""Looking at what was learned: load_policy, --watch and --capture-video.

Most films are of a task that draws itself, so that they need no library for graphics.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import torch
from conftest import run
from test_environment import Steady, quick_train, register

import ddpg_continuous as ddpg
import sac_continuous as sac

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be without a display")

MP4 = "rl-video-episode-0.mp4"


class Picture(Steady):
    """Observations are a number drawn at the reset, rewards 1000 × the action; pictures count the steps."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 30}
    modes: list = []  # the render modes of all environments made

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.modes.append(render_mode)

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.number = self.np_random.random(1, np.float32)
        return self.number, info

    def step(self, action):
        _, reward, *ends = super().step(action)
        return self.number, 1000 * reward, *ends

    def render(self):
        return np.full((64, 64, 3), 50 * self.steps, np.uint8)


class Blind(Steady):
    """One that can be made for pictures, and then cannot draw any."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def render(self):
        raise RuntimeError("no library\nfor graphics")


PICTURE, BLIND = register(Picture), register(Blind)


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    """No display, and no say in how MuJoCo draws."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")  # which counts as unset
    Picture.modes.clear()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of SAC's run on the task that draws itself."""
    return quick_train(sac, tmp_path_factory.mktemp("trained") / "run", env_id=PICTURE)


def watch(script, run_dir: Path, **changes) -> None:
    """`--watch RUN_DIR`, in this process."""
    script.watch(script.Args(watch=str(run_dir), cuda=False, **changes))


# ---- What was learned


def test_load_policy_needs_two_files_alone(trained, tmp_path):
    """On a machine without the GPU that the run was on, it has the trained agent's actor."""
    shutil.copy(trained / "policy.pt", tmp_path)
    saved = json.loads((trained / "args.json").read_text())
    saved["args"]["cuda"] = True
    (tmp_path / "args.json").write_text(json.dumps(saved))
    actor, agent = sac.load_policy(tmp_path).actor, torch.load(trained / "checkpoint.pt")["agent"]
    for name, weights in actor.state_dict().items():
        assert torch.equal(weights, agent[f"actor.{name}"])


@pytest.mark.parametrize("seed", [1, 7])
def test_watch_plays_the_policy_without_noise(seed, trained, tmp_path, capsys):
    """The episode that --seed starts; it prints the return, and the film's path."""
    run_dir = shutil.copytree(trained, tmp_path / "run")
    watch(sac, run_dir, seed=seed)
    start = gym.utils.seeding.np_random(seed)[0].random(1, np.float32)
    action = sac.load_policy(trained).act(start).item()
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"return: {4000 * action:.1f}", f"film: {run_dir}/videos/watch/{MP4}"]
    assert output.err == ""
    frames = imageio.v3.imread(run_dir / "videos" / "watch" / MP4)
    assert [round(frame.mean() / 50) for frame in frames] == [0, 1, 2, 3, 4]
    assert os.environ["MUJOCO_GL"] == "egl"


def test_watch_with_a_display_opens_a_window(trained, monkeypatch, capsys):
    monkeypatch.setenv("DISPLAY", ":0")
    before = set(trained.rglob("*"))
    watch(sac, trained)
    assert "human" in Picture.modes
    assert "rgb_array" not in Picture.modes
    assert "film" not in capsys.readouterr().out
    assert set(trained.rglob("*")) == before


NOTHING = {
    "no folder": lambda run_dir: shutil.rmtree(run_dir),
    "no checkpoint yet": lambda run_dir: (run_dir / "policy.pt").unlink(),
    "args.json in part": lambda run_dir: os.truncate(run_dir / "args.json", 99),
    "policy.pt in part": lambda run_dir: os.truncate(run_dir / "policy.pt", 999),
    "another script's": lambda run_dir: None,
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_to_watch(what, trained, tmp_path, capsys):
    """Exit status 2, one line, and nothing written."""
    run_dir = shutil.copytree(trained, tmp_path / "run")
    NOTHING[what](run_dir)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        watch(ddpg if what == "another script's" else sac, run_dir)
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert "--watch" in output.err or str(run_dir) in output.err
    assert set(tmp_path.rglob("*")) == before


# ---- Films of a training


def test_captured_films(trained, tmp_path):
    """One at the start and one with each periodic checkpoint, and no change to what is learned."""
    options = {"env_id": PICTURE, "capture_video": True, "checkpoint_frequency": 50}
    run_dir = quick_train(sac, tmp_path / "run", **options)
    films = {path.parent.name: len(imageio.v3.imread(path)) for path in run_dir.rglob("*.mp4")}
    assert films == {"step-0": 5, "step-50": 5, "step-100": 5}
    for name in ("losses.csv", "episodes.csv", "policy.pt"):
        assert (run_dir / name).read_bytes() == (trained / name).read_bytes()


LIBRARIES = ["libegl1", "libopengl0", "libosmesa6"]


@pytest.mark.parametrize("env_id, words", [(BLIND, LIBRARIES), ("Pendulum-v1", ["pygame"])])
def test_a_film_that_cannot_be_made_says_what_is_missing(env_id, words, tmp_path, monkeypatch, capsys):
    """In one line, and at the start of the training, not at its first checkpoint."""
    monkeypatch.setitem(sys.modules, "pygame", None)  # which makes its import fail
    with pytest.raises(SystemExit, match="2"):
        quick_train(sac, tmp_path / "run", env_id=env_id, capture_video=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words)
    assert not (tmp_path / "run" / "timing.csv").exists()


# ---- MuJoCo's films

PROBE = "import gymnasium as gym; env = gym.make('HalfCheetah-v5', render_mode='rgb_array'); "
PROBE += "env.reset(); env.render()"
FAR = """
import gymnasium as gym
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv


class Far(HalfCheetahEnv):
    '''A cheetah that is carried away, four metres a step.'''

    def step(self, action):
        result = super().step(action)
        place = self.data.qpos.copy()
        place[0] += 4
        self.set_state(place, self.data.qvel)
        return result


gym.register("Far-v0", Far, max_episode_steps=12)
"""


def test_mujocos_camera_follows_over_an_endless_floor(tmp_path, monkeypatch):
    """The coloured body is in every frame, on black and white squares, which the model ends after 40 m."""
    for renderer in ("egl", "osmesa"):
        monkeypatch.setenv("MUJOCO_GL", renderer)
        probe = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, capture_output=True, check=False)
        if probe.returncode == 0:
            break
    else:
        pytest.skip("MuJoCo can draw neither by EGL nor by OSMesa here")

    (tmp_path / "far.py").write_text(FAR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_dir = quick_train(ddpg, tmp_path / "run", env_id="far:Far-v0", total_timesteps=65)
    done = run("ddpg_continuous", "--watch", run_dir)
    assert done.returncode == 0, done.stderr
    frames = imageio.v3.imread(run_dir / "videos" / "watch" / MP4).astype(float)
    assert frames.shape == (13, 480, 480, 3)
    red, _, blue = np.moveaxis(frames, -1, 0)
    assert ((red - blue > 40).sum(axis=(1, 2)) > 500).all()
    floor = red[:, -80:].reshape(13, 10, 8, 60, 8).mean(axis=(2, 4))  # blurred, as eyes would
    assert (floor.std(axis=(1, 2)) > 30).all()
