"""The recorded optimizer steps with the training model, loss, step and optimizer.

Everything but the data goes through `Trainer.train_step`: weights come from the recorded model,
noised sequences from the file, learning rates from the schedule that the file describes; the
gradient is a sum over tokens, and nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.hf_weights import published_state
from megatron_ext.config import Config
from megatron_ext.conformance import tolerances
from megatron_ext.conformance.golden import Arrays, Golden, Unsupported, recorded_schedule
from megatron_ext.conformance.models import build_recorded_model, recorded_config, vocabulary_of
from megatron_ext.conformance.recorded_batches import Steps, padded_batch, recorded_source
from megatron_ext.conformance.report import Measurement, measure
from megatron_ext.conformance.session import Session
from megatron_ext.conformance.tolerances import Tolerance
from megatron_ext.data.dataset import Datasets
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.optim.build import build_optimizer
from megatron_ext.training.build import Vocabulary
from megatron_ext.training.loop import Trainer
from megatron_ext.training.step import LossSums

GRADIENTS, FINAL = "e2e_grads_step0.safetensors", "e2e_params_final.safetensors"

_STEP_TOLERANCES = {
    "loss": tolerances.STEP_LOSS,
    "elbo": tolerances.ELBO,
    "kl_loss": tolerances.STEP_PART,
    "is_loss": tolerances.STEP_PART,
    "num_tokens": tolerances.EXACT,
}


def check_training(name: str, session: Session) -> None:
    """Losses of every step, gradients of the first, weights after the last."""
    recorded, report = session.golden.arrays(name), session.report
    for file in (GRADIENTS, FINAL):
        if file not in session.golden:
            report.skip(file, "no such file")
    if session.config.precision.bf16:
        raise Unsupported("recorded in float32; this run is --bf16")
    trainer = _trainer(recorded, _trained_model(recorded, session.golden), session)
    num_steps = len(recorded["loss"])
    results: dict[str, list[Measurement]] = {key: [] for key in _STEP_TOLERANCES}
    for step in range(num_steps):
        sums = trainer.train_step(trainer.source.step(step)).sums
        for key, value in _recorded_values(sums).items():
            want, tolerance = recorded[key][step], _STEP_TOLERANCES[key]
            results[key].append(measure(f"step {step}", value, want, tolerance))
        if step == 0:
            _check_tensors(GRADIENTS, _gradients(trainer), session, tolerances.STEP_GRADIENT)
    for key, measurements in results.items():
        report.check(f"{name} {key}", measurements)
    state = published_state(trainer.model, trainer.vocabulary.size)
    _check_tensors(FINAL, state, session, tolerances.FINAL_WEIGHT)
    if recorded.unread():
        report.skip(f"{name} {', '.join(recorded.unread())}", "unknown to this suite")


def _recorded_values(sums: LossSums) -> dict[str, float]:
    """A step's sums as they are recorded: the loss as a sum, its parts per noised token."""
    count = sums.count.item()
    return {
        "loss": sums.loss.item(),
        "elbo": sums.elbo.item() / max(count, 1.0),
        "kl_loss": sums.kl.item() / max(count, 1.0),
        "is_loss": sums.is_div.item() / max(count, 1.0),
        "num_tokens": count,
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _trained_model(recorded: Arrays, golden: Golden) -> str:
    """Name of the recorded model that the steps start from.

    The one with the tensors of the results, and of several the one nearest to the final weights,
    unless the file names it.
    """
    if "model" in recorded:
        return str(recorded["model"])
    results = [golden.tensors(file) for file in (FINAL, GRADIENTS) if file in golden]
    if not results:
        raise Unsupported(f"neither {GRADIENTS} nor {FINAL} is there to tell which model it is")
    distances = {}
    for match in golden.matching(r"model_(.+)\.safetensors"):
        tensors = golden.tensors(match.string)
        if _shapes(tensors) == _shapes(results[0]):
            squares = [(tensors[key] - x).double().square().sum() for key, x in results[0].items()]
            distances[match[1]] = torch.stack(squares).sum().item()
    if not distances:
        raise Unsupported("no model_*.safetensors has the tensors of the trained model")
    return min(distances, key=lambda model: distances[model])


def _trainer(recorded: Arrays, model: str, session: Session) -> Trainer:
    """The parts of a training run, with the recorded model and data in the usual places."""
    schedule = recorded_schedule(recorded)
    steps = Steps.of(recorded, first_dim_is_step=True)
    batch = padded_batch(steps.labels.shape[1], session)
    config = recorded_config(
        model, steps.labels.shape[2], session,
        diffusion=_diffusion_section(recorded, schedule),
        optimizer=_optimizer_section(recorded),
        training={
            "global_batch_size": batch, "train_iters": recorded.integer("opt_total_steps"),
        },
    )  # fmt: skip
    _check_shape_of_optimizer(recorded, config)
    chunks = build_recorded_model(
        config, session.golden.tensors(f"model_{model}.safetensors"), schedule, session
    )
    optimizer = build_optimizer(chunks, config, session.groups)
    optimizer.reload_model_params()
    source = recorded_source(steps, config, schedule, session)
    vocabulary = Vocabulary(vocabulary_of(config), schedule.mask_token_id, None, None, None)
    return Trainer(
        config, session.groups, session.device, vocabulary,
        Datasets(source.dataset, None, None), source, chunks, optimizer,
    )  # fmt: skip


def _diffusion_section(recorded: Arrays, schedule: MixingSchedule) -> dict[str, Any]:
    return {
        "objective": "hybrid",
        "mixing_shift": schedule.shift,
        "mixing_scale": schedule.scale,
        "min_log_snr": schedule.min_log_snr,
        "max_log_snr": schedule.max_log_snr,
        "beta_is": recorded.number("beta_is_div", 1.0),
        "loss_normalization": "sum",
    }


def _optimizer_section(recorded: Arrays) -> dict[str, Any]:
    """The reference's arguments: eps is divided by width and depth, decay multiplied by width."""
    lr = recorded.number("opt_lr")
    size = recorded.number("opt_hidden_size") * recorded.number("opt_num_layers")
    return {
        "optimizer": "laprop",
        "parameterization": "completep",
        "lr": lr,
        "aux_lr_factor": recorded.number("opt_aux_lr") / lr,
        "adam_beta1": recorded.number("opt_beta1"),
        "adam_beta2": recorded.number("opt_beta2"),
        "adam_eps": recorded.number("opt_adam_eps") / size,
        "weight_decay": recorded.number("opt_weight_decay"),
        "norm_weight_decay": recorded.number("opt_ln_wd"),
        "bias_weight_decay": recorded.number("opt_bias_wd"),
        "clip_grad": 0.0,
        "lr_decay_style": "WSD",
        "lr_warmup_iters": recorded.integer("opt_warmup_steps"),
        "lr_wsd_decay_iters": recorded.number("opt_cooldown_steps"),
    }


def _check_shape_of_optimizer(recorded: Arrays, config: Config) -> None:
    width, depth = recorded.integer("opt_hidden_size"), recorded.integer("opt_num_layers")
    if (width, depth) != (config.model.hidden_size, config.model.num_layers):
        raise Unsupported(f"its optimizer is one for width {width} and {depth} layers")


@torch.no_grad()
def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Reduced gradients of the last step as published tensors of this rank's stages.

    After a step with the distributed optimizer a rank holds the reduced values of its shard of
    each bucket; one all-gather per bucket brings the others.
    """
    if trainer.config.parallel.use_distributed_optimizer:
        for chunk in trainer.model:
            for buffer in chunk.buffers:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    return published_state(
        trainer.model, trainer.vocabulary.size, values=lambda parameter: parameter.main_grad
    )


def _check_tensors(
    file: str, state: dict[str, Tensor], session: Session, tolerance: Tolerance
) -> None:
    """Compare this stage's tensors with a file; the stages together must have all of it."""
    if file not in session.golden:
        return
    want = session.golden.tensors(file)
    measurements = [
        measure(key, state[key], x, tolerance) for key, x in want.items() if key in state
    ]
    session.report.check(file, measurements, want)
