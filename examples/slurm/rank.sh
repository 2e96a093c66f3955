#!/usr/bin/env bash
# One rank of a SLURM step: what torchrun would say in the environment, from what SLURM says.
# `exec` makes the program the task itself, so that SLURM's signals and its exit code are its own.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
exec "$@"
