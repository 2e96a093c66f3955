"""LaProp with decoupled weight decay, and AdamW, in one pass over the parameters.

LaProp (arXiv 2002.04839) normalises the gradient before it averages it. The stored averages are
already free of start-up bias: with t counted from 1 and b^_i = 1 - (1 - b_i) / (1 - b_i^t),

    nu <- b^_2 nu + (1 - b^_2) g^2        mu <- b^_1 mu + (1 - b^_1) g / (sqrt(nu) + eps)
    p  <- p - lr (mu + weight_decay p)

On a CPU torch.compile makes an update one loop over parameters, gradients and averages. Elsewhere,
and where that is not worth compiling, it runs through tiles of parameters, a dozen operations each:
on a CPU they stay in cache, on a GPU they are large and bound the memory of temporaries.

State per parameter is `exp_avg` and `exp_avg_sq`, float32 (float64 for float64 parameters); `step`
is kept in the parameter group, as fused optimizers do and megatron-core's distributed optimizer
expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_ext.kernels.vocabulary.passes import has_compiler

TILE_ELEMENTS = 1 << 17
"""Of a tile on a CPU: 512 KiB each of parameter, gradient, averages and temporaries."""
GPU_TILE_ELEMENTS = 1 << 26
"""Of a tile elsewhere: the temporaries, 12 bytes per element, stay below 1 GiB however many
parameters a rank updates."""
COMPILED_FROM = 1 << 23
"""Elements in all from which on compiling (seconds, once) is worth it on a CPU."""

Tensors = list[Tensor]
Factor = float | Tensor
"""A number that may differ between steps; a float64 scalar tensor where the update is compiled.
None may be added: torch.compile takes `_foreach_add_` of a scalar tensor for one of a constant."""


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
        is_compiled = self._is_compiled()
        for group in self.param_groups:
            group["step"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                gradients = [p.grad for p in parameters]
                averages = [self.state[p]["exp_avg"] for p in parameters]
                squares = [self.state[p]["exp_avg_sq"] for p in parameters]
                self._step_group(group, is_compiled, parameters, gradients, averages, squares)
        return loss

    def _step_group(self, group: dict[str, Any], is_compiled: bool, *tensors: Tensors) -> None:
        factors: list[Factor] = [*self._factors(group), group["weight_decay"], group["lr"]]
        if is_compiled:
            factors = [torch.tensor(x, dtype=torch.float64) for x in factors]
            for members in zip(*tensors, strict=True):
                # Detached, or a tensor of another number of dimensions is compiled again.
                flat = ([x.view(-1).detach()] for x in members)
                _compiled(self._advance)(*flat, group["eps"], factors)
            return
        is_cpu = tensors[0][0].device.type == "cpu"
        size = self.tile_elements or (TILE_ELEMENTS if is_cpu else GPU_TILE_ELEMENTS)
        for tile in _tiles(size, *tensors):
            _update(self._advance, *tile, group["eps"], factors)

    def _is_compiled(self) -> bool:
        """Of all groups alike, as they share what is compiled."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return (
            all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
            and not any(isinstance(p, FakeTensor) for p in parameters)
            and sum(p.numel() for p in parameters) >= COMPILED_FROM
            and has_compiler()
        )

    def _factors(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The numbers that `_advance` gets."""
        raise NotImplementedError

    @staticmethod
    def _advance(
        gradients: Tensors, averages: Tensors, squares: Tensors, eps: float, *factors: Any
    ) -> Tensors:
        """Advance the averages in place; returns the step before lr and decay, to be read only."""
        raise NotImplementedError


def _tiles(size: int, *tensors: Tensors) -> Iterator[tuple[Tensors, ...]]:
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


def _update(
    advance: Callable[..., Tensors],
    parameters: Tensors,
    gradients: Tensors,
    averages: Tensors,
    squares: Tensors,
    eps: float,
    factors: list[Factor],
) -> None:
    *others, decay, lr = factors
    gradients = [g.to(a.dtype) for g, a in zip(gradients, averages, strict=True)]
    moves = advance(gradients, averages, squares, eps, *others)
    steps = [p.to(m.dtype) for p, m in zip(parameters, moves, strict=True)]
    steps = torch._foreach_mul(steps, decay)
    torch._foreach_add_(steps, moves)
    torch._foreach_mul_(steps, lr)
    # The reference rounds the update, then the sum, to the parameter's dtype.
    torch._foreach_sub_(parameters, [s.to(p.dtype) for s, p in zip(steps, parameters, strict=True)])


@cache
def _compiled(advance: Callable[..., Tensors]) -> Callable[..., None]:
    # On all threads, however small the tensor is that it is compiled for.
    options = {"cpp.min_chunk_size": 1}
    return torch.compile(partial(_update, advance), dynamic=True, fullgraph=True, options=options)


class LaProp(_GroupedOptimizer):
    """LaProp; arguments as in the module's formula."""

    def _factors(self, group: dict[str, Any]) -> tuple[float, ...]:
        new = [(1 - b) / (1 - b ** group["step"]) for b in group["betas"]]
        return *new, *(1 - x for x in new)

    @staticmethod
    def _advance(
        gradients: Tensors, averages: Tensors, squares: Tensors, eps: float, *factors: Any
    ) -> Tensors:
        new_mean, new_square, old_mean, old_square = factors
        torch._foreach_mul_(squares, old_square)
        torch._foreach_addcmul_(squares, torch._foreach_mul(gradients, new_square), gradients)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, eps)
        torch._foreach_mul_(averages, old_mean)
        torch._foreach_addcdiv_(averages, torch._foreach_mul(gradients, new_mean), roots)
        return averages


class AdamW(_GroupedOptimizer):
    """AdamW, numerically torch's, with `step` in the group."""

    def _factors(self, group: dict[str, Any]) -> tuple[float, ...]:
        mean, square = (1 - b ** group["step"] for b in group["betas"])
        return *group["betas"], *(1 - b for b in group["betas"]), mean, square**0.5

    @staticmethod
    def _advance(
        gradients: Tensors, averages: Tensors, squares: Tensors, eps: float, *factors: Any
    ) -> Tensors:
        old_mean, old_square, new_mean, new_square, mean_share, square_share_root = factors
        torch._foreach_mul_(averages, old_mean)
        torch._foreach_add_(averages, torch._foreach_mul(gradients, new_mean))
        torch._foreach_mul_(squares, old_square)
        torch._foreach_addcmul_(squares, torch._foreach_mul(gradients, new_square), gradients)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, square_share_root)
        torch._foreach_add_(roots, eps)
        moves = torch._foreach_div(averages, roots)
        torch._foreach_div_(moves, mean_share)
        return moves
