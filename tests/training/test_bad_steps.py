"""A step with a loss or gradient that is not finite changes nothing, on any rank.

The fault is put in from outside the code, by a hook on one rank's model at one step. The oracle is
the state before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ext.config import Config
from megatron_ext.parallel.parameters import complete_parameters
from megatron_ext.training.loop import Trainer
from tests.checkpoint.segments import optimizer_state
from tests.distributed import run_ranks
from tests.training.tiny import split, tiny_config


def infinite_gradient(trainer: Trainer) -> list[Any]:
    """The gradient of one of this rank's matrices times infinity."""
    weight = trainer.model[-1].module.decoder.layers[-1].mlp.linear_fc2.weight
    return [weight.register_hook(lambda gradient: gradient * torch.inf)]


def nan_loss(trainer: Trainer) -> list[Any]:
    """NaN as the loss of every token, where this rank computes losses."""
    model = trainer.model[-1].module
    if not model.post_process:
        return []

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        del module, inputs
        return output._replace(loss=output.loss * torch.nan)

    return [model.output_layer.register_forward_hook(spoil)]


FAULTS: dict[str, Callable[[Trainer], list[Any]]] = {
    "gradient": infinite_gradient,
    "loss": nan_loss,
}
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "dp2_gradient": (split(), "gradient", 0),
    "dp2_plain_gradient": (split(use_distributed_optimizer=False), "gradient", 1),
    "dp2_loss": (split(), "loss", 1),
    "tp2_gradient": (split(tp=2), "gradient", 1),
    "pp2_gradient": (split(pp=2), "gradient", 0),
    "pp2_loss": (split(pp=2), "loss", 1),
    "dp2_overlap_loss": (split(overlap_grad_reduce=True, overlap_param_gather=True), "loss", 0),
}
"""Layout, fault, and the rank it strikes."""


def state_of(trainer: Trainer) -> list[Any]:
    complete_parameters(trainer.model)
    weights = [p.detach().clone() for chunk in trainer.model for p in chunk.parameters()]
    return [*weights, *optimizer_state(trainer)]


def is_same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(one, other, strict=True)
    )


def skipped_step(rank: int, config: Config, fault: str, struck: int) -> dict[str, Any]:
    """Two good steps, a bad one, a good one."""
    trainer = Trainer.build(config)
    applied = []
    for step in (0, 1):
        applied.append(trainer.train_step(trainer.source.step(step)).applied)
    before = state_of(trainer)
    hooks = FAULTS[fault](trainer) if rank == struck else []
    applied.append(trainer.train_step(trainer.source.step(2)).applied)
    is_untouched = is_same(before, state_of(trainer))
    for hook in hooks:
        hook.remove()
    last = trainer.train_step(trainer.source.step(3))
    applied.append(last.applied)
    return {
        "applied": applied,
        "is_untouched": is_untouched,
        "has_moved": not is_same(before, state_of(trainer)),
        "step": trainer.position.step,
        "loss": last.sums.loss.item(),
    }


def skipped_steps(rank: int) -> dict[str, dict[str, Any]]:
    return {
        name: skipped_step(rank, tiny_config(**sections), fault, struck)
        for name, (sections, fault, struck) in CASES.items()
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, skipped_steps)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_step_on_one_rank_is_skipped_on_all_and_changes_nothing(
    name: str, two_ranks: list[dict[str, dict[str, Any]]]
) -> None:
    ranks = [rank[name] for rank in two_ranks]
    for seen in ranks:
        assert seen["applied"] == [True, True, False, True]
        assert seen["is_untouched"]
        assert seen["has_moved"]
        assert seen["step"] == 4
        assert seen["loss"] == ranks[0]["loss"]
