"""What each class of parameters gets, and that the optimizers are what they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.kernels.vocabulary.passes import has_compiler
from megatron_ext.optim import AdamW, LaProp, laprop
from megatron_ext.optim.build import apply_schedule, schedule_of
from megatron_ext.optim.groups import param_class
from megatron_ext.training.loop import Trainer
from tests.training.tiny import split, tiny_config

CLASSES = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.layers.0.input_layernorm.weight": "norm",
    "decoder.layers.0.self_attention.linear_proj.weight": "bulk",
    "decoder.layers.0.self_attention.linear_qkv.weight": "bulk",
    "decoder.layers.0.self_attention.q_norm.weight": "norm",
    "decoder.layers.0.self_attention.k_norm.weight": "norm",
    "decoder.layers.0.self_attention.core_attention.k_bias": "bias",
    "decoder.layers.0.self_attention.core_attention.v_bias": "bias",
    "decoder.layers.0.pre_mlp_layernorm.weight": "norm",
    "decoder.layers.0.mlp.linear_fc1.weight": "bulk",
    "decoder.layers.0.mlp.linear_fc1.bias": "bias",
    "decoder.layers.0.mlp.linear_fc2.weight": "bulk",
    "decoder.layers.0.mlp.linear_fc2.bias": "bias",
    "decoder.final_layernorm.weight": "norm",
    "output_layer.weight": "embedding",
}
"""Specification 4.2, by the names of this model."""

LR, DECAY, NORM_DECAY, BIAS_DECAY, WIDTH, LAYERS = 0.5, 0.1, 0.2, 0.3, 32, 4
COMPLETEP = {
    "norm": (0.02 * LR, NORM_DECAY),
    "embedding": (0.02 * LR, 0.0),
    "bias": (0.02 * LR, BIAS_DECAY),
    "bulk": (LR / WIDTH, DECAY * WIDTH),
}
STANDARD = {
    "norm": (LR, NORM_DECAY),
    "embedding": (LR, DECAY),
    "bias": (LR, BIAS_DECAY),
    "bulk": (LR, DECAY),
}


@pytest.mark.usefixtures("single_rank")
def test_every_parameter_has_its_class() -> None:
    model = Trainer.build(tiny_config()).model[0].module
    names = [name for name, _ in model.named_parameters()]
    assert set(CLASSES) == {name for name in names if ".layers." not in name or "layers.0." in name}
    for name in names:
        layer_0 = name if ".layers." not in name else ".".join(
            ["decoder.layers.0", *name.split(".")[3:]]
        )  # fmt: skip
        assert param_class(name) == CLASSES[layer_0], name


@pytest.mark.parametrize("is_distributed", [True, False])
@pytest.mark.parametrize(
    ("parameterization", "expected", "eps"),
    [("completep", COMPLETEP, 1e-8 / (WIDTH * LAYERS)), ("standard", STANDARD, 1e-8)],
)
@pytest.mark.usefixtures("single_rank")
def test_groups_have_the_rates_decays_and_eps_of_their_class(
    parameterization: str, expected: dict[str, tuple[float, float]], eps: float,
    is_distributed: bool,
) -> None:  # fmt: skip
    config = tiny_config(
        optimizer={
            "lr": LR, "weight_decay": DECAY, "norm_weight_decay": NORM_DECAY,
            "bias_weight_decay": BIAS_DECAY, "parameterization": parameterization,
            "lr_warmup_iters": 0,
        },
        **split(use_distributed_optimizer=is_distributed),
    )  # fmt: skip
    trainer = Trainer.build(config)
    apply_schedule(trainer.optimizer, schedule_of(config.optimizer, 5), 0)
    members: dict[str, int] = {}
    for name, parameter in trainer.model[0].module.named_parameters():
        members[param_class(name)] = members.get(param_class(name), 0) + parameter.numel()
    seen = set()
    for group in trainer.optimizer.param_groups:
        kind = group["name"]
        seen.add(kind)
        assert (group["lr"], group["weight_decay"]) == pytest.approx(expected[kind])
        assert group["eps"] == pytest.approx(eps)
        assert sum(p.numel() for p in group["params"]) == members[kind]
    assert seen == set(expected)


def parameters(seed: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    numbers = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (7,), (2, 2, 2)]
    return [
        torch.nn.Parameter(torch.randn(s, generator=numbers, dtype=torch.float64).to(dtype))
        for s in shapes
    ]


def updated(optimizer: torch.optim.Optimizer, weights: list[Any], steps: range) -> list[Any]:
    for step in steps:
        gradients = parameters(1000 + step, weights[0].dtype)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.detach()
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torchs(decay: float) -> None:
    options: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    mine, theirs = parameters(1, torch.float64), parameters(1, torch.float64)
    ours = updated(AdamW(mine, **options), mine, range(20))
    reference = updated(torch.optim.AdamW(theirs, foreach=False, **options), theirs, range(20))
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LaProp, AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 7, 15, 16])
def test_tiles_do_not_change_a_bit(
    kind: type, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = parameters(2, dtype), parameters(2, dtype)
    expected = updated(kind(whole, lr=0.01, weight_decay=0.1), whole, range(3))
    monkeypatch.setattr(laprop, "TILE_ELEMENTS", tile)
    for one, other in zip(
        updated(kind(cut, lr=0.01, weight_decay=0.1), cut, range(3)), expected, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("kind", [LaProp, AdamW])
def test_the_compiled_update_is_the_update(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for all sizes and steps, and again for another eps."""
    plain, compiled = parameters(2, torch.float32), parameters(2, torch.float32)
    first, second = (kind(x, lr=0.01, weight_decay=0.1) for x in (plain, compiled))
    graphs = []
    torch._dynamo.utils.counters.clear()
    for step, (lr, decay, eps) in enumerate(
        [(0.01, 0.1, 1e-8), (0.3, 0.0, 1e-8), (0.02, 0.7, 1e-8), (0.02, 0.7, 0.5)]
    ):
        for optimizer in (first, second):
            optimizer.param_groups[0].update(lr=lr, weight_decay=decay, eps=eps)
        monkeypatch.setattr(laprop, "COMPILED_FROM", 1 << 40)
        expected = updated(first, plain, range(step, step + 1))
        monkeypatch.setattr(laprop, "COMPILED_FROM", 0)
        for one, other in zip(
            updated(second, compiled, range(step, step + 1)), expected, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] == 1 and graphs[3] <= 2


@pytest.mark.parametrize("kind", [LaProp, AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_restored_optimizer_goes_on_to_the_last_bit(kind: type, dtype: torch.dtype) -> None:
    whole, first = parameters(2, dtype), parameters(2, dtype)
    expected = updated(kind(whole, lr=0.01, weight_decay=0.1), whole, range(6))
    half = kind(first, lr=0.01, weight_decay=0.1)
    middle = updated(half, first, range(3))
    second = [torch.nn.Parameter(x) for x in middle]
    restored = kind(second, lr=0.01, weight_decay=0.1)
    restored.load_state_dict(half.state_dict())
    for one, other in zip(updated(restored, second, range(3, 6)), expected, strict=True):
        assert torch.equal(one, other)
    exact = torch.promote_types(dtype, torch.float32)
    assert all(state["exp_avg"].dtype == exact for state in restored.state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "lr is -1"), ({"lr": 1.0, "betas": (0.9, 1.0)}, "betas are"),
     ({"lr": 1.0, "eps": -1.0}, "eps is"), ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay is")],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaProp(parameters(0, torch.float32), **options)
