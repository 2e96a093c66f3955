#!/usr/bin/env bash
# Text to .bin/.idx as a SLURM job array, through datatrove; run it on the login node.
#
#   VENV=/shared/venv bash examples/slurm/preprocess.sh PARTITION TASKS \
#       --input /shared/text/*.jsonl.zst --tokenizer-model /shared/tokenizer \
#       --output-prefix /shared/data/mine
#
# It submits an array of up to TASKS tasks at a time and a job that merges their results, and
# returns. The same command again submits what is missing. More arguments of sbatch:
# --slurm-args account=mine qos=low.
set -euo pipefail
partition=${1:?is the partition} tasks=${2:?is the number of tasks at a time}
shift 2
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${VENV:+$VENV/bin/}python
exec "$python" "$repository/tools/preprocess_data.py" --executor slurm \
    --slurm-partition "$partition" --workers "$tasks" "$@"
