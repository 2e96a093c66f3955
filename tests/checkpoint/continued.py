"""What ranks do with an imported run: start from its weights at several layouts, and save them.

Apart from the tests, so that ranks need not import transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.training import CheckpointWriter, Position
from megatron_ext.cli import load_config
from megatron_ext.training.loop import Trainer
from tests.training.tiny import split, validation_bound


def continued(run: Path, parallel: dict[str, Any], *, bf16: bool, step: int) -> Any:
    """Start from the run's weights at this layout; the bound, and a checkpoint of `step`."""
    config = load_config(run / "config.yaml").with_sections(
        **split(**parallel),
        precision={"bf16": bf16},
        data={"mock_data": True, "num_workers": 0},
        training={"micro_batch_size": 2, "global_batch_size": 8, "seed": 5},
        checkpoint={"load": str(run), "finetune": True},
    )
    trainer = Trainer.build(config)
    trainer.load()
    bound = validation_bound(trainer)[0]
    root = run.parent / "saved"
    writer = CheckpointWriter(root)
    writer.save(trainer.model, trainer.optimizer, Position(step, 8 * step, 256 * step))
    trainer.train_step(trainer.source.step(0))
    return bound, config


LAYOUTS: dict[int, tuple[dict[str, Any], bool]] = {
    1: ({"tp": 2, "pp": 2}, False),
    2: ({"pp": 2, "virtual": 2}, False),
    3: ({"tp": 2, "sequence_parallel": True}, True),
    4: ({"tp": 2, "pp": 2}, True),
}
"""Layouts of four ranks and whether in bfloat16, by the step their checkpoint is saved as."""


def continue_at_layouts(rank: int, run: Path) -> dict[int, Any]:
    del rank
    return {
        step: continued(run, parallel, bf16=bf16, step=step)
        for step, (parallel, bf16) in LAYOUTS.items()
    }
