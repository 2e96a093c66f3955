"""What the step is measured against has its size, its FLOPs, and learns."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.measure import multiply_flops
from megatron_ext.presets import MODEL_PRESETS, total_parameters
from megatron_ext.training import bench
from megatron_ext.training.comparison import Rival, RivalStep

SHAPE = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 2, "seq_length": 16}


def _case(**changes: Any) -> dict[str, Any]:
    return {"shape": SHAPE, "vocab_size": 128, "sequences": 2, "precision": "fp32"} | changes


def _rival(kind: Rival, case: dict[str, Any]) -> RivalStep:
    config = bench.run_config(case)
    return RivalStep(kind, config.model, bench.schedule_of(config), bf16=False)


@pytest.mark.parametrize("kind", ["dense", "modernbert", "llama"])
def test_rivals_have_the_models_size(kind: Rival) -> None:
    case = _case(shape={**MODEL_PRESETS["gidd-25m"], "num_layers": 3}, vocab_size=2048)
    ours = total_parameters(bench.run_config(case).model, case["vocab_size"])
    theirs = _rival(kind, case).num_parameters
    assert theirs == ours if kind == "dense" else abs(theirs / ours - 1) < 0.03


@pytest.mark.parametrize("kind", ["dense", "modernbert", "llama"])
def test_rivals_learn_a_batch(kind: Rival) -> None:
    torch.manual_seed(0)
    case = _case()
    (batch,) = bench.source_of(bench.run_config(case)).step(0)
    step = _rival(kind, case)
    losses = [step(batch) for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_floor_counts_every_product_of_the_dense_step_but_those_of_attention() -> None:
    """Attention multiplies two more matrices, over one key more than there are positions."""
    case = _case()
    config = bench.run_config(case)
    step, (batch,) = _rival("dense", case), bench.source_of(config).step(0)
    with FlopCounterMode(display=False) as counted:
        step(batch)
    model, num_tokens = config.model, batch.x0.numel()
    products = bench.products_of_step(model, case["vocab_size"], num_tokens)
    keys = model.seq_length + 1
    attention = 12 * model.num_layers * model.hidden_size * keys * num_tokens
    assert counted.get_total_flops() == multiply_flops(products) + attention


def test_groups_hold_what_fits_beside_the_hybrid_step_and_no_more() -> None:
    case = _case(ways=list(bench.WAYS), vocab_size=2**16)
    needed = {way: bench.bytes_needed(way, case) for way in bench.WAYS}

    def memory(*ways: str) -> int:
        return sum(needed[way][0] for way in ways) + max(needed[way][1] for way in ways)

    everything = memory(*bench.WAYS)
    assert bench.groups_that_fit(case, everything) == [list(bench.WAYS)]
    for limit in (memory("hybrid", "dense"), memory("hybrid", "llama"), memory("hybrid")):
        groups = bench.groups_that_fit(case, limit)
        assert all(group[0] == "hybrid" and memory(*group) <= limit for group in groups)
        placed = [way for group in groups for way in group[1:]]
        fitting = [x for x in bench.WAYS if x != "hybrid" and memory("hybrid", x) <= limit]
        assert sorted(placed) == sorted(fitting)


def test_every_way_can_be_asked_for() -> None:
    assert set(bench.WAYS) == {"hybrid", "hybrid, compiled layers", "masked", *get_args(Rival)}
