"""Operations of a training step as they happen, with the phase of the step that they belong to.

`Watch` sees every operation below autograd, collectives included, whether tensors are real or
fake, and tells its observers after it ran. It changes no result. Phases follow from what the code
says anyway: the ranges that it names for the profiler, the autograd node that runs, and the output
head's forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Phase = Literal[
    "forward", "backward", "recompute", "loss", "zero gradients", "reduce gradients",
    "optimizer step",
]  # fmt: skip

_RANGES: tuple[Phase, ...] = ("zero gradients", "reduce gradients", "optimizer step")
_ENTER = torch.ops.profiler._record_function_enter_new.default
_LEAVE = torch.ops.profiler._record_function_exit._RecordFunction
_HEAD_NODE = "_OfHiddenBackward"
"""Autograd node of the loss that makes its own logits (`kernels.vocabulary.projection`)."""
_RECOMPUTING_NODE = "CheckpointFunctionBackward"


class Observer(Protocol):
    """Something that counts operations."""

    def observe(self, function: Any, arguments: tuple[Any, ...], result: Any, phase: Phase) -> None:
        """`function` is the overload that ran, `arguments` are its positional ones."""
        ...


class Watch(TorchDispatchMode):
    """Tells `observers` of every operation within its context."""

    def __init__(self, *observers: Observer) -> None:
        super().__init__()
        self._observers = observers
        self._ranges: list[str] = []
        self._heads_running = 0

    def follow(self, heads: Iterable[torch.nn.Module]) -> None:
        """Count what runs in the forward passes of these modules as the loss."""

        def enter(*unused: object) -> None:
            self._heads_running += 1

        def leave(*unused: object) -> None:
            self._heads_running -= 1

        for head in heads:
            head.register_forward_pre_hook(enter)
            head.register_forward_hook(leave)

    @property
    def phase(self) -> Phase:
        for name in _RANGES:
            if name in self._ranges:
                return name
        if self._heads_running:
            return "loss"
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        node = torch._C._current_autograd_node()
        name = "" if node is None else node.name()
        if name == _HEAD_NODE:
            return "loss"
        return "recompute" if name == _RECOMPUTING_NODE else "backward"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func is _ENTER:
            self._ranges.append(args[0])
        elif func is _LEAVE:
            self._ranges.pop()
        else:
            phase = self.phase
            for observer in self._observers:
                observer.observe(func, args, result, phase)
        return result
