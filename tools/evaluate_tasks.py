r"""lm-evaluation-harness with the model `gidd`; arguments are those of the `lm_eval` command.

python tools/evaluate_tasks.py run --model gidd --tasks arc_easy --output_path results \
    --model_args load=runs/big,num_draws=128,canvas=True
torchrun --nproc-per-node 8 tools/evaluate_tasks.py run --model gidd --model_args load=folder ...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; install lm_eval, or megatron-diffusion[lm_eval].")

    import megatron_ext.inference.lm_eval_model  # noqa: F401
    from megatron_ext.parallel.groups import shutdown_parallel

    try:
        cli_evaluate()
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        shutdown_parallel()


if __name__ == "__main__":
    main()
