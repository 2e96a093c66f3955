"""Where the time of training steps goes: torch's profiler, summed up by what the time is for.

Forward operators belong to the innermost marked module they run in, backward operators to the
forward operator that they differentiate (the profiler numbers both). Matrix products count as such
wherever they run but inside the attention core. A time is an operator's own, without those it
calls, on the thread that called it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

PRODUCTS = "matrix products"
ATTENTION = "attention core"
LAYERS = "norms, rotary, activation, residuals"
LOSS = "loss without its products"
GRADIENTS = "gradient buffers"
OPTIMIZER = "optimizer"
OTHER = "other"
GROUPS = (PRODUCTS, ATTENTION, LAYERS, LOSS, GRADIENTS, OPTIMIZER, OTHER)

_MARK = "step_profile: "
_MATRIX_OPERATORS = {
    f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
}
_BACKWARD = "autograd::engine::evaluate_function: "


@contextlib.contextmanager
def marked(modules: dict[torch.nn.Module, str]) -> Iterator[None]:
    """Mark the forward of modules with the group that their time belongs to."""
    running: list[Any] = []

    def begin(module: torch.nn.Module, arguments: Any) -> None:
        running.append(record_function(_MARK + modules[module]))
        running[-1].__enter__()

    def end(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = []
    for module in modules:
        hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def modules_by_group(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The modules of a whole `DiffusionModel` that decide what time is for."""
    groups = {model.decoder: LAYERS, model.output_layer: LOSS}
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    return groups | dict.fromkeys(cores, ATTENTION)


def profile_steps(
    step: Callable[[], object], model: torch.nn.Module, repetitions: int
) -> dict[str, float]:
    """Seconds per step of a whole `DiffusionModel` by group, after one step without profiler."""
    step()
    events = record_steps(step, modules_by_group(model), repetitions)
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event, group in assign_groups(events):
        seconds[group] += event.self_cpu_time_total / 1e6 / repetitions
    return seconds


def record_steps(
    step: Callable[[], object], modules: dict[torch.nn.Module, str], repetitions: int = 1
) -> list[FunctionEvent]:
    """The profiler's events of `repetitions` steps, in which `modules` are marked."""
    with (
        marked(modules),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded,
    ):
        for _ in range(repetitions):
            step()
    return list(recorded.events())


def assign_groups(events: Iterable[FunctionEvent]) -> Iterator[tuple[FunctionEvent, str]]:
    """Every event with the group of its time."""
    events = list(events)
    # The last operator that began under a number is the one that was differentiated.
    forward = {
        event.sequence_nr: _group_of_forward(event)
        for event in events
        if event.sequence_nr >= 0 and _differentiates(event) is None
    }
    for event in events:
        node = _differentiates(event)
        if node is None:
            group = _group_of_forward(event)
        elif node.name.endswith("AccumulateGrad"):
            group = GRADIENTS
        else:
            group = forward.get(node.sequence_nr, OTHER)
        if event.name in _MATRIX_OPERATORS and group != ATTENTION:
            group = PRODUCTS
        yield event, group


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    current: FunctionEvent | None = event
    while current is not None:
        yield current
        current = current.cpu_parent


def _differentiates(event: FunctionEvent) -> FunctionEvent | None:
    """The node of the backward pass in which an event runs."""
    return next((x for x in _ancestors(event) if x.name.startswith(_BACKWARD)), None)


def _group_of_forward(event: FunctionEvent) -> str:
    """The group of the innermost mark around an event."""
    for x in _ancestors(event):
        if x.name.startswith(_MARK):
            return x.name.removeprefix(_MARK)
        if x.name == "optimizer step":
            return OPTIMIZER
        if x.name in ("zero gradients", "reduce gradients"):
            return GRADIENTS
    return OTHER
