#!/usr/bin/env bash
# Prints TD3's grid of training runs, or runs it with `run`; --help tells the rest (it is sweep.sh's).
set -euo pipefail
ALGORITHMS=td3 exec "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" "$@"
