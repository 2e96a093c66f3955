"""The training loop: build the parts, take steps, report, validate, save, stop for a reason."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megatron_ext.checkpoint.changes import (
    comparable,
    config_changes,
    data_changes,
    require_accepted,
)
from megatron_ext.checkpoint.training import (
    Position,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    newest_intact,
    read_memory,
)
from megatron_ext.cli import dump_config
from megatron_ext.config import Config, require
from megatron_ext.data.batches import BatchSource, MicroBatch, RankPosition, prefetched
from megatron_ext.data.dataset import Datasets
from megatron_ext.model.fusion import require_compiler
from megatron_ext.model.init import initialize_weights
from megatron_ext.optim.build import (
    apply_schedule,
    build_optimizer,
    learning_rates,
    optimizer_step,
    schedule_of,
)
from megatron_ext.parallel.determinism import require_determinism
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
from megatron_ext.training.folders import (
    is_own_folder,
    refuse_foreign_folder,
    refuse_unshared,
    refuse_unwritable,
)
from megatron_ext.training.guards import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_NOT_SAVED,
    Stop,
    StopGuard,
    forget_exit,
    write_exit,
)
from megatron_ext.training.metrics import MetricsLog
from megatron_ext.training.report import Reporter
from megatron_ext.training.saving import Saver
from megatron_ext.training.sequences import SequenceReport, sequence_reports
from megatron_ext.training.spikes import LossSpikes, Spike
from megatron_ext.training.step import LossSums, is_finite, reduced_sums, run_micro_batches
from megatron_ext.training.watchdog import Watchdog

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    sums: LossSums
    grad_norm: float
    applied: bool
    """False where a non-finite loss or gradient, or a spike that is not to be learned from, left
    weights and optimizer as they were."""
    spike: Spike | None
    reports: list[dict[str, Any]]
    """Of this rank's micro-batches, on ranks with losses."""


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
    data_identity: list[dict[str, Any]] | None = None
    """What the training data is, to recognise it after a restart; same on all ranks."""
    notes: list[str] = field(default_factory=list)
    """What loading has to say: damaged checkpoints, changes since the checkpoint."""

    def __post_init__(self) -> None:
        self.spikes = LossSpikes(self.config.resilience)
        self._agreed_loss = 0.0

    @classmethod
    def build(cls, config: Config) -> Trainer:
        """Everything up to the first step; wrong input is refused here."""
        if config.resilience.deterministic:
            require_determinism()
        require_compiler(config.precision)
        groups = initialize_parallel(config.parallel, config.training.seed)
        config.num_microbatches(torch.distributed.get_world_size())
        vocabulary = resolve_vocabulary(config, open_tokenizer(config.data))
        data = build_data(config, vocabulary)
        trainer = cls.assemble(config, groups, vocabulary, data)
        identity = [getattr(data.train, "identity", None) if is_first_rank() else None]
        torch.distributed.broadcast_object_list(identity, src=0)
        trainer.data_identity = identity[0]
        return trainer

    @classmethod
    def assemble(
        cls,
        config: Config,
        groups: ProcessGroupCollection,
        vocabulary: Vocabulary,
        data: Datasets,
        initialize: Callable[[Any, int, int], None] = initialize_weights,
    ) -> Trainer:
        """Model and optimizer on this rank's groups, around data that is open already."""
        schedule = build_schedule(config, vocabulary)
        rank = RankPosition(groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size())
        source = BatchSource(data.train, schedule, config, rank, vocabulary.pad_token_id)
        model = build_model(config, vocabulary.size, schedule, groups, initialize)
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
        is_own, root = is_own_folder(checkpoint), Path(checkpoint.load)
        if is_own and not has_checkpoint(root):
            return
        if checkpoint.ckpt_step is None:
            folder, self.notes = newest_intact(root, set_aside=is_own)
        else:
            folder = find_checkpoint(root, checkpoint.ckpt_step)
        is_verified = checkpoint.ckpt_step is None
        if checkpoint.finetune:
            load_checkpoint(folder, self.model, None, is_verified=is_verified)
            self.optimizer.reload_model_params()
            return
        position = load_checkpoint(folder, self.model, self.optimizer, is_verified=is_verified)
        batch = self.config.training.global_batch_size
        require(
            position.consumed_samples == (position.step + position.skipped_steps) * batch,
            "global_batch_size", batch,
            f"{folder} consumed {position.consumed_samples} samples in {position.step} steps; "
            "keep the batch size of the run, so that data and noise continue where they were.",
        )  # fmt: skip
        self._compare_with(folder)
        self.position = position

    def _compare_with(self, folder: Path) -> None:
        """Refuse or note what is not as it was; take back what the run remembers."""
        before, memory = read_memory(folder)
        changes = config_changes(before, comparable(self.config))
        known = memory.get("data")
        both = known is not None and self.data_identity is not None
        data = data_changes(known, self.data_identity) if both else ""
        require_accepted(changes, data, self.config.checkpoint.accept_changes)
        ranks = memory.get("ranks"), torch.distributed.get_world_size()
        told = [str(change) for change in changes]
        told += [f"--data-path: {data}"] if data else []
        told += [f"{ranks[0]} -> {ranks[1]} ranks"] if ranks[0] not in (None, ranks[1]) else []
        if told:
            self.notes.append(f"changed since {folder.name}: {', '.join(told)}")
        self.spikes = LossSpikes(self.config.resilience, memory.get("losses", ()))

    @property
    def memory(self) -> dict[str, Any]:
        """What the run wants back from a checkpoint beside weights, optimizer and position."""
        return {
            "data": self.data_identity,
            "ranks": torch.distributed.get_world_size(),
            "losses": list(self.spikes.losses),
        }

    def batches(self, last: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of the steps from `position` to `last`."""
        offset = self.position.skipped_steps
        first, workers = self.position.step + offset, self.config.data.num_workers
        return prefetched(self.source, first, last + offset, workers)

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
        spike = self._spike_of(sums)
        is_harmful = spike is not None and self.config.resilience.loss_spike_action != "report"
        schedule = schedule_of(self.config.optimizer, self.config.training.train_iters)
        apply_schedule(self.optimizer, schedule, self.position.step)
        with record_function("optimizer step"):
            result = optimizer_step(
                self.optimizer,
                self.config.optimizer.clip_grad,
                is_finite=is_finite(sums) and not is_harmful,
            )
        if result.applied:
            self.spikes.remember(self._agreed_loss)
        batch = self.config.training.global_batch_size
        self.position = replace(
            self.position,
            step=self.position.step + 1,
            consumed_samples=self.position.consumed_samples + batch,
            consumed_tokens=self.position.consumed_tokens + batch * self.config.model.seq_length,
        )
        return StepResult(sums, result.grad_norm, result.applied, spike, reports)

    def _spike_of(self, sums: LossSums) -> Spike | None:
        """The same answer on every rank: rank 0's loss decides, to the last bit."""
        if not self.spikes.is_on:
            return None
        loss = sums.loss / sums.count.clamp(min=1.0)
        torch.distributed.broadcast(loss, src=0)
        self._agreed_loss = loss.item()
        return self.spikes.judge(self._agreed_loss)

    def sequences(self, batches: list[MicroBatch], result: StepResult) -> list[SequenceReport]:
        """The step that was just taken, sequence by sequence. A collective."""
        number = self.position.step - 1 + self.position.skipped_steps
        indices = self.source.sample_indices(number)
        return sequence_reports(indices, batches, result.reports, self.groups)

    def go_back(self, saver: Saver) -> range:
        """Return to the last checkpoint and leave out the batches since; their samples."""
        ahead = self.position
        position, memory = saver.go_back(self.model, self.optimizer)
        skipped = ahead.skipped_steps + ahead.step - position.step
        batch = self.config.training.global_batch_size
        first = position.consumed_samples
        self.position = replace(
            position,
            skipped_steps=skipped,
            consumed_samples=(position.step + skipped) * batch,
        )
        self.spikes = LossSpikes(self.config.resilience, memory.get("losses", ()))
        return range(first, self.position.consumed_samples)

    def validate(self, watchdog: Watchdog | None = None) -> dict[str, float] | None:
        """The bound on the validation data, `None` where there is none."""
        if self.data.valid is None or self.config.training.skip_eval:
            return None
        available = len(self.data.valid)
        limit = self.config.training.eval_iters * self.config.training.global_batch_size
        source = BatchSource(
            self.data.valid, self.source.schedule, self.config, self.source.position, None
        )
        count = min(available, limit) if limit else available
        progress = None if watchdog is None else lambda: watchdog.beat("validation")
        result = evaluate(
            self.model, source, count, self.config, self.groups, self.device, progress
        )
        return Reporter.validation_values(result, self.data.valid.bytes_per_token, self.config)


def is_first_rank() -> bool:
    return torch.distributed.get_rank() == 0


def train(config: Config) -> int:
    """Run to the end or to a reason to stop; returns the exit code of `training.guards`."""
    save = config.checkpoint.save
    refuse_foreign_folder(config.checkpoint)
    refuse_unwritable(save)
    if os.environ.get("RANK", "0") == "0":
        forget_exit(save)
    with Watchdog(config) as watchdog:
        trainer = Trainer.build(config)
        refuse_unshared(save)
        watchdog.beat("loading")
        trainer.load()
        if is_first_rank() and save is not None:
            dump_config(config, Path(save) / "config.yaml")
        log = MetricsLog(config, is_writer=is_first_rank(), first_step=trainer.position.step)
        run = Run(
            trainer, Reporter(trainer, log), StopGuard(config.training, trainer.device), watchdog
        )
        code, reason = run.to_the_end()
        log.close()
        if is_first_rank():
            write_exit(save, code, reason, trainer.position.step)
    return code


class Run:
    """Steps, and what happens between them, until a reason to stop."""

    def __init__(
        self, trainer: Trainer, reporter: Reporter, guard: StopGuard, watchdog: Watchdog
    ) -> None:
        self.trainer, self.reporter = trainer, reporter
        self.guard, self.watchdog = guard, watchdog
        self.config, self.num_rollbacks = trainer.config, 0
        self.saver = Saver(self.config.checkpoint, trainer.position.step, reporter.event)

    def to_the_end(self) -> Stop:
        """All steps that are left; exit code and reason."""
        trainer, last, stop = self.trainer, self.config.training.train_iters, None
        self.reporter.start()
        for note in trainer.notes:
            self.reporter.event("continued", note)
        while stop is None and trainer.position.step < last:
            stop = self.steps_until_a_stop_or_rollback(last)
        if stop is None:
            self.validate()
        self.watchdog.beat("the last save")
        self.saver.finish()
        if self.saver.saved_step != trainer.position.step:
            self.save()
            self.saver.finish()
        if self.saver.failures and stop is None:
            stop = EXIT_NOT_SAVED, "the last checkpoint could not be written"
        return (EXIT_DONE, "all steps done") if stop is None else stop

    def steps_until_a_stop_or_rollback(self, last: int) -> Stop | None:
        trainer = self.trainer
        self.watchdog.beat(f"step {trainer.position.step + 1}")
        for batches in trainer.batches(last):
            started = time.perf_counter()
            result = trainer.train_step(batches)
            step = trainer.position.step
            has_gone_back = self.look_at(result, batches)
            if has_gone_back and self.guard.stop is None:
                return None
            self.reporter.step(
                result, learning_rates(trainer.optimizer), time.perf_counter() - started
            )
            interval = self.config.training.eval_interval
            if interval and step % interval == 0 and step < last:
                self.validate()
            self.saver.poll()
            if self.saver.is_due(step):
                self.save()
            self.guard.stop = self.guard.stop or self.saver.stop
            stop = self.guard.decide(step)
            if stop is not None:
                self.reporter.message(f"stopping at step {step}: {stop[1]}")
                return stop
            self.watchdog.beat(f"step {step + 1}")
        return None

    def look_at(self, result: StepResult, batches: list[MicroBatch]) -> bool:
        """Report a step out of the ordinary; whether the run went back to a checkpoint for it."""
        self.guard.record(applied=result.applied)
        if result.applied and result.spike is None:
            return False
        trainer, settings = self.trainer, self.config.resilience
        sequences = trainer.sequences(batches, result)
        goes_back = result.spike is not None and settings.loss_spike_action == "rollback"
        goes_back = goes_back and self.saver.has_saved
        if goes_back and self.num_rollbacks == settings.max_rollbacks:
            self.guard.stop = EXIT_DIVERGED, f"a spike after {self.num_rollbacks} rollbacks"
            goes_back = False
        action = "applied" if result.applied else "the update is left out"
        self.reporter.out_of_the_ordinary(result, sequences, "going back" if goes_back else action)
        if not goes_back:
            return False
        spiked = trainer.position.step
        self.saver.finish()
        left_out = trainer.go_back(self.saver)
        self.num_rollbacks += 1
        self.guard.record(applied=True)
        step = trainer.position.step
        self.reporter.event(
            "rollback",
            f"back from step {spiked} to the checkpoint of step {step}; samples {left_out.start} "
            f"to {left_out.stop - 1} are left out",
            spiked_step=spiked, first_sample=left_out.start, last_sample=left_out.stop - 1,
        )  # fmt: skip
        return True

    def validate(self) -> None:
        self.watchdog.beat("validation")
        self.reporter.validation(self.trainer.validate(self.watchdog))

    def save(self) -> None:
        trainer = self.trainer
        self.watchdog.beat(f"saving step {trainer.position.step}")
        self.saver.save(trainer.model, trainer.optimizer, trainer.position, trainer.memory)
