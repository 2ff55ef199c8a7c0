"""SAC as first published, with a value network V in place of the critics' targets: sac_continuous.py but for

    y = r + γ (1-d) V'(s')                                                                            (E14)
    descend  ½ mean (V(s) - (min_i Q_i(s, ã) - α log π(ã|s)))²,  the ã of (E11)          over V       (E13)
    V' ← (1-τ) V' + τ V                                                                                (E1)

and a fixed temperature α. Haarnoja et al. 2018, "Soft Actor-Critic: Off-Policy Maximum Entropy Deep
Reinforcement Learning with a Stochastic Actor", arXiv 1801.01290.

Usage: python benchmark/ablations/sac_value_network.py --env-id Hopper-v4
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sac_continuous as sac
from sac_continuous import Batch, critic_loss, descend, min_q, mlp, polyak


@dataclass
class Args(sac.Args):
    """Trains SAC with a value network on a Gymnasium task, or plays what it learned (--watch)."""

    alpha: float = 0.2  # temperature α, fixed: 1 over the paper's reward scale, which is 5 for most tasks
    autotune: Suppress[Fixed[bool]] = False
    target_entropy: Suppress[Fixed[float | None]] = None
    exp_name: str = Path(__file__).stem  # names the run in the default --run-dir, and its curve in a figure


@torch.no_grad()
def td_target(batch: Batch, vf_target: nn.Module, args: Args) -> Tensor:
    """(E14) y = r + γ (1-d) V'(s'): (B,)."""
    return batch.rewards + args.gamma * (1 - batch.terminations) * vf_target(batch.next_observations)


def value_loss(observations: Tensor, vf: nn.Module, soft_values: Tensor) -> tuple[Tensor, Tensor]:
    """(E13) ½ mean (V(s) - (min_i Q_i(s, ã) - α log π(ã|s)))²: the loss, and V(s) (B,) for the log."""
    values = vf(observations)
    return 0.5 * F.mse_loss(values, soft_values.detach()), values


class Agent(sac.Agent):
    """The networks of SAC with V, and how they learn. It acts as SAC does."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__(obs_dim, action_dim, args)
        # What V' and the fixed α replace goes, so that it is not in the checkpoint either.
        del self.qf1_target, self.qf2_target, self.critic_targets, self.log_alpha, self.alpha_optimizer
        self.vf = nn.Sequential(mlp(obs_dim, args.hidden_dim, 1), nn.Flatten(0)).to(self.device)  # -> (B,)
        self.vf_target = deepcopy(self.vf).requires_grad_(False)
        self.v_optimizer = torch.optim.Adam(self.vf.parameters(), lr=args.q_lr, fused=True)

    def update(self, batch: Batch, gradient_step: int) -> dict[str, Tensor]:
        """One gradient step on each network; returns what to log."""
        args = self.args

        target_q = td_target(batch, self.vf_target, args)
        qf1_loss, qf1_values = critic_loss(batch, self.qf1, target_q)
        qf2_loss, qf2_values = critic_loss(batch, self.qf2, target_q)
        q_gradient_norm = descend(qf1_loss + qf2_loss, self.q_optimizer)
        metrics = {
            "qf1_values": qf1_values.mean(),
            "qf1_loss": qf1_loss,
            "qf2_values": qf2_values.mean(),
            "qf2_loss": qf2_loss,
            "qf_loss": (qf1_loss + qf2_loss) / 2,
            "q_gradient_norm": q_gradient_norm,
            "target_q": target_q.mean(),
        }

        actions, log_prob = self.actor.sample(batch.observations)
        soft_values = min_q(self.critics, batch.observations, actions) - args.alpha * log_prob
        policy_loss = -soft_values.mean()  # (E11)
        actor_gradient_norm = descend(policy_loss, self.actor_optimizer)
        metrics |= {"actor_loss": policy_loss, "actor_gradient_norm": actor_gradient_norm}
        metrics |= {"entropy": -log_prob.mean()}

        vf_loss, vf_values = value_loss(batch.observations, self.vf, soft_values)
        v_gradient_norm = descend(vf_loss, self.v_optimizer)
        metrics |= {"vf_values": vf_values.mean(), "vf_loss": vf_loss, "v_gradient_norm": v_gradient_norm}

        if gradient_step % args.target_network_frequency == 0:
            polyak([self.vf_target], [self.vf], args.tau)
        return {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    sac.Args, sac.Agent = Args, Agent
    arguments = tyro.cli(Args)
    if arguments.watch:
        sac.watch(arguments)
    else:
        sac.train(arguments)
