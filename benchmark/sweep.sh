#!/usr/bin/env bash
# A grid of training runs, every algorithm on every task with every seed: printed, one command a line, or run.
#
#   benchmark/sac.sh                     print SAC's grid; likewise ddpg.sh, td3.sh, and all.sh for all three
#   benchmark/sac.sh run                 run it; after Ctrl-C the same command goes on from there
#   benchmark/sac.sh run --alpha 0.1     further flags go to every run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." # paths are relative to the root of the repository

ENVS=${ENVS:-HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4}
SEEDS=${SEEDS:-1 2 3}
ALGORITHMS=${ALGORITHMS:-ddpg td3 sac}
TOTAL_TIMESTEPS=${TOTAL_TIMESTEPS:-1000000} # may be raised later: finished runs then go on
RESULTS=${RESULTS:-runs/sweep}              # a run's folder is {RESULTS}/{algorithm}/{task}/seed{n}
PYTHON=${PYTHON:-python}                    # the interpreter that has the packages
# JOBS is the number of runs at a time, each on one thread: one run per core if unset. They would share a GPU:
# hence --no-cuda.

# Seeds are the outermost loop: an unfinished sweep has one seed of everything before two of anything.
print_grid() {
    for seed in $SEEDS; do
        for task in $ENVS; do
            for algorithm in $ALGORITHMS; do
                printf -v command '%q ' "$PYTHON" "${algorithm}_continuous.py" --env-id "$task" \
                    --seed "$seed" --total-timesteps "$TOTAL_TIMESTEPS" --no-cuda \
                    --run-dir "$RESULTS/$algorithm/$task/seed$seed" --resume "$@"
                echo "${command% }"
            done
        done
    done
}

# A . stands for - or _: the scripts take both.
if [[ "$*" =~ --(env.id|seed|total.timesteps|run.dir) ]]; then
    echo "${0##*/}: error: set ENVS, SEEDS, TOTAL_TIMESTEPS or RESULTS instead of ${BASH_REMATCH[0]}" >&2
    exit 2
fi
if [[ ${1:-} == run ]]; then
    exec benchmark/run_commands.sh < <(print_grid "${@:2}")
fi
print_grid "$@"
