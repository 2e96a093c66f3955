"""What running without CUDA leaves alone."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.parallel.cpu import enable_cpu

enable_cpu()


@pytest.mark.parametrize("factory", ["empty", "zeros", "ones", "full", "arange", "randn"])
def test_a_device_context_still_reaches_every_factory(factory: str) -> None:
    arguments = ((2,), 1.0) if factory == "full" else (2,)
    with torch.device("meta"):
        assert getattr(torch, factory)(*arguments).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")
def test_user_code_keeps_torchs_errors_without_cuda() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"
