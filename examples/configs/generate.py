"""Write the recipes of the paper's models, in BF16 and FP8, beside this file.

    python examples/configs/generate.py

A test compares the files with what this writes: change them here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """What sets a run of the paper apart from the others."""

    preset: str
    title: str
    objective: str = "hybrid"
    lr: float = 0.3
    adam_beta2: float = 0.99
    cooldown: float = 0
    steps: int = 100_000
    batch: int = 64
    micro_batch: int = 8
    note: str = ""


def _large(preset: str, kind: str, lr: float, steps: int, batch: int, micro_batch: int) -> Recipe:
    size = preset.rpartition("-")[2].upper()
    note = (
        f"# The paper does not state this run's learning rate; {lr} follows from its fitted law\n"
        "# 10^-2.06 B^0.3412, with B the batch in tokens.\n"
    )
    title = f"GIDD {size}, {kind} noise: {batch} x 2048 tokens x {steps:,} steps"
    return Recipe(preset, title, kind, lr, 0.98, 0.2, steps, batch, micro_batch, note)


def _sweep(size: int, micro_batch: int) -> Recipe:
    which = "the smallest size" if size == 25 else "a size"
    title = f"GIDD {size}M, balanced noise: {which} of the paper's sweep, at batch 64"
    return Recipe(f"gidd-{size}m", title, micro_batch=micro_batch)


RECIPES = (
    _sweep(25, 8),
    _sweep(49, 8),
    _sweep(85, 8),
    _sweep(202, 8),
    _sweep(567, 4),
    _large("gidd-mask-3b", "masked", 1.44, 23_500, 1536, 4),
    _large("gidd-unif-3b", "uniform", 1.44, 22_500, 1536, 4),
    _large("gidd-unif-10b", "uniform", 1.82, 29_000, 3072, 2),
)

FLOAT8 = """
fp8:
  fp8_format: hybrid
  fp8_recipe: tensorwise
  first_last_layers_bf16: true
"""


def text(recipe: Recipe, *, is_fp8: bool) -> str:
    """The file of a recipe."""
    name = recipe.preset + ("-fp8" if is_fp8 else "")
    objective = f"  objective: {recipe.objective}\n"
    objective += "  mixing_shift: 0.0\n" if recipe.objective == "hybrid" else ""
    engine = "  transformer_impl: transformer_engine\n" if is_fp8 else ""
    about = (
        "# FP8 through Transformer Engine; --transformer-impl local --fp8-emulate has its\n"
        "# numbers anywhere. The paper's runs were not in FP8, and this has not run on a GPU.\n"
    )
    return f"""\
# {recipe.title}{", in FP8" if is_fp8 else ""}
#
# torchrun --nproc-per-node 8 pretrain_diffusion.py --config examples/configs/{name}.yaml \\
#     --data-path PREFIX --tokenizer-model FOLDER --save RUN --load RUN
#
# The noise is the paper's text; docs/noise.md lists where its code differs.
{recipe.note}{about if is_fp8 else ""}model_preset: {recipe.preset}

model:
  seq_length: 2048

diffusion:
{objective}  loss_normalization: sum

noise:
  p_independent: 0.5
  p_linear: 0.0
  p_prompt: 0.2
  max_prompt_fraction: 1.0
  prompt_length_law: paper
  p_infill: 0.0
  max_empty_fraction: 0.2
  uniform_noise_includes_mask: false

optimizer:
  optimizer: laprop
  lr: {recipe.lr}
  adam_beta1: 0.9
  adam_beta2: {recipe.adam_beta2}
  weight_decay: 0.0
  clip_grad: 0.0
  parameterization: completep
  lr_decay_style: WSD
  lr_warmup_iters: 2000
  lr_wsd_decay_iters: {recipe.cooldown}

precision:
  bf16: true
  compile_layers: true
{engine}{FLOAT8 if is_fp8 else ""}
training:
  train_iters: {recipe.steps}
  global_batch_size: {recipe.batch}
  micro_batch_size: {recipe.micro_batch}
"""


def files() -> dict[str, str]:
    """Every recipe by file name."""
    return {
        f"{recipe.preset}{'-fp8' if is_fp8 else ''}.yaml": text(recipe, is_fp8=is_fp8)
        for recipe in RECIPES
        for is_fp8 in (False, True)
    }


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content)
