"""One rank of a run of any size in this process: fake tensors, and a process group that only talks.

Fake tensors have shapes and types and no numbers. Two things need numbers all the same: a value
that the host reads, which is answered with one that keeps the step on its usual way (`HOST_VALUE`),
and small integers that stay on the host in a real run, too (visibility, which attention plans
with): operations on real tensors alone stay real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_ext.parallel.groups import shutdown_parallel

HOST_VALUE = 2
"""What every number that the host reads is: finite, and a gradient norm that must be clipped."""
_READ = torch.ops.aten._local_scalar_dense.default


class Answers(TorchDispatchMode):
    """Stands in for values and for other ranks, under `FakeTensorMode`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_host_reads = 0
        """Times that the host waited for a number of the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return _received(func, args)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _READ:
            self.num_host_reads += 1
            return _value_of(args[0].dtype)
        return func(*args, **kwargs)


def _received(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What a collective returns; results are where its arguments say, without numbers."""
    match len(function._schema.returns):
        case 0:
            return None
        case 1:
            return FakeWork().boxed()
        case _:
            return arguments[0], FakeWork().boxed()


def _value_of(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return float(HOST_VALUE) if dtype.is_floating_point else HOST_VALUE


@contextmanager
def pretended_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one of many ranks that nobody else runs; leaves no groups behind.

    Raises `ValueError` where the process belongs to a group already.
    """
    if torch.distributed.is_initialized():
        raise ValueError("this process is a rank of a run already; dry runs need one of their own.")
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank is {rank}: give a number from 0 to {world_size - 1}.")
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        shutdown_parallel()


@contextmanager
def fake_tensors() -> Iterator[Answers]:
    """Every tensor made within has no numbers."""
    answers = Answers()
    with FakeTensorMode(allow_non_fake_inputs=True), answers:
        yield answers
