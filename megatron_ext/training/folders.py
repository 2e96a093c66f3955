"""--save and --load, checked before anything is built."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import torch

from megatron_ext.checkpoint.training import has_checkpoint
from megatron_ext.config import CheckpointConfig, require

_SECONDS_UNTIL_VISIBLE = 60.0
"""Network file systems may take their time to show one node what another wrote."""


def is_own_folder(checkpoint: CheckpointConfig) -> bool:
    """Whether --load and --save are one folder, however they are written."""
    save, load = checkpoint.save, checkpoint.load
    return save is not None and load is not None and Path(save).resolve() == Path(load).resolve()


def refuse_foreign_folder(checkpoint: CheckpointConfig) -> None:
    """Raise where --save holds checkpoints of a run that this one does not continue."""
    is_own = is_own_folder(checkpoint)
    require(
        not (checkpoint.finetune and is_own), "finetune", True,
        f"it starts at step 0, and would replace the checkpoints of --load in --save, which is the "
        f"same folder, {checkpoint.save}; choose another --save, or give --no-finetune to continue "
        "that run.",
    )  # fmt: skip
    require(
        checkpoint.save is None or is_own or not has_checkpoint(checkpoint.save),
        "save", checkpoint.save,
        "it holds checkpoints already; give --load of the same folder to continue that run, or "
        "choose another.",
    )  # fmt: skip


def refuse_unwritable(save: str | None) -> None:
    """Raise where a file cannot be written to --save, which is made where it is missing."""
    if save is None:
        return
    probe = Path(save) / f".probe.{os.uname().nodename}.{os.getpid()}"
    try:
        Path(save).mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        require(
            False, "save", save,
            f"cannot write there: {error.strerror} ({error.filename}); free space, change its "
            "permissions, or choose another folder.",
        )  # fmt: skip
    finally:
        if probe.parent.is_dir():
            probe.unlink(missing_ok=True)


def refuse_unshared(save: str | None) -> None:
    """Raise on every rank where one does not see what rank 0 writes to --save. A collective.

    A folder on the disk of each node takes shards of a checkpoint that nobody can put together.
    """
    if save is None:
        return
    names = [f".shared.{uuid.uuid4().hex}"]
    torch.distributed.broadcast_object_list(names, src=0)
    path = Path(save) / names[0]
    if torch.distributed.get_rank() == 0:
        path.touch()
    torch.distributed.barrier()
    deadline = time.monotonic() + _SECONDS_UNTIL_VISIBLE
    while not _is_listed(path) and time.monotonic() < deadline:
        time.sleep(1.0)
    blind: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(blind, None if _is_listed(path) else os.uname().nodename)
    if torch.distributed.get_rank() == 0:
        path.unlink(missing_ok=True)
    nodes = sorted({node for node in blind if node is not None})
    require(
        not nodes, "save", save,
        f"nodes {', '.join(nodes)} do not see there what rank 0 writes; give a folder on a file "
        "system that all nodes share.",
    )  # fmt: skip


def _is_listed(path: Path) -> bool:
    """Asked of the folder, whose cached absence of a single name may be older."""
    return path.name in os.listdir(path.parent)
