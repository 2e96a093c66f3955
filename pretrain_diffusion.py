"""Pretrain a discrete diffusion language model.

    torchrun --nproc-per-node 8 pretrain_diffusion.py --config examples/configs/gidd-unif-3b.yaml
    python pretrain_diffusion.py --config examples/quickstart/pretrain.yaml --train-iters 50

`--help` lists every flag. Exit codes are those of `megatron_ext.training.guards`.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Configuration, run, exit code; a contradiction in the input is one line on stderr."""
    from megatron_ext.cli import parse

    try:
        config = parse()
    except ValueError as error:
        print(f"pretrain_diffusion.py: {error}", file=sys.stderr)
        return 2

    from megatron_ext.parallel.cpu import keep_freed_memory
    from megatron_ext.parallel.groups import shutdown_parallel
    from megatron_ext.training.guards import process_code
    from megatron_ext.training.loop import train

    keep_freed_memory()
    try:
        return process_code(train(config))
    except ValueError as error:
        print(f"pretrain_diffusion.py: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown_parallel()


if __name__ == "__main__":
    sys.exit(main())
