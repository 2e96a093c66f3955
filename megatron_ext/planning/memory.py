"""Memory of tensors as they come and go: what holds it, its peak, and its course over a step.

Counted are the storages of tensors, real or fake, each once however many tensors share it, from
the operation that made it to the moment nobody holds it. What an operation allocates and frees
inside itself is invisible here, as are allocator's rounding and the libraries' own memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from megatron_ext.planning.watch import Phase

Category = Literal["weights", "gradients", "optimizer", "activations", "loss", "buffers"]
CATEGORIES: tuple[Category, ...] = (
    "weights", "gradients", "optimizer", "activations", "loss", "buffers",
)  # fmt: skip
_CATEGORY_OF_PHASE: dict[Phase, Category] = {
    "forward": "activations",
    "backward": "activations",
    "recompute": "activations",
    "loss": "loss",
    "zero gradients": "gradients",
    "reduce gradients": "gradients",
    "optimizer step": "optimizer",
}


class Segment(NamedTuple):
    """A stretch of a step in one phase."""

    phase: Phase
    start_bytes: int
    peak_bytes: int
    end_bytes: int


class _Block(NamedTuple):
    category: Category
    num_bytes: int
    number: int
    reference: weakref.ref


class MemoryTrace:
    """Bytes held by category; an observer of `Watch`.

    `default` is the category of what is allocated while it is set; while it is `None`, the phase
    decides.
    """

    def __init__(self) -> None:
        self.default: Category | None = None
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.total = self.peak = 0
        self.at_peak = dict(self.now)
        self._peak_number = self._number = self._step_number = 0
        self._blocks: dict[int, _Block] = {}
        self._segments: list[list[Any]] = []

    def observe(self, function: Any, arguments: tuple[Any, ...], result: Any, phase: Phase) -> None:
        del function, arguments
        if self.default is None and (not self._segments or self._segments[-1][0] != phase):
            self._segments.append([phase, self.total, self.total, self.total])
        for tensor in _tensors(result):
            self.add(tensor, self.default or _CATEGORY_OF_PHASE[phase])
        if self._segments:
            last = self._segments[-1]
            last[2], last[3] = max(last[2], self.total), self.total

    def add(self, tensor: Tensor, category: Category) -> None:
        """Count the storage of `tensor` under `category`, where it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        num_bytes = storage.nbytes()
        self._number += 1
        reference = weakref.ref(storage, partial(self._freed, key))
        self._blocks[key] = _Block(category, num_bytes, self._number, reference)
        self.now[category] += num_bytes
        self.total += num_bytes
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)
            self._peak_number = self._number

    def _freed(self, key: int, reference: weakref.ref) -> None:
        del reference
        block = self._blocks.pop(key)
        self.now[block.category] -= block.num_bytes
        self.total -= block.num_bytes

    def classify(self, tensor: Tensor, category: Category) -> None:
        """Count the storage of `tensor` under `category` from now on."""
        key = tensor.untyped_storage()._cdata
        block = self._blocks.get(key)
        if block is None:
            self.add(tensor, category)
            return
        self._blocks[key] = block._replace(category=category)
        self.now[block.category] -= block.num_bytes
        self.now[category] += block.num_bytes

    def start_step(self) -> None:
        """From here on phases decide; the peak is that of the step."""
        self.default = None
        self.peak, self.at_peak = self.total, dict(self.now)
        self._step_number = self._peak_number = self._number
        self._segments.clear()

    def finish_step(self) -> None:
        """What the step allocated as activations and left behind are buffers that it reuses."""
        for key, block in list(self._blocks.items()):
            if block.number > self._step_number and block.category == "activations":
                self._blocks[key] = block._replace(category="buffers")
                places = [self.now, self.at_peak] if block.number <= self._peak_number else []
                for place in places or [self.now]:
                    place["activations"] -= block.num_bytes
                    place["buffers"] += block.num_bytes

    @property
    def timeline(self) -> list[Segment]:
        return [Segment(*values) for values in self._segments]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
