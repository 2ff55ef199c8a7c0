"""Pendulum-v1 with its rewards times 0.01, 1 or 100. From the root of the repository:

python sac_continuous.py --env-id benchmark.ablations.scaled_pendulum:ScaledPendulum100-v0
"""

import gymnasium as gym


def register(scale: float) -> None:
    """Registers ScaledPendulum{scale}-v0."""
    gym.register(
        f"ScaledPendulum{scale:g}-v0",
        entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv",
        max_episode_steps=200,
        additional_wrappers=(gym.wrappers.TransformReward.wrapper_spec(func=lambda reward: scale * reward),),
    )


for factor in (0.01, 1, 100):
    register(factor)
