"""Writes single mistakes into copies of the scripts, one at a time, and says which test catches each.

Usage: python tests/mutants.py              all of them, which takes an hour or more
       python tests/mutants.py 3 40-45      some, by number

A mistake in a part that the scripts share is made in all three. It is caught if any test fails.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ALL = ("ddpg", "td3", "sac")


class Mutant(NamedTuple):
    """A mistake: what stands in these scripts, and what is written in its place."""

    scripts: tuple[str, ...]
    old: str
    new: str
    tests: str  # the files that are likely to catch it, tried before all others


EQUATIONS, UPDATE = "test_equations.py test_update.py", "test_update.py test_equations.py"
LOOP, RUN = "test_update.py test_environment.py test_training.py", "test_training.py test_resume.py"
RESUME, REFUSALS = "test_resume.py test_training.py", "test_refusals.py test_environment.py"
WATCH = "test_watch.py test_training.py"
MUTANTS = [
    # SAC
    Mutant(
        ("sac",), "next_actions) - alpha * next_log_prob", "next_actions) + alpha * next_log_prob", EQUATIONS
    ),
    Mutant(("sac",), "(1 - batch.terminations) * next_q", "batch.terminations * next_q", EQUATIONS),
    Mutant(("sac",), ".amin(dim=0)", ".amax(dim=0)", EQUATIONS),
    Mutant(("sac",), "(alpha * log_prob - min_q(", "(alpha * log_prob + min_q(", EQUATIONS),
    Mutant(
        ("sac",),
        "min_q(critics, observations, actions)).mean()",
        "critics[0](observations, actions)).mean()",
        UPDATE,
    ),
    Mutant(
        ("sac",), "(log_normal - log_slope).sum(dim=-1)", "(log_normal - log_slope).mean(dim=-1)", EQUATIONS
    ),
    Mutant(("sac",), "(log_normal - log_slope).sum(dim=-1)", "log_normal.sum(dim=-1)", EQUATIONS),
    Mutant(
        ("sac",),
        "log_std = -5 + 3.5 * (1 + torch.tanh(log_std))",
        "log_std = log_std.clamp(-5, 2)",
        EQUATIONS,
    ),
    Mutant(("sac",), "torch.randn_like(mean))", "torch.randn(mean.shape[-1], dtype=mean.dtype))", EQUATIONS),
    Mutant(("sac",), "return -log_alpha * (log_prob", "return log_alpha * (log_prob", EQUATIONS),
    Mutant(
        ("sac",), "(log_prob.detach() + target_entropy)", "(log_prob.detach() - target_entropy)", EQUATIONS
    ),
    Mutant(("sac",), "-float(action_dim) if", "-float(action_dim**2) if", UPDATE),
    Mutant(("sac",), "        if args.autotune:\n", "        if True:\n", UPDATE),
    Mutant(
        ("sac",), "self.qf2_target = deepcopy(self.qf2)", "self.qf2_target = deepcopy(self.qf1)", EQUATIONS
    ),
    Mutant(
        ("sac",),
        "descend(qf1_loss + qf2_loss, self.q_optimizer)",
        "descend(qf1_loss, self.q_optimizer)",
        UPDATE,
    ),
    Mutant(
        ("sac",), "action, _ = self.actor.sample(observation)", "action = self.actor(observation)", EQUATIONS
    ),
    Mutant(
        ("sac",),
        "lr=args.q_lr, fused=True)\n        self.alpha",
        "lr=args.policy_lr, fused=True)\n        self.alpha",
        UPDATE,
    ),
    Mutant(("sac",), "q_lr: float = 1e-3", "q_lr: float = 3e-4", UPDATE),
    # TD3
    Mutant(("td3",), "noise = noise.clamp(-args.noise_clip, args.noise_clip)", "pass", EQUATIONS),
    Mutant(("td3",), "torch.randn_like(batch.actions)", "torch.randn_like(batch.actions[:1])", EQUATIONS),
    Mutant(
        ("td3",),
        "(actor_target(batch.next_observations) + noise).clamp(-1, 1)",
        "actor_target(batch.next_observations) + noise",
        EQUATIONS,
    ),
    Mutant(
        ("td3",),
        "gradient_step % args.policy_frequency == 0",
        "gradient_step % args.policy_frequency == 1",
        UPDATE,
    ),
    Mutant(
        ("td3",),
        "            if gradient_step % args.target_network_frequency == 0:\n                polyak",
        "        if gradient_step % args.target_network_frequency == 0:\n            polyak",
        UPDATE,
    ),
    Mutant(("td3",), "return -qf1(observations", "return qf1(observations", EQUATIONS),
    Mutant(("td3",), "if not args.clipped_double_q", "if args.clipped_double_q", EQUATIONS),
    Mutant(
        ("td3",),
        "polyak([self.actor_target, *self.critic_targets], [self.actor, *self.critics], args.tau)",
        "polyak(self.critic_targets, self.critics, args.tau)",
        UPDATE,
    ),
    Mutant(("td3",), "return (action + noise).clamp(-1, 1)", "return (action + noise)", EQUATIONS),
    Mutant(("td3",), "policy_noise: float = 0.2", "policy_noise: float = 0.1", UPDATE),
    # DDPG
    Mutant(("ddpg",), "0.15 * (0 - self.ou_state)", "0.15 * (0 + self.ou_state)", EQUATIONS),
    Mutant(("ddpg",), "math.sqrt(args.ou_dt)", "args.ou_dt", EQUATIONS),
    Mutant(("ddpg",), "        self.ou_state.zero_()\n", "        pass\n", EQUATIONS),
    Mutant(
        ("ddpg",), "action = 2 * torch.rand_like(action) - 1", "action = torch.rand_like(action)", EQUATIONS
    ),
    Mutant(
        ("ddpg",),
        "td_target(batch, self.actor_target, self.qf1_target",
        "td_target(batch, self.actor, self.qf1_target",
        UPDATE,
    ),
    Mutant(
        ("ddpg",),
        "td_target(batch, self.actor_target, self.qf1_target",
        "td_target(batch, self.actor_target, self.qf1",
        UPDATE,
    ),
    # The loop and the buffer
    Mutant(
        ALL, "target_parameter.lerp_(parameter, tau)", "target_parameter.lerp_(parameter, 1 - tau)", EQUATIONS
    ),
    Mutant(ALL, "row = self.added % self.capacity", "row = min(self.added, self.capacity - 1)", UPDATE),
    Mutant(ALL, "filled = min(self.added, self.capacity)", "filled = self.capacity", UPDATE),
    Mutant(ALL, "rows = torch.randint(filled,", "rows = torch.randint((filled + 1) // 2,", UPDATE),
    Mutant(ALL, "next_observation, terminated)\n", "next_observation, terminated or truncated)\n", LOOP),
    Mutant(
        ALL,
        "buffer.add(observation, action, reward, next_observation",
        "buffer.add(observation, action, reward, observation",
        LOOP,
    ),
    Mutant(ALL, "learning = global_step > args.learning_starts", "learning = global_step > 0", LOOP),
    Mutant(ALL, "learning and global_step % args.train_frequency == 0", "learning", LOOP),
    Mutant(ALL, "for _ in range(args.gradient_steps):", "for _ in range(1):", LOOP),
    Mutant(ALL, "            agent.start_episode()\n", "", LOOP),
    Mutant(ALL, "        observation = next_observation\n", "", LOOP),
    Mutant(ALL, "            observation, _ = env.reset()\n", "            env.reset()\n", LOOP),
    Mutant(ALL, "run.gradient_step += 1", "run.gradient_step = global_step", LOOP),
    # Environment and evaluation
    Mutant(
        ALL,
        "env = gym.wrappers.RescaleAction(env, actions",
        "gym.wrappers.RescaleAction(env, actions",
        EQUATIONS,
    ),
    Mutant(ALL, "        env.reset(seed=seed)\n", "        env.reset(seed=0)\n", RUN),
    Mutant(ALL, "        self.action_space.seed(seed)\n", "        self.action_space.seed(0)\n", RUN),
    Mutant(
        ALL,
        "env.step(agent.act(observation))",
        "env.step(agent.explore(observation))",
        "test_environment.py test_watch.py",
    ),
    Mutant(
        ALL,
        "over = terminated or truncated",
        "over = truncated or (terminated and len(rewards) > 1)",
        "test_environment.py",
    ),
    Mutant(ALL, "following = reward + gamma * following", "following = reward + following", RUN),
    Mutant(
        ALL,
        "self.eval_env, self.eval_seed = make_env(args.env_id, args.seed)",
        "self.eval_env, self.eval_seed = env",
        "test_environment.py",
    ),
    Mutant(
        ALL,
        "self.eval_seed + episode)",
        "self.eval_seed + self.global_step + episode)",
        "test_environment.py",
    ),
    Mutant(
        ALL,
        "return last or self.global_step % frequency == 0",
        "return self.global_step % frequency == 0",
        RUN,
    ),
    Mutant(ALL, "        raise FloatingPointError(", "        print(", RUN),
    # Checkpoint and record
    Mutant(
        ALL, '        self.action_space.np_random.bit_generator.state = state["random_actions"]\n', "", RESUME
    ),
    Mutant(ALL, '        self.unwrapped.np_random.bit_generator.state = state["generator"]\n', "", RESUME),
    Mutant(ALL, '        torch.set_rng_state(state["generator"])\n', "", RESUME),
    Mutant(ALL, '"run": self, **optimizers}', '"run": self}', RESUME),
    Mutant(
        ALL,
        'self.elapsed, self.losses = state["elapsed"], state["losses"]',
        'self.losses = state["losses"]',
        RESUME,
    ),
    Mutant(
        ALL,
        'self.elapsed, self.losses = state["elapsed"], state["losses"]',
        'self.elapsed = state["elapsed"]',
        RESUME,
    ),
    Mutant(ALL, "os.truncate(path, csv_bytes.get(path.name, 0))", "pass", RESUME),
    Mutant(
        ALL,
        "                os.fsync(file.fileno())\n                csv_bytes",
        "                csv_bytes",
        RESUME,
    ),
    Mutant(ALL, "        new.replace(path)\n", "        shutil.copy(new, path)\n", RESUME),
    Mutant(ALL, "weights_only=True, mmap=True", "weights_only=False, mmap=True", RESUME),
    Mutant(ALL, "    if damaged:\n", "    if False:\n", RESUME),
    Mutant(ALL, "        if changed - MAY_CHANGE:\n", "        if False:\n", RESUME),
    Mutant(ALL, "(signal.SIGTERM, signal.SIGINT)}", "(signal.SIGTERM,)}", RESUME),
    Mutant(ALL, "            os._exit(130)\n", "            pass\n", RESUME),
    Mutant(ALL, "            self.lock.acquire(timeout=0)\n", "", RESUME),
    Mutant(
        ALL,
        "                return\n            episodes.append",
        "                pass\n            episodes.append",
        RESUME,
    ),
    Mutant(ALL, '"losses": "losses", "evaluations"', '"losses": "charts", "evaluations"', RUN),
    # Settings, refusals, watching
    Mutant(ALL, "    torch.set_num_threads(args.threads)\n", "", RUN),
    Mutant(
        ALL, "    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)\n", "", RUN
    ),
    Mutant(ALL, "    torch.manual_seed(args.seed)\n", "", RUN),
    Mutant(
        ALL,
        "gradients = torch.autograd.grad(loss, parameters)",
        "gradients = torch.autograd.grad(-loss, parameters)",
        UPDATE,
    ),
    Mutant(ALL, "    if args.batch_size > args.buffer_size:\n", "    if False:\n", REFUSALS),
    Mutant(ALL, "            if too_much or not enough or", "            if not enough or", REFUSALS),
    Mutant(ALL, "    sys.exit(2)\n", "    sys.exit(1)\n", REFUSALS),
    Mutant(ALL, "    agent.actor.load_state_dict(", "    dict(", WATCH),
    Mutant(
        ALL,
        "except torch._dynamo.exc.TorchDynamoException as error",
        "except ZeroDivisionError as error",
        "test_compile.py",
    ),
]


def catching_test(mutant: Mutant, folder: Path) -> str:
    """The first test that fails in a copy of the project with this mistake; "" if none does."""
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "results", "runs", "figures")
    )
    for script in mutant.scripts:
        path = folder / f"{script}_continuous.py"
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.old!r} stands {text.count(mutant.old)} times in {path.name}")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    for files in ([f"tests/{name}" for name in mutant.tests.split()], ["tests"]):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if failed:
            return failed[0].split()[1]
    return ""


def main() -> int:
    """Prints a line for each mutant; returns the number of those that got through."""
    numbers = []
    for argument in sys.argv[1:]:
        first, _, last = argument.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    survivors = 0
    for number in numbers or range(len(MUTANTS)):
        mutant = MUTANTS[number]
        with tempfile.TemporaryDirectory() as folder:
            caught_by = catching_test(mutant, Path(folder, "project"))
        survivors += not caught_by
        change = f"{mutant.old.strip()} -> {mutant.new.strip()}".replace("\n", " ")
        print(f"{number} {'+'.join(mutant.scripts)}: {change}: {caught_by or 'GOT THROUGH'}", flush=True)
    print(f"{survivors} got through")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
