#!/usr/bin/env bash
# The grid of all three algorithms: printed, or run with `run`. sweep.sh has the variables.
exec "$(dirname "$0")/sweep.sh" "$@"
