"""Our optimizers and parameter groups inside megatron-core's, and one guarded step.

With the distributed optimizer every data-parallel rank keeps master weights and averages of its
share of the flattened parameters; without, each rank keeps all averages, and there are no master
weights (pure bfloat16, or float32). The choice does not change the numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from megatron_ext.config import Config, OptimizerConfig
from megatron_ext.optim.groups import (
    PARAM_CLASSES,
    epsilon,
    learning_rate_multiplier,
    param_class,
    weight_decay,
)
from megatron_ext.optim.laprop import AdamW, LaProp
from megatron_ext.optim.schedule import LearningRateSchedule
from megatron_ext.parallel.cpu import enable_cpu
from megatron_ext.parallel.groups import device_of_rank
from megatron_ext.parallel.versions import gradients_for_norm

enable_cpu()

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import (  # noqa: E402
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import (  # noqa: E402
    OptimizerConfig as EngineOptimizerConfig,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


class ShardedOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer for optimizers that keep `step` in their groups.

    Without Transformer Engine or apex the engine looks for `step` in every parameter's state,
    where a rank without parameters has none.
    """

    def state_dict(self) -> dict[str, Any]:
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": groups}}


def parameter_groups(model: list[torch.nn.Module], config: Config) -> list[dict[str, Any]]:
    """The four classes as groups, in a fixed order and present on every rank, empty or not."""
    members: dict[str, list[torch.nn.Parameter]] = {kind: [] for kind in PARAM_CLASSES}
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            members[param_class(name)].append(parameter)
    groups = []
    for order, kind in enumerate(PARAM_CLASSES):
        multiplier = learning_rate_multiplier(kind, config.optimizer, config.model)
        groups.append(
            {
                "params": members[kind],
                "name": kind,
                "lr": config.optimizer.lr * multiplier,
                "weight_decay": weight_decay(kind, config.optimizer, config.model),
                "lr_multiplier": multiplier,
                # megatron-core recognises groups of a checkpoint by these four values.
                "lr_mult": float(order),
                "wd_mult": 1.0,
                "is_expert_parallel": False,
                "is_decoupled_lr": False,
            }
        )
    return groups


def build_optimizer(
    model: list[Any], config: Config, groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """The optimizer of this rank's model chunks (wrapped by DistributedDataParallel)."""
    settings, precision = config.optimizer, config.precision
    distributed = config.parallel.use_distributed_optimizer
    kind = LaProp if settings.optimizer == "laprop" else AdamW
    inner = kind(
        parameter_groups(model, config),
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=epsilon(settings, config.model),
    )
    engine = EngineOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        bf16=precision.bf16 and precision.master_weights,
        params_dtype=torch.bfloat16 if precision.bf16 else torch.float32,
        clip_grad=settings.clip_grad,
        use_distributed_optimizer=distributed,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_recipe=config.fp8.fp8_recipe if config.fp8.fp8_param_gather else None,
    )

    def initialize_state(optimizer: Any, config: Any = None) -> None:
        del config
        optimizer.initialize_state()

    if distributed:
        buffers = {i: chunk.buffers for i, chunk in enumerate(model)}
        optimizer: Any = ShardedOptimizer(
            inner, engine, None, initialize_state,
            model_chunks=model,
            per_model_buffers=buffers,
            data_parallel_group=groups.intra_dp_cp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=groups.mp.rank(),
            distributed_optimizer_instance_id=0,
        )  # fmt: skip
        optimizer.grad_stats_parallel_group = groups.intra_dist_opt
    else:
        optimizer = FP32Optimizer(inner, engine, initialize_state)
        optimizer.grad_stats_parallel_group = groups.mp
    optimizer.tp_group = groups.tp
    # A run may have to save before its first update, and the engine's checkpoints need averages.
    inner.initialize_state()
    return optimizer


def schedule_of(config: OptimizerConfig, train_iters: int) -> LearningRateSchedule:
    """The learning-rate schedule that the flags describe."""
    return LearningRateSchedule(
        base_lr=config.lr,
        total_steps=train_iters,
        warmup_steps=config.lr_warmup_iters,
        cooldown_steps=config.lr_wsd_decay_iters,
        style=config.lr_decay_style,
        min_lr=config.min_lr,
    )


def apply_schedule(optimizer: Any, schedule: LearningRateSchedule, step: int) -> None:
    """Set every group's learning rate for the update after `step` completed ones."""
    base = schedule.lr(step)
    for group in optimizer.param_groups:
        group["lr"] = base * group["lr_multiplier"]


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Current learning rate by parameter class."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class UpdateResult(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float
    """Global L2 norm before clipping, every parameter counted once."""
    applied: bool


def gradient_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Global L2 norm of the prepared gradients in float32; one all-reduce of one number.

    megatron-core's own function takes float32 gradients only; pure bfloat16 has others.
    """
    gradients = gradients_for_norm(optimizer)
    device = device_of_rank()
    total = torch.zeros((), dtype=torch.float32, device=device)
    if gradients:
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
        total += torch.stack(norms).square().sum()
    torch.distributed.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return total.sqrt()


@torch.no_grad()
def optimizer_step(
    optimizer: MegatronOptimizer, clip_grad: float, *, is_finite: bool = True
) -> UpdateResult:
    """Clip and update, or touch nothing where the loss or the gradient norm is not finite."""
    optimizer.prepare_grads()
    norm = gradient_norm(optimizer).item()
    if not (is_finite and math.isfinite(norm)):
        return UpdateResult(norm, False)
    if 0 < clip_grad < norm:
        gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, clip_grad / (norm + 1e-6))
    optimizer.step_with_ready_grads()
    return UpdateResult(norm, True)
