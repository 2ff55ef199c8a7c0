"""SAC whose σ does not depend on the state: one learned log σ for each action dimension.

It is sac_continuous.py but for u = m(s) + σ ⊙ ξ in (E8). The bounds of log σ are the same.

Usage: python benchmark/ablations/sac_state_independent_std.py --env-id HalfCheetah-v4
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sac_continuous as sac


@dataclass
class Args(sac.Args):
    """Trains SAC with a σ independent of the state, or plays what it learned (--watch)."""

    exp_name: str = Path(__file__).stem  # names the run in the default --run-dir, and its curve in a figure


class Actor(nn.Module):
    """Squashed Gaussian policy π(a|s); called, it acts with tanh(m(s)): (B, O) -> (B, A) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.net = sac.mlp(obs_dim, hidden_dim, action_dim)
        self.raw_log_std = nn.Parameter(torch.zeros(action_dim))  # σ = exp(-1.5) to begin with, about SAC's

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.net(observations))

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """a ~ π(·|s) (B, A), through which gradients flow, and log π(a|s) (B,) in nats."""
        mean = self.net(observations)
        log_std = -5 + 3.5 * (1 + torch.tanh(self.raw_log_std))  # in [-5, 2]
        return sac.squashed_gaussian(mean, log_std, torch.randn_like(mean))


if __name__ == "__main__":
    sac.Args, sac.Actor = Args, Actor
    arguments = tyro.cli(Args)
    if arguments.watch:
        sac.watch(arguments)
    else:
        sac.train(arguments)
