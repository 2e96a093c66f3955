"""Transformer Engine and FP8 on a GPU: `pytest -m gpu tests/gpu`. Not run yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import Config, Float8Recipe
from megatron_ext.kernels.float8 import CurrentScaling, float8_linear
from tests.checkpoint.segments import train_segment, with_folders
from tests.training.tiny import tiny_config, train_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_rank")]

RECIPES: tuple[Float8Recipe, ...] = ("tensorwise", "delayed", "blockwise", "mxfp8")


def config(recipe: Float8Recipe | None, *, emulated: bool = False, **sections: Any) -> Config:
    """A width that every recipe accepts."""
    impl = "local" if emulated or recipe is None else "transformer_engine"
    fp8 = {"fp8_format": "e4m3", "fp8_recipe": recipe or "delayed", "fp8_emulate": emulated}
    return tiny_config(
        model={"hidden_size": 256, "seq_length": 128, "vocab_size": 512},
        precision={"bf16": True, "transformer_impl": impl, "compile_layers": not emulated},
        training={"micro_batch_size": 8, "global_batch_size": 16, "train_iters": 20},
        fp8=fp8 if recipe else {},
        **sections,
    )


def require_recipe(recipe: Float8Recipe) -> None:
    engine = pytest.importorskip("transformer_engine.pytorch.quantization")
    check = {
        "blockwise": "check_fp8_block_scaling_support",
        "mxfp8": "check_mxfp8_support",
    }.get(recipe, "check_fp8_support")
    is_available, reason = getattr(engine, check)()
    if not is_available:
        pytest.skip(reason)


def test_transformer_engine_in_bf16_tracks_local_layers() -> None:
    pytest.importorskip("transformer_engine.pytorch")
    local = train_tiny(config(None))
    engine = train_tiny(
        config(None).with_sections(precision={"transformer_impl": "transformer_engine"})
    )
    assert engine.losses == pytest.approx(local.losses, rel=2e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_tracks_its_emulation_and_bf16(recipe: Float8Recipe) -> None:
    require_recipe(recipe)
    real, emulated = train_tiny(config(recipe)), train_tiny(config(recipe, emulated=True))
    assert real.losses == pytest.approx(emulated.losses, rel=2e-2)
    assert real.losses == pytest.approx(train_tiny(config(None)).losses, rel=5e-2)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_a_layer_equals_its_emulation(recipe: Float8Recipe) -> None:
    """One product and its gradients; what is left is the accumulator and the rounding to BF16."""
    require_recipe(recipe)
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    kind = {
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }[recipe]
    torch.manual_seed(0)
    layer = te.Linear(256, 512, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16)
    with te.fp8_autocast(enabled=True, fp8_recipe=kind(fp8_format=recipes.Format.E4M3)):
        y = layer(x)
    y.backward(grad)
    mine, weight = (t.detach().clone().requires_grad_() for t in (x, layer.weight))
    expected = float8_linear(mine, weight, CurrentScaling(recipe, "e4m3"))
    expected.backward(grad)
    for a, b in ((y, expected), (x.grad, mine.grad), (layer.weight.grad, weight.grad)):
        difference = (a - b).float().norm() / b.float().norm()
        assert difference < 5e-3


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_bf16_and_fp8_resume_from_each_other(
    recipe: Float8Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, masters and averages of one are those of the other, to the last bit."""
    require_recipe(recipe)
    # Transformer Engine keeps the state of delayed scaling as a pickle and wants to be asked.
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    plain, quantized = config(None), config(recipe)
    for step, (now, after) in enumerate(((plain, quantized), (quantized, plain)), start=1):
        first = with_folders(now, load=tmp_path if step > 1 else None, save=tmp_path)
        saved = train_segment(first, 2 * step)
        resumed = train_segment(with_folders(after, load=tmp_path), 2 * step)
        for kind in ("weights", "optimizer"):
            for mine, theirs in zip(getattr(resumed, kind), getattr(saved, kind), strict=True):
                assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs


def test_weights_kept_in_fp8_start_from_masters_in_full_precision() -> None:
    require_recipe("tensorwise")
    from megatron_ext.training.loop import Trainer

    def masters(asked: Config) -> list[torch.Tensor]:
        trainer = Trainer.build(asked)
        groups = trainer.optimizer.optimizer.param_groups
        return [p.detach().clone() for group in groups for p in group["params"]]

    kept = config("tensorwise").with_sections(fp8={"fp8_param_gather": True})
    for mine, theirs in zip(masters(kept), masters(config("tensorwise")), strict=True):
        assert torch.equal(mine, theirs)
