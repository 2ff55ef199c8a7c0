"""Pendulum-v1 with its rewards times 0.01, 1 or 100. With this folder on PYTHONPATH, Gymnasium finds

python sac_continuous.py --env-id scaled_pendulum:ScaledPendulum100-v0
"""

import gymnasium as gym

for scale in (0.01, 1.0, 100.0):
    gym.register(
        f"ScaledPendulum{scale:g}-v0",
        entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv",
        max_episode_steps=200,
        additional_wrappers=(
            gym.wrappers.TransformReward.wrapper_spec(func=lambda reward, scale=scale: scale * reward),
        ),
    )
