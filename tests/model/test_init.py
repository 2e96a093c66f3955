"""Parameters: how many, how they start, and that padding the vocabulary changes no number."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.hf_names import published_names
from megatron_ext.config import ModelConfig
from megatron_ext.model.init import global_name
from megatron_ext.presets import MODEL_PRESETS, total_parameters, transformer_parameters
from megatron_ext.training.loop import Trainer
from tests.training.tiny import VOCABULARY, tiny_config, train_tiny

PAPER = {
    "gidd-25m": (8, 512, 8, "25.2M"),
    "gidd-49m": (10, 640, 10, "49.2M"),
    "gidd-85m": (12, 768, 12, "85.1M"),
    "gidd-202m": (16, 1024, 16, "201.6M"),
    "gidd-567m": (20, 1536, 12, "566.7M"),
    "gidd-mask-3b": (18, 3072, 24, "2.039B"),
    "gidd-unif-3b": (19, 3072, 24, "2.152B"),
    "gidd-unif-10b": (34, 4608, 36, "8.665B"),
}
"""Layers, width, heads and P of the paper's tables."""
WITH_EMBEDDINGS = {"gidd-mask-3b": 2.844, "gidd-unif-3b": 2.958, "gidd-unif-10b": 9.873}
"""Billions of parameters with the tables of 131,072 ids."""


def as_printed(count: int) -> str:
    return f"{count / 1e9:.3f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_presets_have_the_papers_shapes_and_parameters(name: str) -> None:
    layers, width, heads, printed = PAPER[name]
    model = ModelConfig(**MODEL_PRESETS[name])
    assert (model.num_layers, model.hidden_size) == (layers, width)
    assert (model.num_attention_heads, model.seq_length) == (heads, 2048)
    true_count = layers * (12 * width**2 + 11 * width) + width
    assert transformer_parameters(model) == true_count
    # The code behind the sweep counts the feed-forward biases twice and leaves out the key/value
    # token; what is printed for 10B is the true count.
    counted_by_code = layers * (12 * width**2 + 14 * width) + width
    assert printed in (as_printed(counted_by_code), as_printed(true_count))
    if name in WITH_EMBEDDINGS:
        assert total_parameters(model, 131072) / 1e9 == pytest.approx(
            WITH_EMBEDDINGS[name], rel=1e-3
        )


VARIANTS: dict[str, dict[str, Any]] = {
    "gidd": {},
    "gidd_wide_head": {"kv_channels": 16},
    "plain": {"qk_norm": "none", "kv_bias_token": False, "mlp_bias": False},
    "swiglu": {"activation": "swiglu"},
    "swiglu_without_bias": {"activation": "swiglu", "mlp_bias": False, "ffn_hidden_size": 48},
    "tied": {"untie_embeddings_and_output_weights": False},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("single_rank")
def test_the_formula_counts_what_is_built(name: str) -> None:
    trainer = Trainer.build(tiny_config(model=VARIANTS[name]))
    built = sum(parameter.numel() for parameter in trainer.model[0].parameters())
    assert built == total_parameters(trainer.config.model, VOCABULARY)


@pytest.mark.usefixtures("single_rank")
def test_the_model_has_the_published_tensors() -> None:
    model = Trainer.build(tiny_config()).model[0].module
    names = [global_name(model, name) for name, _ in model.named_parameters()]
    published = list(itertools.chain.from_iterable(published_names(name) for name in names))
    assert len(set(published)) == len(published) == 14 * 4 + 3


def initial_weights(**model: Any) -> dict[str, torch.Tensor]:
    trainer = Trainer.build(tiny_config(model={"num_layers": 2, "vocab_size": 1024, **model}))
    module = trainer.model[0].module
    return {global_name(module, n): p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.usefixtures("single_rank")
def test_every_class_of_weights_starts_with_its_deviation() -> None:
    weights = initial_weights(hidden_size=128, init_scale=0.4, head_init_std=0.0)
    kinds = set()
    for name, values in weights.items():
        if name.startswith("embedding."):
            kinds.add("embedding")
            expected = 0.02
        elif values.dim() == 2 and "linear" in name:
            kinds.add("matrix")
            expected = 0.4 / 128**0.5
        else:
            kinds.add("zero")
            expected = 0.0
        # The estimate of a deviation from n numbers is off by 1 / sqrt(2 n); mean by 1 / sqrt(n).
        tolerance = 5 * expected / values.numel() ** 0.5
        assert abs(values.std(correction=0).item() - expected) <= tolerance, name
        assert abs(values.mean().item()) <= tolerance, name
    assert kinds == {"embedding", "matrix", "zero"}


@pytest.mark.usefixtures("single_rank")
def test_gains_start_at_one_in_both_conventions() -> None:
    for is_offset, start in ((True, 0.0), (False, 1.0)):
        weights = initial_weights(apply_layernorm_1p=is_offset)
        gains = [values for name, values in weights.items() if "norm" in name]
        assert len(gains) == 2 * 4 + 1
        assert all((values == start).all() for values in gains)


@pytest.mark.usefixtures("single_rank")
def test_no_two_weights_start_alike() -> None:
    weights = initial_weights(hidden_size=64, head_init_std=0.02)
    drawn = [x for x in weights.values() if x.std() > 0]
    for one, other in itertools.combinations(drawn, 2):
        count = min(one.numel(), other.numel())
        pair = torch.stack([one.flatten()[:count], other.flatten()[:count]])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / count**0.5


@pytest.mark.usefixtures("single_rank")
def test_another_seed_draws_other_weights() -> None:
    one, other = (
        Trainer.build(tiny_config(training={"seed": seed})).model[0].module.embedding
        for seed in (5, 6)
    )
    assert not torch.equal(one.word_embeddings.weight, other.word_embeddings.weight)


@pytest.mark.usefixtures("single_rank")
def test_padding_the_vocabulary_changes_no_number() -> None:
    narrow = train_tiny(tiny_config())
    padded = train_tiny(tiny_config(model={"make_vocab_size_divisible_by": 128}))
    assert padded.losses == pytest.approx(narrow.losses, rel=1e-6)
    assert padded.grad_norms == pytest.approx(narrow.grad_norms, rel=1e-6)
    assert padded.validation[0][:2] == pytest.approx(narrow.validation[0][:2], rel=1e-6)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert padded.final[name].values.shape == (128, 32)
        assert not padded.final[name].values[VOCABULARY:].any()
