"""Checks of the training model's forward pass against recorded hidden states and logits.

The model runs through megatron-core's pipeline schedule. Hooks catch what passes through each
stage's modules; every rank compares its own piece (cp, and tp under sequence parallelism), and the
report takes the worst over ranks and asks that each recorded part was seen by one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.conformance import tolerances
from megatron_ext.conformance.golden import Arrays, GoldenError, Unsupported
from megatron_ext.conformance.models import build_recorded_model, recorded_config, vocabulary_of
from megatron_ext.conformance.recorded_batches import pad_positions, piece_of_rank
from megatron_ext.conformance.report import Measurement, measure, measure_rms
from megatron_ext.conformance.session import Session
from megatron_ext.diffusion.schedule import MixingSchedule

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.utils import unwrap_model  # isort: skip

_MODEL_FILES = ("{}.safetensors", "{}_config.json", "{}_io.npz")


@dataclass(frozen=True)
class Inputs:
    """One forward pass over whole sequences, without padding."""

    input_ids: Tensor
    """[b, s] int64."""
    mask: Tensor
    """[b, s, s] bool, True where the query may attend."""
    positions: Tensor | None = None
    """[s], the same for every sequence; the model's own where absent."""


def _forward(
    model: list[Any], config: Config, inputs: Inputs, session: Session
) -> dict[str, Tensor]:
    """What this rank's stages produce: embed, layer_out/i, final_norm [s', b, h] and logits."""
    length, device = config.model.seq_length, session.device
    piece = piece_of_rank(length, session)
    ids = pad_positions(inputs.input_ids, 1, length)[:, piece].to(device)
    mask = pad_positions(pad_positions(inputs.mask, 2, length, False), 1, length, True)
    mask = mask[:, piece].to(device)
    positions = inputs.positions
    if positions is not None:
        positions = pad_positions(positions, 0, length)[piece].to(device)
    found: dict[str, Tensor] = {}

    def keep_logits(logits: Tensor) -> tuple[Tensor, Tensor, dict]:
        found["logits"] = logits
        return logits.sum(), torch.ones((), dtype=torch.int, device=device), {}

    def step(iterator: Iterator, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        del iterator
        return chunk(ids, mask, None, positions), keep_logits

    hooks = [hook for chunk in unwrap_model(model) for hook in _catch(chunk, found)]
    virtual = len(model) > 1
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(()) for _ in model] if virtual else iter(()),
                model=model if virtual else model[0],
                # Interleaved schedules want a multiple of the pipeline's size.
                num_microbatches=session.groups.pp.size() if virtual else 1,
                seq_length=length,
                micro_batch_size=len(inputs.input_ids),
                forward_only=True,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _catch(chunk: Any, found: dict[str, Tensor]) -> Iterator[Any]:
    """Hooks that file a stage's hidden states under their recorded names."""

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    if chunk.pre_process:
        yield chunk.embedding.register_forward_hook(keep("embed"))
    for layer in chunk.decoder.layers:
        name = f"layer_out/{layer.layer_number - 1}"
        yield layer.register_forward_hook(keep(name))
    if chunk.post_process:
        yield chunk.decoder.final_layernorm.register_forward_hook(keep("final_norm"))


def _measure_piece(
    part: str, got: Tensor, want: np.ndarray, config: Config, session: Session
) -> Measurement:
    """Compare this rank's piece of a recorded [b, s, ...]; positions beyond s are padding."""
    of_hidden = not part.endswith("logits")
    if of_hidden:
        got = got.transpose(0, 1)
    piece = piece_of_rank(config.model.seq_length, session, of_hidden=of_hidden)
    mine = want[:, piece]
    got = got[:, : mine.shape[1]]
    if not config.precision.bf16:
        return measure(part, got, mine, tolerances.HIDDEN)
    rms = float(np.sqrt(np.mean(np.square(want, dtype=np.float64))))
    return measure_rms(part, got, mine, tolerances.HIDDEN_BF16, rms)


def _mask_of(recorded: Arrays, kind: str, session: Session) -> Tensor:
    """[b, s, s] from a recorded mask, which is that or [b, s] of the keys."""
    mask = recorded.tensor(f"mask_{kind}", session.device)
    return mask if mask.dim() == 3 else mask[:, None, :].expand(-1, mask.shape[1], -1)


def check_model(name: str, session: Session) -> None:
    """One recorded model: `name` is the stem that its three files share."""
    files = [pattern.format(name) for pattern in _MODEL_FILES]
    absent = [file for file in files if file not in session.golden]
    if absent:
        session.report.skip(name, f"no {' and no '.join(absent)}")
        return
    model = name.removeprefix("model_")
    recorded = session.golden.arrays(f"{name}_io.npz")
    tensors = session.golden.tensors(f"{name}.safetensors")
    length = recorded["input_ids"].shape[1]
    config = recorded_config(model, length, session)
    if recorded.ignore(r".*_attn_probs"):
        session.report.skip(f"{name} attn_probs", "not an output of the training model")
    chunks = build_recorded_model(config, tensors, _schedule(config), session)
    _check_own_precision(name, session, recorded, config, chunks)
    _check_bf16(name, session, recorded, tensors, length)
    recorded.ignore("mask_.*")
    if recorded.unread():
        session.report.skip(f"{name} {', '.join(recorded.unread())}", "unknown to this suite")


def _schedule(config: Config) -> MixingSchedule:
    """Logits depend on none."""
    return MixingSchedule(vocab_size=vocabulary_of(config), mask_token_id=0, shift=0.0)


def _check_own_precision(
    name: str, session: Session, recorded: Arrays, config: Config, chunks: list[Any]
) -> None:
    """What is recorded in float32 against the run's own precision."""
    ids = recorded.tensor("input_ids", session.device)
    kinds = recorded.prefixes(r"mask_(.+)")
    if not kinds:
        raise GoldenError(f"{recorded.name} has no mask_*")
    for kind in kinds:
        mask = _mask_of(recorded, kind, session)
        found = _forward(chunks, config, Inputs(ids, mask), session)
        for what in ("embed", "layer_out", "final_norm", "logits"):
            key = f"{kind}_{what}"
            if key not in recorded:
                session.report.skip(f"{name} {key}", "not recorded")
                continue
            parts = dict(_parts_of(what, key, recorded[key]))
            session.report.check(
                f"{name} {what}",
                [
                    _measure_piece(label, found[source], want, config, session)
                    for label, (source, want) in parts.items()
                    if source in found
                ],
                parts,
            )
        if f"jax_{kind}_logits" in recorded:
            key = f"jax_{kind}_logits"
            _check_logits(f"{name} jax_logits", key, found, recorded, config, session)
    _check_shifted(name, session, recorded, config, chunks)


def _parts_of(
    what: str, key: str, want: np.ndarray
) -> Iterator[tuple[str, tuple[str, np.ndarray]]]:
    """(label, (where the model's result is filed, recorded [b, s, ...]))."""
    if what != "layer_out":
        yield key, (what, want)
        return
    for layer, of_layer in enumerate(want):
        yield f"{key}[{layer}]", (f"layer_out/{layer}", of_layer)


def _check_logits(
    check: str,
    key: str,
    found: dict[str, Tensor],
    recorded: Arrays,
    config: Config,
    session: Session,
) -> None:
    want = recorded[key]
    measurements = []
    if "logits" in found:
        measurements = [_measure_piece(key, found["logits"], want, config, session)]
    session.report.check(check, measurements, [key])


def _check_shifted(
    name: str, session: Session, recorded: Arrays, config: Config, chunks: list[Any]
) -> None:
    """Explicit positions, recorded per sequence; sequences with other positions run apart."""
    ids = recorded.tensor("input_ids", session.device)
    for shift in recorded.prefixes(r"position_ids_(.+)"):
        key = f"{shift}_logits"
        if key not in recorded:
            session.report.skip(f"{name} {key}", "not recorded")
            continue
        # The recording uses the prompt's mask.
        mask = _mask_of(recorded, "prompt", session)
        positions = recorded.tensor(f"position_ids_{shift}", session.device)
        positions = positions.expand(len(ids), -1)
        measurements, parts = [], []
        for of_group in torch.unique(positions, dim=0):
            rows = (positions == of_group).all(-1)
            inputs = Inputs(ids[rows], mask[rows], of_group)
            found = _forward(chunks, config, inputs, session)
            part = f"positions from {int(of_group[0])}: logits"
            parts.append(part)
            want = recorded[key][rows.cpu().numpy()]
            if "logits" in found:
                measurements.append(_measure_piece(part, found["logits"], want, config, session))
        session.report.check(f"{name} {key}", measurements, parts)


def _check_bf16(
    name: str, session: Session, recorded: Arrays, tensors: dict[str, Tensor], length: int
) -> None:
    """Weights and model in bfloat16, whatever the precision of the run."""
    kinds = recorded.prefixes(r"bf16_(.+)_logits")
    if not kinds:
        session.report.skip(f"{name} bf16_logits", "not recorded")
        return
    # No optimizer is built, so master weights are wherever the configuration allows them.
    precision = {
        "bf16": True,
        "master_weights": session.config.parallel.use_distributed_optimizer,
    }
    in_bf16 = replace(session, config=session.config.with_sections(precision=precision))
    try:
        config = recorded_config(name.removeprefix("model_"), length, in_bf16)
    except Unsupported as reason:
        session.report.skip(f"{name} bf16_logits", str(reason))
        return
    chunks = build_recorded_model(config, tensors, _schedule(config), in_bf16)
    ids = recorded.tensor("input_ids", session.device)
    for kind in kinds:
        inputs = Inputs(ids, _mask_of(recorded, kind, session))
        found = _forward(chunks, config, inputs, in_bf16)
        key = f"bf16_{kind}_logits"
        _check_logits(f"{name} bf16_logits", key, found, recorded, config, in_bf16)
