"""LaProp with decoupled weight decay, and AdamW, on all parameters at once.

LaProp (arXiv 2002.04839) normalises the gradient before it averages it. The stored averages are
already free of start-up bias: with t counted from 1 and b^_i = 1 - (1 - b_i) / (1 - b_i^t),

    nu <- b^_2 nu + (1 - b^_2) g^2        mu <- b^_1 mu + (1 - b^_1) g / (sqrt(nu) + eps)
    p  <- p - lr (mu + weight_decay p)

An update runs through tiles of parameters, a dozen operations each. On a CPU tiles stay in
cache, so that parameters, gradients and averages cross the memory bus once; on a GPU they are large
and bound the memory of temporaries.

State per parameter is `exp_avg` and `exp_avg_sq`, float32 (float64 for float64 parameters); `step`
is kept in the parameter group, as fused optimizers do and megatron-core's distributed optimizer
expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 17
"""Of a tile on a CPU: 512 KiB each of parameter, gradient, averages and temporaries."""
GPU_TILE_ELEMENTS = 1 << 26
"""Of a tile elsewhere: the temporaries, 12 bytes per element, stay below 1 GiB however many
parameters a rank updates."""


class _GroupedOptimizer(torch.optim.AdamW):
    """Foreach updates of all parameters of a group; `step` in the group.

    It is an AdamW by type alone: megatron-core's distributed optimizer accepts nothing else, for
    the sake of the state's names. Nothing of torch's AdamW runs.
    """

    tile_elements: int | None = None
    """Elements updated at a time; by the kind of device where absent."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} is {value}: give zero or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}: give numbers in [0, 1)")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        torch.optim.Optimizer.__init__(self, params, defaults | {"step": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but averages keep their dtype and `step` stays in the group alone.

        torch would round the averages of bfloat16 parameters; megatron-core's distributed optimizer
        adds a `step` to every parameter where Transformer Engine and apex are absent.
        """
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved_ids, parameters, strict=True):
            if index in state_dict["state"]:
                saved = state_dict["state"][index]
                self.state[parameter] = {
                    name: saved[name].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")
                }

    def initialize_state(self) -> None:
        """Zero averages for every parameter that has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.initialize_state()
        for group in self.param_groups:
            group["step"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                averages = [self.state[p]["exp_avg"] for p in parameters]
                squares = [self.state[p]["exp_avg_sq"] for p in parameters]
                gradients = [p.grad for p in parameters]
                is_cpu = parameters[0].device.type == "cpu"
                size = self.tile_elements or (TILE_ELEMENTS if is_cpu else GPU_TILE_ELEMENTS)
                for tile in _tiles(size, parameters, gradients, averages, squares):
                    self._step_tile(group, *tile)
        return loss

    def _step_tile(
        self,
        group: dict,
        parameters: list[Tensor],
        gradients: list[Tensor],
        averages: list[Tensor],
        squares: list[Tensor],
    ) -> None:
        gradients = [g.to(a.dtype) for g, a in zip(gradients, averages, strict=True)]
        steps = self._update(group, gradients, averages, squares)
        if group["weight_decay"] != 0:
            for step, parameter in zip(steps, parameters, strict=True):
                step.add_(parameter, alpha=group["weight_decay"])
        _subtract(parameters, steps, group["lr"])

    def _update(
        self, group: dict, gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor]
    ) -> list[Tensor]:
        """Advance the averages in place; returns new tensors with the step before lr and decay."""
        raise NotImplementedError


def _tiles(size: int, *tensors: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The lists cut alike, into pieces of at most `size` elements in all."""
    tile: list[tuple[Tensor, ...]] = []
    room = size
    for members in zip(*tensors, strict=True):
        # A view where the tensor is contiguous, as everything here is.
        flat = [x.view(-1) for x in members]
        first, length = 0, flat[0].numel()
        while first < length:
            last = min(first + room, length)
            tile.append(tuple(x[first:last] for x in flat))
            room -= last - first
            first = last
            if room == 0:
                yield tuple(map(list, zip(*tile, strict=True)))
                tile, room = [], size
    if tile:
        yield tuple(map(list, zip(*tile, strict=True)))


def _subtract(parameters: list[Tensor], steps: list[Tensor], lr: float) -> None:
    if parameters[0].dtype == steps[0].dtype:
        torch._foreach_add_(parameters, steps, alpha=-lr)
        return
    # The reference rounds the update, then the sum, to the parameter's dtype.
    torch._foreach_mul_(steps, -lr)
    torch._foreach_add_(parameters, [s.to(p.dtype) for s, p in zip(steps, parameters, strict=True)])


class LaProp(_GroupedOptimizer):
    """LaProp; arguments as in the module's formula."""

    def _update(
        self, group: dict, gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor]
    ) -> list[Tensor]:
        new_mean, new_square = ((1 - b) / (1 - b ** group["step"]) for b in group["betas"])
        torch._foreach_mul_(squares, 1 - new_square)
        torch._foreach_addcmul_(squares, gradients, gradients, value=new_square)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        normalised = torch._foreach_div(gradients, roots)
        torch._foreach_mul_(averages, 1 - new_mean)
        torch._foreach_add_(averages, normalised, alpha=new_mean)
        return [average.clone() for average in averages]


class AdamW(_GroupedOptimizer):
    """AdamW, numerically torch's, with `step` in the group."""

    def _update(
        self, group: dict, gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor]
    ) -> list[Tensor]:
        mean, square = group["betas"]
        correction = [1 - b ** group["step"] for b in group["betas"]]
        torch._foreach_lerp_(averages, gradients, 1 - mean)
        torch._foreach_mul_(squares, square)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - square)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, correction[1] ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(averages, roots)
        torch._foreach_div_(steps, correction[0])
        return steps
