"""Published tensors into the training model and out of it, at any tp, pp and virtual stages.

Published tensors are whole: `[v, h]` tables without padding rows, separate q, k and v projections.
A rank cuts its part of each parameter of its stages (`load_published_weights`) or, with the ranks
of its tp group, puts whole tensors together again (`published_state`).

Collectives: loading compares names over pp (one small object gather); `published_state` gathers
every split parameter over tp, one at a time, so a rank needs memory for its stage only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from megatron_ext.checkpoint.hf_names import from_published, published_names, to_published
from megatron_ext.model.diffusion_model import DiffusionModel
from megatron_ext.model.init import cut, global_name
from megatron_ext.parallel.parameters import complete_parameters

from megatron.core.utils import unwrap_model  # isort: skip

_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def _parameters(
    model: Iterable[torch.nn.Module],
) -> Iterable[tuple[DiffusionModel, str, torch.nn.Parameter]]:
    """(stage, global name, parameter) of every chunk, wrapped for data parallelism or not."""
    for chunk in unwrap_model(list(model)):
        for name, parameter in chunk.named_parameters():
            yield chunk, global_name(chunk, name), parameter


def _is_split(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _whole_shape(name: str, parameter: Tensor, tp_size: int, vocab_size: int) -> tuple[int, ...]:
    """Shape of the whole parameter without padding rows."""
    shape = list(parameter.shape)
    if _is_split(parameter):  # type: ignore[arg-type]
        shape[parameter.partition_dim] *= tp_size  # type: ignore[attr-defined]
    if name in _TABLES:
        shape[0] = vocab_size
    return tuple(shape)


def _check_names(model: list[torch.nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Compare the names that all pipeline stages need with those that are there."""
    mine = {key for _, name, _ in _parameters(model) for key in published_names(name)}
    group = unwrap_model(model)[0].groups.pp
    of_stages: list[set[str]] = [set() for _ in range(group.size())]
    torch.distributed.all_gather_object(of_stages, mine, group=group)
    needed = set().union(*of_stages)
    problems = []
    for what, names in (("missing", needed - set(tensors)), ("unknown", set(tensors) - needed)):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            problems.append(f"{len(names)} {what} ({some})")
    if problems:
        raise ValueError(f"the published tensors do not fit the model: {'; '.join(problems)}")


@torch.no_grad()
def load_published_weights(
    model: list[torch.nn.Module], tensors: Mapping[str, Tensor], vocab_size: int
) -> None:
    """Fill this rank's parameters in place from published tensors, cast to the parameters' dtypes.

    `tensors` may read lazily; every tensor is asked for once per stage that needs it. Padding rows
    of the embedding and the head become zero. Where an optimizer keeps copies of the weights, call
    its `reload_model_params` afterwards. Raises `ValueError` on all ranks of the pipeline where
    names are missing or unknown, and where a shape does not fit.
    """
    _check_names(model, tensors)
    for chunk, name, parameter in _parameters(model):
        tp = chunk.groups.tp
        heads = chunk.settings.model.num_attention_heads
        parts = {key: tensors[key] for key in published_names(name)}
        shape = _whole_shape(name, parameter, tp.size(), vocab_size)
        for key, fitting in to_published(name, torch.empty(shape, device="meta"), heads).items():
            if parts[key].shape != fitting.shape:
                raise ValueError(
                    f"{key} has shape {tuple(parts[key].shape)}; the model has "
                    f"{tuple(fitting.shape)}"
                )
        whole = from_published(name, parts, heads)
        if name in _TABLES:
            split = tp.size() if _is_split(parameter) else 1
            padding = parameter.shape[0] * split - vocab_size
            whole = torch.nn.functional.pad(whole, (0, 0, 0, padding))
        parameter.copy_(cut(whole, parameter, tp.rank(), tp.size()))


def join(part: Tensor, parameter: torch.nn.Parameter, group: torch.distributed.ProcessGroup) -> (
    Tensor
):  # fmt: skip
    """The whole tensor from every tp rank's `part` of `parameter`: the inverse of `cut`."""
    size = group.size()
    if size == 1 or not _is_split(parameter):
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    by_rank = [piece.chunk(stride, dim) for piece in parts]
    return torch.cat([pieces[i] for i in range(stride) for pieces in by_rank], dim)


@torch.no_grad()
def published_state(
    model: list[torch.nn.Module],
    vocab_size: int,
    values: Callable[[torch.nn.Parameter], Tensor] = torch.nn.Parameter.detach,
) -> dict[str, Tensor]:
    """Published tensors of this rank's pipeline stages, whole, on every rank of the tp group.

    `values` picks what is assembled for a parameter: the weight itself, or something of its shape
    such as its gradient. All ranks of the tp and data-parallel groups call this together.
    """
    complete_parameters(model)
    state: dict[str, Tensor] = {}
    for chunk, name, parameter in _parameters(model):
        whole = join(values(parameter), parameter, chunk.groups.tp)
        if name in _TABLES:
            whole = whole[:vocab_size]
        state |= to_published(name, whole, chunk.settings.model.num_attention_heads)
    return state
