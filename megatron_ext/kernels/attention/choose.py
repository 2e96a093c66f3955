"""Which implementation of attention a device, a dtype and a model can have, and the fastest.

`auto` takes the first that nothing speaks against. The order is measured on CPUs
(docs/performance.md); on CUDA it is what the libraries' own measurements say.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from megatron_ext.kernels.attention.flash import OLDEST_VERSION

Implementation = Literal["auto", "reference", "blocked", "sdpa", "flex", "flash", "te", "described"]
"""What `--attention-impl` and `impl=` accept; `described` takes fake tensors only: it is what dry
runs put in the place of flash-attn."""

_ORDER: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("blocked",),
    "cuda": ("flash", "flex", "blocked"),
}
_TAKES_PATTERNS = ("reference", "blocked", "sdpa", "flex")
"""Implementations that take visibility as a bool mask of any pattern."""


def choose_attention(
    impl: Implementation,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    softcap: float | None,
    trains: bool,
) -> Implementation:
    """The implementation that `impl` means here; never `auto`.

    Raises `ValueError` with the flag and the reason where it cannot do what is asked.
    """
    facts = (device, dtype, head_width, softcap, trains)
    if impl == "auto":
        order = _ORDER.get(device.type, ("blocked",))
        return next(name for name in order if _objection(name, *facts) is None)
    objection = _objection(impl, *facts)
    if objection is not None:
        raise ValueError(f"--attention-impl is {impl!r}: {objection}")
    return impl


def for_pattern(impl: Implementation) -> Implementation:
    """`impl`, or the nearest to it that takes a bool mask of any pattern."""
    return impl if impl in _TAKES_PATTERNS else "flex"


def _objection(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    softcap: float | None,
    trains: bool,
) -> str | None:
    match impl:
        case "reference" | "blocked" | "described":
            return None
        case "sdpa":
            if softcap is not None:
                return (
                    "torch's scaled-dot-product attention has no soft cap "
                    f"(--attention-softcap {softcap:g}); use auto."
                )
            return None
        case "flex":
            return _flex_objection(device, head_width, trains)
        case "flash":
            return _flash_objection(device, dtype, head_width)
        case "te":
            return (
                "Transformer Engine's attention cannot express this model: it takes no key/value "
                "token and returns no log-sum-exp to fold one in, and with a mask of prompts it "
                "has no soft cap and no fused kernel; use auto."
            )
        case _:
            return "choose auto, reference, blocked, sdpa, flex or flash."


def _flex_objection(device: torch.device, head_width: int, trains: bool) -> str | None:
    if device.type == "cpu" and trains:
        return "FlexAttention has no backward pass on CPUs; use auto."
    if device.type != "cpu" and head_width < 16:
        return f"FlexAttention needs heads of 16 or wider, not {head_width}; use auto."
    return None


def _flash_objection(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    if device.type != "cuda":
        return f"flash-attn runs on CUDA devices, not on {device.type}; use auto."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs compute capability 8.0 or newer; use auto."
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash-attn computes in 16 bits; give --bf16, or use auto."
    if head_width % 8 or head_width > 256:
        return f"flash-attn needs heads of a multiple of 8 up to 256, not {head_width}; use auto."
    try:
        installed = version("flash-attn")
    except PackageNotFoundError:
        return "flash-attn is not installed; install it, or use auto."
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        return f"flash-attn is {installed}; install {oldest} or newer, or use auto."
    return None
