"""Take one recorded step of a run again and print what each of its sequences did.

    python tools/replay_step.py --load runs/mine --step 1234
    torchrun --nproc-per-node 8 tools/replay_step.py --load runs/mine --step 1234 --output step.json

The layout is that of the run's config.yaml unless --layout gives tp, pp and cp.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", required=True, help="folder of the run")
    parser.add_argument("--step", required=True, type=int, help="step, as the log counts them")
    parser.add_argument(
        "--layout", type=int, nargs=3, metavar=("TP", "PP", "CP"), help="another layout"
    )
    parser.add_argument("--deterministic", action="store_true", help="as the training flag")
    parser.add_argument("--output", help="write everything as JSON to this file, too")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    from megatron_ext.cli import load_config
    from megatron_ext.parallel.groups import shutdown_parallel
    from megatron_ext.training.replay import is_first_rank, replay_step

    try:
        config = load_config(Path(options.load) / "config.yaml")
        if options.layout:
            tp, pp, cp = options.layout
            config = config.with_sections(
                parallel={
                    "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
                    "context_parallel_size": cp, "num_virtual_stages_per_pipeline_rank": 1,
                    "sequence_parallel": config.parallel.sequence_parallel and tp > 1,
                }
            )  # fmt: skip
        if options.deterministic:
            config = config.with_sections(resilience={"deterministic": True})
        config = config.with_sections(checkpoint={"load": options.load})
        replay = replay_step(config, options.step)
        if is_first_rank():
            print(
                f"step {replay.step}, from the checkpoint of step {replay.from_checkpoint}: loss "
                f"{replay.loss:.6f}, elbo {replay.elbo:.6f}, gradient norm {replay.grad_norm:.6f}"
                f"{'' if replay.applied else ', not finite'}"
            )
            for name, difference in replay.differences.items():
                print(f"recorded {name} {replay.recorded[name]:.6f}, off by {difference:.1e} of it")
            for report in sorted(replay.sequences, key=lambda report: -report.badness):
                print(f"  {report}")
            if options.output:
                Path(options.output).write_text(json.dumps(replay.as_dict(), indent=1) + "\n")
    except ValueError as error:
        print(f"replay_step.py: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown_parallel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
