"""Checks of the loss on recorded logits: every implementation, float32 and float64, split on tp.

    logits  [n, v_padded/tp]  this rank's columns; padding columns hold large numbers that must
                              not count

The fused form runs on the same numbers: hidden states are the identity [n, n] and the head's weight
is the transposed logits [v_padded/tp, n], so its products are exact and the weight's gradient is
that of the logits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.conformance import tolerances
from megatron_ext.conformance.golden import Arrays, GoldenError, recorded_schedule
from megatron_ext.conformance.recorded_batches import (
    Steps,
    padded_batch,
    padded_length,
    piece_of_rank,
    recorded_source,
)
from megatron_ext.conformance.report import Measurement, measure
from megatron_ext.conformance.schedule_checks import mask_id_of_large_vocabulary
from megatron_ext.conformance.session import Session
from megatron_ext.conformance.tolerances import Tolerance
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.gidd_loss import GiddLoss, gidd_loss, linear_gidd_loss
from megatron_ext.kernels.vocabulary.passes import choose
from megatron_ext.model.translate import padded_vocab_size
from megatron_ext.training.metrics import averages
from megatron_ext.training.step import LossSums, reduced_sums, sum_losses

_PADDING_LOGIT = 60.0
_LARGE_VOCABULARY = 131072
_OUTPUTS = {"loss": "loss", "elbo": "elbo", "kl_loss": "kl", "is_loss": "is_div"}
"""Recorded name -> field of `GiddLoss`."""


def implementations(session: Session) -> list[str]:
    """The one that --loss-impl names; for auto the plain ones and the choice for training."""
    asked = session.config.precision.loss_impl
    if asked != "auto":
        return [asked]
    fastest = choose("auto", session.device, torch.float32, _LARGE_VOCABULARY)
    return list(dict.fromkeys(["reference", "chunked", fastest]))


@dataclass(frozen=True)
class Case:
    """Logits [n, v] of one recorded call and what else goes in, on this rank's device."""

    logits: Tensor
    xt: Tensor
    x0: Tensor
    log_snr: Tensor
    beta_is: float
    schedule: MixingSchedule

    def columns(self, session: Session) -> slice:
        """This rank's columns of the padded vocabulary."""
        tp, model = session.groups.tp, session.config.model
        size = self.schedule.vocab_size
        width = padded_vocab_size(size, model.make_vocab_size_divisible_by, tp.size()) // tp.size()
        return slice(tp.rank() * width, (tp.rank() + 1) * width)

    def local_logits(self, session: Session, dtype: torch.dtype) -> Tensor:
        columns = self.columns(session)
        mine = self.logits[:, columns].to(dtype)
        missing = columns.stop - columns.start - mine.shape[1]
        return torch.nn.functional.pad(mine, (0, missing), value=_PADDING_LOGIT)

    def run(
        self, session: Session, impl: str, dtype: torch.dtype, *, fused: bool
    ) -> tuple[GiddLoss, Tensor]:
        """Per-token results and the gradient of the summed loss by this rank's columns."""
        logits, tp = self.local_logits(session, dtype), session.groups.tp
        ids = (self.xt, self.x0, self.log_snr.to(dtype), self.schedule)
        if fused:
            weight = logits.t().contiguous().requires_grad_()
            hidden = torch.eye(len(logits), dtype=dtype, device=logits.device)
            result = linear_gidd_loss(
                hidden, weight, *ids, tp_group=tp, beta_is=self.beta_is, impl=impl,
                chunk_size=session.config.precision.loss_chunk_size,
            )  # fmt: skip
        else:
            weight = logits.requires_grad_()
            result = gidd_loss(weight, *ids, tp_group=tp, beta_is=self.beta_is, impl=impl)
        (gradient,) = torch.autograd.grad(result.loss.sum(), weight)
        return result, gradient.t() if fused else gradient


def _output_tolerances(device: torch.device, *, exact: bool) -> dict[str, Tolerance]:
    if exact:
        return dict.fromkeys([*_OUTPUTS, "grad"], tolerances.TRUTH)
    of_loss = tolerances.loss(device)
    return {
        "loss": of_loss,
        "kl_loss": of_loss,
        "is_loss": of_loss,
        "elbo": tolerances.ELBO,
        "grad": tolerances.loss_gradient(device),
    }


def _measure_case(
    session: Session, recorded: Arrays, prefix: str, case: Case, impl: str, *, exact: bool
) -> Iterator[Measurement]:
    """Both forms of one implementation against what is recorded of a case."""
    dtype = torch.float64 if exact else torch.float32
    allowed = _output_tolerances(session.device, exact=exact)
    entry = f"{prefix}truth64_" if exact else prefix
    columns = case.columns(session)
    real = max(min(columns.stop, case.schedule.vocab_size) - columns.start, 0)
    for fused in (False, True):
        result, gradient = case.run(session, impl, dtype, fused=fused)
        form = " fused with the head" if fused else ""
        for name, attribute in _OUTPUTS.items():
            if f"{entry}{name}" in recorded:
                want = recorded[f"{entry}{name}"].reshape(-1)
                got = getattr(result, attribute)
                yield measure(f"{entry}{name}{form}", got, want, allowed[name])
        if f"{entry}grad" in recorded:
            want = recorded[f"{entry}grad"].reshape(len(gradient), -1)[:, columns]
            yield measure(f"{entry}grad{form}", gradient[:, :real], want, allowed["grad"])
        if f"{entry}grad_at_idx" in recorded:
            yield from _measure_sparse_gradient(
                session, recorded, prefix, entry, columns, gradient, allowed["grad"], form
            )
        padding = gradient[:, real:]
        yield measure(
            f"{entry}gradient of padding{form}", padding, torch.zeros_like(padding),
            tolerances.EXACT,
        )  # fmt: skip


def _measure_sparse_gradient(
    session: Session,
    recorded: Arrays,
    prefix: str,
    entry: str,
    columns: slice,
    gradient: Tensor,
    allowed: Tolerance,
    form: str,
) -> Iterator[Measurement]:
    """A gradient recorded at some columns, with its norm per token."""
    at = recorded[f"{prefix}grad_idx"]
    here = (at >= columns.start) & (at < columns.stop)
    got = gradient[:, torch.from_numpy(at[here] - columns.start).long().to(gradient.device)]
    want = recorded[f"{entry}grad_at_idx"][:, here]
    yield measure(f"{entry}grad_at_idx{form}", got, want, allowed)
    squares = gradient.double().square().sum(-1)
    torch.distributed.all_reduce(squares, group=session.groups.tp)
    yield measure(f"{entry}grad_l2{form}", squares.sqrt(), recorded[f"{entry}grad_l2"], allowed)


def _check_cases(name: str, session: Session, recorded: Arrays, cases: dict[str, Case]) -> None:
    if not cases:
        raise GoldenError(f"{name} has no cases")
    has_truth = any("truth64_" in key for key in recorded.keys)
    for impl in implementations(session):
        for exact in (False, True) if has_truth and impl != "triton" else (False,):
            measurements = [
                measurement
                for prefix, case in cases.items()
                for measurement in _measure_case(session, recorded, prefix, case, impl, exact=exact)
            ]
            kind = "float64 against truth" if exact else "float32"
            session.report.check(f"{name} {impl} {kind}", measurements)
    if not has_truth:
        session.report.skip(f"{name} truth64", "not recorded")
    if recorded.ignore(r".*bf16_.*"):
        session.report.skip(f"{name} bf16_*", "recorded for information, too rough to gate on")
    unread = recorded.unread()
    if unread:
        session.report.skip(f"{name} {', '.join(unread)}", "unknown to this suite")


def check_loss(name: str, session: Session) -> None:
    """All cases of loss_{k}.npz."""
    recorded, device = session.golden.arrays(name), session.device
    schedule = recorded_schedule(recorded)
    cases = {}
    for prefix in recorded.prefixes(r"((?!.*bf16).*)logits"):
        logits = recorded.tensor(f"{prefix}logits", device)
        cases[prefix] = Case(
            logits=logits.flatten(0, -2),
            xt=recorded.tensor(f"{prefix}input_ids", device).flatten(),
            x0=recorded.tensor(f"{prefix}labels", device).flatten(),
            log_snr=recorded.tensor(f"{prefix}log_snr", device).flatten(),
            beta_is=recorded.number(f"{prefix}beta_is_div", 1.0),
            schedule=schedule,
        )
    _check_cases(name, session, recorded, cases)


def check_loss_large(name: str, session: Session) -> None:
    """loss_V{v}.npz: logits are made again from their seed and compared with their checksum."""
    recorded, device = session.golden.arrays(name), session.device
    match = re.fullmatch(r"loss_V(\d+)\.npz", name)
    size = recorded.integer("vocab_size") if "vocab_size" in recorded else int(match[1])  # type: ignore[index]
    mask = _mask_id_of(recorded, size, session)
    cases, checksums = {}, []
    for prefix in recorded.prefixes(r"(.*)seed"):
        logits = _regenerated(recorded, prefix, size)
        digest = np.frombuffer(hashlib.sha256(logits.tobytes()).digest(), dtype=np.uint8)
        want = recorded[f"{prefix}logits_sha256"]
        checksums.append(measure(f"{prefix}logits_sha256", digest, want, tolerances.EXACT))
        first = recorded[f"{prefix}logits_first8"]
        got = logits[:, : first.shape[1]]
        checksums.append(measure(f"{prefix}logits_first8", got, first, tolerances.EXACT))
        cases[prefix] = Case(
            logits=torch.from_numpy(logits).to(device),
            xt=recorded.tensor(f"{prefix}input_ids", device),
            x0=recorded.tensor(f"{prefix}labels", device),
            log_snr=recorded.tensor(f"{prefix}log_snr", device),
            beta_is=recorded.number(f"{prefix}beta_is_div", 1.0),
            schedule=recorded_schedule(
                recorded,
                vocab_size=size,
                mask_token_id=mask,
                shift=recorded.number(f"{prefix}shift"),
                scale=recorded.number(f"{prefix}scale", 1.0),
            ),
        )
    session.report.check(f"{name} regenerated logits", checksums)
    _check_cases(name, session, recorded, cases)


def _regenerated(recorded: Arrays, prefix: str, vocab_size: int) -> np.ndarray:
    labels, boost = recorded[f"{prefix}labels"], recorded[f"{prefix}boost"]
    numbers = np.random.default_rng(recorded.integer(f"{prefix}seed"))
    logits = numbers.standard_normal((len(labels), vocab_size), dtype=np.float32) * 2
    logits[np.arange(len(labels)), labels] += boost
    return logits


def _mask_id_of(recorded: Arrays, vocab_size: int, session: Session) -> int:
    """From the file; else what the purely masked calls have as noise; else schedule.npz's."""
    if "mask_id" in recorded:
        return recorded.integer("mask_id")
    for prefix in recorded.prefixes(r"(.*)seed"):
        shift, scale = recorded.number(f"{prefix}shift"), recorded.number(f"{prefix}scale", 1.0)
        if MixingSchedule(vocab_size, 0, shift, scale).is_mask_only:
            xt, x0 = recorded[f"{prefix}input_ids"], recorded[f"{prefix}labels"]
            noise = np.unique(xt[xt != x0])
            if len(noise) == 1:
                return int(noise[0])
    if "schedule.npz" in session.golden:
        schedule = session.golden.arrays("schedule.npz")
        if f"V{vocab_size}_pairs" in schedule:
            return mask_id_of_large_vocabulary(schedule, vocab_size)
        return schedule.integer("mask_id")
    raise GoldenError(f"{recorded.name} does not say which id is the mask")


def check_aggregation(name: str, session: Session) -> None:
    """Recorded sums and means through the training code's sums, reduction and averages."""
    recorded = session.golden.arrays(name)
    # The format fixes the shift at 0 where the file does not say.
    schedule = recorded_schedule(recorded, shift=recorded.number("shift", 0.0))
    steps = Steps.of(recorded, first_dim_is_step=False)
    sums, config = _trained_sums(session, recorded, steps, schedule)
    means = averages(sums, "train", config)
    for kind in recorded.prefixes(r"([^_]+)_returned_loss"):
        if kind not in ("sum", "mean"):
            session.report.skip(f"{name} {kind}", "no such normalization in the training code")
            continue
        loss = sums.loss.item() if kind == "sum" else means["train/loss"]
        scale = recorded.number(f"{kind}_loss_scale", 1.0)
        got = {
            "returned_loss": loss * scale,
            "metrics_loss": loss,
            "metric_elbo": means["train/elbo"],
            "metric_kl_loss": means["train/kl"],
            "metric_is_loss": means["train/is_div"],
            "metric_num_tokens": sums.count.item(),
        }
        session.report.check(
            f"{name} {kind}",
            [
                measure(key, value, recorded[f"{kind}_{key}"], tolerances.AGGREGATE)
                for key, value in got.items()
            ],
        )
    if recorded.unread():
        session.report.skip(f"{name} {', '.join(recorded.unread())}", "unknown to this suite")


def _trained_sums(
    session: Session, recorded: Arrays, steps: Steps, schedule: MixingSchedule
) -> tuple[LossSums, Config]:
    """Global sums of the recorded positions, shared out over dp, cp and tp as a step does."""
    whole = recorded.tensor("logits", session.device)
    num_sequences, length = whole.shape[:2]
    config = session.config.with_sections(
        model={"seq_length": padded_length(length, session.config)},
        training={"global_batch_size": padded_batch(num_sequences, session)},
    )
    source = recorded_source(steps, config, schedule, session)
    padded = whole.new_zeros(
        config.training.global_batch_size, config.model.seq_length, whole.shape[-1]
    )
    padded[:num_sequences, :length] = whole
    piece = piece_of_rank(config.model.seq_length, session)
    reports = []
    for rows, batch in zip(source.sample_indices(0), source.step(0), strict=True):
        batch = batch.to(session.device)
        case = Case(
            padded[list(rows), piece].flatten(0, 1), batch.input_ids.flatten(),
            batch.x0.flatten(), batch.log_snr.flatten(), recorded.number("beta_is_div", 1.0),
            schedule,
        )  # fmt: skip
        losses, _ = case.run(session, session.config.precision.loss_impl, whole.dtype, fused=False)
        by_position = GiddLoss(*(x.view(batch.x0.shape) for x in losses))
        reports.append({"sums": sum_losses(by_position, batch, config)})
    return reduced_sums(reports, session.groups, session.device), config
