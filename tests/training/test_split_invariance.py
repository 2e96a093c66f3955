"""A run gives the same numbers however the model and the batch are split over ranks.

The oracle is the same run on one rank. Every layout is its own test; the ranks of one size are
spawned once and run all their layouts, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_ext.config import Config
from tests.distributed import run_ranks
from tests.training.tiny import (
    NUM_VALIDATION,
    STEPS,
    VOCABULARY,
    Run,
    run_cases,
    tiny_config,
    whole_weights,
    with_split,
)

TOLERANCE = 1e-5
"""Relative, of losses, bounds and gradient norms in float32; seen: up to 1e-6."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "hybrid": {},
    "six_layers": {"model": {"num_layers": 6}},
    "masked": {"diffusion": {"objective": "masked"}},
    "uniform": {"diffusion": {"objective": "uniform"}},
    "ar": {"diffusion": {"objective": "ar"}},
    "sum": {"diffusion": {"loss_normalization": "sum"}, "optimizer": {"lr": 0.1, "clip_grad": 0.0}},
    "causal_prompt": {"diffusion": {"causal_prompt_attn": True}},
    "documents": {"data": {"mock_data": False, "reset_attention_mask": True}},
    "documents_ar": {
        "data": {"mock_data": False, "reset_attention_mask": True},
        "diffusion": {"objective": "ar"},
    },
    "tied": {"model": {"untie_embeddings_and_output_weights": False}},
    "gelu": {
        "model": {"activation": "gelu", "qk_norm": "none", "position_embedding_type": "none"},
        "optimizer": {"optimizer": "adamw", "weight_decay": 0.01, "bias_weight_decay": 0.01},
    },
    "plain": {
        "model": {
            "activation": "swiglu",
            "attention_softcap": None,
            "kv_bias_token": False,
            "qk_norm": "none",
            "residual_scale": None,
            "head_scale": None,
            "mlp_bias": False,
            "apply_layernorm_1p": False,
            "kv_channels": 16,
            "ffn_hidden_size": 48,
        },
        "optimizer": {"optimizer": "adamw", "parameterization": "standard", "lr": 0.003},
    },
    "swiglu_bias": {"model": {"activation": "swiglu"}},
}
"""Models, objectives and data; each runs on one rank as the reference of its layouts."""


@dataclass(frozen=True)
class Layout:
    """A run on several ranks, or on one in another way, that must repeat a variant's numbers."""

    ranks: int
    variant: str = "hybrid"
    parallel: tuple[tuple[str, Any], ...] = ()
    sections: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def config(self, variants: dict[str, Config]) -> Config:
        config = with_split(variants[self.variant], **dict(self.parallel))
        return config.with_sections(**{name: dict(values) for name, values in self.sections})


def layout(
    ranks: int, variant: str = "hybrid", *, sections: dict[str, dict[str, Any]] | None = None,
    **parallel: Any,
) -> Layout:  # fmt: skip
    changed = tuple((name, tuple(values.items())) for name, values in (sections or {}).items())
    return Layout(ranks, variant, tuple(parallel.items()), changed)


def attention(impl: str) -> dict[str, dict[str, Any]]:
    """Sections that choose an attention core; `auto` is `blocked` here."""
    return {"precision": {"attention_impl": impl}}


MICRO_1 = {"training": {"micro_batch_size": 1}}
COMPILED = {"precision": {"compile_layers": True}}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS: dict[str, Layout] = {
    # one rank
    "micro1": layout(1, sections=MICRO_1),
    "micro8": layout(1, sections={"training": {"micro_batch_size": 8}}),
    "recompute_full": layout(1, recompute_granularity="full"),
    "recompute_block": layout(
        1, recompute_granularity="full", recompute_method="block", recompute_num_layers=3
    ),
    "recompute_selective": layout(1, recompute_granularity="selective"),
    "plain_optimizer": layout(1, use_distributed_optimizer=False),
    "prefetched": layout(1, sections={"data": {"num_workers": 2}}),
    "dense_attention": layout(1, sections=attention("reference")),
    "documents_dense_attention": layout(1, "documents", sections=attention("reference")),
    "causal_prompt_dense_attention": layout(1, "causal_prompt", sections=attention("reference")),
    "documents_ar_dense_attention": layout(1, "documents_ar", sections=attention("reference")),
    "plain_dense_attention": layout(1, "plain", sections=attention("reference")),
    "plain_sdpa_attention": layout(1, "plain", sections=attention("sdpa")),
    "loss_chunks": layout(1, sections={"precision": {"loss_chunk_size": 7}}),
    "compiled": layout(1, sections=COMPILED),
    "compiled_recompute_full": layout(1, sections=COMPILED, recompute_granularity="full"),
    # two ranks
    "tp2_sp_compiled": layout(2, tp=2, sequence_parallel=True, sections=COMPILED),
    "pp2_vpp2_compiled": layout(2, pp=2, virtual=2, sections=COMPILED),
    "cp2_compiled": layout(2, cp=2, sections=COMPILED),
    "dp2_overlap_compiled": layout(2, sections=COMPILED, **OVERLAP),
    "tp2": layout(2, tp=2),
    "tp2_sp": layout(2, tp=2, sequence_parallel=True),
    "tp2_padded": layout(2, tp=2, sections={"model": {"make_vocab_size_divisible_by": 128}}),
    "tp2_reference_loss": layout(2, tp=2, sections={"precision": {"loss_impl": "reference"}}),
    "tp2_recompute_selective": layout(2, tp=2, recompute_granularity="selective"),
    "pp2": layout(2, pp=2),
    "pp2_vpp2": layout(2, pp=2, virtual=2),
    "pp2_recompute_full": layout(2, pp=2, recompute_granularity="full"),
    "cp2": layout(2, cp=2),
    "cp2_recompute_full": layout(2, cp=2, recompute_granularity="full"),
    "dp2": layout(2),
    "dp2_plain_optimizer": layout(2, use_distributed_optimizer=False),
    "dp2_overlap": layout(2, **OVERLAP),
    "dp2_plain_optimizer_overlap": layout(
        2, use_distributed_optimizer=False, overlap_grad_reduce=True
    ),
    "masked_tp2": layout(2, "masked", tp=2),
    "masked_cp2": layout(2, "masked", cp=2),
    "uniform_tp2_sp": layout(2, "uniform", tp=2, sequence_parallel=True),
    "uniform_pp2": layout(2, "uniform", pp=2),
    "ar_tp2": layout(2, "ar", tp=2),
    "ar_cp2": layout(2, "ar", cp=2),
    "sum_tp2_sp": layout(2, "sum", tp=2, sequence_parallel=True),
    "sum_dp2": layout(2, "sum"),
    "sum_micro1_pp2": layout(2, "sum", pp=2, sections=MICRO_1),
    "causal_prompt_cp2": layout(2, "causal_prompt", cp=2),
    "documents_cp2": layout(2, "documents", cp=2),
    "documents_ar_cp2": layout(2, "documents_ar", cp=2),
    "tied_tp2": layout(2, "tied", tp=2),
    "tied_tp2_sp": layout(2, "tied", tp=2, sequence_parallel=True),
    "gelu_tp2": layout(2, "gelu", tp=2),
    "plain_tp2": layout(2, "plain", tp=2),
    "plain_pp2": layout(2, "plain", pp=2),
    "plain_cp2_sdpa_attention": layout(2, "plain", cp=2, sections=attention("sdpa")),
    "cp2_dense_attention": layout(2, cp=2, sections=attention("reference")),
    "swiglu_bias_tp2_sp": layout(2, "swiglu_bias", tp=2, sequence_parallel=True),
    # three ranks
    "six_layers_pp3": layout(3, "six_layers", pp=3),
    "six_layers_pp3_vpp2": layout(
        3,
        "six_layers",
        pp=3,
        virtual=2,
        sections={"training": {"micro_batch_size": 1, "global_batch_size": 6}},
    ),  # fmt: skip
    # four ranks
    "tp2_pp2": layout(4, tp=2, pp=2),
    "tp2_pp2_sp": layout(4, tp=2, pp=2, sequence_parallel=True),
    "tp2_cp2": layout(4, tp=2, cp=2),
    "tp2_cp2_sp": layout(4, tp=2, cp=2, sequence_parallel=True),
    "tp2_dp2": layout(4, tp=2),
    "tp2_dp2_plain_optimizer": layout(4, tp=2, use_distributed_optimizer=False),
    "tp2_dp2_sp_overlap": layout(4, tp=2, sequence_parallel=True, **OVERLAP),
    "cp2_dp2": layout(4, cp=2),
    "pp2_cp2": layout(4, pp=2, cp=2),
    "pp2_dp2_overlap": layout(4, pp=2, **OVERLAP),
    "pp2_vpp2_dp2_overlap": layout(4, pp=2, virtual=2, **OVERLAP),
    "tp2_pp2_vpp2_sp_recompute": layout(
        4, tp=2, pp=2, virtual=2, sequence_parallel=True, recompute_granularity="full"
    ),
    "tp4": layout(4, tp=4),
    "cp4": layout(4, cp=4),
    "pp4": layout(4, pp=4),
    "dp4": layout(4),
    "documents_tp2_cp2_sp": layout(4, "documents", tp=2, cp=2, sequence_parallel=True),
}


@pytest.fixture(scope="session")
def variants(document_prefix: str) -> dict[str, Config]:
    configs = {name: tiny_config(**sections) for name, sections in VARIANTS.items()}
    return {
        name: config
        if config.data.mock_data
        else config.with_sections(data={"data_path": (document_prefix,)})
        for name, config in configs.items()
    }


@pytest.fixture(scope="session")
def runs_of(variants: dict[str, Config]) -> Callable[[int], list[dict[str, Run]]]:
    """Runs by name on every rank of a group size; the ranks are spawned at the first request."""
    known: dict[int, list[dict[str, Run]]] = {}

    def run(ranks: int) -> list[dict[str, Run]]:
        if ranks not in known:
            cases = {n: x.config(variants) for n, x in LAYOUTS.items() if x.ranks == ranks}
            if ranks == 1:
                cases |= variants
                cases["six_layers_batch6"] = variants["six_layers"].with_sections(
                    training={"global_batch_size": 6}
                )
            known[ranks] = run_ranks(ranks, run_cases, cases)
        return known[ranks]

    return run


@dataclass(frozen=True)
class Pair:
    """The ranks of a layout, and the reference on one rank."""

    ranks: list[Run]
    reference: Run


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest, runs_of: Callable[[int], list[dict[str, Run]]]) -> Pair:
    name = request.param
    reference = "six_layers_batch6" if name == "six_layers_pp3_vpp2" else LAYOUTS[name].variant
    result = Pair([runs[name] for runs in runs_of(LAYOUTS[name].ranks)], runs_of(1)[0][reference])
    for run in (*result.ranks, result.reference):
        assert run.error is None, run.error
    return result


def test_losses_and_gradient_norms_do_not_depend_on_the_split(pair: Pair) -> None:
    reference = pair.reference
    assert len(reference.losses) == STEPS
    for run in pair.ranks:
        assert run.losses == pytest.approx(reference.losses, rel=TOLERANCE)
        assert run.elbos == pytest.approx(reference.elbos, rel=TOLERANCE)
        assert run.grad_norms == pytest.approx(reference.grad_norms, rel=TOLERANCE)


def test_validation_bound_does_not_depend_on_the_split(pair: Pair) -> None:
    (bound, error, count), _ = pair.reference.validation
    assert count == NUM_VALIDATION
    for run in pair.ranks:
        first, second = run.validation
        assert first == second
        assert first[:2] == pytest.approx((bound, error), rel=TOLERANCE)
        assert first[2] == count


def test_initial_weights_do_not_depend_on_the_split(pair: Pair) -> None:
    whole = whole_weights([run.initial for run in pair.ranks], VOCABULARY)
    reference = whole_weights([pair.reference.initial], VOCABULARY)
    assert whole.keys() == reference.keys()
    for name, values in reference.items():
        assert torch.equal(whole[name], values), name


def test_trained_weights_do_not_depend_on_the_split(pair: Pair) -> None:
    whole = whole_weights([run.final for run in pair.ranks], VOCABULARY)
    initial = whole_weights([pair.reference.initial], VOCABULARY)
    for name, values in whole_weights([pair.reference.final], VOCABULARY).items():
        # LaProp turns a gradient that is nothing but rounding into a whole step, so a few elements
        # may go elsewhere; all others agree.
        moved = (values - initial[name]).abs().max()
        assert moved > 0, name
        strays = (whole[name] - values).abs() > 1e-3 * moved
        assert strays.sum() <= max(1, 1e-3 * strays.numel()), name
