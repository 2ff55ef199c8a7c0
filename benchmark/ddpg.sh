#!/usr/bin/env bash
# DDPG's grid of training runs: printed, or run with `run`. sweep.sh has the variables.
ALGORITHMS=ddpg exec "$(dirname "$0")/sweep.sh" "$@"
