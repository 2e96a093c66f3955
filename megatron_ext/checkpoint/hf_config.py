"""The published config.json as a `ModelConfig`.

Fields that describe the model are translated; fields that would change its numbers in a way this
model cannot follow are refused by name and value; all others (dtypes, class names, initial scales,
sampling defaults) do not concern the architecture. A field that is absent has the default of the
published configuration class, not of `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ext.config import ModelConfig

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "head_dim": None,
    "max_position_embeddings": 1024,
    "attn_soft_cap": 30.0,
    "resid_scale": 4.0,
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
    "rope_theta": 10000.0,
    "head_scaling": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "weight_scaling": "fan_in",
}

_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gidd",),
    "weight_scaling": (1.0,),
    "is_causal": (False,),
    "rope_scaling": (None,),
    "attention_dropout": (0.0, None),
    "hidden_dropout": (0.0, None),
    "pretraining_tp": (1,),
}
"""The only values of these fields that this model computes; absent fields pass unless they have a
default above."""


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The architecture that the fields of a published config.json describe.

    `seq_length` is `max_position_embeddings`. Raises `ValueError` with the field and its value
    for what is not supported.
    """
    known = {**_DEFAULTS, **fields}
    for name, supported in _REQUIRED.items():
        if name in known and known[name] not in supported:
            choices = " or ".join(repr(value) for value in supported)
            raise ValueError(
                f"config.json: {name} is {known[name]!r}: this model supports {choices} only."
            )
    heads = known["num_attention_heads"]
    shared = known.get("num_key_value_heads")
    if shared not in (None, heads):
        raise ValueError(
            f"config.json: num_key_value_heads is {shared!r}: this model has one key and value "
            f"per head ({heads})."
        )
    width = known["hidden_size"]
    try:
        return ModelConfig(
            num_layers=known["num_hidden_layers"],
            hidden_size=width,
            num_attention_heads=heads,
            kv_channels=known["head_dim"],
            ffn_hidden_size=known["intermediate_size"],
            seq_length=known["max_position_embeddings"],
            vocab_size=known["vocab_size"],
            mlp_bias=known["mlp_bias"],
            kv_bias_token=known["attention_bias"],
            attention_softcap=known["attn_soft_cap"] or None,
            qk_norm="full" if known["use_qk_norm"] else "none",
            rotary_base=known["rope_theta"],
            norm_epsilon=known["rms_norm_eps"],
            residual_scale=known["resid_scale"],
            head_scale=known["head_scaling"] * width,
            untie_embeddings_and_output_weights=not known["tie_word_embeddings"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json does not describe a model: {error}") from error
