"""Small runs at several layouts, as the ranks of a test take them for real."""

from __future__ import annotations

from typing import Any

from megatron_ext.config import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_ext.model.init import initialize_weights
from megatron_ext.parallel.groups import initialize_parallel
from megatron_ext.planning.dry_run import StepReport, observe_step


def small(**sections: dict[str, Any]) -> Config:
    base = Config(
        model=ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32,
                          vocab_size=200),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=8),
        data=DataConfig(mock_data=True, mask_token_id=0, pad_token_id=1),
    )  # fmt: skip
    return base.with_sections(**sections)


def layout(
    tp: int = 1, pp: int = 1, cp: int = 1, virtual: int = 1, **parallel: Any
) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "num_virtual_stages_per_pipeline_rank": virtual,
        **parallel,
    }


FOUR_RANKS: dict[str, Config] = {
    "tp2_pp2_sp": small(parallel=layout(2, 2, sequence_parallel=True)),
    "tp2_dp2": small(
        parallel=layout(2, overlap_grad_reduce=True, overlap_param_gather=True),
        precision={"bf16": True},
    ),
    "cp2_dp2": small(
        parallel=layout(cp=2, use_distributed_optimizer=False),
        diffusion={"objective": "masked"},
        precision={"loss_impl": "reference", "attention_impl": "reference"},
    ),
    "pp2_vpp2_dp2": small(
        parallel=layout(pp=2, virtual=2, recompute_granularity="full"),
        optimizer={"optimizer": "adamw"},
    ),
    "tp2_cp2_ar": small(
        parallel=layout(2, cp=2, recompute_granularity="selective"),
        diffusion={"objective": "ar"},
    ),
}


def take_steps(rank: int, cases: dict[str, Config]) -> dict[str, StepReport]:
    """Real steps of each case on this rank of an initialised group: of two, the one of less memory.

    Gloo's threads let go of a message when they come to it, which can only add memory.
    """
    del rank
    return {
        name: min((real_step(config) for _ in range(2)), key=lambda report: report.peak_bytes)
        for name, config in cases.items()
    }


def real_step(config: Config) -> StepReport:
    groups = initialize_parallel(config.parallel, config.training.seed)
    return observe_step(config, groups, "cpu", initialize_weights)
