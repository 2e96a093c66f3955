#!/usr/bin/env bash
# Several machines without a scheduler: start the same command on each.
#
#   NODES=2 HEAD=node1:29400 RUN=/shared/runs/mine bash examples/launch/multi_node.sh \
#       --config examples/configs/gidd-unif-3b.yaml --data-path /shared/data/mine ...
#
# HEAD is one of the machines and a free port on it. RUN and the data lie on a file system that all
# machines share. Ranks follow from the order of arrival. Arguments go to pretrain_diffusion.py. Told
# to end, ranks have GRACE_SECONDS (torchrun's 30) to save.
set -euo pipefail
: "${RUN:?is the folder of the run}" "${NODES:?is the number of machines}"
: "${HEAD:?is HOST:PORT of one of the machines}"
: "${GPUS:=8}" "${RESTARTS:=3}" "${PYTHON:=python}"
grace=(${GRACE_SECONDS:+--shutdown-timeout "$GRACE_SECONDS"})
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$(basename "$RUN")" \
    --max-restarts "$RESTARTS" "${grace[@]}" \
    "$repository/pretrain_diffusion.py" "$@" --save "$RUN" --load "$RUN"
