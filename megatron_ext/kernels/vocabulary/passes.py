"""The passes over rows of logits, in plain torch, and the choice between implementations.

    rows    [n, w]   logits before `scale`, any float dtype; `w` columns on this rank
    bias    [w]      0, or minus infinity for columns that count for nothing
    scale   []       factor of the logits
    others  [n]

Everything but `rows` and `out` is float32 (float64 for float64 rows). With l = scale rows + bias:

    statistics   peak = max l, at least the lowest finite number, and sum exp(l - peak)
    tail_sums    sums over columns but `skip` of v - log(1 + v) and v / (1 + v), v = exp(l + shift)
    gradient     out = p (weight_p - weight_v / (1 + r p)), p = exp(l - lse)

`gradient` may write over `rows`. The three functions below work through tiles that stay in cache;
`compiled` are the same formulas fused by torch.compile, `triton` kernels for GPUs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Implementation = Literal["auto", "reference", "chunked", "compiled", "triton", "described"]
"""`described` takes fake tensors only: it is what dry runs put in the place of GPU kernels."""

TILE_ELEMENTS = 1 << 18
"""Of a tile, 1 MiB in float32: it and its temporaries stay in a core's cache."""
COMPILED_FROM_VOCABULARY = 16384
"""Below, compiling (seconds, once) is not worth it."""


class Passes(NamedTuple):
    """An implementation."""

    statistics: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(rows, bias, scale) -> peak, total."""
    tail_sums: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(rows, bias, scale, shift, skip) -> the two sums; `skip` int64 column, -1 for none."""
    gradient: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None
    ]
    """(rows, out, bias, scale, lse, weight_p, r, weight_v); the last two may be absent."""


def choose(
    impl: Implementation, device: torch.device, dtype: torch.dtype, vocab_size: int
) -> Implementation:
    """What `auto` stands for; raises `ValueError` for what cannot run here.

    A function of the kind of device, the dtype of the logits, the whole vocabulary and what is
    installed, so that all ranks of a run agree.
    """
    if impl == "triton":
        if dtype == torch.float64:
            raise ValueError("--loss-impl is triton: it does not take float64; choose chunked.")
        if find_spec("triton") is None:
            raise ValueError("--loss-impl is triton: install triton, or choose auto.")
        if device.type == "cpu" and not _is_interpreted():
            raise ValueError(
                "--loss-impl is triton: its kernels need a GPU (or TRITON_INTERPRET=1); "
                "choose auto."
            )
    if impl == "compiled" and device.type == "cpu" and not has_compiler():
        raise ValueError("--loss-impl is compiled: no C++ compiler is found; install g++.")
    if impl != "auto":
        return impl
    if dtype == torch.float64:
        return "chunked"
    if device.type != "cpu":
        return "triton" if find_spec("triton") is not None else "chunked"
    is_worth_it = vocab_size >= COMPILED_FROM_VOCABULARY
    return "compiled" if is_worth_it and has_compiler() else "chunked"


def is_gpu(impl: Implementation, device: torch.device) -> bool:
    """Whether memory and time to save are a GPU's, described ones included."""
    return impl == "described" or device.type != "cpu"


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def passes_of(impl: Implementation) -> Passes:
    """The passes of an implementation that `choose` returned."""
    match impl:
        case "chunked":
            return Passes(statistics, tail_sums, gradient)
        case "compiled":
            from megatron_ext.kernels.vocabulary import passes_compiled as module
        case "triton":
            from megatron_ext.kernels.vocabulary import passes_triton as module
        case "described":
            from megatron_ext.kernels.vocabulary import passes_described as module
        case _:
            raise ValueError(
                f"impl is {impl!r}: choose auto, reference, chunked, compiled or triton"
            )
    return Passes(module.statistics, module.tail_sums, module.gradient)


def statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _in_tiles(_statistics, rows, bias, scale)


def tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    return _in_tiles(_tail_sums, rows, bias, scale, shift, skip)


def gradient(
    rows: Tensor,
    out: Tensor,
    bias: Tensor,
    scale: Tensor,
    lse: Tensor,
    weight_p: Tensor,
    r: Tensor | None,
    weight_v: Tensor | None,
) -> None:
    for part in _tiles(rows):
        p = _logits(rows[part], bias, scale).sub_(lse[part].unsqueeze(-1)).exp_()
        weight = weight_p[part].unsqueeze(-1)
        if r is not None and weight_v is not None:
            u = torch.mul(p, r[part].unsqueeze(-1)).add_(1)
            weight = torch.addcdiv(weight, weight_v[part].unsqueeze(-1), u, value=-1)
        out[part] = p.mul_(weight)


def _tiles(rows: Tensor) -> Iterator[slice]:
    num_rows = max(TILE_ELEMENTS // max(rows.shape[1], 1), 1)
    return (slice(i, i + num_rows) for i in range(0, len(rows), num_rows))


def _in_tiles(
    function: Callable[..., tuple[Tensor, Tensor]],
    rows: Tensor,
    bias: Tensor,
    scale: Tensor,
    *vectors: Tensor,
) -> tuple[Tensor, Tensor]:
    results = bias.new_empty((2, len(rows)))
    for part in _tiles(rows):
        logits = _logits(rows[part], bias, scale)
        results[0, part], results[1, part] = function(logits, *(x[part] for x in vectors))
    return results[0], results[1]


def _logits(rows: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """Whose memory is new."""
    return torch.addcmul(bias, rows.to(bias.dtype), scale)


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    # A rank can hold nothing but padding: its peak is -inf and must not make NaNs.
    peak = logits.amax(-1).clamp_min(torch.finfo(logits.dtype).min)
    return peak, logits.sub_(peak.unsqueeze(-1)).exp_().sum(-1)


def _tail_sums(logits: Tensor, shift: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    v = logits.add_(shift.unsqueeze(-1)).exp_()
    column = skip.clamp_min(0).unsqueeze(-1)
    v.scatter_(-1, column, v.gather(-1, column).masked_fill_(skip.unsqueeze(-1) >= 0, 0.0))
    return minus_log1p(v).sum(-1), (v / (1 + v)).sum(-1)


def minus_log1p(v: Tensor) -> Tensor:
    """v - log(1 + v) for v >= 0 without cancellation at small v."""
    limit = 2e-2 if v.dtype == torch.float32 else 1e-3
    return torch.where(v < limit, minus_log1p_series(v), v - torch.log1p(v))


def minus_log1p_series(v: Tensor) -> Tensor:
    """v - log(1 + v), to parts in 10^7 for v < 0.1."""
    return v * v * (0.5 - v * (1 / 3 - v * (0.25 - v * (0.2 - v * (1 / 6 - v / 7)))))
