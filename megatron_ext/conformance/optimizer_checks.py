"""Checks of the optimizer on its own: trajectories, learning rates, parameter groups."""

from __future__ import annotations

import re

import torch

from megatron_ext.checkpoint.hf_names import published_names
from megatron_ext.config import Config, ModelConfig
from megatron_ext.conformance import tolerances
from megatron_ext.conformance.golden import Arrays, GoldenError, Unsupported
from megatron_ext.conformance.report import Measurement, measure
from megatron_ext.conformance.session import Session
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.model.init import global_name
from megatron_ext.optim import LaProp
from megatron_ext.optim.build import parameter_groups
from megatron_ext.optim.schedule import LearningRateSchedule
from megatron_ext.training.build import build_model

from megatron.core.utils import unwrap_model  # isort: skip

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

_PUBLISHED_LABELS = {
    "norm": "ln_params",
    "embedding": "emb_unemb_params",
    "bias": "bias_params",
    "bulk": "bulk_params",
}


def check_laprop(name: str, session: Session) -> None:
    """Parameters and both averages after every step of every recorded trajectory."""
    recorded = session.golden.arrays(name)
    cases = recorded.prefixes(r"(.+_)lr")
    if not cases:
        raise GoldenError(f"{name} has no trajectories")
    for case in cases:
        kind = str(recorded[f"{case}dtype"])
        if kind not in _DTYPES:
            session.report.skip(f"{name} {case}*", f"unknown dtype {kind}")
            continue
        session.report.check(f"{name} {case}* {kind}", _trajectory(recorded, case, kind, session))
        if kind == "bf16":
            keys = ", ".join(match.string for match in recorded.matching(rf"{case}(?:mu|nu)_.+"))
            recorded.ignore(rf"{case}(?:mu|nu)_.+")
            session.report.skip(f"{name} {keys}", "recorded from rounded squares; no tolerance")
    if recorded.unread():
        session.report.skip(f"{name} {', '.join(recorded.unread())}", "unknown to this suite")


def _trajectory(recorded: Arrays, case: str, kind: str, session: Session) -> list[Measurement]:
    device, dtype = session.device, _DTYPES[kind]
    names = [match[1] for match in recorded.matching(rf"{case}p0_(.+)")]
    parameters = {
        name: torch.nn.Parameter(recorded.tensor(f"{case}p0_{name}", device).to(dtype))
        for name in names
    }
    gradients = {name: recorded.tensor(f"{case}grads_{name}", device) for name in names}
    optimizer = LaProp(
        parameters.values(),
        lr=0.0,
        betas=(recorded.number(f"{case}b1"), recorded.number(f"{case}b2")),
        eps=recorded.number(f"{case}eps"),
        weight_decay=recorded.number(f"{case}weight_decay"),
    )
    measurements = []
    for step, lr in enumerate(recorded[f"{case}lr"]):
        optimizer.param_groups[0]["lr"] = float(lr)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].to(dtype)
        optimizer.step()
        for name, parameter in parameters.items():
            found = {"params": (parameter, tolerances.LAPROP[kind])}
            if kind != "bf16":
                state = optimizer.state[parameter]
                found["mu"] = (state["exp_avg"], tolerances.LAPROP_AVERAGES)
                found["nu"] = (state["exp_avg_sq"], tolerances.LAPROP_AVERAGES)
            for what, (value, tolerance) in found.items():
                key = f"{case}{what}_{name}"
                measurements.append(
                    measure(f"{key}[{step}]", value, recorded[key][step], tolerance)
                )
    return measurements


def check_learning_rates(name: str, session: Session) -> None:
    """Learning rates of every step of every recorded schedule."""
    cases = session.golden.json(name)
    if not isinstance(cases, list) or not cases:
        raise GoldenError(f"{name} has no schedules")
    measurements = []
    for i, case in enumerate(cases):
        try:
            schedule = LearningRateSchedule(
                base_lr=case["base_lr"],
                total_steps=case["total_steps"],
                warmup_steps=case["warmup_steps"],
                cooldown_steps=case["cooldown_steps"],
            )
            want = case["values"]
        except (KeyError, TypeError) as error:
            raise GoldenError(f"{name}, entry {i}: no {error}") from error
        got = [schedule.lr(step) for step in range(len(want))]
        measurements.append(measure(f"schedule {i}", got, want, tolerances.LEARNING_RATE))
    session.report.check(name, measurements)


def check_labels(name: str, session: Session) -> None:
    """The group that the training optimizer puts every published tensor in.

    Names decide, so a small model with the same names stands for the recorded one.
    """
    labels = session.golden.json(name)
    if not isinstance(labels, dict) or not labels:
        raise GoldenError(f"{name} has no labels")
    config = _config_with_names(set(labels), session)
    schedule = MixingSchedule(vocab_size=2, mask_token_id=0, shift=0.0)
    chunks = build_model(config, 2, schedule, session.groups)
    names = {
        parameter: global_name(chunk, local)
        for chunk in unwrap_model(chunks)
        for local, parameter in chunk.named_parameters()
    }
    found = {
        published: _PUBLISHED_LABELS[group["name"]]
        for group in parameter_groups(chunks, config)
        for parameter in group["params"]
        for published in published_names(names[parameter])
    }
    measurements = []
    for published, label in found.items():
        recorded = labels.get(published, "nothing")
        part = published if recorded == label else f"{published}: {label} for {recorded}"
        measurements.append(measure(part, recorded == label, True, tolerances.EXACT))
    parts = [
        published for published, label in labels.items() if found.get(published) in (None, label)
    ]
    session.report.check(name, measurements, parts)


def _config_with_names(published: set[str], session: Session) -> Config:
    """The smallest model that has these tensors and fits the layout."""
    layers = {int(m[1]) for x in published if (m := re.match(r"model\.layers\.(\d+)\.", x))}
    parallel = session.config.parallel
    heads = parallel.tensor_model_parallel_size
    ends = {x.split(".", 3)[-1] for x in published}
    model = ModelConfig(
        num_layers=len(layers) or 1,
        hidden_size=2 * heads,
        num_attention_heads=heads,
        seq_length=heads * parallel.context_parallel_size,
        mlp_bias="mlp.up_proj.bias" in ends,
        kv_bias_token="self_attn.k_bias" in ends,
        qk_norm="full" if "self_attn.q_norm.weight" in ends else "none",
        untie_embeddings_and_output_weights="lm_head.weight" in published,
    )
    try:
        return Config(model=model, parallel=parallel, precision=session.config.precision)
    except ValueError as error:
        raise Unsupported(f"a model with these names does not fit: {error}") from error
