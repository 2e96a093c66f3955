"""Sample text from a training run or a Hugging Face folder.

python tools/generate.py --load runs/quickstart --num-samples 2 --steps 64
python tools/generate.py --load runs/quickstart --prompt "The state of the union"
torchrun --nproc-per-node 2 tools/generate.py --load runs/quickstart --tensor-model-parallel-size 2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.hf.steps_gidd import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to sample from, and where samples go."""

    load: str
    """A run's --save folder, or a Hugging Face folder."""
    prompt: tuple[str, ...] = ("",)
    """Texts to continue; each <|mask|> in one is a token to fill in."""
    input: Path | None = None
    """JSON lines with a "prompt" each, instead of --prompt."""
    output: Path | None = None
    """Write JSON lines with "prompt", "text" (the prompt in it) and "ids" (the new tokens) instead
    of printing."""
    num_samples: int = 1
    """Samples of each prompt."""
    batch_size: int = 8
    """Sequences denoised together."""
    trace: Path | None = None
    """Write every step of the first batch as JSON, for tools/visualize_denoising.py."""
    ckpt_step: int | None = None
    """Checkpoint of a run to use; the latest when absent."""
    tokenizer_model: str | None = None
    """Where the tokenizer is, if not where it was in training."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks in a pipeline of layers."""


def run(
    config: tyro.conf.OmitArgPrefixes[GenerateConfig],
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig],
) -> None:
    """Sample text from a training run or a Hugging Face folder."""
    from megatron_ext.config import ParallelConfig
    from megatron_ext.inference.generate import generate, read_prompts, write_samples
    from megatron_ext.inference.load import load_model
    from megatron_ext.parallel.groups import shutdown_parallel

    prompts = read_prompts(config.input) if config.input is not None else list(config.prompt)
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
    )
    try:
        model = load_model(config.load, config.ckpt_step, config.tokenizer_model, parallel)
        samples = generate(
            model, [text for text in prompts for _ in range(config.num_samples)], sampling,
            batch_size=config.batch_size, trace=config.trace,
        )  # fmt: skip
        write_samples(samples, model.name, config.output)
    finally:
        shutdown_parallel()


def main() -> None:
    try:
        tyro.cli(run, description=__doc__)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
