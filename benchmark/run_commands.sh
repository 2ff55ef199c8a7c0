#!/usr/bin/env bash
# Runs each line of standard input, the command of a training run, JOBS at a time: one per core if unset.
# sweep.sh and ablations.sh start it. With `one "$command"` it runs this command alone, in its own place.
#
# Output goes to output.log in the run's --run-dir. A run that fails is named and stops no other, and the exit
# status is then not 0. Ctrl-C or SIGTERM makes every run write its checkpoint; the same commands go on later.
set -euo pipefail

one() {
    local words
    if [[ $1 != *" --run-dir "* ]]; then
        echo "${0##*/}: error: no --run-dir in the command '$1'" >&2
        exit 2
    fi
    eval "words=(${1#* --run-dir })" # the rest of the command, in words as the shell splits it
    mkdir -p "${words[0]}"
    eval "exec $1" >>"${words[0]}/output.log" 2>&1
}

name_if_it_fails() {
    local status=0
    "$0" one "$1" || status=$?
    if ((status)); then
        echo "FAILED with exit status $status, see output.log in its --run-dir: $1" >&2
        exit 1 # 255 would stop xargs
    fi
}

all() {
    local jobs=${JOBS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)} program=$0 runner status=0
    if [[ $(parallel --version 2>/dev/null) == *GNU* ]]; then # moreutils has another parallel
        # Not with --resume-failed: its job log knows a run by its line's number alone, and so would skip work
        # after a change of the grid or a deleted folder. Finished runs are started again, and end at once.
        runner=(parallel --null --jobs "$jobs" --termseq "TERM,120000") # by default it kills after 0.4 s
        printf -v program '%q' "$0" # it gives its words to a shell
        if [[ -t 2 ]]; then
            runner+=(--bar)
        fi
    else
        runner=(xargs -0 -n 1 -P "$jobs")
    fi
    set -m # the runner has a process group of its own, so that Ctrl-C comes to this script alone
    "${runner[@]}" "$program" name_if_it_fails < <(tr '\n' '\0') &
    set +m
    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    wait "$!" || status=$?
    exit "$status"
}

stop() {
    local tenths=0
    trap - INT TERM HUP # a second Ctrl-C ends the waiting, not the runs
    kill -TERM -- "-$!"
    echo "stopping: every run writes its checkpoint" >&2
    # GNU parallel passes the signal on and waits. xargs dies of it and leaves its runs in the process group.
    while kill -0 -- "-$!" 2>/dev/null && ((++tenths < 1200)); do
        sleep 0.1
    done
    exit "$1"
}

"${@:-all}" # the function that the first word names
