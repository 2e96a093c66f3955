"""Likelihood bounds, choices of completions, and the quality of samples.

python tools/evaluate.py --load runs/quickstart --input valid.jsonl
python tools/evaluate.py --load runs/quickstart --data-path data/valid --num-draws 32
python tools/evaluate.py --load model-hf --completions questions.jsonl --canvas --num-draws 128
python tools/evaluate.py --generative-perplexity --judge gpt2-folder --samples samples.jsonl
torchrun --nproc-per-node 8 tools/evaluate.py --load runs/big --tensor-model-parallel-size 4 ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.inference.evaluate import EvaluateConfig, evaluate  # noqa: E402
from megatron_ext.inference.likelihood import LikelihoodConfig  # noqa: E402


def run(
    config: tyro.conf.OmitArgPrefixes[EvaluateConfig],
    settings: tyro.conf.OmitArgPrefixes[LikelihoodConfig],
) -> None:
    """Likelihood bounds, choices of completions, and the quality of samples."""
    from megatron_ext.inference.generate import is_first_rank
    from megatron_ext.parallel.groups import shutdown_parallel

    try:
        report, text = evaluate(config, settings)
        if is_first_rank():
            print(text)
            if config.output is not None:
                config.output.parent.mkdir(parents=True, exist_ok=True)
                config.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finally:
        shutdown_parallel()


def main() -> None:
    try:
        tyro.cli(run, description=__doc__)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
