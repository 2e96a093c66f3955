"""A run that stops and goes on is the run that did not stop.

At the same layout to the last bit, losses, gradient norms, weights and optimizer state; at another
layout to the tolerance of the split.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import Config
from megatron_ext.training.loop import Trainer
from tests.checkpoint.segments import (
    Segment,
    train_segment,
    train_segments,
    whole_and_halves,
    with_folders,
)
from tests.distributed import run_ranks
from tests.training.tiny import BF16, split, tiny_config

HALF = 2
TOLERANCE = 1e-5

ONE_RANK: dict[str, dict[str, dict[str, Any]]] = {
    "plain_optimizer": split(use_distributed_optimizer=False),
    "distributed_optimizer": {},
    "adamw": {"optimizer": {"optimizer": "adamw", "lr": 0.1}},
    "bf16": BF16,
    "pure_bf16": {
        "precision": {"bf16": True, "master_weights": False},
        **split(use_distributed_optimizer=False),
    },
    "tied": {"model": {"untie_embeddings_and_output_weights": False}},
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TWO_RANKS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2_sp": split(tp=2, sequence_parallel=True),
    "tp2_tied_swiglu": {
        **split(tp=2),
        "model": {"untie_embeddings_and_output_weights": False, "activation": "swiglu"},
    },
    "dp2_async": {"checkpoint": {"async_save": True}},
    "dp2_overlap": split(**OVERLAP),
    "dp2_plain_optimizer": split(use_distributed_optimizer=False),
    "pp2_vpp2": split(pp=2, virtual=2),
    "pp2_vpp2_bf16": {**split(pp=2, virtual=2), **BF16},
    "cp2": split(cp=2),
    "dp2_bf16": BF16,
    "tp2_bf16": {**split(tp=2), **BF16},
    "tp2_sp_bf16": {**split(tp=2, sequence_parallel=True), **BF16},
    "pp2_bf16": {**split(pp=2), **BF16},
    "cp2_bf16": {**split(cp=2), **BF16},
    "pp2": split(pp=2),
    "tp2_sp_bf16_compiled": {
        **split(tp=2, sequence_parallel=True), "precision": {"bf16": True, "compile_layers": True},
    },
}  # fmt: skip
CHAIN: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("tp2", split(tp=2)),
    ("dp2", split()),
    ("pp2", split(pp=2)),
    ("pp2_vpp2", split(pp=2, virtual=2)),
    ("tp2_sp", split(tp=2, sequence_parallel=True)),
    ("cp2_overlap", split(cp=2, **OVERLAP)),
]
"""One step at each layout, after one on a single rank and before another."""
CHAIN_STEPS = len(CHAIN) + 2


def chain_config(**sections: dict[str, Any]) -> Config:
    return tiny_config(**sections, training={"train_iters": CHAIN_STEPS})


def assert_same_run(whole: Segment, first: Segment, second: Segment) -> None:
    assert (whole.first, first.first, second.first) == (0, 0, len(first.losses))
    assert first.losses + second.losses == whole.losses
    assert first.grad_norms + second.grad_norms == whole.grad_norms
    for kind in ("weights", "optimizer"):
        resumed, expected = getattr(second, kind), getattr(whole, kind)
        assert len(resumed) == len(expected)
        for mine, theirs in zip(resumed, expected, strict=True):
            is_same = torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs
            assert is_same, kind


@pytest.mark.parametrize("name", ONE_RANK)
@pytest.mark.usefixtures("single_rank")
def test_resume_at_the_same_layout_is_exact_on_one_rank(name: str, tmp_path: Path) -> None:
    config = tiny_config(**ONE_RANK[name])
    pieces = train_segments(0, whole_and_halves("run", config, tmp_path, HALF))
    assert_same_run(*pieces.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a folder of checkpoints for every case, and one for the chain."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def two_ranks(saved: Path) -> list[dict[str, Segment]]:
    """Every case of `TWO_RANKS`, and the chain, which begins with a step on one rank."""
    from megatron_ext.parallel.groups import shutdown_parallel

    train_segment(with_folders(chain_config(), save=saved / "chain"), 1)
    shutdown_parallel()
    pieces: dict[str, Any] = {}
    for name, sections in TWO_RANKS.items():
        pieces |= whole_and_halves(name, tiny_config(**sections), saved / name, HALF)
    for step, (name, sections) in enumerate(CHAIN, start=1):
        config = with_folders(chain_config(**sections), load=saved / "chain", save=saved / "chain")
        pieces[f"chain/{name}"] = (config, step + 1)
    return run_ranks(2, train_segments, pieces)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_resume_at_the_same_layout_is_exact_on_two_ranks(
    name: str, two_ranks: list[dict[str, Segment]]
) -> None:
    for rank in two_ranks:
        assert_same_run(*(rank[f"{name}/{part}"] for part in ("whole", "first", "second")))


@pytest.mark.usefixtures("two_ranks", "single_rank")
def test_overlapped_gathering_saves_the_weights_of_all_ranks(saved: Path) -> None:
    """Resuming would not notice: the optimizer's share of each rank is restored anyway."""

    def weights(name: str) -> list[torch.Tensor]:
        trainer = Trainer.build(with_folders(tiny_config(), load=saved / name, finetune=True))
        trainer.load()
        return [parameter.detach() for parameter in trainer.model[0].parameters()]

    for overlapped, plain in zip(weights("dp2_overlap"), weights("dp2_async"), strict=True):
        torch.testing.assert_close(overlapped, plain, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("single_rank")
def test_resume_at_another_layout_continues_the_run(
    two_ranks: list[dict[str, Segment]], saved: Path
) -> None:
    steps = CHAIN_STEPS
    whole = train_segment(chain_config(), steps)
    last = train_segment(with_folders(chain_config(), load=saved / "chain"), steps)
    assert last.first == steps - 1
    for rank in two_ranks:
        pieces = [rank[f"chain/{name}"] for name, _ in CHAIN] + [last]
        assert [piece.first for piece in pieces] == list(range(1, steps))
        losses = list(chain.from_iterable(piece.losses for piece in pieces))
        norms = list(chain.from_iterable(piece.grad_norms for piece in pieces))
        assert losses == pytest.approx(whole.losses[1:], rel=TOLERANCE)
        assert norms == pytest.approx(whole.grad_norms[1:], rel=TOLERANCE)
