#!/usr/bin/env bash
# Prints or runs the comparisons that the lectures show, each on one task: every variant with every seed.
#
#   benchmark/ablations.sh                              print all of them, one complete command a line
#   benchmark/ablations.sh run                          run them
#   benchmark/ablations.sh run tau reward-scale         run these two
#   benchmark/ablations.sh run 5 4                      the same two, by number
#   benchmark/ablations.sh run tau --eval-episodes 20   further flags go to every run
#
#    1 benchmark       DDPG, TD3 and SAC on five tasks: benchmark/all.sh
#    2 deterministic   SAC against its deterministic variant
#    3 mean-action     one policy evaluated with its mean action and with sampled ones
#    4 reward-scale    SAC with rewards times 1, 3, 10, 30 and 100 at temperature 1, as fixed temperatures
#    5 tau             SAC with τ from 0.0001 to 0.1, and with hard copies
#    6 temperature     SAC with a learned temperature against fixed ones
#    7 value-network   SAC v1 against v2
#    8 tuned-ddpg      DDPG tuned by random search against untuned SAC
#    9 exploration     DDPG with Gaussian, Ornstein-Uhlenbeck and ε-uniform exploration
#   10 gradient-steps  SAC with 1, 2 and 4 gradient steps per environment step
#
# Variables, and what they are if unset:
#   BUDGET           small: minutes on two cores for each comparison. paper: what the papers spend on a task
#   ENV_ID           Pendulum-v1 with the small budget, Hopper-v4 with the paper's
#   TOTAL_TIMESTEPS  6000 with the small budget, 1000000 with the paper's
#   SEEDS            1 2 3; five with the paper's budget
#   SEARCH_SEEDS     101 102; those of the trials of tuned-ddpg
#   TRIALS           8; 20 with the paper's budget
#   JOBS             one run at a time per core; each is single-threaded
#   RESULTS          benchmark/ablations/results, or results_paper; a run is in {comparison}/{variant}/seed{n}
#   PYTHON           python; the interpreter that has the packages
#   GPU              0; with 1 the runs train on the GPU, and JOBS of them share it
#
# What several comparisons need runs once, in shared/. A sweep is stopped and continued like those of sweep.sh.

# shellcheck disable=SC2154 # root, results and python are variables of sweep.sh
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [[ ${BUDGET:-small} == paper ]]; then
    task=Hopper-v4 steps=1000000 seeds='1 2 3 4 5' trials=20 setting=()
    RESULTS=${RESULTS:-$(cd "$here" && pwd)/ablations/results_paper}
else
    # Small networks and few random steps, so that a run takes half a minute.
    task=Pendulum-v1 steps=6000 seeds='1 2 3' trials=8
    setting=(--learning-starts 1000 --hidden-dim 64 --eval-frequency 500)
    RESULTS=${RESULTS:-$(cd "$here" && pwd)/ablations/results}
fi
task=${ENV_ID:-$task} steps=${TOTAL_TIMESTEPS:-$steps} seeds=${SEEDS:-$seeds} trials=${TRIALS:-$trials}
search_seeds=${SEARCH_SEEDS:-101 102}
# How sweep.sh runs a grid. Which steps a run has is looked up here, not by its cells.
# shellcheck source=benchmark/sweep.sh
source "$here/sweep.sh"
export TOTAL_TIMESTEPS=1

# ======== The comparisons ========

numbered=(benchmark deterministic mean-action reward-scale tau temperature value-network tuned-ddpg exploration
    gradient-steps)

# Adds a variant: its folder, its seeds, and the script with its flags.
variant() {
    local folder=$1 words
    [[ " ${variants[*]-} " != *" $folder "* ]] || return 0 # another comparison has added it
    printf -v words ' %q' "${@:3}"
    variants+=("$folder") seeds_of[$folder]=$2 words_of[$folder]=${words# }
}

sac() { variant "$1" "$seeds" sac_continuous.py "${@:2}"; }
ddpg() { variant "$1" "$seeds" ddpg_continuous.py "${@:2}"; }

# Adds the variants of a comparison by its name.
add() {
    local scale number flags drawn=0
    case $1 in
    deterministic)
        sac shared/sac
        variant deterministic/deterministic "$seeds" benchmark/ablations/sac_deterministic.py
        ;;
    mean-action) variant mean-action/sac "$seeds" benchmark/ablations/sampled_actions.py ;;
    reward-scale)
        # Rewards times k at temperature 1 have the same best policy as rewards as they are at 1/k. The last is none
        # of the lecture's: of rewards as large as those of Pendulum only a hundredth is too small.
        for scale in 1:1 3:0.3333 10:0.1 30:0.03333 100:0.01 0.01:100; do
            sac "reward-scale/${scale%:*}" --no-autotune --alpha "${scale#*:}"
        done
        ;;
    tau)
        for number in 0.0001 0.001 0.01 0.1; do
            sac "tau/$number" --tau "$number"
        done
        sac shared/sac # 0.005
        sac tau/hard --tau 1 --target-network-frequency 200
        ;;
    temperature)
        sac shared/sac
        sac shared/sac-fixed --no-autotune --alpha 0.2
        sac reward-scale/1 --no-autotune --alpha 1
        sac reward-scale/100 --no-autotune --alpha 0.01
        ;;
    value-network)
        variant value-network/v1 "$seeds" benchmark/ablations/sac_value_network.py --alpha 0.2
        sac shared/sac-fixed --no-autotune --alpha 0.2
        sac shared/sac
        ;;
    tuned-ddpg)
        while read -r number flags; do
            # shellcheck disable=SC2086 # several words
            variant "tuned-ddpg/trials/$number" "$search_seeds" ddpg_continuous.py $flags
            drawn=1
        done < <("$python" "$root/benchmark/ablations/random_search.py" draw "$trials")
        ((drawn)) || refuse "no trials were drawn; set PYTHON and TRIALS"
        sac shared/sac
        ddpg shared/ddpg
        variant tuned-ddpg/tuned "$seeds" benchmark/ablations/random_search.py best "$results/tuned-ddpg/trials"
        ;;
    exploration)
        ddpg shared/ddpg # Gaussian
        ddpg exploration/ornstein-uhlenbeck --ou-noise
        ddpg exploration/epsilon-uniform --exploration-noise 0 --random-action-prob 0.2
        ;;
    gradient-steps)
        sac shared/sac # 1
        sac gradient-steps/2 --gradient-steps 2
        sac gradient-steps/4 --gradient-steps 4
        ;;
    benchmark) refuse "comparison 1 is the main benchmark: benchmark/all.sh run" ;;
    *) refuse "there is no comparison $1; --help names them" ;;
    esac
}

# Fills `commands` and `folders` with the cells of one phase, and the further flags given. What was tuned is trained
# in the second phase, after the trials.
make_grid() {
    local phase=$1 place=0 added variant words script command seed all device=--no-cuda
    [[ ${GPU:-0} == 0 ]] || device=--cuda
    commands=() folders=() added=-1
    # Seeds vary slowest, so that an unfinished sweep has one seed of everything before two of anything.
    while ((${#commands[@]} != added)); do
        added=${#commands[@]}
        for variant in "${variants[@]}"; do
            read -r -a all <<<"${seeds_of[$variant]}"
            seed=${all[place]-}
            [[ $seed && $variant == */tuned ]] && ((phase == 1)) && continue
            [[ $seed && $variant != */tuned ]] && ((phase == 2)) && continue
            [[ $seed ]] || continue
            words=${words_of[$variant]} script=$root/${words_of[$variant]%% *}
            [[ -e $script ]] || refuse "there is no $script"
            words=${words#"${words%% *}"}
            printf -v command '%q ' "$python" "${script#"$PWD"/}"
            command=${command% }$words
            printf -v words ' %q' --env-id "$task" --seed "$seed" --total-timesteps "$steps" --threads 1 "$device" \
                --run-dir "$results/$variant/seed$seed" --resume "${setting[@]}" "${@:2}"
            commands+=("$command$words") folders+=("$results/$variant/seed$seed")
        done
        place=$((place + 1))
    done
}

# ======== Command line ========

main() {
    local mode=print name flag phase folder recorded
    local -a variants=() chosen=()
    local -A seeds_of=() words_of=()
    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash 4.4 or later is needed"
    case ${1:-} in
    print | run) mode=$1 && shift ;;
    -h | --help)
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        return
        ;;
    esac
    while [[ ${1:-} && $1 != -* ]]; do
        name=$1
        [[ ! $name =~ ^([1-9]|10)$ ]] || name=${numbered[$1 - 1]}
        chosen+=("$name")
        shift
    done
    for flag; do
        case ${flag//_/-} in
        --env-id* | --seed* | --total-timesteps* | --run-dir*)
            refuse "$flag is the sweep's own; use ENV_ID, SEEDS, TOTAL_TIMESTEPS or RESULTS"
            ;;
        esac
    done
    [[ ${BUDGET:-small} =~ ^(small|paper)$ ]] || refuse "BUDGET=$BUDGET is not small or paper"
    [[ $steps =~ ^[1-9][0-9]*$ ]] || refuse "TOTAL_TIMESTEPS=$steps is not a number of steps"
    command -v "$python" >/dev/null || refuse "there is no $python; set PYTHON"
    ((${#chosen[@]})) || chosen=("${numbered[@]:1}")
    for name in "${chosen[@]}"; do
        add "$name"
    done
    for phase in 1 2; do
        make_grid "$phase" "$@"
        ((${#commands[@]})) || continue
        if [[ $mode == print ]]; then
            printf '%s\n' "${commands[@]}"
            continue
        fi
        for folder in "${folders[@]}"; do
            recorded=$(steps_of_record "$folder")
            [[ ! $recorded || $recorded -ge $steps ]] || refuse \
                "$folder ended at step $recorded and has no checkpoint to continue from; set RESULTS to another folder"
        done
        run_grid
        rm -rf "$SWEEP"
    done
}

# In braces, so that bash has read all of this file before a long sweep starts.
{
    main "$@"
    exit
}
