"""Checks of sampling: single steps, and whole deterministic generations by both models.

The training model generates at the session's layout, the Hugging Face model on every rank; each
step's tokens and scores are compared with the recorded ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_ext.conformance import tolerances
from megatron_ext.conformance.golden import Arrays, GoldenError, Unsupported
from megatron_ext.conformance.models import build_recorded_model, recorded_config, vocabulary_of
from megatron_ext.conformance.report import Measurement, measure
from megatron_ext.conformance.session import Session
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.hf import GiddConfig, GiddForDiffusionLM
from megatron_ext.hf.generation_gidd import CachedDenoiser
from megatron_ext.hf.sampling_gidd import Denoiser, SpecialTokens, Step, sample
from megatron_ext.hf.steps_gidd import SamplingConfig, confidence_gain, filtered_probs, log_snr_grid
from megatron_ext.inference.denoiser import TrainingDenoiser

from megatron.core.utils import unwrap_model  # isort: skip

INDEX = "generation_index.json"
"""Settings of the generations."""
_MASK, _PAD = 3, 2
"""Ids where a file stores none; its format says so."""
_PRIOR_LOG_SNR = -9.0
"""Noise level whose distribution weights the other reference sampler's adaptive steps."""


def check_sampling_steps(name: str, session: Session) -> None:
    """Filtered predictions, posteriors, and the adaptive step of the other reference sampler."""
    recorded = session.golden.arrays(name)
    mask = int(recorded.number("mask_id", _MASK))
    logits = recorded.tensor("logits", session.device)
    filters = recorded.prefixes(r"args_(\d+)")
    session.report.check(
        f"{name} filters",
        [_filtered(recorded, case, logits) for case in filters],
        [f"probs_{case}" for case in filters],
    )
    ancestral = recorded.prefixes(r"(a\d+_)shift")
    session.report.check(
        f"{name} posterior",
        [m for case in ancestral for m in _posterior(recorded, case, mask, session)],
        [f"{case}p_hf" for case in ancestral],
    )
    adaptive = recorded.prefixes(r"(ja\d+_)shift")
    session.report.check(
        f"{name} adaptive step",
        [m for case in adaptive for m in _adaptive(recorded, case, mask, session)],
        [f"{case}next" for case in adaptive],
    )


def _filtered(recorded: Arrays, case: str, logits: Tensor) -> Measurement:
    temperature, top_p, top_k = recorded[f"args_{case}"].tolist()
    config = SamplingConfig(
        temperature=temperature,
        top_p=None if top_p < 0 else top_p,
        top_k=None if top_k < 0 else int(top_k),
    )
    probs = filtered_probs(logits, config)
    return measure(f"probs_{case}", probs, recorded[f"probs_{case}"], tolerances.STEP_PROBABILITY)


def _schedule(recorded: Arrays, case: str, vocab_size: int, mask: int) -> MixingSchedule:
    return MixingSchedule(vocab_size, mask, recorded.number(f"{case}shift"))


def _posterior(recorded: Arrays, case: str, mask: int, session: Session) -> list[Measurement]:
    logits = recorded.tensor(f"{case}logits", session.device).clone()
    ids = recorded.tensor(f"{case}z", session.device)
    logits[..., mask] = -torch.inf
    levels = (
        torch.full(ids.shape, recorded.number(case + level), device=ids.device)
        for level in ("log_snr_t", "log_snr_s")
    )
    schedule = _schedule(recorded, case, logits.shape[-1], mask)
    got = schedule.posterior(torch.softmax(logits, dim=-1), ids, *levels)
    keys = (key for key in (f"{case}p_hf", f"{case}p_jax") if key in recorded)
    return [measure(key, got, recorded[key], tolerances.STEP_PROBABILITY) for key in keys]


def _adaptive(recorded: Arrays, case: str, mask: int, session: Session) -> list[Measurement]:
    logits = recorded.tensor(f"{case}logits", session.device).clone()
    ids = recorded.tensor(f"{case}z", session.device)
    logits[..., mask] = -torch.inf
    level = torch.tensor(_PRIOR_LOG_SNR, device=ids.device)
    weight = _schedule(recorded, case, logits.shape[-1], mask).pi_at(level, ids)
    gain = confidence_gain(logits, ids, weight)
    noised = recorded.tensor(f"{case}noise_mask", session.device)
    chosen = (gain * noised).topk(recorded.integer(f"{case}top_k")).indices
    new = ids.scatter(1, chosen, logits.argmax(-1).gather(1, chosen))
    return [
        measure(f"{case}prob_delta", gain, recorded[f"{case}prob_delta"], tolerances.STEP_GAIN),
        measure(f"{case}next", new, recorded[f"{case}next"], tolerances.EXACT),
    ]


def check_generation(name: str, session: Session) -> None:
    """Noise-level grids, and every recorded generation step by step."""
    recorded = session.golden.arrays(name)
    grids = list(recorded.matching(r"hf_grid_(.+)_(\d+)"))
    schedule = MixingSchedule(_MASK + 1, _MASK, 0.0)
    session.report.check(
        f"{name} grids",
        [
            measure(
                match.string,
                log_snr_grid(schedule, int(match[2]), match[1]),
                recorded[match.string],
                tolerances.GRID,
            )
            for match in grids
        ],
        [match.string for match in grids],
    )
    if session.config.precision.bf16:
        session.report.skip(f"{name} g*", "recorded in float32")
        return
    if INDEX not in session.golden:
        session.report.skip(f"{name} g*", f"no {INDEX}")
        return
    for entry in session.golden.json(INDEX):
        files = [f"model_{entry['model']}{end}" for end in (".safetensors", "_config.json")]
        absent = [file for file in files if file not in session.golden]
        if absent:
            session.report.skip(f"{name} {entry['key']}", f"no {' and no '.join(absent)}")
            continue
        for kind, build in (("training model", _training), ("Hugging Face", _hugging_face)):
            row = f"{name} {entry['key']} {kind}"
            try:
                denoiser, schedule, context = build(entry, recorded, session)
            except Unsupported as reason:
                session.report.skip(row, str(reason))
                continue
            parts = _generate(entry, recorded, denoiser, schedule, context, session.device)
            session.report.check(row, parts, [f"{entry['key']}output"])


def _training(
    entry: dict[str, Any], recorded: Arrays, session: Session
) -> tuple[Denoiser, MixingSchedule, int]:
    parallel = session.config.parallel
    if parallel.context_parallel_size > 1 or parallel.num_virtual_stages_per_pipeline_rank > 1:
        raise Unsupported("sampling supports neither context parallelism nor virtual stages")
    context = recorded[entry["key"] + "x_prior"].shape[1]
    config = recorded_config(entry["model"], context, session)
    if config.model.seq_length != context:
        raise Unsupported(f"a canvas of {context} does not divide into the layout's pieces")
    mask = int(recorded.number("mask_id", _MASK))
    schedule = MixingSchedule(vocabulary_of(config), mask, entry["noise_type"])
    tensors = session.golden.tensors(f"model_{entry['model']}.safetensors")
    (model,) = unwrap_model(build_recorded_model(config, tensors, schedule, session))
    return TrainingDenoiser(model.eval()), schedule, context


def _hugging_face(
    entry: dict[str, Any], recorded: Arrays, session: Session
) -> tuple[Denoiser, MixingSchedule, int]:
    fields = session.golden.json(f"model_{entry['model']}_config.json")
    config = GiddConfig(**fields | {"noise_type": entry["noise_type"]})
    model = GiddForDiffusionLM(config).to(session.device).eval()
    try:
        model.load_state_dict(session.golden.tensors(f"model_{entry['model']}.safetensors"))
    except RuntimeError as error:
        raise GoldenError(f"model_{entry['model']}.safetensors: {error}") from error
    mask = int(recorded.number("mask_id", _MASK))
    context = recorded[entry["key"] + "x_prior"].shape[1]
    return CachedDenoiser(model), model.mixing_schedule(mask), context


def _generate(
    entry: dict[str, Any],
    recorded: Arrays,
    denoiser: Denoiser,
    schedule: MixingSchedule,
    context: int,
    device: torch.device,
) -> list[Measurement]:
    """A recorded generation, and its variants with an early end of document."""
    key, config = entry["key"], _settings(entry)
    prompt = recorded[f"{key}prompt"].tolist()
    prior = torch.from_numpy(recorded[f"{key}x_prior"])
    steps: list[Step] = []

    def run(config: SamplingConfig, eos: int, observer: Any = None) -> Tensor:
        special = SpecialTokens(eos, _PAD)
        return sample(
            denoiser, schedule, prompt, context, config, special, prior=prior, device=device,
            observer=observer,
        )  # fmt: skip

    output = run(config, entry["eos_token_id"], steps.append)
    found = [
        measure(f"{key}output", output, recorded[f"{key}output"], tolerances.EXACT),
        measure(
            f"{key}z_s",
            torch.stack([step.ids for step in steps]),
            recorded[f"{key}z_s"],
            tolerances.EXACT,
        ),
    ]
    if f"{key}p_delta" in recorded:
        gains = torch.stack([step.gain for step in steps if step.gain is not None])
        expected = recorded[f"{key}p_delta"]
        found.append(measure(f"{key}p_delta", gains, expected, tolerances.GENERATION_GAIN))
    if key == "g0_" and "eos_case_eos" in recorded:
        eos = recorded.integer("eos_case_eos")
        whole = replace(config, min_length=config.max_length)
        for part, settings in (("eos_case_output", config), ("minlen_case_output", whole)):
            found.append(measure(part, run(settings, eos), recorded[part], tolerances.EXACT))
    return found


def _settings(entry: dict[str, Any]) -> SamplingConfig:
    return SamplingConfig(
        method=entry["method"],
        max_length=entry["max_length"],
        block_length=entry["block_length"],
        steps=entry["steps"],
        tokens_per_step=entry["tps"],
        temperature=entry["temperature"],
        grid=entry["sched"],
    )
