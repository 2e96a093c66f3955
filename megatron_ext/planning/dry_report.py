"""A dry run as a page of text."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config import Config
from megatron_ext.planning.dry_run import StepReport
from megatron_ext.planning.memory import CATEGORIES, Segment
from megatron_ext.planning.planner import MEMORY_BAND, PLANNED

_TIMELINE_ROWS = 12


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def describe(run: StepReport, config: Config) -> str:
    """Lines for a console."""
    return "\n".join(
        [*_heading(run, config), "", *_memory(run), "", *_flops(run), "", *_collectives(run), "",
         *_timeline(run.timeline)]
    )  # fmt: skip


def _heading(run: StepReport, config: Config) -> Iterator[str]:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    yield (
        f"rank {run.rank} of {run.world_size} ({run.device}): tp {tp}, pp {pp}, cp {cp}, "
        f"dp {run.world_size // parallel.model_parallel_size}; {PLANNED}"
    )
    yield (
        f"{run.num_parameters:,} parameters here, {run.num_microbatches} micro-batches of "
        f"{config.training.micro_batch_size} x {config.model.seq_length} tokens, "
        f"{run.host_reads} waits for the device per step; dry run took {run.seconds:.1f} s"
    )


def _memory(run: StepReport) -> Iterator[str]:
    yield f"{'memory, GiB':<16}{'at the peak':>12}{'between steps':>15}"
    for name in CATEGORIES:
        yield f"  {name:<14}{gib(run.bytes_at_peak[name]):>12}{gib(run.bytes_at_rest[name]):>15}"
    rest = sum(run.bytes_at_rest.values())
    yield f"  {'in all':<14}{gib(run.peak_bytes):>12}{gib(rest):>15}"
    yield (
        f"  tensors, +-{MEMORY_BAND:.0%}; an allocator's rounding and gaps and the libraries' own "
        "memory come on top"
    )


def _flops(run: StepReport) -> Iterator[str]:
    yield f"FLOPs of matrix products per step: {run.total_flops:.4g}"
    for kind, phases in sorted(run.flops.items()):
        parts = ", ".join(f"{phase} {flops:.4g}" for phase, flops in sorted(phases.items()))
        yield f"  {kind}: {parts}"
    moved = ", ".join(f"{phase} {gib(x)}" for phase, x in sorted(run.traffic_bytes.items()))
    yield f"GiB that other operations read and write: {moved}"


def _collectives(run: StepReport) -> Iterator[str]:
    yield f"{'collectives per step':<26}{'ranks':>7}{'times':>8}{'MiB each':>12}{'MiB in all':>13}"
    for row in run.collectives:
        each = row["num_bytes"] / 2**20
        name = f"{row['group']} {row['operation']}"
        yield (
            f"  {name:<24}{row['size']:>7}{row['count']:>8}{each:>12.3f}"
            f"{each * row['count']:>13.1f}"
        )
    if not run.collectives:
        yield "  none"


def _timeline(segments: list[Segment]) -> Iterator[str]:
    yield f"{'timeline, GiB':<20}{'start':>8}{'peak':>8}{'end':>8}"
    rows = [f"  {s.phase:<18}{gib(s.start_bytes):>8}{gib(s.peak_bytes):>8}{gib(s.end_bytes):>8}"
            for s in segments]  # fmt: skip
    if len(rows) > _TIMELINE_ROWS:
        half = _TIMELINE_ROWS // 2
        rows[half:-half] = [f"  ... {len(rows) - 2 * half} more (--json has all)"]
    yield from rows
