"""The training loop: build the parts, take steps, report, validate, save, stop for a reason."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megatron_ext.checkpoint.training import (
    CheckpointWriter,
    Position,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
)
from megatron_ext.cli import dump_config
from megatron_ext.config import CheckpointConfig, Config, require
from megatron_ext.data.batches import BatchSource, MicroBatch, RankPosition, prefetched
from megatron_ext.data.dataset import Datasets
from megatron_ext.optim.build import (
    apply_schedule,
    build_optimizer,
    learning_rates,
    optimizer_step,
    schedule_of,
)
from megatron_ext.parallel.groups import device_of_rank, initialize_parallel
from megatron_ext.training.build import (
    Vocabulary,
    build_data,
    build_model,
    build_schedule,
    open_tokenizer,
    resolve_vocabulary,
)
from megatron_ext.training.evaluation import evaluate
from megatron_ext.training.guards import EXIT_DONE, StopGuard
from megatron_ext.training.metrics import MetricsLog
from megatron_ext.training.report import Reporter
from megatron_ext.training.step import LossSums, is_finite, reduced_sums, run_micro_batches

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    sums: LossSums
    grad_norm: float
    applied: bool
    """False where a non-finite loss or gradient left weights and optimizer as they were."""


@dataclass
class Trainer:
    """The parts of a run on one rank."""

    config: Config
    groups: ProcessGroupCollection
    device: torch.device
    vocabulary: Vocabulary
    data: Datasets
    source: BatchSource
    model: list[Any]
    optimizer: Any
    position: Position = Position(0, 0, 0)

    @classmethod
    def build(cls, config: Config) -> Trainer:
        """Everything up to the first step; wrong input is refused here."""
        groups = initialize_parallel(config.parallel, config.training.seed)
        config.num_microbatches(torch.distributed.get_world_size())
        vocabulary = resolve_vocabulary(config, open_tokenizer(config.data))
        schedule = build_schedule(config, vocabulary)
        data = build_data(config, vocabulary)
        rank = RankPosition(groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size())
        source = BatchSource(data.train, schedule, config, rank, vocabulary.pad_token_id)
        model = build_model(config, vocabulary.size, schedule, groups)
        optimizer = build_optimizer(model, config, groups)
        device = device_of_rank()
        return cls(config, groups, device, vocabulary, data, source, model, optimizer)

    def load(self) -> None:
        """Continue from --load, or start from its weights with --finetune.

        A run whose --load is its own, still empty --save starts from scratch, so that one command
        starts and restarts it.
        """
        checkpoint = self.config.checkpoint
        if checkpoint.load is None:
            return
        if is_own_folder(checkpoint) and not has_checkpoint(checkpoint.load):
            return
        folder = find_checkpoint(checkpoint.load, checkpoint.ckpt_step)
        optimizer = None if checkpoint.finetune else self.optimizer
        position = load_checkpoint(folder, self.model, optimizer)
        if checkpoint.finetune:
            self.optimizer.reload_model_params()
            return
        self.position = position
        batch = self.config.training.global_batch_size
        require(
            position.consumed_samples == position.step * batch, "global_batch_size", batch,
            f"{folder} consumed {position.consumed_samples} samples in {position.step} steps; "
            "keep the batch size of the run, so that data and noise continue where they were.",
        )  # fmt: skip

    def train_step(self, batches: list[MicroBatch]) -> StepResult:
        """Forward, backward and update for the step that follows `position`."""
        with record_function("zero gradients"):
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        reports = run_micro_batches(
            self.model, batches, self.config, self.groups, self.device, forward_only=False
        )
        sums = reduced_sums(reports, self.groups, self.device)
        schedule = schedule_of(self.config.optimizer, self.config.training.train_iters)
        apply_schedule(self.optimizer, schedule, self.position.step)
        with record_function("optimizer step"):
            result = optimizer_step(
                self.optimizer, self.config.optimizer.clip_grad, is_finite=is_finite(sums)
            )
        batch = self.config.training.global_batch_size
        self.position = Position(
            self.position.step + 1,
            self.position.consumed_samples + batch,
            self.position.consumed_tokens + batch * self.config.model.seq_length,
        )
        return StepResult(sums, result.grad_norm, result.applied)

    def validate(self) -> dict[str, float] | None:
        """The bound on the validation data, `None` where there is none."""
        if self.data.valid is None or self.config.training.skip_eval:
            return None
        available = len(self.data.valid)
        limit = self.config.training.eval_iters * self.config.training.global_batch_size
        source = BatchSource(
            self.data.valid, self.source.schedule, self.config, self.source.position, None
        )
        count = min(available, limit) if limit else available
        result = evaluate(self.model, source, count, self.config, self.groups, self.device)
        return Reporter.validation_values(result, self.data.valid.bytes_per_token, self.config)


def is_own_folder(checkpoint: CheckpointConfig) -> bool:
    """Whether --load and --save are one folder, however they are written."""
    save, load = checkpoint.save, checkpoint.load
    return save is not None and load is not None and Path(save).resolve() == Path(load).resolve()


def refuse_foreign_folder(checkpoint: CheckpointConfig) -> None:
    """Raise where --save holds checkpoints of a run that this one does not continue."""
    is_own = is_own_folder(checkpoint)
    require(
        not (checkpoint.finetune and is_own), "finetune", True,
        f"it starts at step 0, and would replace the checkpoints of --load in --save, which is the "
        f"same folder, {checkpoint.save}; choose another --save, or give --no-finetune to continue "
        "that run.",
    )  # fmt: skip
    require(
        checkpoint.save is None or is_own or not has_checkpoint(checkpoint.save),
        "save", checkpoint.save,
        "it holds checkpoints already; give --load of the same folder to continue that run, or "
        "choose another.",
    )  # fmt: skip


def train(config: Config) -> int:
    """Run to the end or to a reason to stop; returns the process's exit code."""
    refuse_foreign_folder(config.checkpoint)
    trainer = Trainer.build(config)
    trainer.load()
    writer = None
    if config.checkpoint.save is not None:
        writer = CheckpointWriter(
            config.checkpoint.save,
            async_save=config.checkpoint.async_save,
            keep_last=config.checkpoint.keep_last,
        )
    is_writer = torch.distributed.get_rank() == 0
    if is_writer and config.checkpoint.save is not None:
        dump_config(config, Path(config.checkpoint.save) / "config.yaml")
    first, last = trainer.position.step, config.training.train_iters
    log = MetricsLog(config, is_writer=is_writer, first_step=first)
    reporter = Reporter(trainer, log)
    reporter.start()
    guard = StopGuard(config.training, trainer.device)
    code = run_steps(trainer, writer, reporter, guard, first, last)
    if writer is not None:
        writer.finish()
    log.close()
    return code


def run_steps(
    trainer: Trainer,
    writer: CheckpointWriter | None,
    reporter: Reporter,
    guard: StopGuard,
    first: int,
    last: int,
) -> int:
    """Steps first ... last - 1."""
    training, checkpoint = trainer.config.training, trainer.config.checkpoint
    saved, stop = first, None
    workers = trainer.config.data.num_workers
    for batches in prefetched(trainer.source, first, last, workers):
        started = time.perf_counter()
        result = trainer.train_step(batches)
        step = trainer.position.step
        guard.record(applied=result.applied)
        reporter.step(result, learning_rates(trainer.optimizer), time.perf_counter() - started)
        if training.eval_interval and step % training.eval_interval == 0 and step < last:
            reporter.validation(trainer.validate())
        if writer is not None:
            writer.poll()
            if checkpoint.save_interval and step % checkpoint.save_interval == 0:
                writer.save(trainer.model, trainer.optimizer, trainer.position)
                saved = step
        stop = guard.decide(step)
        if stop is not None:
            reporter.message(f"stopping at step {step}: {stop[1]}")
            break
    if stop is None:
        reporter.validation(trainer.validate())
    if writer is not None and saved != trainer.position.step:
        writer.save(trainer.model, trainer.optimizer, trainer.position)
    return EXIT_DONE if stop is None else stop[0]
