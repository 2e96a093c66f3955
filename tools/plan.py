"""Choose a layout for a model, a batch and a number of GPUs: what fits, how fast it should be.

python tools/plan.py --gpu H100 --gpus 256 --model-preset gidd-unif-3b --global-batch-size 512
python tools/plan.py --gpu B200 --gpus 64 --precision bf16 --top 3 --config recipe.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="All other flags, --config and --model-preset are those of pretrain_diffusion.py; "
        "of those for layout, batch and precision only --global-batch-size is kept.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--gpu", required=True, help="A100, H100, H200, B200 or GB200")
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument(
        "--precision", nargs="+", choices=("bf16", "fp8"), default=["bf16"],
        help="of the layers' products",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=5, help="layouts to show")
    parser.add_argument(
        "--dry-run", action="store_true", help="walk through the best layout's step for its memory"
    )
    parser.add_argument("--json", type=Path, help="write the plans to this file, too")
    return parser


def main() -> int:
    mine, rest = parser().parse_known_args()
    from megatron_ext.cli import parse
    from megatron_ext.planning.plan_report import table
    from megatron_ext.planning.planner import plan

    try:
        base = parse(rest)
        plans = plan(
            base.model, base.training.global_batch_size, mine.gpu, mine.gpus, base=base,
            precisions=mine.precision, limit=mine.top,
        )  # fmt: skip
        if not plans:
            sys.exit(
                f"error: nothing fits {mine.gpus} {mine.gpu} with --global-batch-size "
                f"{base.training.global_batch_size}: use more GPUs, or another batch."
            )
        print(table(plans))
        print(f"\nfastest:\n{plans[0].command(*rest)}")
        if mine.dry_run:
            from megatron_ext.planning.dry_report import describe
            from megatron_ext.planning.dry_run import dry_run

            rank = plans[0].memory.stage * (mine.gpus // plans[0].spread.pipeline)
            print(
                "", describe(dry_run(plans[0].config, mine.gpus, rank), plans[0].config), sep="\n"
            )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if mine.json is not None:
        mine.json.write_text(
            json.dumps([x.summary() | {"flags": x.flags} for x in plans], indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
