"""Weights that every data-parallel rank can read after an update.

With `--overlap-param-gather` an update leaves each rank with its own share of the new weights; the
others' arrive during the next forward pass. Whoever reads weights between the two (a checkpoint,
an export, a norm) asks for them first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def complete_parameters(model: Iterable[Any]) -> None:
    """Bring every rank's share of the weights here where the update has not; one all-gather of the
    weights over data-parallel ranks then, and nothing otherwise.

    `model` are this rank's chunks, wrapped for data parallelism or not. All data-parallel ranks
    call this together.
    """
    for chunk in model:
        settings = getattr(chunk, "ddp_config", None)
        if settings is not None and settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
