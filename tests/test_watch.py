"""Looking at what was learned: --watch and --capture-video, with a display, without one, and where nothing
can draw.

Each script runs in a process of its own, which sees no display unless a test gives it one.
"""

import ctypes.util
import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import SCRIPTS, run
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from test_resume import (
    DRIFT,
    Drift,
    Warm,
    contents,
    copy,
    drift,
    fake_wandb,
    finish,
    in_turn,
    start,
    wait_for,
)
from twenty_kills import SHORT, differences, results

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be without a display")

# What decides how a picture is drawn.
SCREENS = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")
PACKAGES = ("libegl1", "libopengl0", "libosmesa6")  # what helps where none can be drawn


class Picture(Drift):
    """The drifting point, drawn without any library for graphics: a bright square where it is."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 30}
    modes: Path | None = None  # file for the render modes asked for

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode
        if self.modes:
            with open(self.modes, "a") as file:
                file.write(f"{render_mode}\n")

    def render(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        x, y = np.clip(32 + 5 * self.position, 4, 60).astype(int)
        frame[x - 4 : x + 4, y - 4 : y + 4] = 255
        return frame


class Far(HalfCheetahEnv):
    """A cheetah that is carried away, one metre a step."""

    def step(self, action):
        result = super().step(action)
        place = self.data.qpos.copy()
        place[0] += 1
        self.set_state(place, self.data.qvel)
        return result


def headless(*more: Callable, **variables: str) -> None:
    """To prepare a process: of the variables for drawing it has only these; then come more steps."""
    for name in SCREENS:
        os.environ.pop(name, None)
    os.environ.update(variables)
    gym.register("Picture-v0", Picture)
    gym.register("Far-v0", Far, max_episode_steps=20)
    in_turn(*more)


def shown(modes: Path) -> None:
    """To prepare a process: it believes that it has a display, and notes which render modes are asked for."""
    import glfw

    headless(DISPLAY=":0")
    glfw.init = lambda: True
    Picture.modes = modes


def watching(script: str, run_dir: Path, *flags, prepare: Callable = headless, status: int = 0) -> str:
    """What `--watch RUN_DIR` prints, after a check of its exit status."""
    process = Warm(script, "--watch", run_dir, *flags, output=run_dir.with_suffix(".watch"), prepare=prepare)
    assert process.wait() == status, process.output()[-3000:]
    return process.output()


def films(output: str) -> list[Path]:
    """The video files whose paths were printed, each on a line."""
    return [Path(line) for line in output.splitlines() if line.endswith(".mp4")]


def read(path: Path) -> np.ndarray:
    """All frames of a video: (N, height, width, 3)."""
    import imageio.v3  # here, as the processes of the scripts have no use for it

    return imageio.v3.imread(path)


def returns(output: str) -> list[float]:
    """The returns printed after `returns:`."""
    (line,) = (line for line in output.splitlines() if line.startswith("returns:"))
    return [float(word) for word in line.split()[1:]]


def advice(output: str) -> list[str]:
    """The lines that name a package to install."""
    return [line for line in output.splitlines() if any(package in line for package in PACKAGES)]


@pytest.fixture
def name(script) -> str:
    """The name of each script in turn."""
    return script.__name__


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable:
    """trained(script, *flags) is the folder of a run that ended."""

    @functools.cache
    def train(script: str, *flags) -> Path:
        run_dir = tmp_path_factory.mktemp("trained") / "run"
        finish(script, run_dir, *flags, steps=300, prepare=headless)
        return run_dir

    return train


@pytest.fixture(scope="module")
def renderer(trained, tmp_path_factory) -> None:
    """Skips where MuJoCo cannot draw."""
    folder = copy(trained(SCRIPTS[0]), tmp_path_factory.mktemp("renderer") / "run")
    process = Warm(SCRIPTS[0], "--watch", folder, output=folder.with_suffix(".watch"), prepare=headless)
    if process.wait():
        pytest.skip(f"MuJoCo cannot draw here: {process.output()[-300:]}")


# ---- Watching


def test_watch_without_a_display_films(name, renderer, trained, tmp_path):
    """One video for each episode, and its path; a frame for each step, on which something can be seen and
    moves; the returns, which are as many as the steps in this task."""
    run_dir = copy(trained(name), tmp_path / "run")
    before = contents(run_dir)
    output = watching(name, run_dir, "--watch-episodes", 2)
    paths = films(output)
    assert len(paths) == len(set(paths)) == 2
    assert all(path.is_relative_to(run_dir) for path in paths)
    for path, episodic_return in zip(paths, returns(output), strict=True):
        frames = read(path)
        assert len(frames) == episodic_return + 1  # and the start
        assert frames[0].shape[:2] == (480, 480)
        assert frames[0].std() > 10
        assert np.abs(np.float32(frames[-1]) - frames[0]).max() > 50
    assert {file: data for file, data in contents(run_dir).items() if file in before} == before


def test_the_camera_follows(renderer, trained, tmp_path):
    """The body is in every frame: it alone is coloured, on a floor of grey and green squares."""
    run_dir = copy(trained("sac_continuous", "--env-id", "Far-v0"), tmp_path / "run")
    (path,) = films(watching("sac_continuous", run_dir))
    red, _, blue = np.moveaxis(np.float32(read(path)), -1, 0)
    assert ((red - blue > 40).sum(axis=(1, 2)) > 500).all()


def test_watch_again(trained, tmp_path):
    """The same seed gives the same episodes and another seed others; the default is one episode. What is
    printed is of this time only, though the videos of the last time are still there."""
    run_dir = copy(trained("sac_continuous", "--env-id", "Picture-v0"), tmp_path / "run")
    first = watching("sac_continuous", run_dir, "--watch-episodes", 3)
    again = watching("sac_continuous", run_dir)
    other = watching("sac_continuous", run_dir, "--seed", 7)
    assert len(returns(first)) == len(films(first)) == 3
    assert len(returns(again)) == len(films(again)) == 1
    assert returns(again) == returns(first)[:1]
    assert returns(other) != returns(again)


def test_watch_with_a_display_opens_a_window(name, trained, tmp_path):
    """The environment is asked to show itself to a human, and no video is made."""
    run_dir = copy(trained(name, "--env-id", "Picture-v0"), tmp_path / "run")
    prepare = functools.partial(shown, tmp_path / "modes")
    output = watching(name, run_dir, "--watch-episodes", 2, prepare=prepare)
    assert "human" in (tmp_path / "modes").read_text().split()
    assert len(returns(output)) == 2
    assert not list(run_dir.rglob("*.mp4"))


def test_watch_a_run_that_goes_on(name, tmp_path):
    """It plays the last checkpoint, and does not disturb the training."""
    picture = [*DRIFT, "--env-id", "Picture-v0"]
    finish(name, tmp_path / "alone", *picture, prepare=headless)
    run_dir, here, go = tmp_path / "run", tmp_path / "here", tmp_path / "go"
    wait = functools.partial(in_turn, here.touch, functools.partial(wait_for, go))
    faults = functools.partial(drift, {200: wait})
    process = start(name, run_dir, *picture, prepare=functools.partial(headless, faults))
    wait_for(here)
    assert films(watching(name, run_dir))
    go.touch()
    assert process.wait() == 0, process.output()
    assert not differences(run_dir, results(tmp_path / "alone"))


NOTHING = ["no folder", "an empty folder", "no checkpoint yet", "no args.json", "another script's run"]


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_to_watch(name, what, trained, tmp_path):
    """Exit status 2, one line, and nothing written."""
    run_dir = tmp_path / "run"
    if what == "an empty folder":
        run_dir.mkdir()
    elif what == "no checkpoint yet":
        copy(trained(name), run_dir)
        for path in run_dir.glob("*.pt"):
            path.unlink()
    elif what == "no args.json":
        copy(trained(name), run_dir)
        (run_dir / "args.json").unlink()
    elif what == "another script's run":
        copy(trained(SCRIPTS[SCRIPTS.index(name) - 1]), run_dir)
    before = contents(run_dir)
    output = watching(name, run_dir, status=2)
    assert len(output.splitlines()) == 1
    assert "--watch" in output
    assert contents(run_dir) == before
    assert run_dir.exists() == (what != "no folder")


def test_no_episode_to_watch(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.watch(script.Args(watch="run", watch_episodes=0, cuda=False))
    assert end.value.code == 2
    assert "--watch-episodes 0 is out of range" in capsys.readouterr().err


# ---- Videos of a training


CAPTURE = ["--capture-video", "--video-frequency", 100]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable:
    """plain(script) is the results of a run of 300 steps without videos."""

    @functools.cache
    def train(script: str) -> dict[str, bytes]:
        run_dir = tmp_path_factory.mktemp("plain") / "run"
        finish(script, run_dir, steps=300, prepare=headless)
        return results(run_dir)

    return train


def test_captured_videos(name, renderer, plain, tmp_path):
    """One every --video-frequency steps, with frames in it, mirrored to wandb, and no change to the bytes."""
    run_dir, calls = tmp_path / "run", tmp_path / "calls"
    prepare = functools.partial(headless, functools.partial(fake_wandb, calls))
    finish(name, run_dir, *CAPTURE, "--track", steps=300, prepare=prepare)
    paths = sorted((run_dir / "videos").rglob("*.mp4"))
    assert len(paths) == 3
    for path, step in zip(paths, (100, 200, 300), strict=True):
        assert str(step) in str(path.relative_to(run_dir))
        assert len(read(path)) > 1
    assert not differences(run_dir, plain(name))
    mirrored = []
    for call in map(json.loads, calls.read_text().splitlines()):
        mirrored += [(call["step"], value) for key, value in call.get("log", {}).items() if "video" in key]
    assert mirrored == list(zip((100, 200, 300), map(str, paths), strict=True))


def test_osmesa(renderer, trained, tmp_path):
    """MuJoCo's renderer on the processor, asked for by MUJOCO_GL as its documentation says."""
    if not ctypes.util.find_library("OSMesa"):
        pytest.skip("libosmesa6 is not installed")
    run_dir = copy(trained("td3_continuous"), tmp_path / "run")
    environment = {key: value for key, value in os.environ.items() if key not in SCREENS}
    completed = run("td3_continuous", "--watch", run_dir, env=environment | {"MUJOCO_GL": "osmesa"})
    assert completed.returncode == 0, completed.stderr
    (path,) = films(completed.stdout)
    assert read(path).std() > 10


# Three ways to have nothing to draw with. A fixed script for each, as the three share the code.
BLIND = {
    "glfw without a display": ("ddpg_continuous", {"MUJOCO_GL": "glfw"}),
    "no OSMesa": ("td3_continuous", {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "nowhere"}),
    "no EGL": ("sac_continuous", {"PYOPENGL_PLATFORM": "nowhere"}),
}


def blind(script: str, variables: dict[str, str], *arguments) -> tuple[int, str]:
    """Exit status and output of a script started from the command line with these variables."""
    environment = {key: value for key, value in os.environ.items() if key not in SCREENS}
    completed = run(script, *arguments, env=environment | variables)
    return completed.returncode, completed.stdout + completed.stderr


@pytest.mark.parametrize("how", BLIND)
def test_where_nothing_can_draw(how, plain, trained, tmp_path):
    """Training is unharmed, and one line, not one for each video, says what to install. So does --watch, and
    then ends with status 2."""
    script, variables = BLIND[how]
    run_dir = tmp_path / "run"
    words = [*SHORT.split(), *CAPTURE, "--total-timesteps", 300, "--run-dir", run_dir]
    watched = copy(trained(script), tmp_path / "watched")
    outcomes = {}
    threads = [
        threading.Thread(target=lambda: outcomes.update(train=blind(script, variables, *words))),
        threading.Thread(target=lambda: outcomes.update(watch=blind(script, variables, "--watch", watched))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    status, output = outcomes["watch"]
    assert status == 2, output
    assert len(advice(output)) == 1, output
    assert not films(output)
    status, output = outcomes["train"]
    assert status == 0, output
    assert len(advice(output)) == 1, output
    assert not differences(run_dir, plain(script))
