"""What of megatron-core runs underneath."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.model.translate import padded_vocab_size, transformer_config
from tests.training.tiny import tiny_config, train_tiny


@pytest.mark.parametrize("activation", ["squared_relu", "gelu", "swiglu"])
@pytest.mark.usefixtures("single_rank")
def test_nothing_is_compiled_unasked(activation: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train_tiny(tiny_config(model={"activation": activation, "num_layers": 1}), last=2)
    assert not torch._dynamo.utils.counters["frames"]


def test_squared_relu_is_the_square_of_relu() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    y = transformer_config(tiny_config()).activation_func(x)
    y.sum().backward()
    expected = [max(value, 0.0) for value in x.tolist()]
    assert y.tolist() == [value * value for value in expected]
    assert x.grad.tolist() == [2 * value for value in expected]


@pytest.mark.parametrize(
    ("size", "divisible_by", "tp", "padded"),
    [(61, 1, 1, 61), (61, 1, 2, 62), (61, 128, 2, 128), (131072, 128, 8, 131072), (5, 4, 3, 12)],
)
def test_the_vocabulary_is_padded_to_the_next_common_multiple(
    size: int, divisible_by: int, tp: int, padded: int
) -> None:
    assert padded_vocab_size(size, divisible_by, tp) == padded
