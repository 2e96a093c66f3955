"""Initial weights as a pure function of (seed, parameter name).

Each parameter is drawn whole from a generator keyed by its global name and then cut for this rank,
so every layout starts from the same model, padded vocabulary rows included (they are zero). Biases
and norm gains start from zero (from one where gains are not zero-centred).
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.diffusion.random import Purpose, generator
from megatron_ext.model.diffusion_model import DiffusionModel

_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def global_name(model: DiffusionModel, name: str) -> str:
    """A parameter's name with its layer counted from the first of the whole model."""
    match = _LOCAL_LAYER.match(name)
    if match is None:
        return name
    number = model.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[match.end() :]}"


def _standard_deviation(name: str, config: ModelConfig) -> float:
    if name.startswith("embedding."):
        return config.emb_init_std
    if name.startswith("output_layer."):
        return config.head_init_std
    if name.endswith(("linear_qkv.weight", "linear_proj.weight", "fc1.weight", "fc2.weight")):
        return config.matrix_init_std
    return 0.0


def _draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    index = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    numbers = generator(seed, index, Purpose.WEIGHTS).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(numbers).mul_(std)


def cut(whole: Tensor, parameter: torch.nn.Parameter, rank: int, size: int) -> Tensor:
    """This tp rank's part of a whole parameter, by megatron-core's partition attributes."""
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    pieces = [part.chunk(size, dim)[rank] for part in whole.chunk(stride, dim)]
    return torch.cat(pieces, dim)


@torch.no_grad()
def initialize_weights(model: DiffusionModel, vocab_size: int, seed: int) -> None:
    """Fill every parameter of this stage in place."""
    config, tp = model.settings.model, model.groups.tp
    for local_name, parameter in model.named_parameters():
        name = global_name(model, local_name)
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= tp.size()  # type: ignore[attr-defined]
        std = _standard_deviation(name, config)
        if std == 0.0:
            is_gain = "norm" in name and not config.apply_layernorm_1p
            parameter.fill_(1.0 if is_gain else 0.0)
            continue
        whole = torch.zeros(shape)
        rows = vocab_size if name.startswith(("embedding.", "output_layer.")) else shape[0]
        whole[:rows] = _draw(name, (rows, *shape[1:]), std, seed)
        mine = cut(whole, parameter, tp.rank(), tp.size())
        parameter.copy_(mine)
        if hasattr(parameter, "get_high_precision_init_val"):
            # A weight that Transformer Engine keeps in FP8; the optimizer's master starts from this
            # copy, which was taken before anything was drawn.
            parameter.get_high_precision_init_val().copy_(mine)
