"""What the benches share: the machine, times, memory, matrix rates, tables and their page.

Every bench is a module `bench*.py` beside what it measures, prints tables and writes JSON:

    parser = bench_parser(__doc__)                    # --quick, --json
    times = alternate({"ours": ours, "dense": dense}, repetitions=7)
    report = Report("loss", vars(arguments), [Table("Loss", columns, rows)])
    report.finish(arguments.json)

`make bench` writes build/bench/NAME.json for each and renders them into docs/performance.md.
"""

from megatron_ext.measure.machine import describe_machine, format_machine
from megatron_ext.measure.matrices import (
    MatrixProduct,
    linear_products,
    multiply,
    multiply_elements,
    multiply_flops,
)
from megatron_ext.measure.memory import Allocator, call_here, call_in_child, peak_memory
from megatron_ext.measure.report import Column, Report, Table, bench_parser, render
from megatron_ext.measure.timing import Timing, alternate

__all__ = [
    "Allocator",
    "Column",
    "MatrixProduct",
    "Report",
    "Table",
    "Timing",
    "alternate",
    "bench_parser",
    "call_here",
    "call_in_child",
    "describe_machine",
    "format_machine",
    "linear_products",
    "multiply",
    "multiply_elements",
    "multiply_flops",
    "peak_memory",
    "render",
]
