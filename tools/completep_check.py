"""Check that CompleteP transfers: size of updates, and best learning rate, over widths and depths.

python tools/completep_check.py coordinates --config examples/scaling/base.yaml
python tools/completep_check.py rates --config examples/scaling/base.yaml --objective ar
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.config import Config, Objective  # noqa: E402


def _recipe(config: Path, objective: Objective | None) -> Config:
    from megatron_ext.cli import load_config

    recipe = load_config(config)
    if objective is None:
        return recipe
    return recipe.with_sections(diffusion={"objective": objective})


def coordinates(
    config: Path, widths: tuple[int, ...] = (32, 64, 128, 256),
    depths: tuple[int, ...] = (4, 8, 16), head_width: int = 16,
    objective: Objective | None = None, lr: float = 0.1, steps: int = 8,
    output: Path = Path("runs/completep"),
) -> int:  # fmt: skip
    """How far embedding, residual stream and logits move in a few steps, by width and depth.

    Exit code 1 where CompleteP's movement is not flat in width and depth.

    Args:
        config: Recipe with data and noise; its shape does not matter.
        widths: At the first depth.
        depths: At the first width.
        head_width: Of the attention heads.
        objective: The recipe's when absent.
        lr: Base learning rate (CompleteP's; the standard one is matched at the first shape).
        steps: Updates before the measurement, without warm-up.
        output: Folder for coordinates.json and its figure.
    """
    from megatron_ext.training.completep_report import check_coordinates, shapes_of

    shapes = shapes_of(widths, depths, head_width)
    return int(not check_coordinates(_recipe(config, objective), shapes, lr, steps, output))


def rates(
    config: Path, widths: tuple[int, ...] = (32, 64, 128), depths: tuple[int, ...] = (4, 8, 16),
    head_width: int = 16, objective: Objective | None = None,
    learning_rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8), steps: int = 200,
    output: Path = Path("runs/completep"),
) -> int:  # fmt: skip
    """Loss against base learning rate for every width and depth; how far the best rate moves.

    Exit code 1 where CompleteP's best rate moves by a grid step or more, or leaves the grid.

    Args:
        config: Recipe with data and noise; its shape does not matter.
        widths: At the first depth.
        depths: At the first width.
        head_width: Of the attention heads.
        objective: The recipe's when absent.
        learning_rates: A geometric grid of base rates.
        steps: Updates of each run, at a constant rate after the recipe's warm-up.
        output: Folder for rates.json and its figure.
    """
    from megatron_ext.training.completep_report import check_rates, shapes_of

    shapes = shapes_of(widths, depths, head_width)
    return int(not check_rates(_recipe(config, objective), shapes, learning_rates, steps, output))


def main() -> int:
    from megatron_ext.parallel.groups import shutdown_parallel

    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"coordinates": coordinates, "rates": rates}, description=__doc__
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown_parallel()


if __name__ == "__main__":
    sys.exit(main())
