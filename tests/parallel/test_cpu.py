"""What running without CUDA leaves alone."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.parallel.cpu import _unless_alone, enable_cpu
from tests.distributed import run_ranks

enable_cpu()


@pytest.mark.parametrize("factory", ["empty", "zeros", "ones", "full", "arange", "randn"])
def test_a_device_context_still_reaches_every_factory(factory: str) -> None:
    arguments = ((2,), 1.0) if factory == "full" else (2,)
    with torch.device("meta"):
        assert getattr(torch, factory)(*arguments).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")
def test_user_code_keeps_torchs_errors_without_cuda() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"


def _gather_and_reduce(rank: int) -> None:
    """What megatron-core's calls return equals what torch's own functions return."""
    size = torch.distributed.get_world_size()
    given = torch.arange(3.0) + 10 * rank
    for name, shape in (("all_gather_into_tensor", 3 * size), ("reduce_scatter_tensor", 3)):
        collective = getattr(torch.distributed, name)
        source = given if name.startswith("all") else given.repeat(size)
        results = [torch.full((shape,), torch.nan) for _ in range(3)]
        collective(results[0], source)
        assert _unless_alone(collective)(results[1], source) is None
        _unless_alone(collective)(results[2], source, async_op=True).wait()
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_group_of_one_rank_gets_what_the_collective_would_return(ranks: int) -> None:
    run_ranks(ranks, _gather_and_reduce)
