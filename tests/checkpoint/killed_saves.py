"""A process that dies by SIGKILL at the k-th change it makes to a checkpoint folder.

Changes are counted by a Python audit hook: files opened for writing, renames, deletions, folders.
Nothing of the code under test is replaced.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        _, mode, flags = arguments
        if isinstance(mode, str):
            return any(letter in mode for letter in "wax+")
        return bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES


class ChangeCounter:
    """Counts this process's changes below `root` and kills it before number `kill_before`."""

    def __init__(self, root: Path, kill_before: int | None) -> None:
        self.root, self.kill_before, self.count = str(root), kill_before, 0
        self.process, self.is_counting = os.getpid(), False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_counting or os.getpid() != self.process:
            return
        if not _is_change(event, arguments):
            return
        path = arguments[0]
        # Deletions inside a folder that is being removed name files relative to it.
        is_inside = isinstance(path, (str, os.PathLike)) and (
            str(path).startswith(self.root) or not os.path.isabs(path)
        )
        if is_inside:
            self.count += 1
            if self.count == self.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)


def save_step(root: str, step: int, kill_before: int | None, counts: Any) -> None:
    """Save a checkpoint of an untrained tiny model as `step`, keeping two, and report changes."""
    import torch

    from megatron_ext.checkpoint.training import CheckpointWriter, Position
    from megatron_ext.training.loop import Trainer
    from tests.training.tiny import tiny_config

    # megatron-core's writer keeps a process of its own, which outlives a parent that is killed:
    # whoever started this one ends the whole group.
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    trainer = Trainer.build(tiny_config(model={"num_layers": 1}, training={"seed": step}))
    batch = trainer.config.training.global_batch_size
    counter = ChangeCounter(Path(root), kill_before)
    writer = CheckpointWriter(root, keep_last=2)
    counter.is_counting = True
    writer.save(trainer.model, trainer.optimizer, Position(step, step * batch, 0))
    counter.is_counting = False
    counts.put(counter.count)
