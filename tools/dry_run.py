"""Run the training step of any configuration at any size without a cluster, its memory or its time.

python tools/dry_run.py --config recipe.yaml --world-size 256
python tools/dry_run.py --world-size 64 --model-preset gidd-unif-3b --bf16 --global-batch-size 512 \
    --micro-batch-size 1 --tensor-model-parallel-size 2 --sequence-parallel
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="All other flags, --config and --model-preset are those of pretrain_diffusion.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the run")
    parser.add_argument(
        "--rank", type=int, nargs="+", help="ranks to walk through; one of the first and one of "
        "the last pipeline stage when absent, which need the most memory",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu",
        help="kind of device that the run is for: it decides how attention and loss work",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write everything to this file, too")
    return parser


def main() -> int:
    mine, rest = parser().parse_known_args()
    from megatron_ext.cli import parse
    from megatron_ext.planning.dry_report import describe
    from megatron_ext.planning.dry_run import dry_run

    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        config = parse(rest)
        last = mine.world_size - 1
        ends = [0] if config.parallel.pipeline_model_parallel_size == 1 else [0, last]
        runs = []
        for rank in mine.rank or ends:
            runs.append(dry_run(config, mine.world_size, rank, device=mine.device))
            print(describe(runs[-1], config), end="\n\n")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if mine.json is not None:
        mine.json.write_text(json.dumps([run.as_dict() for run in runs], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
