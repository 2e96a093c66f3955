"""The recipes describe runs that can be built, and those named after the paper are the paper's."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest

from megatron_ext.cli import load_config
from megatron_ext.config import ModelConfig
from megatron_ext.diffusion.noising import PUBLISHED_NOISE
from megatron_ext.presets import MODEL_PRESETS, total_parameters, transformer_parameters
from megatron_ext.scaling.ladder import make_plan
from megatron_ext.scaling.study import read_study

ROOT = Path(__file__).resolve().parents[1]
YAML_FILES = sorted(
    path for path in (ROOT / "examples").rglob("*.yaml") if path.parent.name != "kubernetes"
)
STUDIES = [path for path in YAML_FILES if "\nrecipe: " in path.read_text()]
RECIPES = [path for path in YAML_FILES if path not in STUDIES]
PAPER_RECIPES = sorted((ROOT / "examples/configs").glob("gidd-*.yaml"))
PAPER_TOKENS = {"gidd-mask-3b": 73.9e9, "gidd-unif-3b": 70.8e9, "gidd-unif-10b": 182.5e9}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_valid_configuration(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.num_microbatches(config.parallel.model_parallel_size) >= 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_can_be_planned(path: Path) -> None:
    plan, configs = make_plan(read_study(path))
    assert len(plan.runs) == len(configs) > 1


@pytest.mark.parametrize("recipe", PAPER_RECIPES, ids=lambda path: path.stem)
def test_paper_recipe_has_the_papers_noise_and_shape(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.noise == PUBLISHED_NOISE["paper"]
    shape = MODEL_PRESETS[recipe.stem.removesuffix("-fp8")]
    assert {name: getattr(config.model, name) for name in shape} == shape
    if recipe.stem in PAPER_TOKENS:
        tokens = (
            config.training.train_iters * config.training.global_batch_size
        ) * config.model.seq_length
        assert tokens == pytest.approx(PAPER_TOKENS[recipe.stem], rel=1e-2)


def test_recipes_are_what_their_generator_writes() -> None:
    written = runpy.run_path(str(ROOT / "examples/configs/generate.py"))["files"]()
    assert {path.name: path.read_text() for path in PAPER_RECIPES} == written


def test_the_page_on_recipes_has_the_planners_layouts() -> None:
    page = runpy.run_path(str(ROOT / "examples/configs/layouts.py"))["page"]()
    assert page == (ROOT / "docs/recipes.md").read_text(), "run examples/configs/layouts.py"
    assert page.count("planned, not measured") == 1 and page.count("\n| gidd-") == 48


@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_a_recipe_in_fp8_differs_from_the_other_in_that_alone(preset: str) -> None:
    """And can be emulated: its widths and batches are aligned."""
    plain, quantized = (
        load_config(ROOT / f"examples/configs/{preset}{kind}.yaml") for kind in ("", "-fp8")
    )
    assert quantized.fp8.fp8_format is not None
    back = quantized.with_sections(
        precision={"transformer_impl": "local"}, fp8={"fp8_emulate": True}
    )
    assert dataclasses.replace(back, fp8=plain.fp8) == plain


def test_the_page_on_configuration_lists_the_presets_with_their_parameters() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/configuration.md").read_text().splitlines()
        if line.startswith("| gidd-")
    ]
    expected = []
    for name, shape in MODEL_PRESETS.items():
        model = ModelConfig(**shape)
        expected.append(
            [
                name,
                str(model.num_layers),
                str(model.hidden_size),
                str(model.num_attention_heads),
                f"{transformer_parameters(model):,}",
                f"{total_parameters(model, 131072):,}",
            ]
        )
    assert rows == expected
