"""Saves of a run that may fail: a full disk costs a checkpoint, not the run.

A save that fails on any rank fails on all, leaves the checkpoints before it as they are, and is
tried again at the next occasion; after `--max-failed-saves` in a row the run stops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.training import (
    CheckpointWriter,
    Position,
    SaveFailed,
    has_checkpoint,
    load_checkpoint,
    newest_intact,
    read_memory,
)
from megatron_ext.config import CheckpointConfig
from megatron_ext.training.guards import EXIT_NOT_SAVED, Stop


class Saver:
    """Writes checkpoints where there is a --save. Every rank calls every method together."""

    def __init__(
        self, config: CheckpointConfig, step: int, complain: Callable[[str, str], None]
    ) -> None:
        self.config, self.complain = config, complain
        self.saved_step, self.failures = step, 0
        self.writer = None
        if config.save is not None:
            self.writer = CheckpointWriter(
                config.save, async_save=config.async_save, keep_last=config.keep_last
            )

    def is_due(self, step: int) -> bool:
        interval = self.config.save_interval
        return self.writer is not None and interval > 0 and step % interval == 0

    @property
    def has_saved(self) -> bool:
        """Whether this run has a checkpoint to go back to; as rank 0 sees it."""
        save = self.config.save
        answer = [save is not None and has_checkpoint(save)]
        torch.distributed.broadcast_object_list(answer, src=0)
        return answer[0]

    def save(
        self, model: list[Any], optimizer: Any, position: Position, memory: dict[str, Any]
    ) -> None:
        """Write (or begin to write) the checkpoint of `position`."""
        writer = self.writer
        if writer is None:
            return
        self.finish()
        if self._try(lambda: writer.save(model, optimizer, position, memory)):
            self.saved_step = position.step

    def poll(self) -> None:
        """Complete a background write if it is done."""
        if self.writer is not None:
            self._try(self.writer.poll)

    def finish(self) -> None:
        """Wait for a background write."""
        if self.writer is not None:
            self._try(self.writer.finish)

    @property
    def stop(self) -> Stop | None:
        """A reason to stop, where too many saves have failed."""
        if self.failures < self.config.max_failed_saves:
            return None
        return EXIT_NOT_SAVED, f"{self.failures} checkpoints in a row could not be written"

    def go_back(self, model: list[Any], optimizer: Any) -> tuple[Position, dict[str, Any]]:
        """Fill weights and optimizer from the newest intact checkpoint of this run."""
        assert self.config.save is not None, "only a run that saves can go back"
        folder, damaged = newest_intact(Path(self.config.save), set_aside=True)
        for line in damaged:
            self.complain("fallback", line)
        position = load_checkpoint(folder, model, optimizer, is_verified=True)
        return position, read_memory(folder)[1]

    def _try(self, work: Callable[[], None]) -> bool:
        assert self.writer is not None
        published = self.writer.published
        try:
            work()
        except SaveFailed as error:
            self.failures += 1
            self.saved_step = -1
            self.complain(
                "save_failed",
                f"{error}. The run goes on ({self.failures} of --max-failed-saves "
                f"{self.config.max_failed_saves}); earlier checkpoints are as they were.",
            )
            return False
        if self.writer.published != published:
            self.failures = 0
        return True
