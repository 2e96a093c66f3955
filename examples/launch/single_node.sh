#!/usr/bin/env bash
# One machine, all its GPUs (or GPUS of them; on a machine without, processes on the CPU).
#
#   GPUS=8 RUN=runs/mine bash examples/launch/single_node.sh \
#       --config examples/configs/gidd-567m.yaml --data-path data/mine --tokenizer-model data/tokenizer
#
# Arguments go to pretrain_diffusion.py as they are. The same command starts and continues the run.
# After a fault torchrun starts all ranks again, at most RESTARTS times; told to end, ranks have
# GRACE_SECONDS (torchrun's 30) to save.
set -euo pipefail
: "${RUN:?is the folder of the run}" "${GPUS:=8}" "${RESTARTS:=3}" "${PYTHON:=python}"
grace=(${GRACE_SECONDS:+--shutdown-timeout "$GRACE_SECONDS"})
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Without it restarted ranks read the addresses of those before them from torchrun's store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" \
    --max-restarts "$RESTARTS" "${grace[@]}" \
    "$repository/pretrain_diffusion.py" "$@" --save "$RUN" --load "$RUN"
