#!/usr/bin/env bash
# A comparison that the lectures show, as training runs: printed, one command a line, or run.
#
#   benchmark/ablations.sh                                name the experiments
#   benchmark/ablations.sh targets                        print the commands of one
#   benchmark/ablations.sh targets run                    run them; after Ctrl-C the same command goes on from there
#   benchmark/ablations.sh targets run --batch-size 128   further flags go to every run
#   python benchmark/plot.py runs/ablations/targets --output figures
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." # paths are relative to the root of the repository

RESULTS=${RESULTS:-runs/ablations} # a run's folder is {RESULTS}/{experiment}/{curve}/{task}/seed{n}
PYTHON=${PYTHON:-python}           # the interpreter that has the packages
# SEEDS="1 2" are the seeds to run; if unset, 1 up to the number in the table.
# JOBS is the number of runs at a time: one per core if unset.

# Experiment, task, steps, number of seeds, curve (its --exp-name), and algorithm or module of ablations/ with flags.
# 0.38 is the standard deviation that --ou-noise has in the long run: 0.2 / √(1 - (1 - 0.15)²).
table="
exploration           MountainCarContinuous-v0   15000 5 gaussian_0.1          ddpg --learning-starts 1000
exploration           MountainCarContinuous-v0   15000 5 gaussian_0.38         ddpg --learning-starts 1000 --exploration-noise 0.38
exploration           MountainCarContinuous-v0   15000 5 ornstein_uhlenbeck    ddpg --learning-starts 1000 --ou-noise
exploration           MountainCarContinuous-v0   15000 5 epsilon_uniform_0.2   ddpg --learning-starts 1000 --random-action-prob 0.2
exploration           HalfCheetah-v4            100000 3 gaussian_0.1          ddpg
exploration           HalfCheetah-v4            100000 3 gaussian_0.38         ddpg --exploration-noise 0.38
exploration           HalfCheetah-v4            100000 3 ornstein_uhlenbeck    ddpg --ou-noise
exploration           HalfCheetah-v4            100000 3 epsilon_uniform_0.2   ddpg --random-action-prob 0.2
targets               HalfCheetah-v4            100000 5 tau_1                 ddpg --tau 1
targets               HalfCheetah-v4            100000 5 tau_0.05              ddpg --tau 0.05
targets               HalfCheetah-v4            100000 5 tau_0.005             ddpg --tau 0.005
targets               HalfCheetah-v4            100000 5 copied_every_200      ddpg --tau 1 --target-network-frequency 200
td3_fixes             Hopper-v4                 300000 3 td3_continuous        td3
td3_fixes             Hopper-v4                 300000 3 no_clipped_double_q   td3 --no-clipped-double-q
td3_fixes             Hopper-v4                 300000 3 no_policy_noise       td3 --policy-noise 0
td3_fixes             Hopper-v4                 300000 3 no_policy_delay       td3 --policy-frequency 1
state_independent_std HalfCheetah-v4            100000 3 sac_continuous        sac
state_independent_std HalfCheetah-v4            100000 3 state_independent_std sac_state_independent_std
gradient_steps        Walker2d-v4                50000 3 gradient_steps_1      sac --gradient-steps 1
gradient_steps        Walker2d-v4                50000 3 gradient_steps_4      sac --gradient-steps 4
gradient_steps        Walker2d-v4                50000 3 gradient_steps_16     sac --gradient-steps 16
value_network         HalfCheetah-v4            100000 3 sac_continuous        sac
value_network         HalfCheetah-v4            100000 3 fixed_alpha           sac --no-autotune
value_network         HalfCheetah-v4            100000 3 value_network         sac_value_network
deterministic         Hopper-v4                 300000 5 sac_continuous        sac
deterministic         Hopper-v4                 300000 5 deterministic         sac_deterministic
reward_scale          ScaledPendulum0.01-v0      20000 5 sac_continuous        sac
reward_scale          ScaledPendulum0.01-v0      20000 5 fixed_alpha           sac --no-autotune
reward_scale          ScaledPendulum1-v0         20000 5 sac_continuous        sac
reward_scale          ScaledPendulum1-v0         20000 5 fixed_alpha           sac --no-autotune
reward_scale          ScaledPendulum100-v0       20000 5 sac_continuous        sac
reward_scale          ScaledPendulum100-v0       20000 5 fixed_alpha           sac --no-autotune
"

# Seeds are the outermost loop, so that an unfinished experiment has one seed of every curve.
print_commands() {
    local seed task steps count curve script flags command
    for seed in ${SEEDS:-1 2 3 4 5}; do
        while read -r _ task steps count curve script flags; do
            if [[ ! ${SEEDS:-} && $seed -gt $count ]]; then
                continue
            fi
            if [[ $task == Scaled* ]]; then
                task=benchmark.ablations.scaled_pendulum:$task # the module that registers it
            fi
            if [[ $script == sac_* ]]; then
                script=benchmark/ablations/$script.py
            else
                script=${script}_continuous.py
            fi
            # shellcheck disable=SC2086 # several flags
            printf -v command '%q ' "$PYTHON" "$script" --env-id "$task" --seed "$seed" --total-timesteps "$steps" \
                --eval-frequency $((steps / 20)) --no-cuda --exp-name "$curve" $flags \
                --run-dir "$RESULTS/$experiment/$curve/${task#*:}/seed$seed" --resume "$@"
            echo "${command% }"
        done < <(grep "^$experiment " <<<"$table")
    done
}

names=$(cut -d ' ' -f 1 <<<"$table" | uniq | xargs)
experiment=${1:-}
if [[ ! $experiment ]]; then
    echo "$names"
    exit
elif ! grep -qwF -- "$experiment" <<<"$names"; then
    echo "${0##*/}: error: $experiment is none of $names" >&2
    exit 2
fi
shift
# A . stands for - or _: the scripts take both.
if [[ "$*" =~ --(env.id|seed|total.timesteps|run.dir|exp.name) ]]; then
    echo "${0##*/}: error: set SEEDS or RESULTS instead of ${BASH_REMATCH[0]}" >&2
    exit 2
fi
if [[ ${1:-} == run ]]; then
    exec benchmark/run_commands.sh < <(print_commands "${@:2}")
fi
print_commands "$@"
