"""CompleteP: which class a parameter belongs to, and what its class gets.

    class      parameters                       learning rate        weight decay
    norm       every RMSNorm gain               aux_lr_factor lr     norm_weight_decay
    embedding  input embedding, output head     aux_lr_factor lr     0
    bias       MLP biases, key/value token      aux_lr_factor lr     bias_weight_decay
    bulk       matrices of the layers           lr / h               weight_decay h

eps = 1e-8 / (h L) for every class (paper section 4; all absolute in the width h, no base width).
Under `standard` every class has the learning rate lr and only `bulk` and `embedding` may decay.
"""

from __future__ import annotations

from typing import Literal

from megatron_ext.config import ModelConfig, OptimizerConfig

ParamClass = Literal["norm", "embedding", "bias", "bulk"]
PARAM_CLASSES: tuple[ParamClass, ...] = ("norm", "embedding", "bias", "bulk")


def param_class(name: str) -> ParamClass:
    """The class of a parameter by its name in the model (first match, as the reference)."""
    if "norm" in name:
        return "norm"
    if "embedding" in name or "output_layer" in name:
        return "embedding"
    return "bias" if "bias" in name else "bulk"


def learning_rate_multiplier(
    kind: ParamClass, config: OptimizerConfig, model: ModelConfig
) -> float:
    """Factor on the base learning rate."""
    if config.parameterization == "standard":
        return 1.0
    return 1.0 / model.hidden_size if kind == "bulk" else config.aux_lr_factor


def weight_decay(kind: ParamClass, config: OptimizerConfig, model: ModelConfig) -> float:
    """Decoupled decay, multiplied by the class's learning rate in the update."""
    match kind:
        case "norm":
            return config.norm_weight_decay
        case "bias":
            return config.bias_weight_decay
        case "embedding":
            return config.weight_decay if config.parameterization == "standard" else 0.0
        case "bulk":
            scale = model.hidden_size if config.parameterization == "completep" else 1
            return config.weight_decay * scale


def epsilon(config: OptimizerConfig, model: ModelConfig) -> float:
    """The optimizer's eps."""
    if config.adam_eps is not None:
        return config.adam_eps
    if config.parameterization == "standard":
        return 1e-8
    return 1e-8 / (model.hidden_size * model.num_layers)
