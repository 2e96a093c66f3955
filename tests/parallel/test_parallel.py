"""Groups, collectives with gradients, and what running without CUDA leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.collectives import all_reduce_sum, gather_sequence
from megatron_ext.parallel.groups import initialize_parallel
from tests.distributed import run_ranks

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are off")


@needs_no_cuda
def test_user_code_keeps_torchs_errors_and_names() -> None:
    for build in (
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.empty_like(torch.ones(1), device="cuda"),
        lambda: torch.ones(1).cuda(),
        lambda: torch.nn.Linear(1, 1).cuda(),
        torch.cuda.current_device,
    ):
        with pytest.raises((RuntimeError, AssertionError)):
            build()
    assert not torch.cuda.is_available()
    assert torch.ones(1).type() == "torch.FloatTensor"


@needs_no_cuda
def test_megatron_gets_cpu_tensors_where_it_names_cuda() -> None:
    source = "import torch\nx = torch.zeros(2, device='cuda')\nd = torch.cuda.current_device()\n"
    names: dict[str, Any] = {"__name__": "megatron.core.imagined"}
    exec(source, names)
    assert names["x"].device == names["d"] == torch.device("cpu")
    elsewhere: dict[str, Any] = {"__name__": "megatronic"}
    with pytest.raises((RuntimeError, AssertionError)):
        exec(source, elsewhere)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layouts_and_collectives(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name in ("tensor", "context", "pipeline"):
        kind = "model_parallel" if name != "context" else "parallel"
        groups = initialize_parallel(ParallelConfig(**{f"{name}_{kind}_size": 2}))
        sizes = {axis: getattr(groups, axis).size() for axis in ("tp", "cp", "dp", "pp")}
        ranks = {
            axis: torch.distributed.get_process_group_ranks(getattr(groups, axis))
            for axis in ("tp", "cp", "dp", "pp")
        }
        seen[name] = (sizes, ranks)
    try:
        initialize_parallel(ParallelConfig(tensor_model_parallel_size=8))
    except ValueError as error:
        seen["refusal"] = str(error)
    group = torch.distributed.group.WORLD

    piece = numbers(rank, 3, 2).requires_grad_()
    weight = numbers(10 + rank, 12, 2)
    whole = gather_sequence(piece, group)
    (whole * weight).sum().backward()
    seen["gather"] = (whole.detach(), piece.grad)

    part = numbers(20 + rank, 4).requires_grad_()
    total = all_reduce_sum(part, group)
    (total * numbers(30 + rank, 4)).sum().backward()
    seen["sum"] = (total.detach(), part.grad)
    return seen


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, Any]]:
    return run_ranks(4, layouts_and_collectives)


def test_a_process_can_change_its_layout(four_ranks: list[dict[str, Any]]) -> None:
    for name, axis in (("tensor", "tp"), ("context", "cp"), ("pipeline", "pp")):
        for rank in four_ranks:
            assert rank[name][0] == {"tp": 1, "cp": 1, "pp": 1, "dp": 2, axis: 2}


def test_tp_and_cp_are_neighbours_and_pp_is_furthest(four_ranks: list[dict[str, Any]]) -> None:
    first = four_ranks[0]
    assert first["tensor"][1]["tp"] == first["context"][1]["cp"] == [0, 1]
    assert first["tensor"][1]["dp"] == first["pipeline"][1]["pp"] == [0, 2]


def test_a_layout_larger_than_the_ranks_is_refused(four_ranks: list[dict[str, Any]]) -> None:
    for rank in four_ranks:
        assert "--tensor-model-parallel-size is 8: tp x pp x cp = 8 must divide" in rank["refusal"]


def test_gathered_pieces_and_their_gradients_are_those_of_the_whole(
    four_ranks: list[dict[str, Any]],
) -> None:
    pieces = [numbers(rank, 3, 2).requires_grad_() for rank in range(4)]
    whole = torch.cat(pieces)
    sum((whole * numbers(10 + rank, 12, 2)).sum() for rank in range(4)).backward()
    for rank, seen in enumerate(four_ranks):
        assert torch.equal(seen["gather"][0], whole.detach())
        torch.testing.assert_close(seen["gather"][1], pieces[rank].grad, rtol=1e-12, atol=1e-12)


def test_summed_parts_and_their_gradients_are_those_of_the_sum(
    four_ranks: list[dict[str, Any]],
) -> None:
    parts = [numbers(20 + rank, 4).requires_grad_() for rank in range(4)]
    total = torch.stack(parts).sum(0)
    sum((total * numbers(30 + rank, 4)).sum() for rank in range(4)).backward()
    for rank, seen in enumerate(four_ranks):
        torch.testing.assert_close(seen["sum"][0], total.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen["sum"][1], parts[rank].grad, rtol=1e-12, atol=1e-12)
