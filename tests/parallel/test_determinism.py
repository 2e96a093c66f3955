"""--deterministic is in force while a run trains, and refuses an environment that forbids it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from megatron_ext.parallel.determinism import require_determinism
from tests.training.tiny import tiny_config, train_tiny

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    for name in VARIABLES:
        os.environ.pop(name, None)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("objective", ["hybrid", "ar"])
def test_a_run_trains_to_the_same_numbers_without_a_nondeterministic_algorithm(
    objective: str, clean: pytest.MonkeyPatch
) -> None:
    """torch raises at the first operation that it knows to be nondeterministic."""
    del clean
    sections = {"diffusion": {"objective": objective}, "model": {"num_layers": 1}}
    plain = train_tiny(tiny_config(**sections))
    config = tiny_config(**sections, resilience={"deterministic": True})
    runs = [train_tiny(config), train_tiny(config)]
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    one, other = ((run.losses, run.grad_norms) for run in runs)
    assert one == other
    # The sums of the embedding's gradient are in another order than without the flag.
    assert one[0] == pytest.approx(plain.losses, rel=1e-6)


def test_a_contrary_environment_is_refused(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(ValueError, match="--deterministic .* NCCL_ALGO=NVLS; unset it"):
        require_determinism()
    clean.setenv("NCCL_ALGO", "Tree")
    require_determinism()


@pytest.mark.gpu
@pytest.mark.usefixtures("single_rank")
def test_two_runs_on_a_gpu_agree_to_the_last_bit(clean: pytest.MonkeyPatch) -> None:
    del clean
    precision = {"bf16": True, "compile_layers": True}
    config = tiny_config(resilience={"deterministic": True}, precision=precision)
    one, other = train_tiny(config), train_tiny(config)
    assert (one.losses, one.grad_norms) == (other.losses, other.grad_norms)
