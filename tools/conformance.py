"""Prove a machine, backend, precision or layout against the reference's recorded numbers.

    python tools/conformance.py --golden tests/golden/dev
    torchrun --nproc-per-node 4 tools/conformance.py --golden tests/golden/dev \
        --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2

Prints one table: check, worst error, tolerance, verdict; then what was skipped and why, then a
summary. Exit codes: 0 all passed, 1 a check failed, 2 wrong arguments or nothing to check (torchrun
itself turns every failure into 1).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.config import ParallelConfig, PrecisionConfig, require  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare the training code at a layout and precision with recorded numbers of the reference.

    Exit codes: 0 all passed, 1 a check failed, 2 wrong arguments or nothing to check.
    """

    golden: Path
    """Folder of recorded numbers in the format of tests/golden/dev; everything that is not
    arithmetic (vocabulary, mask id, shifts, model shapes, counts) is read from its files."""
    micro_batch_size: int = 1
    """Sequences per rank and forward pass in the recorded optimizer steps."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)

    def __post_init__(self) -> None:
        require(
            self.micro_batch_size > 0, "micro_batch_size", self.micro_batch_size,
            "give a number above zero.",
        )  # fmt: skip


def main() -> int:
    """Arguments, checks, table on rank 0, exit code."""
    is_first = os.environ.get("RANK", "0") == "0"
    flags = Annotated[Arguments, tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands]
    try:
        arguments = tyro.cli(flags, prog="conformance.py")  # type: ignore[arg-type]

        from megatron_ext.conformance.run import open_folder, run, session_config, start_session
        from megatron_ext.parallel.groups import shutdown_parallel

        golden = open_folder(arguments.golden)
        config = session_config(arguments.parallel, arguments.precision, arguments.micro_batch_size)
        session = start_session(golden, config)
    except ValueError as error:
        if is_first:
            print(f"conformance.py: {error}", file=sys.stderr)
        return 2
    try:
        text, code = run(session)
        if is_first:
            print(text, flush=True)
        # torchrun ends the other ranks as soon as one reports a failure.
        torch.distributed.barrier()
    finally:
        shutdown_parallel()
    return code


if __name__ == "__main__":
    sys.exit(main())
