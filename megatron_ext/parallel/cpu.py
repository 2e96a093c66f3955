"""Let megatron-core run on a machine without CUDA, over gloo.

megatron-core names CUDA in places that have nothing to do with kernels: the device of a scale
tensor, the state of a random-number tracker, a synchronisation before a point-to-point message.
`enable_cpu` gives those calls a CPU meaning. Two rules keep this honest:

* it does nothing where CUDA is available;
* every patched function looks at its caller and changes its behaviour only for code of the
  `megatron` package, so user code keeps torch's real functions and torch's real errors.

Call it before the first import of `megatron.core`: some modules bind the functions they need when
they are imported. This is the only place of the project that patches anything.

`keep_freed_memory` is the other thing a CPU wants, and a program's choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")
_enabled = False


def _called_from_megatron() -> bool:
    frame = sys._getframe(2)
    name = frame.f_globals.get("__name__", "")
    return name == "megatron" or name.startswith("megatron.")


def _patch(owner: Any, name: str, replacement: Callable) -> None:
    """Replace `owner.name` for callers inside megatron; everybody else gets the original."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # A compiler that traces the caller cannot look at its frames.
            return original(*args, **kwargs)
        function = replacement if _called_from_megatron() else original
        return function(*args, **kwargs)

    setattr(owner, name, scoped)


def _on_cpu(factory: Callable) -> Callable:
    """The factory with every CUDA device in `device=` replaced by the CPU."""

    def build(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and not (isinstance(device, int) or torch.device(device) == _CPU):
            kwargs["device"] = _CPU if torch.device(device).type == "cuda" else device
        elif isinstance(device, int):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return build


class _NullStream:
    """Stands for a CUDA stream or event: everything on a CPU happens in program order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *error: object) -> None:
        del error

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        del other
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    wait_stream = wait_event = wait = record = record_event = synchronize = _nothing


def _typename(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type()` as a CUDA tensor would answer: megatron sorts gradients by these strings."""
    if dtype is None:
        return _original_type(tensor).replace("torch.", "torch.cuda.")
    return _original_type(tensor, dtype, *args, **kwargs)


_original_type = torch.Tensor.type


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    del args, kwargs
    torch.set_rng_state(state)


def _are_one(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two contiguous tensors of a shape share memory; fake tensors have no addresses."""
    same = first.untyped_storage()._cdata == second.untyped_storage()._cdata
    return same and first.storage_offset() == second.storage_offset()


def _unless_alone(collective: Callable) -> Callable:
    """The collective, which for a group of one rank is a copy at most.

    gloo takes three times as long to gather
    the parameters of one rank as LaProp to update them. Asynchronous calls keep their handle.
    """

    def call(
        output: torch.Tensor, given: torch.Tensor, *args: Any, group: Any = None,
        async_op: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if async_op or torch.distributed.get_world_size(group) > 1:
            return collective(output, given, *args, group=group, async_op=async_op, **kwargs)
        if not _are_one(output, given):
            output.copy_(given)
        return None

    return call


def _patch_torch() -> None:
    # `with torch.device(...)` remembers the factories it redirects when it is first used.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"):
        _patch(torch, name, _on_cpu(getattr(torch, name)))
    for name in ("empty_like", "zeros_like", "ones_like"):
        _patch(torch, name, _on_cpu(getattr(torch, name)))

    def null(*args: Any, **kwargs: Any) -> _NullStream:
        del args, kwargs
        return _NullStream()

    def nothing(*args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def identity(value: Any, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return value

    cuda = torch.cuda
    _patch(cuda, "current_device", lambda: _CPU)
    _patch(cuda, "device_count", lambda: 1)
    _patch(cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state())
    _patch(cuda, "set_rng_state", _set_rng_state)
    _patch(cuda, "manual_seed", lambda seed: torch.manual_seed(seed) and None)
    for name in ("current_stream", "default_stream", "stream"):
        _patch(cuda, name, null)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"):
        _patch(cuda, name, nothing)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        _patch(cuda, name, lambda *a, **k: 0)
    # Classes are also used in annotations and `isinstance`, so they are replaced as they are.
    cuda.Stream = _NullStream  # type: ignore[misc,assignment]
    cuda.Event = _NullStream  # type: ignore[misc,assignment]
    _patch(torch.Tensor, "cuda", identity)
    _patch(torch.nn.Module, "cuda", identity)
    _patch(torch.Tensor, "type", _typename)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        collective = getattr(torch.distributed, name)
        _patch(torch.distributed, name, _unless_alone(collective))


def _patch_megatron_random() -> None:
    """The tracker's state functions and the FP8 switch that selective recompute asks."""
    from megatron.core.tensor_parallel import random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        del args, kwargs
        return torch.get_rng_state()

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = _set_rng_state
    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)

        def no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
            del args, kwargs
            return contextlib.nullcontext()

        random.activation_recompute_forward = no_context
        random.fp8_autocast = no_context


def enable_cpu() -> None:
    """Install the patches once; a no-op where CUDA is available."""
    global _enabled
    if _enabled or torch.cuda.is_available():
        return
    _enabled = True
    _patch_torch()
    _patch_megatron_random()


_ALLOCATOR = {
    # name in the environment: (number for mallopt, value)
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 64 << 20),
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1),
}


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free; whether this call brought it about.

    glibc gives every large block back to the kernel when it is freed and gets it again, zeroed, a
    page fault per 4 KiB, for the next tensor: that is a quarter of an FP32 training step on a CPU
    and half of a BF16 one. Kept, resident memory stays near its peak, which grows by a tenth.

    Does nothing where CUDA is available, where the C library is not glibc, and where the
    environment has one of glibc's variables for it. For programs, not for libraries: it holds for
    the whole process.
    """
    library = ctypes.CDLL(None)
    is_chosen = any(name in os.environ for name in _ALLOCATOR)
    if torch.cuda.is_available() or is_chosen or not hasattr(library, "mallopt"):
        return False
    return all([library.mallopt(*option) == 1 for option in _ALLOCATOR.values()])
