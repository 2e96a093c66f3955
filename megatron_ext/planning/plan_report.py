"""Plans as a table for a console."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.planning.planner import MEMORY_BAND, PLANNED, TIME_BAND, Plan


def table(plans: Sequence[Plan]) -> str:
    """A line for each plan, fastest first."""
    first = plans[0]
    heading = (
        f"{first.spread.gpus} {first.gpu.name}, {first.spread.global_batch} sequences of "
        f"{first.config.model.seq_length} tokens per step; {PLANNED}: memory +-{MEMORY_BAND:.0%}, "
        f"time +-{TIME_BAND:.0%}"
    )
    columns = (
        f"{'tp':>3}{'pp':>4}{'vpp':>4}{'cp':>4}{'dp':>6}{'micro':>6}  {'recompute':<10}"
        f"{'precision':<10}{'GiB':>6}{'s/step':>9}{'tokens/s':>12}{'per GPU':>9}{'MFU':>7}"
    )
    return "\n".join([heading, columns, *map(_line, plans)])


def _line(plan: Plan) -> str:
    spread = plan.spread
    return (
        f"{spread.tensor:>3}{spread.pipeline:>4}{spread.virtual:>4}{spread.context:>4}"
        f"{spread.data:>6}{spread.micro_batch:>6}  {spread.recompute:<10}{spread.precision:<10}"
        f"{plan.memory_bytes / 2**30:>6.1f}{plan.step_time_s:>9.3g}{plan.tokens_per_s:>12,.0f}"
        f"{plan.tokens_per_s / spread.gpus:>9,.0f}{plan.mfu:>7.1%}"
    )
