#!/usr/bin/env bash
# SAC's grid of training runs: printed, or run with `run`. sweep.sh has the variables.
ALGORITHMS=sac exec "$(dirname "$0")/sweep.sh" "$@"
