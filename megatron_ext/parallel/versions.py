"""Where supported versions of megatron-core differ; nothing else asks which one runs.

0.16    the newest for Python 3.10 and 3.11; common state in `common.pt`
0.19    Python 3.12 and later; common state among the shards; background saves ask which
        implementation writes them
"""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import torch

from megatron_ext.parallel.cpu import enable_cpu

enable_cpu()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402

_SAVE_ARGUMENTS = inspect.signature(dist_checkpointing.save).parameters
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in _SAVE_ARGUMENTS else {}
COMMON_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""Where 0.19 keeps what all ranks of a checkpoint share."""


def save_request(state: dict[str, Any], folder: Path) -> Any:
    """Plan a checkpoint and return the engine's request that writes it. A collective."""
    return dist_checkpointing.save(
        state, str(folder), async_sharded_save=True, validate_access_integrity=True, **_OWN_WRITER
    )


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """This rank's gradients, every parameter once over all ranks."""
    name = "get_main_grads_for_grad_norm"
    if hasattr(optimizer, name):
        return getattr(optimizer, name)()
    return optimizer.get_grads_for_grad_norm()


def common_in_shards(folder: Path, reader: torch.distributed.checkpoint.StorageReader) -> Any:
    """What all ranks of a checkpoint of 0.19 share, read in one process."""
    wanted = {COMMON_KEY: io.BytesIO()}
    torch.distributed.checkpoint.load(wanted, storage_reader=reader, no_dist=True)
    loaded = wanted[COMMON_KEY]
    if isinstance(loaded, io.BytesIO):
        loaded.seek(0)
        loaded = torch.load(loaded, weights_only=True)
    return loaded[0]
