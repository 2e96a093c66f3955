"""CompleteP keeps the size of updates over width and depth; the standard parameterisation fails."""

from __future__ import annotations

import pytest

from megatron_ext.training.completep import Shape, coordinates, shaped, slopes
from megatron_ext.training.completep_report import FLAT
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
