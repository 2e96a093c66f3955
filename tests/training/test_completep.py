"""CompleteP keeps the size of updates over width and depth; the standard parameterisation fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.training.completep import (
    Shape,
    best_rates,
    coordinates,
    grid_steps_moved,
    rates,
    shaped,
    slopes,
)
from megatron_ext.training.completep_report import FLAT
from tests.data.corpora import write_with_megatron
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_rank")

CONFIG = tiny_config(
    model={"head_init_std": 0.0},
    noise={"p_prompt": 0.0, "p_infill": 0.0, "max_empty_fraction": 0.0},
)


def test_updates_keep_their_size_under_completep_and_grow_under_the_standard() -> None:
    shapes = [Shape(32, 4), Shape(128, 4), Shape(32, 16)]
    found = {}
    for kind in ("completep", "standard"):
        rows = coordinates(CONFIG, shapes, kind, steps=8, lr=0.1)
        assert [(row["width"], row["depth"]) for row in rows] == [
            (shape.width, shape.depth) for shape in shapes
        ]
        found[kind] = {axis: slopes(rows, axis) for axis in ("width", "depth")}
    for axis in ("width", "depth"):
        assert all(abs(slope) <= FLAT for slope in found["completep"][axis].values()), found
    assert found["standard"]["width"]["residual"] > 1
    assert found["standard"]["width"]["logits"] > FLAT
    assert found["standard"]["depth"]["residual"] > 0.5


@pytest.fixture
def text_prefix(tmp_path: Path) -> str:
    """Documents in which a token says much about the next."""
    rng = np.random.default_rng(3)
    following = np.stack([rng.permutation(np.arange(4, 64))[:4] for _ in range(64)])
    documents = []
    for _ in range(100):
        tokens = [int(rng.integers(4, 64))]
        for _ in range(399):
            tokens.append(int(rng.choice(following[tokens[-1]], p=[0.7, 0.15, 0.1, 0.05])))
        documents.append([np.array(tokens)])
    return str(write_with_megatron(tmp_path / "text", documents))


@pytest.mark.slow
def test_best_learning_rate_transfers_under_completep_and_moves_under_the_standard(
    text_prefix: str,
) -> None:
    config = CONFIG.with_sections(
        model={"vocab_size": 64},
        diffusion={"objective": "ar"},
        data={"mock_data": False, "data_path": (text_prefix,), "split": "100,0,0"},
        optimizer={"lr_warmup_iters": 5},
        training={"micro_batch_size": 8},
    )
    shapes, grid = [Shape(32, 2), Shape(256, 2)], (0.04, 0.1, 0.25, 0.625)
    moved = {}
    for kind in ("completep", "standard"):
        best = best_rates(rates(config, shapes, kind, 50, grid))
        moved[kind] = grid_steps_moved(best, grid)
    assert moved["completep"] < 1 < moved["standard"], moved


def test_parameterizations_are_matched_at_the_first_shape() -> None:
    base = Shape(32, 4)
    ours, theirs = (shaped(CONFIG, base, kind, base, 0.1) for kind in ("completep", "standard"))
    assert theirs.optimizer.lr == pytest.approx(ours.optimizer.lr / 32)
    assert theirs.model.matrix_init_std == pytest.approx(ours.model.matrix_init_std)
    wide = shaped(CONFIG, Shape(128, 4), "standard", base, 0.1)
    assert wide.optimizer.lr == theirs.optimizer.lr
    assert wide.model.matrix_init_std == theirs.model.matrix_init_std
    with pytest.raises(ValueError, match="--widths has 40"):
        shaped(CONFIG, Shape(40, 4), "completep", base, 0.1)
