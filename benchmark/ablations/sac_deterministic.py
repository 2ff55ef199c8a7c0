"""SAC without entropy, its actor μ deterministic: sac_continuous.py but for

    act with clip(μ(s) + n, -1, 1), n Gaussian                                                          (E5)
    y = r + γ (1-d) min_i Q_i'(s', μ(s')), with μ as it is now                                         (E10)
    descend  -mean min_i Q_i(s, μ(s))                                                    over μ        (E11)

as in section 5.2 of Haarnoja et al. 2018, "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement
Learning with a Stochastic Actor", arXiv 1801.01290, whose targets are hard copies every 1,000 steps: --tau 1
--target-network-frequency 1000. TD3 with --policy-noise 0 --policy-frequency 1 is another algorithm: its y
takes the action of a target actor, and its actor climbs Q1 alone.

Usage: python benchmark/ablations/sac_deterministic.py --env-id Hopper-v4
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sac_continuous as sac


@dataclass
class Args(sac.Args):
    """Trains deterministic SAC on a Gymnasium task, or plays what it learned (--watch)."""

    exploration_noise: float = 0.1  # std of the Gaussian noise on actions, which reach from -1 to 1
    alpha: Suppress[Fixed[float]] = 1.0  # has no effect, as log π is 0 here
    autotune: Suppress[Fixed[bool]] = False
    target_entropy: Suppress[Fixed[float | None]] = None
    exp_name: str = Path(__file__).stem  # names the run in the default --run-dir, and its curve in a figure


class Actor(nn.Module):
    """Deterministic policy μ(s): observations (B, O) -> actions (B, A) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.net = sac.mlp(obs_dim, hidden_dim, action_dim)

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.net(observations))

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """μ(s), and 0 (B,) for log π, with which the entropy vanishes from (E10) and (E11)."""
        actions = self(observations)
        return actions, torch.zeros_like(actions[..., 0])


class Agent(sac.Agent):
    """The networks of SAC with this actor, and how they explore."""

    @torch.no_grad()
    def explore(self, observation: np.ndarray) -> np.ndarray:
        """(E5) clip(μ(s) + n, -1, 1), n Gaussian: (O,) -> (A,)."""
        observation = torch.as_tensor(observation, dtype=torch.float32, device=self.device)
        action = self.actor(observation)
        noise = self.args.exploration_noise * torch.randn_like(action)
        return (action + noise).clamp(-1, 1).cpu().numpy()

    def update(self, batch: sac.Batch, gradient_step: int) -> dict[str, Tensor]:
        """SAC's; α and the entropy mean nothing here, and are not logged."""
        metrics = super().update(batch, gradient_step)
        meaningless = {"alpha", "alpha_loss", "entropy"}
        return {name: value for name, value in metrics.items() if name not in meaningless}


if __name__ == "__main__":
    sac.Args, sac.Actor, sac.Agent = Args, Actor, Agent
    arguments = tyro.cli(Args)
    if arguments.watch:
        sac.watch(arguments)
    else:
        sac.train(arguments)
