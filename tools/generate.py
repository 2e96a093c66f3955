"""Sample text from a training run.

python tools/generate.py --load runs/quickstart --num-samples 2 --steps 64
python tools/generate.py --load runs/quickstart --prompt "The state of the union"
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.inference.sampling import SamplingConfig, until_end  # noqa: E402


def run(
    load: str,
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig],
    prompt: str = "",
    num_samples: int = 1,
    length: int | None = None,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
) -> None:
    """Sample text from a training run.

    Args:
        load: the run's --save folder.
        sampling: how to sample.
        prompt: text to continue.
        num_samples: sequences to draw.
        length: tokens of a sequence, prompt included; the training length when absent.
        ckpt_step: checkpoint to use; the latest when absent.
        tokenizer_model: where the tokenizer is, if not where it was in training.
    """
    from megatron_ext.inference.load import load_run
    from megatron_ext.inference.sampling import sample_ancestral

    loaded = load_run(load, ckpt_step, tokenizer_model)
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(prompt) if prompt else []
    length = length or loaded.config.model.seq_length
    if length > loaded.config.model.seq_length:
        raise ValueError(
            f"--length is {length}: the model was trained on {loaded.config.model.seq_length}."
        )

    def progress(steps: range) -> tqdm:
        return tqdm(steps, desc="sample", unit="step", disable=None)

    samples = sample_ancestral(
        loaded.denoise, loaded.schedule, [ids] * num_samples, length, sampling, progress
    )
    for number, sample in enumerate(samples.tolist()):
        new = until_end(sample, len(ids), tokenizer.eos_id)
        text = tokenizer.decode([id for id in new if id != tokenizer.pad_id])
        print(f"--- sample {number} of step {loaded.step} ---\n{prompt}{text}\n")


def main() -> None:
    try:
        tyro.cli(run, description=__doc__)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
