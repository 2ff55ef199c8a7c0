"""Learning: each algorithm solves Pendulum-v1.

A random policy's evaluation is about -1200, a perfect one's about -150. With these settings the best of the
last three evaluations is above -150 for each of the algorithms; its seeds 1 to 3 were tried.
"""

import csv

OPTIONS = {"env_id": "Pendulum-v1", "total_timesteps": 4000, "learning_starts": 500, "tau": 0.02}
OPTIONS |= {"hidden_dim": 64, "batch_size": 128, "eval_frequency": 500, "eval_episodes": 5}
RATES = {"learning_rate": 2e-3, "policy_lr": 2e-3, "q_lr": 2e-3}


def test_it_learns(script, tmp_path):
    """Noise-free episodes end above -250, where the untrained policy's were below -1000."""
    rates = {name: rate for name, rate in RATES.items() if name in vars(script.Args())}
    args = script.Args(
        run_dir=str(tmp_path / "run"), threads=1, compile=False, cuda=False, **OPTIONS, **rates
    )
    with open(script.train(args) / "evaluations.csv", newline="") as file:
        returns = {int(row["global_step"]): float(row["episodic_return"]) for row in csv.DictReader(file)}
    assert returns[500] < -1000
    # A policy may be caught in a poor moment of its learning, so the best of the last three counts.
    assert max(returns[step] for step in (3000, 3500, 4000)) > -250, returns
