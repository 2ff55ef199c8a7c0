#!/usr/bin/env bash
# Prints the grids of all algorithms, interleaved, or runs them with `run`; --help tells the rest (it is sweep.sh's).
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" "$@"
