#!/usr/bin/env bash
# TD3's grid of training runs: printed, or run with `run`. sweep.sh has the variables.
ALGORITHMS=td3 exec "$(dirname "$0")/sweep.sh" "$@"
