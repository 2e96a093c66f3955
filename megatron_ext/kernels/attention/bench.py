"""Time and memory of attention with soft cap, key/value token and prompts, by implementation.

    python -m megatron_ext.kernels.attention.bench [--quick] [--json FILE]

Half of the sequences begin with a prompt of a quarter of their length. `matrix products` are the
two of the forward and the five of the backward pass (scores once more) over all keys, in blocks of
512 queries. `torch SDPA, plain` is torch's fused attention with neither cap nor token nor prompts:
another function, for orientation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.kernels.attention import attention
from megatron_ext.measure import (
    Column,
    MatrixProduct,
    Report,
    Table,
    alternate,
    bench_parser,
    multiply,
    peak_memory,
)
from megatron_ext.measure.memory import call_here, call_in_child

SOFTCAP = 30.0
BLOCK = 512
DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16}
HERE = "megatron_ext.kernels.attention.bench"
CASES = [(2, 512, 8, 64), (2, 2048, 8, 64), (1, 2048, 12, 128), (1, 4096, 8, 64)]
"""Sequences, their length, heads, width of a head."""

COLUMNS = [
    Column("sequences", "b"),
    Column("length", "s"),
    Column("heads", "a"),
    Column("head_width", "d"),
    Column("dtype", "dtype"),
    Column("way", "way"),
    Column("median_s", "ms", ".1f", 1e3),
    Column("lower_quartile_s", "25 %", ".1f", 1e3),
    Column("upper_quartile_s", "75 %", ".1f", 1e3),
    Column("ratio", "over the products", ".2f"),
    Column("peak_bytes", "peak MiB", ".0f", 2**-20),
]


def prompts(sequences: int, length: int) -> Tensor:
    """Visibility [b, 2, s] with a prompt of a quarter of every second sequence."""
    result = torch.ones(sequences, 2, length, dtype=torch.int32)
    result[:, 1] = 0
    result[::2, 0, : length // 4] = 0
    return result


def products(case: dict[str, Any], *, trains: bool) -> list[MatrixProduct]:
    """Of all heads, in blocks of queries."""
    length, width = case["length"], case["head_width"]
    block = min(BLOCK, length)
    times = case["sequences"] * case["heads"] * (length // block)
    scores = MatrixProduct(block, length, width, right_transposed=True, times=times)
    weighted = MatrixProduct(block, width, length, times=times)
    by_key = MatrixProduct(length, width, block, left_transposed=True, times=times)
    forward = [scores, weighted]
    return [*forward, scores, scores, weighted, by_key, by_key] if trains else forward


def ways_of(case: dict[str, Any], *, trains: bool) -> dict[str, Callable[[], Any]]:
    """Calls on the same inputs, by way; forward and backward where `trains`."""
    sequences, length, heads, width = (
        case[name] for name in ("sequences", "length", "heads", "head_width")
    )
    dtype = DTYPES[case["dtype"]]
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype).requires_grad_(trains)

    inputs = [draw(length, sequences, heads, width) for _ in range(3)]
    token = [draw(heads, width) for _ in range(2)]
    grad = torch.randn(length, sequences, heads, width, generator=rng).to(dtype)
    visibility = prompts(sequences, length)

    def call(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
        if not trains:
            return torch.no_grad()(function)
        return lambda: torch.autograd.grad(function(), leaves, grad)

    def ours(impl: Any) -> Callable[[], Any]:
        def run() -> Tensor:
            return attention(
                *inputs, visibility, softcap=SOFTCAP, k_bias=token[0], v_bias=token[1], impl=impl
            )

        return call(run, [*inputs, *token])

    def plain() -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in inputs)
        return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)

    ways = {
        "matrix products": multiply(products(case, trains=trains), dtype),
        "blocked": ours("blocked"),
        "reference": ours("reference"),
        "torch SDPA, plain": call(plain, inputs),
    }
    if not trains:
        ways["flex, compiled"] = ours("flex")
    return ways


def times_of(
    case: dict[str, Any], trains: bool, repetitions: int, max_seconds: float
) -> dict[str, Any]:
    """Summaries by way, with the median ratio to the products."""
    times = alternate(ways_of(case, trains=trains), repetitions, max_seconds=max_seconds)
    first = times["matrix products"]
    return {way: x.summary() | {"ratio": x.relative_to(first)} for way, x in times.items()}


def bytes_of(case: dict[str, Any], trains: bool, way: str) -> int:
    """Peak memory of a call, output and gradients included."""
    call = ways_of(case, trains=trains)[way]
    call()
    return peak_memory(call)


def measure(case: dict[str, Any], trains: bool, arguments: argparse.Namespace) -> list[Any]:
    """A row per way."""
    child = call_here if arguments.quick else call_in_child
    target = {"case": case, "trains": trains}
    timing = {"repetitions": arguments.repetitions, "max_seconds": arguments.max_seconds}
    # As in training: freed memory stays with the process.
    times = child(f"{HERE}:times_of", target | timing, allocator="kept")
    rows = []
    for way, summary in times.items():
        row = {**case, "way": way, **summary}
        if way != "matrix products":
            row["peak_bytes"] = child(f"{HERE}:bytes_of", target | {"way": way})
        rows.append(row)
    return rows


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--max-seconds", type=float, default=12.0, help="per case of a table")
    arguments = parser.parse_args()
    sizes = [(2, 32, 2, 16)] if arguments.quick else CASES
    if arguments.quick:
        arguments.repetitions = 1
    names = ("sequences", "length", "heads", "head_width")
    cases = [
        dict(zip(names, size, strict=True)) | {"dtype": dtype} for dtype in DTYPES for size in sizes
    ]
    training, inference = (
        [row for case in cases for row in measure(case, trains, arguments)]
        for trains in (True, False)
    )
    tables = [
        Table("Attention, forward and backward", COLUMNS, training),
        Table("Attention, forward alone", COLUMNS, inference),
    ]
    Report("attention", vars(arguments), tables).finish(arguments.json)


if __name__ == "__main__":
    main()
