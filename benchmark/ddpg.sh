#!/usr/bin/env bash
# Prints DDPG's grid of training runs, or runs it with `run`; --help tells the rest (it is sweep.sh's).
set -euo pipefail
ALGORITHMS=ddpg exec "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" "$@"
