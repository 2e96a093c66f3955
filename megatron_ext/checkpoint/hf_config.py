"""The published config.json as configuration sections, and a run's configuration as config.json.

Fields that describe the model are translated; fields that would change its numbers in a way this
model cannot follow are refused by name and value; all others (dtypes, class names, initial scales,
sampling defaults) do not concern the architecture. A field that is absent has the default of the
published configuration class, not of `ModelConfig`. In the other direction, what the fields cannot
say is refused by flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ext.config import (
    SHIFT_OF_OBJECTIVE,
    Config,
    DiffusionConfig,
    ModelConfig,
    require,
)
from megatron_ext.hf.generation_gidd import PUBLISHED_IDS

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
    "noise_type": 0.0,
    "min_log_snr": -9.0,
    "max_log_snr": 9.0,
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
    rotary = known.get("rope_parameters") or {}
    theta = known["rope_theta"]
    if rotary.get("rope_type", "default") != "default" or rotary.get("rope_theta", theta) != theta:
        raise ValueError(
            f"config.json: rope_parameters is {rotary!r} and rope_theta {theta!r}: this model "
            "computes rotary positions from rope_theta alone."
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


def diffusion_config(fields: Mapping[str, Any]) -> DiffusionConfig:
    """The objective that the fields of a published config.json name: its noise and its levels."""
    known = {**_DEFAULTS, **fields}
    try:
        shift = float(known["noise_type"])
        objective_of_shift = {value: name for name, value in SHIFT_OF_OBJECTIVE.items()}
        objective = objective_of_shift.get(shift, "hybrid")
        return DiffusionConfig(
            objective=objective,  # type: ignore[arg-type]
            mixing_shift=shift if objective == "hybrid" else 0.0,
            min_log_snr=float(known["min_log_snr"]),
            max_log_snr=float(known["max_log_snr"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json does not describe a noise: {error}") from error


def _require_published(config: Config) -> None:
    """Raise `ValueError` for the first flag that the published format has no field for."""
    model, diffusion = config.model, config.diffusion
    for section, name, supported in (
        (model, "activation", "squared_relu"),
        (model, "position_embedding_type", "rope"),
        (model, "apply_layernorm_1p", True),
        (diffusion, "causal_prompt_attn", False),
        (diffusion, "mixing_scale", 1.0),
    ):
        value = getattr(section, name)
        advice = f"the Hugging Face format has {supported!r} only."
        require(value == supported, name, value, advice)
    require(
        diffusion.objective != "ar", "objective", "ar",
        "the Hugging Face format is for diffusion models.",
    )  # fmt: skip


def generation_fields(special: Mapping[str, int | None]) -> dict[str, Any]:
    """The generation_config.json of a run, from the ids of bos, eos and pad."""
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")}
    return {name: id for name, id in ids.items() if id is not None}


def published_fields(
    config: Config, vocab_size: int, special: Mapping[str, int | None], dtype: str
) -> dict[str, Any]:
    """The config.json of a run: the published fields, and those special ids that differ.

    `special` are the ids of bos, eos, pad and mask. Raises `ValueError` naming the flag for a
    model or a noise that the format cannot describe.
    """
    _require_published(config)
    model, diffusion = config.model, config.diffusion
    own_ids = {
        f"{name}_token_id": special[name]
        for name in ("pad", "mask")
        if special[name] not in (None, PUBLISHED_IDS[name])
    }
    residual = model.num_layers if model.residual_scale is None else model.residual_scale
    return {
        "architectures": ["GiddForDiffusionLM"],
        "attention_bias": model.kv_bias_token,
        "attn_performer": "eager",
        "attn_soft_cap": model.attention_softcap,
        "auto_map": {
            "AutoConfig": "configuration_gidd.GiddConfig",
            "AutoModel": "modeling_gidd.GiddModel",
            "AutoModelForCausalLM": "modeling_gidd.GiddForDiffusionLM",
        },
        "bos_token_id": special["bos"],
        "dtype": dtype,
        "emb_init_scale": model.emb_init_std,
        "eos_token_id": special["eos"],
        "head_dim": model.head_width,
        "head_init_scale": model.head_init_std,
        "head_scaling": model.logit_scale,
        "hidden_size": model.hidden_size,
        "init_scale": model.matrix_init_std,
        "intermediate_size": model.ffn_width,
        "is_causal": False,
        "max_log_snr": diffusion.max_log_snr,
        "max_position_embeddings": model.seq_length,
        "min_log_snr": diffusion.min_log_snr,
        "mlp_bias": model.mlp_bias,
        "model_type": "gidd",
        "noise_type": diffusion.shift,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        **own_ids,
        "resid_scale": float(residual),
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": None,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_qk_norm": model.qk_norm == "full",
        "vocab_size": vocab_size,
        "weight_scaling": 1.0,
    }
