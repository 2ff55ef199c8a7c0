#!/usr/bin/env bash
# Prints SAC's grid of training runs, or runs it with `run`; --help tells the rest (it is sweep.sh's).
set -euo pipefail
ALGORITHMS=sac exec "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" "$@"
