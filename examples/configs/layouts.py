"""Write docs/recipes.md: how to lay out every recipe on 8, 64 and 256 GPUs, by the planner.

    python examples/configs/layouts.py

A test compares the page with what this writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_ext.cli import load_config  # noqa: E402
from megatron_ext.planning.planner import plan  # noqa: E402
from megatron_ext.presets import MODEL_PRESETS  # noqa: E402

GPU, COUNTS, VOCABULARY = "H100", (8, 64, 256), 131_072
HEADING = """\
# Recipes and layouts

`examples/configs` has the paper's runs by size, each in BF16 and in FP8 (`-fp8`, through
Transformer Engine, first and last layer in BF16). They are written by
`examples/configs/generate.py`; a recipe leaves the layout open.

Below is the fastest layout that fits, chosen by `tools/plan.py` ([planning](planning.md)) for
H100s of 80 GB with 8 to a node, a vocabulary of 131,072 and the recipe's batch; give it as flags
after `--config`. **Every figure is planned, not measured**: no GPU has run this project. The bands
are the planner's, from published runs of other code bases; what it assumes about kernels and
networks is on its page. Figures of `-fp8` recipes are for all layers in FP8; their two layers in
BF16 take longer.

The sweep's sizes train on 64 sequences a step, which 64 and 256 GPUs can share only by cutting
layers and sequences into small pieces. Their planned steps of milliseconds are far from the runs
that the planner was fitted on; use fewer GPUs for them.

Written by `examples/configs/layouts.py`.

| recipe | GPUs | layout, as flags | GiB per GPU | s per step | tokens/s |
|---|---|---|---|---|---|
"""


def row(recipe: str, gpus: int) -> str:
    """A line of the table."""
    base = load_config(ROOT / f"examples/configs/{recipe}.yaml")
    base = base.with_sections(
        model={"vocab_size": VOCABULARY}, data={"mask_token_id": 3, "pad_token_id": 2}
    )
    precision = "fp8" if recipe.endswith("-fp8") else "bf16"
    plans = plan(
        base.model, base.training.global_batch_size, GPU, gpus, base=base,
        precisions=[precision], limit=1,
    )  # fmt: skip
    if not plans:
        return f"| {recipe} | {gpus} | none fits, or none divides its batch | | | |"
    facts = plans[0].summary()
    # The planner knows FP8 in all layers only; the recipe decides.
    flags = " ".join(flag for flag in plans[0].flags if flag != "--no-first-last-layers-bf16")
    return (
        f"| {recipe} | {gpus} | `{flags}` | {facts['memory_gib']} {facts['memory_band']} "
        f"| {facts['step_time_s']} {facts['time_band']} | {facts['tokens_per_s']:,.0f} |"
    )


def page() -> str:
    rows = [
        row(preset + kind, gpus)
        for preset in MODEL_PRESETS
        for kind in ("", "-fp8")
        for gpus in COUNTS
    ]
    return HEADING + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/recipes.md").write_text(page())
