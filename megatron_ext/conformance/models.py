"""The training model with recorded weights, at the session's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_ext.checkpoint.hf_config import model_config
from megatron_ext.checkpoint.hf_weights import load_published_weights
from megatron_ext.config import Config
from megatron_ext.conformance.golden import Golden, GoldenError, Unsupported
from megatron_ext.conformance.recorded_batches import padded_length
from megatron_ext.conformance.session import Session
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.training.build import build_model


def recorded_config(model: str, length: int, session: Session, **sections: Any) -> Config:
    """The session's configuration with recorded model `model`, for sequences of `length`.

    Raises `Unsupported` where the model does not fit the layout.
    """
    try:
        shape = model_config(session.golden.json(f"model_{model}_config.json"))
    except ValueError as error:
        raise GoldenError(f"model_{model}_config.json: {error}") from error
    base = session.config
    shape = replace(
        shape,
        seq_length=padded_length(length, base),
        make_vocab_size_divisible_by=base.model.make_vocab_size_divisible_by,
    )
    try:
        return replace(base, model=shape).with_sections(**sections)
    except ValueError as error:
        raise Unsupported(f"model {model} does not fit: {error}") from error


def build_recorded_model(
    config: Config, tensors: Mapping[str, Tensor], schedule: MixingSchedule, session: Session
) -> list[Any]:
    """This rank's chunks, wrapped for gradient reduction, with the published tensors in them."""
    vocab_size = vocabulary_of(config)
    model = build_model(config, vocab_size, schedule, session.groups)
    try:
        load_published_weights(model, tensors, vocab_size)
    except ValueError as error:
        raise GoldenError(str(error)) from error
    return model


def vocabulary_of(config: Config) -> int:
    assert config.model.vocab_size is not None, "published configurations name their vocabulary"
    return config.model.vocab_size


def models_with_tensors_of(names: set[str], golden: Golden) -> list[str]:
    """Recorded models whose tensors have exactly these names, in the order of the folder."""
    found = []
    for match in golden.matching(r"model_(.+)\.safetensors"):
        if set(golden.tensors(match.string)) == names:
            found.append(match[1])
    return found
