#!/usr/bin/env bash
# Prints the name of this node if the program given (no arguments) fails on it.
set -euo pipefail
"$1" >/dev/null 2>&1 || echo "$SLURMD_NODENAME"
