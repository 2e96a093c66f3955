"""BF16 tracks FP32, with and without master weights, at several layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.config import Config
from tests.distributed import run_ranks
from tests.training.tiny import BF16, Run, run_cases, split, tiny_config

STEPS = 12
GAP = 0.005
"""Relative, of every step's loss; bfloat16 rounds to 0.4 %."""
PURE = {"bf16": True, "master_weights": False}
CASES: dict[str, dict[str, Any]] = {
    "fp32": split(tp=2),
    "bf16": {**split(tp=2), **BF16},
    "bf16_sp": {**split(tp=2, sequence_parallel=True), **BF16},
    "bf16_pp2": {**split(pp=2), **BF16},
    "bf16_pp2_vpp2": {**split(pp=2, virtual=2), **BF16},
    "bf16_cp2": {**split(cp=2), **BF16},
    "bf16_dp2": BF16,
    "pure_bf16": {**split(tp=2, use_distributed_optimizer=False), "precision": PURE},
}


def config_of(sections: dict[str, Any]) -> Config:
    training = {"train_iters": STEPS, "micro_batch_size": 4}
    return tiny_config(**sections, training=training, optimizer={"lr": 0.03})


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    ranks = run_ranks(2, run_cases, {name: config_of(case) for name, case in CASES.items()})
    for run in ranks[0].values():
        assert run.error is None, run.error
    return ranks[0]


def gap(run: Run, reference: Run) -> float:
    return max(abs(a / b - 1) for a, b in zip(run.losses, reference.losses, strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name != "fp32"])
def test_bf16_tracks_fp32(name: str, runs: dict[str, Run]) -> None:
    run, reference = runs[name], runs["fp32"]
    assert len(run.losses) == STEPS and all(run.applied)
    assert 0 < gap(run, reference) < GAP, gap(run, reference)
    assert run.validation[0][0] == pytest.approx(reference.validation[0][0], rel=GAP)


@pytest.mark.usefixtures("single_rank")
def test_bf16_on_one_rank_tracks_fp32_on_two(runs: dict[str, Run]) -> None:
    run = run_cases(0, {"bf16": config_of(BF16)})["bf16"]
    assert run.error is None, run.error
    assert 0 < gap(run, runs["fp32"]) < GAP


def test_gains_stay_in_float32_and_matrices_do_not(runs: dict[str, Run]) -> None:
    for name, piece in runs["bf16"].final.items():
        expected = torch.float32 if "norm" in name else torch.bfloat16
        assert piece.values.dtype == expected, name


def test_master_weights_keep_updates_that_bfloat16_would_lose(runs: dict[str, Run]) -> None:
    """Distance to the FP32 weights after training: smaller with master weights than without."""

    def distance(name: str) -> float:
        return sum(
            (piece.values.float() - runs["fp32"].final[key].values).square().sum().item()
            for key, piece in runs[name].final.items()
        )

    assert distance("bf16") < distance("pure_bf16")
