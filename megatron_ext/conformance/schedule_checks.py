"""Checks of the forward process: mixing schedule, noise masks, log-SNRs, empty tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import NoiseConfig
from megatron_ext.conformance import tolerances
from megatron_ext.conformance.golden import Arrays, Unsupported, recorded_schedule
from megatron_ext.conformance.report import Measurement, measure
from megatron_ext.conformance.session import Session
from megatron_ext.conformance.tolerances import Tolerance
from megatron_ext.diffusion.noising import NoisedSequence, noise_sequence
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.diffusion.visibility import attention_mask_from_visibility

_NUM_DRAWS = 64
"""Sequences of our own noise that must show the recorded structure."""

Output = Callable[[MixingSchedule, Tensor, Tensor, Tensor], Tensor]
"""(schedule, log_snr [g], xt [p], x0 [p]) -> what is recorded."""


def _marginal(label: int) -> Output:
    def compute(schedule: MixingSchedule, log_snr: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        del xt, x0
        onehot = torch.zeros(schedule.vocab_size, dtype=log_snr.dtype, device=log_snr.device)
        onehot[label] = 1.0
        return schedule.marginal(log_snr, onehot.expand(len(log_snr), -1))

    return compute


def _outputs(device: torch.device) -> dict[str, tuple[Output, Tolerance]]:
    return {
        "alpha": (lambda s, g, z, x: s.alpha(g), tolerances.ALPHA),
        "pi": (lambda s, g, z, x: s.pi(g), tolerances.PI),
        "pi_prime": (lambda s, g, z, x: s.pi_prime(g), tolerances.PI),
        "p_log_snr": (lambda s, g, z, x: s.log_snr_density(g), tolerances.ALPHA),
        "pi_at": (lambda s, g, z, x: s.pi_at(g[:, None], z), tolerances.PI),
        "pi_prime_at": (lambda s, g, z, x: s.pi_prime_at(g[:, None], z), tolerances.PI),
        "loss_weights": (
            lambda s, g, z, x: s.loss_weight(g[:, None], z, x),
            tolerances.LOSS_WEIGHT,
        ),
        "elbo_weights": (
            lambda s, g, z, x: s.elbo_weight(g[:, None], z, x),
            tolerances.elbo_weight(device),
        ),
    }


def check_schedule(name: str, session: Session) -> None:
    """Every recorded output of every (shift, scale), at every recorded vocabulary."""
    recorded = session.golden.arrays(name)
    outputs = _outputs(session.device)
    labels = recorded.prefixes(r"marginal_probs_label(\d+)_\d+")
    for label in labels:
        outputs[f"marginal_probs_label{label}"] = (_marginal(int(label)), tolerances.ALPHA)
    own = recorded.integer("vocab_size")
    mask = recorded.integer("mask_id")
    _check_outputs(name, session, recorded, "", own, mask, outputs)
    for text in recorded.prefixes(r"V(\d+)_[a-z].*_\d+"):
        size = int(text)
        mask = mask_id_of_large_vocabulary(recorded, size)
        _check_outputs(name, session, recorded, f"V{text}_", size, mask, outputs)
    _check_times(name, session, recorded)
    unread = recorded.unread()
    if unread:
        session.report.skip(f"{name} {', '.join(unread)}", "unknown to this suite")


def mask_id_of_large_vocabulary(recorded: Arrays, vocab_size: int) -> int:
    """Entries for another vocabulary may have been made with another mask id than the file's.

    Without an entry that says so: where the file's own pairs begin with its mask as noise, these
    do as well; else it is the file's own.
    """
    explicit, pairs = f"V{vocab_size}_mask_id", f"V{vocab_size}_pairs"
    if explicit in recorded:
        return recorded.integer(explicit)
    own = recorded.integer("mask_id")
    return int(recorded[pairs][0, 0]) if recorded["pairs"][0, 0] == own else own


def _check_outputs(
    name: str,
    session: Session,
    recorded: Arrays,
    prefix: str,
    vocab_size: int,
    mask_id: int,
    outputs: dict[str, tuple[Output, Tolerance]],
) -> None:
    log_snr = recorded.tensor("log_snr", session.device)
    xt, x0 = recorded.tensor(f"{prefix}pairs", session.device).unbind(-1)
    for output, (compute, tolerance) in outputs.items():
        measurements: list[Measurement] = []
        for match in recorded.matching(rf"{prefix}{output}_(\d+)"):
            k = int(match[1])
            shift, scale = (float(value) for value in recorded["shift_scale"][k])
            want = recorded[match.string]
            try:
                schedule = recorded_schedule(
                    recorded, vocab_size=vocab_size, mask_token_id=mask_id,
                    shift=shift, scale=scale,
                )  # fmt: skip
            except Unsupported as reason:
                session.report.skip(f"{name} {match.string}", str(reason))
                continue
            got = compute(schedule, log_snr, xt, x0)
            measurements.append(measure(match.string, got, want, tolerance))
        if measurements:
            session.report.check(f"{name} {prefix}{output}", measurements)
        elif not prefix:
            session.report.skip(f"{name} {output}", "not recorded")


def _check_times(name: str, session: Session, recorded: Arrays) -> None:
    # Neither shift nor scale enters these.
    schedule = recorded_schedule(recorded, shift=0.0, scale=1.0)
    log_snr = recorded.tensor("log_snr", session.device)
    for key, values, tolerance in (
        ("time_from_log_snr", schedule.time_from_log_snr(log_snr), tolerances.ALPHA),
        ("log_snr_from_time", None, tolerances.LOG_SNR),
    ):
        if key not in recorded:
            session.report.skip(f"{name} {key}", "not recorded")
            continue
        if values is None:
            values = schedule.log_snr_from_time(recorded.tensor("time", session.device))
        session.report.check(f"{name} {key}", [measure("", values, recorded[key], tolerance)])


def _holds(part: str, fact: np.ndarray | bool) -> Measurement:
    """Measure a fact: every element must be true."""
    fact = np.asarray(fact, dtype=bool)
    return measure(part, fact, np.ones_like(fact), tolerances.EXACT)


def _is_suffix(noised: np.ndarray) -> np.ndarray:
    """Rows in which nothing clean follows something noised."""
    return (noised[:, 1:] >= noised[:, :-1]).all(-1)


def _is_constant_or_distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct = np.array([len(np.unique(row)) for row in rows])
    return distinct == 1, distinct == rows.shape[1]


def _keeps_order(before: np.ndarray, after: np.ndarray, empty_id: int) -> list[bool]:
    """Rows that are the tokens before, in order, among empty ones, cut to the same length."""
    kept = [row[row != empty_id] for row in after]
    return [
        len(new) == len(old) and bool((real == old[: len(real)]).all())
        for old, new, real in zip(before, after, kept, strict=True)
    ]


def _attention(levels: np.ndarray, *, causal_prompt: bool) -> np.ndarray:
    visibility = np.stack([levels, np.zeros_like(levels)], axis=1).astype(np.int32)
    mask = attention_mask_from_visibility(torch.from_numpy(visibility), causal_prompt=causal_prompt)
    return mask.numpy()


def _levels_behind(attention: np.ndarray) -> np.ndarray:
    """Levels from which a recorded mask was made: noised queries see every key."""
    return attention.all(-1).astype(np.int32)


def check_noise_masks(name: str, session: Session) -> None:
    """Recorded masks follow from our visibility; ours and theirs have the same structure."""
    recorded, report = session.golden.arrays(name), session.report
    for kind in recorded.prefixes(r"(.+)_noise_mask"):
        noised, attention = recorded[f"{kind}_noise_mask"], recorded[f"{kind}_attn_mask"]
        is_infill, causal = "infill" in kind, "causal" in kind
        levels = _levels_behind(attention) if is_infill else noised.astype(np.int32)
        facts = [
            _holds("recorded levels are a suffix", _is_suffix(levels)),
            _holds("recorded noise within the levels", noised <= levels),
            measure(
                "recorded attention from our visibility",
                _attention(levels, causal_prompt=causal), attention, tolerances.EXACT,
            ),
        ]  # fmt: skip
        noise = NoiseConfig(
            p_prompt=1.0, p_infill=1.0 if is_infill else 0.0, max_empty_fraction=0.0
        )
        facts += _facts_of_prompts(_draw(noise, noised.shape[1]), is_infill)
        report.check(f"{name} {kind}", facts)
    for match in list(recorded.matching(r"log_snr_p_ind_([\d.]+)")):
        report.check(f"{name} {match.string}", _facts_of_log_snr(recorded, match))
    for match in list(recorded.matching(r"empty_out_pad(\d+)")):
        report.check(f"{name} {match.string}", _facts_of_empty(recorded, match))
    if recorded.unread():
        report.skip(f"{name} {', '.join(recorded.unread())}", "unknown to this suite")


def _draw(noise: NoiseConfig, length: int) -> list[NoisedSequence]:
    """Our own noise; the structure depends on neither vocabulary nor shift."""
    schedule = MixingSchedule(vocab_size=length + 1, mask_token_id=length, shift=0.0)
    return [
        noise_sequence(np.arange(length), schedule, noise, seed=0, index=i)
        for i in range(_NUM_DRAWS)
    ]


def _facts_of_prompts(drawn: list[NoisedSequence], is_infill: bool) -> Iterator[Measurement]:
    noised = np.stack([sequence.noise_mask for sequence in drawn])
    levels = np.stack([sequence.visibility[0] for sequence in drawn])
    clean = [sequence.xt[~sequence.noise_mask] for sequence in drawn]
    labels = [sequence.x0[~sequence.noise_mask] for sequence in drawn]
    yield _holds("our levels are a suffix", _is_suffix(levels))
    yield _holds("our prompts have a token", levels[:, 0] == 0)
    yield _holds("our prompts differ", len(np.unique(levels.sum(-1))) > 1)
    yield _holds("our clean inputs are labels", np.concatenate(clean) == np.concatenate(labels))
    if is_infill:
        yield _holds("our noise within the levels", noised <= levels)
        yield _holds("our infilling clears noise", (noised < levels).any())
    else:
        yield _holds("our noise is the levels", noised == levels)


def _facts_of_log_snr(recorded: Arrays, match) -> Iterator[Measurement]:  # type: ignore[no-untyped-def]
    rows = recorded[match.string]
    constant, distinct = _is_constant_or_distinct(rows)
    yield _holds("recorded rows constant or distinct", constant | distinct)
    p = float(match[1])
    noise = NoiseConfig(p_independent=p, p_prompt=0.0, max_empty_fraction=0.0)
    constant, distinct = _is_constant_or_distinct(
        np.stack([sequence.log_snr for sequence in _draw(noise, rows.shape[1])])
    )
    yield _holds("our rows constant or distinct", constant | distinct)
    if 0.2 <= p <= 0.8:
        yield _holds("ours has both kinds", constant.any() and distinct.any())


def _facts_of_empty(recorded: Arrays, match) -> Iterator[Measurement]:  # type: ignore[no-untyped-def]
    before, after, empty_id = recorded["empty_in"], recorded[match.string], int(match[1])
    yield _holds("recorded order", _keeps_order(before, after, empty_id))
    top = int(max(before.max(), empty_id)) + 1
    schedule = MixingSchedule(vocab_size=top + 1, mask_token_id=top, shift=0.0)
    ours = np.stack(
        [
            noise_sequence(
                row, schedule, NoiseConfig(), seed=0, index=i, empty_token_id=empty_id
            ).x0
            for i, row in enumerate(before)
        ]
    )
    yield _holds("our order", _keeps_order(before, ours, empty_id))
    yield _holds("ours has empty tokens", (ours == empty_id).any())
