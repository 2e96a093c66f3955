"""The fused loss needs a chunk's memory, not that of all tokens; and the bench measures that.

Nothing here is timed. Memory is counted where torch makes tensors: every operator's outputs, each
storage once, alive until it is freed. Scratch memory inside an operator is not seen; the child
process of the bench sees the whole of it.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.diffusion import MixingSchedule
from megatron_ext.kernels.cross_entropy import linear_cross_entropy
from megatron_ext.kernels.gidd_loss import bench, linear_gidd_loss
from megatron_ext.kernels.vocabulary.passes import has_compiler
from megatron_ext.measure import call_in_child
from tests.kernels.samples import MASK_ID, draw_normal, draw_tokens

VOCAB_SIZE, WIDTH, CHUNK_SIZE = 2000, 4, 16


class AllocationCount(TorchDispatchMode):
    """Bytes of the storages made inside, and the elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes, self.peak_bytes, self.largest = 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:  # type: ignore[no-untyped-def]
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._known:
                self._watch(x, num_bytes=0)
        output = function(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                if x.untyped_storage()._cdata not in self._known:
                    self._watch(x, x.untyped_storage().nbytes())
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return output

    def _watch(self, x: Tensor, num_bytes: int) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        self._known.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


def _count(num_tokens: int, form: str) -> AllocationCount:
    """Forward and backward of a loss on `num_tokens` tokens."""
    schedule = MixingSchedule(VOCAB_SIZE, MASK_ID, 0.0)
    xt, x0, log_snr = draw_tokens(schedule, num_tokens)
    hidden = draw_normal(num_tokens, WIDTH, seed=1).float().requires_grad_()
    weight = draw_normal(VOCAB_SIZE, WIDTH, seed=2).float().requires_grad_()
    with AllocationCount() as count:
        if form == "cross_entropy":
            loss = linear_cross_entropy(hidden, weight, x0, VOCAB_SIZE, chunk_size=CHUNK_SIZE)
        else:
            loss = linear_gidd_loss(
                hidden, weight, xt, x0, log_snr.float(), schedule,
                chunk_size=CHUNK_SIZE, impl=form,
            ).loss  # fmt: skip
        loss.sum().backward()
    return count


def test_allocations_are_counted_until_they_are_freed() -> None:
    with AllocationCount() as count:
        a = torch.ones(1000)
        b = a * 2
        del a
        c = b.view(10, 100).t()
        d = c.contiguous()
    assert count.live_bytes == 2 * 4000 and count.peak_bytes == 2 * 4000
    assert count.largest == 1000 and d.shape == (100, 10)


@pytest.mark.parametrize("form", ["chunked", "cross_entropy"])
def test_peak_memory_of_the_fused_losses_does_not_grow_with_the_tokens(form: str) -> None:
    """But for a few numbers per token, which are no share of a chunk of logits."""
    few, many = _count(128, form), _count(256, form)
    per_token = 4 * (30 + 2 * WIDTH) * 128
    chunk = 4 * CHUNK_SIZE * VOCAB_SIZE
    assert few.peak_bytes > chunk
    assert many.peak_bytes - few.peak_bytes <= per_token < 0.2 * chunk
    assert many.peak_bytes < 8 * chunk


def test_peak_memory_of_the_dense_loss_grows_with_the_tokens() -> None:
    few, many = _count(128, "reference"), _count(256, "reference")
    assert many.peak_bytes - few.peak_bytes > 8 * 4 * 128 * VOCAB_SIZE
    assert many.peak_bytes > 20 * _count(256, "chunked").peak_bytes


@pytest.mark.parametrize("form", ["chunked", "cross_entropy"])
def test_the_fused_losses_never_hold_logits_of_two_chunks(form: str) -> None:
    assert _count(256, "reference").largest == 256 * VOCAB_SIZE
    largest = _count(256, form).largest
    assert CHUNK_SIZE * VOCAB_SIZE <= largest < 2 * CHUNK_SIZE * VOCAB_SIZE


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["FP32", "BF16"])
def test_the_compiled_loss_of_given_logits_writes_nothing_of_their_size(dtype: str) -> None:
    num_tokens, vocab_size = 256, 16384
    case = {"num_tokens": num_tokens, "vocab_size": vocab_size, "dtype": dtype}
    arguments = {"kind": "logits", "case": case, "way": "hybrid, compiled"}
    size = call_in_child(f"{bench.__name__}:bytes_of", arguments)
    assert size < 0.1 * 4 * num_tokens * vocab_size


def test_the_bench_sees_the_memory_of_its_process() -> None:
    """Peak resident memory of a child per case, scratch memory of operators and all.

    The vocabulary is one of which a default chunk holds 1024 tokens, in 128 MiB of logits.
    """
    vocab_size = 32768

    def peak_bytes(way: str, num_tokens: int) -> int:
        case = {"num_tokens": num_tokens, "vocab_size": vocab_size, "width": 16, "dtype": "FP32"}
        arguments = {"kind": "fused", "case": case, "way": way}
        return call_in_child(f"{bench.__name__}:bytes_of", arguments)

    chunk = 4 * 1024 * vocab_size
    assert peak_bytes("hybrid, dense", 256) > 8 * 4 * 256 * vocab_size
    few, many = (peak_bytes("hybrid, chunked", num_tokens) for num_tokens in (1024, 2048))
    assert 0.9 * chunk < few < 1.5 * chunk
    assert many - few < 0.2 * chunk
