"""A model small enough to train at every layout on a CPU, and what a run of it leaves behind.

`run_cases` is what the ranks execute: each case is a configuration; a rank trains it from the
first step and returns losses, gradient norms, validation bounds and its pieces of the weights.
`whole_weights` joins the pieces, so that layouts can be compared parameter by parameter.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_ext.config import Config
from megatron_ext.data.batches import BatchSource
from megatron_ext.data.mock import MockDataset
from megatron_ext.model.init import global_name
from megatron_ext.training.evaluation import evaluate
from megatron_ext.training.loop import Trainer

STEPS = 5
VOCABULARY = 61
"""An odd number, padded for tp 2; no ids below 4 occur in the data."""
NUM_VALIDATION = 5
"""Sequences in the validation bound: no multiple of micro-batch size x data-parallel size."""


def tiny_config(**sections: dict[str, Any]) -> Config:
    """4 layers of width 32, an odd vocabulary, all kinds of noise; sections override fields."""
    base: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 32,
            "vocab_size": VOCABULARY,
            "make_vocab_size_divisible_by": 1,
            "head_init_std": 0.02,
        },
        "noise": {"p_prompt": 0.5, "p_independent": 0.5, "p_infill": 0.5},
        "data": {"mock_data": True, "mask_token_id": 3, "pad_token_id": 2, "num_workers": 0},
        "optimizer": {"lr": 0.1, "lr_warmup_iters": 2},
        "training": {
            "train_iters": STEPS,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "seed": 5,
        },
    }
    names = {**base, **sections}
    return Config().with_sections(
        **{name: {**base.get(name, {}), **sections.get(name, {})} for name in names}
    )


BF16: dict[str, dict[str, Any]] = {"precision": {"bf16": True}}


def split(
    tp: int = 1, pp: int = 1, cp: int = 1, virtual: int = 1, **more: Any
) -> dict[str, dict[str, Any]]:
    """The `parallel` section of a layout; dp is what is left of the ranks."""
    return {
        "parallel": {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "num_virtual_stages_per_pipeline_rank": virtual,
            **more,
        }
    }


@dataclass
class Piece:
    """This rank's part of a parameter and how to join it with the others."""

    values: torch.Tensor
    dim: int | None
    stride: int
    tp_rank: int


@dataclass
class Run:
    """What a rank saw of a run; losses and bounds are global and equal on all ranks."""

    losses: list[float] = field(default_factory=list)
    elbos: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    validation: list[tuple[float, float, int]] = field(default_factory=list)
    """(bound, standard error, sequences), evaluated twice after the last step."""
    initial: dict[str, Piece] = field(default_factory=dict)
    final: dict[str, Piece] = field(default_factory=dict)
    error: str | None = None


def weight_pieces(trainer: Trainer) -> dict[str, Piece]:
    """This rank's parameters by global name."""
    pieces = {}
    for chunk in trainer.model:
        model = chunk.module
        for name, parameter in model.named_parameters():
            is_split = getattr(parameter, "tensor_model_parallel", False)
            pieces[global_name(model, name)] = Piece(
                parameter.detach().clone(),
                parameter.partition_dim if is_split else None,
                parameter.partition_stride if is_split else 1,
                trainer.groups.tp.rank(),
            )
    return pieces


def whole_weights(ranks: list[dict[str, Piece]], vocab_size: int) -> dict[str, torch.Tensor]:
    """Parameters joined over tp and pp; vocabulary padding is cut off after a check that it is 0.

    Raises `AssertionError` where ranks that should hold the same values do not.
    """
    by_name: dict[str, dict[int, Piece]] = {}
    for rank in ranks:
        for name, piece in rank.items():
            known = by_name.setdefault(name, {}).setdefault(piece.tp_rank, piece)
            assert torch.equal(known.values, piece.values), f"{name} differs between ranks"
    wholes = {}
    for name, pieces in sorted(by_name.items()):
        ordered = [pieces[rank] for rank in sorted(pieces)]
        first = ordered[0]
        if first.dim is None:
            assert all(torch.equal(first.values, p.values) for p in ordered), f"{name} differs"
            wholes[name] = first.values
            continue
        blocks = [piece.values.chunk(first.stride, first.dim) for piece in ordered]
        whole = torch.cat([b for group in zip(*blocks, strict=True) for b in group], first.dim)
        if name.startswith(("embedding.", "output_layer.")):
            assert not whole[vocab_size:].any(), f"{name}: padding rows are not zero"
            whole = whole[:vocab_size]
        wholes[name] = whole
    return wholes


def validation_bound(trainer: Trainer) -> tuple[float, float, int]:
    """The bound of `NUM_VALIDATION` made-up sequences."""
    config = trainer.config
    extra = 1 if config.diffusion.objective == "ar" else 0
    dataset = MockDataset(trainer.vocabulary.size, config.model.seq_length + extra, seed=77)
    source = BatchSource(dataset, trainer.source.schedule, config, trainer.source.position, None)
    result = evaluate(trainer.model, source, NUM_VALIDATION, config, trainer.groups, trainer.device)
    return result.elbo, result.standard_error, result.num_sequences


def train_tiny(config: Config, *, first: int = 0, last: int | None = None) -> Run:
    """Train on this rank from `--load` or from scratch; validates twice at the end."""
    trainer = Trainer.build(config)
    trainer.load()
    run = Run(initial=weight_pieces(trainer))
    last = config.training.train_iters if last is None else last
    for step in range(max(first, trainer.position.step), last):
        result = trainer.train_step(trainer.source.step(step))
        count = result.sums.count.item()
        run.losses.append(result.sums.loss.item() / count)
        run.elbos.append(result.sums.elbo.item() / count)
        run.grad_norms.append(result.grad_norm)
        run.applied.append(result.applied)
    run.validation = [validation_bound(trainer) for _ in range(2)]
    run.final = weight_pieces(trainer)
    return run


def run_cases(rank: int, cases: dict[str, Config]) -> dict[str, Run]:
    """Every case in turn on the same ranks; an exception becomes the case's `error`."""
    del rank
    runs = {}
    for name, config in cases.items():
        if config.precision.compile_layers:
            # A function is compiled for a few shapes at most; one more is an error.
            torch._dynamo.reset()
        try:
            runs[name] = train_tiny(config)
        except Exception:
            runs[name] = Run(error=traceback.format_exc())
    return runs


def with_split(config: Config, **parallel: Any) -> Config:
    """`config` at another layout (see `split`)."""
    return replace(config, parallel=replace(config.parallel, **split(**parallel)["parallel"]))
