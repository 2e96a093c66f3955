"""What is compiled between matrix products: the same numbers, and no more kept than is planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ext.model import fusion
from megatron_ext.training.loop import Trainer
from tests.training.tiny import tiny_config


class Call(NamedTuple):
    function: Callable
    kept: tuple[int, ...]
    arguments: tuple[Any, ...]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, single_rank: None) -> dict[str, Call]:
    """The first call of every function that `--compile-layers` compiles, in a BF16 step."""
    found: dict[str, Call] = {}

    def record(function: Callable, kept: tuple[int, ...]) -> Callable:
        def run(*arguments: Any) -> Tensor:
            found.setdefault(function.__name__, Call(function, kept, arguments))
            return function(*arguments)

        return run

    monkeypatch.setattr(fusion, "_compiled", record)
    trainer = Trainer.build(tiny_config(precision={"bf16": True, "compile_layers": True}))
    trainer.train_step(trainer.source.step(0))
    return found


def leaves(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments again, those with gradients as leaves of their own."""
    return [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in arguments
    ]


def results(function: Callable, arguments: list[Any]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output, gradients, and what was kept for the backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = function(*arguments)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    gradients = [x.grad for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return output.detach(), gradients, kept


def test_everything_between_the_products_is_compiled(calls: dict[str, Call]) -> None:
    assert calls.keys() == {
        "rms_norm", "sums_of_squares", "scale", "rotate", "add_residual", "relu_squared",
    }  # fmt: skip


def test_compiled_functions_give_the_same_numbers_and_keep_what_they_say(
    calls: dict[str, Call],
) -> None:
    for name, call in calls.items():
        arguments = leaves(call.arguments)
        output, gradients, kept = results(torch.compile(call.function), arguments)
        expected, others, _ = results(call.function, leaves(call.arguments))
        for mine, theirs in zip([output, *gradients], [expected, *others], strict=True):
            assert (mine - theirs).float().norm() <= 1e-2 * theirs.float().norm(), name
        # But for a few numbers per token.
        rows = call.arguments[0].shape[0] * call.arguments[0].shape[1]
        stored = {x.untyped_storage().data_ptr() for x in kept if x.numel() > 2 * rows}
        named = [arguments[i] for i in call.kept if arguments[i].numel() > 2 * rows]
        assert stored == {x.untyped_storage().data_ptr() for x in named}, name


def test_fake_tensors_have_the_shapes_of_real_ones(calls: dict[str, Call]) -> None:
    for name, call in calls.items():
        output, gradients, _ = results(call.function, leaves(call.arguments))
        with FakeTensorMode() as mode:
            fakes = [
                mode.from_tensor(x).detach().requires_grad_(x.requires_grad)
                if isinstance(x, Tensor)
                else x
                for x in call.arguments
            ]
            described = fusion._Described.apply(call.function, call.kept, *fakes)
            described.backward(torch.empty_like(described))
        found = [x.grad for x in fakes if isinstance(x, Tensor) and x.requires_grad]
        for mine, theirs in zip([described, *found], [output, *gradients], strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
