"""From step results to what the log shows: averages, speeds, console lines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.config import Config
from megatron_ext.parallel.parameters import complete_parameters
from megatron_ext.presets import total_parameters
from megatron_ext.scaling.flops import model_flops_per_token, peak_flops
from megatron_ext.training.evaluation import ValidationResult
from megatron_ext.training.metrics import MetricsLog, averages
from megatron_ext.training.sequences import SequenceReport
from megatron_ext.training.step import LossSums

from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate  # isort: skip

if TYPE_CHECKING:
    from megatron_ext.training.loop import StepResult, Trainer

NUM_SEQUENCES_SHOWN = 5
"""Sequences of a step out of the ordinary on the console; events.jsonl has all."""


class Reporter:
    """Accumulates steps between two log lines."""

    def __init__(self, trainer: Trainer, log: MetricsLog) -> None:
        self.trainer, self.log, self.config = trainer, log, trainer.config
        self.total_skipped = 0
        self._reset()

    def _reset(self) -> None:
        self.sums = LossSums.zeros(self.trainer.device).pack()
        self.steps = self.seconds = 0.0

    def message(self, text: str) -> None:
        self.log.message(text)

    def start(self) -> None:
        """Say what runs: shape, layout, where the choices fell."""
        config, parallel = self.config, self.config.parallel
        total = total_parameters(config.model, self.trainer.vocabulary.size)
        self.message(
            f"{total / 1e6:.1f}M parameters, vocabulary {self.trainer.vocabulary.size}, "
            f"objective {config.diffusion.objective} (shift {config.diffusion.shift:g}), "
            f"tp {parallel.tensor_model_parallel_size} pp {parallel.pipeline_model_parallel_size} "
            f"cp {parallel.context_parallel_size} dp {self.trainer.groups.dp.size()}, "
            f"{'bf16' if config.precision.bf16 else 'fp32'} on {self.trainer.device.type}, "
            f"attention {self.trainer.model[0].module.attention.impl} "
            f"(--attention-impl {config.precision.attention_impl}), "
            f"from step {self.trainer.position.step} to {config.training.train_iters}"
        )

    def step(self, result: StepResult, rates: dict[str, float], seconds: float) -> None:
        """Account for one optimizer step; writes a record every --log-interval steps."""
        position = self.trainer.position
        self.seconds += seconds
        self.steps += 1
        if result.applied:
            self.sums += result.sums.pack()
        else:
            self.total_skipped += 1
        count = max(result.sums.count.item(), 1.0)
        self.log.advance(result.sums.loss.item() / count)
        at_end = position.step == self.config.training.train_iters
        if position.step % self.config.logging.log_interval and not at_end:
            return
        values = averages(LossSums.unpack(self.sums), "train", self.config)
        values["train/grad_norm"] = result.grad_norm
        values["train/param_norm"] = self._parameter_norm()
        values["train/lr"] = rates.get("bulk", 0.0)
        values |= {f"train/lr_{name}": rate for name, rate in rates.items()}
        values["train/tokens"] = position.consumed_tokens
        values["train/skipped_steps"] = self.total_skipped
        values |= self._speed()
        self.log.record(position.step, values)
        self.message(
            f"step {position.step}/{self.config.training.train_iters}  "
            f"loss {values['train/loss']:.4f}  elbo {values['train/elbo']:.4f}  "
            f"grad {result.grad_norm:.3g}  lr {values['train/lr']:.3g}  "
            f"{values['perf/tokens_per_s']:,.0f} tokens/s"
        )
        self._reset()

    def out_of_the_ordinary(
        self, result: StepResult, sequences: list[SequenceReport], action: str
    ) -> None:
        """A spike or a step that is not finite: which samples, at which noise levels."""
        step, sums = self.trainer.position.step, result.sums
        if result.spike is not None:
            kind, reason = "spike", f"{result.spike}"
        else:
            kind = "bad_step"
            reason = f"loss or gradient is not finite (gradient norm {result.grad_norm})"
        self.message(f"step {step}: {reason}; {action}")
        worst = sorted(sequences, key=lambda report: -report.badness)
        for report in worst[:NUM_SEQUENCES_SHOWN]:
            self.message(f"  {report}")
        values = {
            "action": action,
            "loss": sums.loss.item() / max(sums.count.item(), 1.0),
            "grad_norm": result.grad_norm,
            "spike": None if result.spike is None else result.spike._asdict(),
            "sequences": [report._asdict() for report in worst],
        }
        self.log.event(kind, step, values)

    def event(self, kind: str, text: str, **values: Any) -> None:
        """Say and record something out of the ordinary."""
        self.message(text)
        self.log.event(kind, self.trainer.position.step, {"message": text, **values})

    def _speed(self) -> dict[str, float]:
        config = self.config
        tokens = self.steps * config.training.global_batch_size * config.model.seq_length
        per_second = tokens / self.seconds
        flops = model_flops_per_token(config.model, self.trainer.vocabulary.size) * per_second
        values = {
            "perf/tokens_per_s": per_second,
            "perf/step_time_s": self.seconds / self.steps,
            "perf/model_flops_per_s": flops,
        }
        peak = config.logging.peak_flops
        if peak is None and self.trainer.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            values["perf/mfu"] = flops / (peak * torch.distributed.get_world_size())
        return values

    @torch.no_grad()
    def _parameter_norm(self) -> float:
        """L2 norm of all weights, each counted once."""
        complete_parameters(self.trainer.model)
        squares = torch.zeros((), dtype=torch.float64, device=self.trainer.device)
        for chunk in self.trainer.model:
            for parameter in chunk.parameters():
                if param_is_not_tensor_parallel_duplicate(parameter):
                    squares += parameter.double().square().sum()
        torch.distributed.all_reduce(squares, group=self.trainer.groups.mp)
        return math.sqrt(squares.item())

    @staticmethod
    def validation_values(
        result: ValidationResult, bytes_per_token: float | None, config: Config
    ) -> dict[str, float]:
        """Tags of a validation result; bits per byte where the data says how long a token is."""
        values = averages(result.sums, "valid", config)
        values["valid/elbo"] = result.elbo
        values["valid/elbo_standard_error"] = result.standard_error
        values["valid/sequences"] = result.num_sequences
        if bytes_per_token is not None:
            values["valid/bits_per_byte"] = result.elbo / bytes_per_token / math.log(2)
        return values

    def validation(self, values: dict[str, float] | None) -> None:
        if values is None:
            return
        step = self.trainer.position.step
        self.log.record(step, values)
        line = (
            f"step {step}  validation bound {values['valid/elbo']:.4f} "
            f"+- {values['valid/elbo_standard_error']:.4f} nats/token"
        )
        if "valid/bits_per_byte" in values:
            line += f", {values['valid/bits_per_byte']:.4f} bits/byte"
        self.message(line)
