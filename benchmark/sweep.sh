#!/usr/bin/env bash
# Prints or runs a grid of training runs: every task with every seed, for each algorithm.
#
#   benchmark/sac.sh                           print SAC's grid, one complete command a line
#   benchmark/sac.sh run                       run it; likewise ddpg.sh and td3.sh
#   benchmark/all.sh run                       the grids of all three, interleaved
#   benchmark/all.sh run --eval-episodes 20    further flags go to every run
#   benchmark/all.sh cell 3                    line 3 of the grid alone, counted from 0
#
# Variables, and what they are if unset:
#   SEEDS            1 2 3
#   ENVS             Hopper-v4 Walker2d-v4 HalfCheetah-v4 Ant-v4 Humanoid-v4
#   TOTAL_TIMESTEPS  1000000
#   JOBS             one run at a time per core; each is single-threaded
#   RESULTS          benchmark/results; a run's folder is {RESULTS}/{algorithm}/{task}/seed{n}
#   PYTHON           python; the interpreter that has the packages
#   GPU              0; with 1 the runs train on the GPU, and JOBS of them share it
#   ALGORITHMS       ddpg td3 sac; which ones all.sh, cell and slurm.sbatch take
#
# Each run's output goes to output.log in its folder. A run that fails does not stop the others; it is named at the
# end, and the exit status is 1. Ctrl-C or SIGTERM stops the sweep: every run writes a checkpoint first. Started
# again, the same sweep goes on from there, and a finished run ends at once.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
results=${RESULTS:-$root/benchmark/results} python=${PYTHON:-python} total_timesteps=${TOTAL_TIMESTEPS:-1000000}
# Paths are short where they can be: from the current folder on.
results=${results%/} results=${results#"$PWD"/}

# ======== The grid ========

# Ends the sweep with a reason and exit status 2.
refuse() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# Fills `commands` and `folders`, one of each a cell, from the variables and the further flags given.
make_grid() {
    local algorithm script task seed folder command device=--no-cuda
    [[ ${GPU:-0} == 0 ]] || device=--cuda
    commands=() folders=()
    # Seeds vary slowest, so that an unfinished sweep has one seed of everything before two of anything.
    for seed in ${SEEDS:-1 2 3}; do
        for task in ${ENVS:-Hopper-v4 Walker2d-v4 HalfCheetah-v4 Ant-v4 Humanoid-v4}; do
            for algorithm in ${ALGORITHMS:-ddpg td3 sac}; do
                script=$root/${algorithm}_continuous.py folder=$results/$algorithm/$task/seed$seed
                [[ -e $script ]] || refuse "there is no $script"
                # The device is always said, as a run begun on one is not continued on the other.
                printf -v command '%q ' "$python" "${script#"$PWD"/}" --env-id "$task" --seed "$seed" \
                    --total-timesteps "$total_timesteps" --threads 1 "$device" --run-dir "$folder" --resume "$@"
                commands+=("${command% }") folders+=("$folder")
            done
        done
    done
}

# ======== One cell ========

# Steps of a finished run in a folder without a checkpoint, as after `git clone`; nothing for any other folder.
steps_of_record() {
    local last total
    if [[ -s $1/args.json && -s $1/timing.csv && ! -e $1/checkpoint.pt && ! -e $1/checkpoint.previous.pt ]]; then
        last=$(tail -n 1 "$1/timing.csv" | cut -d , -f 1)
        total=$(sed -n 's/.*"total_timesteps": \([0-9]*\).*/\1/p' "$1/args.json")
        [[ $last != "$total" ]] || printf '%s' "$total"
    fi
}

# Runs a command in place of this shell, its output into the folder given before it.
run_cell() {
    local folder=$1 steps
    shift
    mkdir -p "$folder" || exit
    steps=$(steps_of_record "$folder")
    # Without its checkpoint a finished run could only be started over, and its files would be overwritten.
    if [[ $steps && $steps -lt $total_timesteps ]]; then
        printf '%s ended at step %s and has no checkpoint to continue from; set RESULTS to another folder\n' \
            "$folder" "$steps" | tee -a "$folder/output.log" >&2
        exit 2
    elif [[ $steps ]]; then
        printf '%s has all its %s steps, and no checkpoint: left as it is\n' "$folder" "$steps"
        exit 0
    fi
    exec "$@" >>"$folder/output.log" 2>&1
}

# Runs a cell of a local sweep, says when it starts and ends, and leaves its exit status in $SWEEP/statuses.
attempt() {
    local folder=$1 status=0 started=$SECONDS
    # Its process is on record before it looks whether the sweep has been stopped: so stop() misses none.
    (
        printf '%d' "$BASHPID" >"$SWEEP/pids/$$"
        [[ ! -e $SWEEP/stopped ]] || exit 143
        printf '%s starts\n' "$folder"
        run_cell "$@"
    ) || status=$?
    rm "$SWEEP/pids/$$"
    if [[ -e $SWEEP/stopped ]]; then
        return "$status"
    fi
    printf '%s %s\n' "$status" "$folder" >>"$SWEEP/statuses"
    printf '%s ends after %d s with exit status %d\n' "$folder" "$((SECONDS - started))" "$status"
    return "$status"
}

# ======== The whole grid on this machine ========

# shellcheck disable=SC2317 # traps call it
# Stops a sweep: no more starts, and one SIGTERM to each run, upon which it writes a checkpoint and ends.
stop() {
    local path
    trap '' INT TERM HUP
    exit_status=$((128 + $1))
    printf 'stopping: each run writes a checkpoint\n' >&2
    : >"$SWEEP/stopped"
    for path in "$SWEEP"/pids/*; do
        kill -TERM "$(cat "$path" 2>/dev/null)" 2>/dev/null || :
    done
}

# Leaves in GNU parallel's job log only what --resume-failed may rely on: jobs that succeeded and whose run is still
# there. They count as done in this sweep too.
tidy_joblog() {
    local line folder fields
    {
        read -r line
        printf '%s\n' "$line"
        while read -r line; do
            read -r -a fields <<<"$line"
            [[ ${fields[*]:6:2} == '0 0' ]] || continue # exit status and signal
            folder=${folders[fields[0] - 1]}
            if [[ -e $folder/args.json ]]; then
                printf '%s\n' "$line"
                printf '0 %s\n' "$folder" >>"$SWEEP/statuses"
            fi
        done
    } <"$1" >"$SWEEP/joblog"
    cp "$SWEEP/joblog" "$1"
}

# Says how many cells are done and names those that failed, with the last line of their output.
summarise() {
    local folder status failures=()
    local -A statuses
    while read -r status folder; do
        statuses[$folder]=$status
    done <"$SWEEP/statuses"
    for folder in "${folders[@]}"; do
        status=${statuses[$folder]:-unknown}
        [[ $status == 0 ]] ||
            failures+=("$folder: exit status $status: $(tail -n 1 "$folder/output.log" 2>/dev/null || :)")
    done
    printf '%d of %d cells are done' "$((${#folders[@]} - ${#failures[@]}))" "${#folders[@]}"
    if ((${#failures[@]})); then
        printf '; %d failed:\n' "${#failures[@]}"
        printf '    %s\n' "${failures[@]}"
        return 1
    fi
    printf '\n'
}

# Whether there is a GNU parallel here; moreutils has another program of that name.
has_gnu_parallel() {
    [[ $(parallel --version 2>/dev/null) == *"GNU parallel"* ]]
}

# Runs every cell, $JOBS at a time, to the end or until a signal.
run_grid() {
    local i jobs=${JOBS:-} joblog options=() whatever='' runner
    [[ $jobs ]] || jobs=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    [[ $jobs =~ ^[1-9][0-9]*$ ]] || refuse "JOBS=$jobs is not a number of runs"
    mkdir -p "$results"
    SWEEP=$(mktemp -d)
    export SWEEP
    trap 'rm -rf "$SWEEP"' EXIT
    mkdir "$SWEEP/pids"
    : >"$SWEEP/statuses"
    # An exit status of 255 would stop xargs; GNU parallel records them all.
    has_gnu_parallel || whatever=' || :'
    for i in "${!commands[@]}"; do
        printf '%q attempt %q %s%s\0' "$root/benchmark/sweep.sh" "${folders[i]}" "${commands[i]}" "$whatever"
    done >"$SWEEP/jobs"

    exit_status=0
    trap 'stop 2' INT
    trap 'stop 15' TERM
    trap 'stop 1' HUP
    set -m # a process group of its own, which Ctrl-C does not reach: stop() signals each run, and once
    if has_gnu_parallel; then
        # GNU parallel knows a job by its number alone, so each grid has a job log of its own.
        joblog=$results/sweep-$(printf '%s\n' "${commands[@]}" | cksum | cut -d ' ' -f 1).joblog
        [[ ! -s $joblog ]] || tidy_joblog "$joblog"
        [[ ! -t 2 ]] || options=(--eta)
        PARALLEL_SHELL=$BASH parallel --null --jobs "$jobs" --joblog "$joblog" --resume-failed --line-buffer \
            "${options[@]}" <"$SWEEP/jobs" &
    else
        xargs -0 -n 1 -P "$jobs" "$BASH" -c <"$SWEEP/jobs" &
    fi
    runner=$!
    set +m
    while kill -0 "$runner" 2>/dev/null; do
        wait "$runner" || :
    done

    if ((exit_status)); then
        printf 'stopped; the same command goes on from here\n' >&2
        exit "$exit_status"
    fi
    summarise
}

# ======== Command line ========

main() {
    local mode=print number=0 flag
    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash 4.4 or later is needed"
    case ${1:-} in
    print | run) mode=$1 && shift ;;
    cell)
        mode=cell number=${2:-}
        [[ $number =~ ^[0-9]+$ ]] || refuse "cell needs the number of a line of the grid, from 0"
        shift 2
        ;;
    attempt) # how a sweep calls itself
        attempt "${@:2}"
        return
        ;;
    -h | --help)
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        return
        ;;
    '' | -*) ;;
    *) refuse "$1 is not print, run, cell or a flag; --help says more" ;;
    esac
    for flag; do
        case ${flag//_/-} in
        --env-id* | --seed* | --total-timesteps* | --run-dir*)
            refuse "$flag is the sweep's own; use ENVS, SEEDS, TOTAL_TIMESTEPS or RESULTS"
            ;;
        esac
    done
    [[ $total_timesteps =~ ^[1-9][0-9]*$ ]] || refuse "TOTAL_TIMESTEPS=$total_timesteps is not a number of steps"
    make_grid "$@"
    case $mode in
    print) printf '%s\n' "${commands[@]}" ;;
    cell)
        ((number < ${#commands[@]})) || refuse "there is no cell $number in a grid of ${#commands[@]}"
        eval "run_cell ${folders[number]@Q} ${commands[number]}"
        ;;
    run)
        command -v "$python" >/dev/null || refuse "there is no $python; set PYTHON"
        run_grid
        ;;
    esac
}

# In braces, so that bash has read all of this file before a long sweep starts. Sourced, it runs nothing.
[[ ${BASH_SOURCE[0]} != "$0" ]] || {
    main "$@"
    exit
}
