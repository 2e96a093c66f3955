"""Time and memory of the loss, forward and backward: on given logits, fused with the head, growth.

On logits, against the definition in dense PyTorch as it reads (eager and compiled) and torch's
plain cross-entropy. Fused with the head, against the matrix products alone: the same three
products of the same chunks of tokens, adding the weight's gradient to the same float32 tensor, as
in training, with no loss between them; dense forms get a gradient of their own from autograd.
Growth is over a factor of 8 in tokens and in vocabulary.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.diffusion import MixingSchedule
from megatron_ext.diffusion.objective import dense_gidd_loss
from megatron_ext.kernels.cross_entropy import linear_cross_entropy
from megatron_ext.kernels.gidd_loss import gidd_loss, linear_gidd_loss
from megatron_ext.kernels.vocabulary.projection import HeadGradients, HeadOptions, chunks_of_logits
from megatron_ext.measure import Column, Report, Table, alternate, bench_parser, peak_memory
from megatron_ext.measure.machine import bytes_in
from megatron_ext.measure.memory import call_here, call_in_child

MASK_ID = 3
DENSE_TENSORS = 16
"""Of [T, V] in float32 that the dense form holds, generously."""
DENSE_LOGITS = 1 << 27
"""Up to which it is timed fused with the head: beyond, a call takes half a minute."""
DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16}
HERE = "megatron_ext.kernels.gidd_loss.bench"

ON_LOGITS = [(512, 131072), (512, 32768), (4096, 32768)]
FUSED = [(512, 131072, 512), (2048, 131072, 512), (2048, 131072, 1024), (2048, 32768, 512)]
GROWTH = [(512, 16384), (1024, 16384), (2048, 16384), (4096, 16384), (512, 32768), (512, 65536),
          (512, 131072)]  # fmt: skip

SHARED_COLUMNS = [
    Column("tokens", "T"),
    Column("vocabulary", "V"),
    Column("dtype", "dtype"),
    Column("way", "way"),
    Column("median_s", "ms", ".1f", 1e3),
    Column("lower_quartile_s", "25 %", ".1f", 1e3),
    Column("upper_quartile_s", "75 %", ".1f", 1e3),
]


def draw_tokens(num_tokens: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """xt, x0, log_snr; half of the tokens are masked, an eighth replaced."""
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randint(MASK_ID + 2, vocab_size, (num_tokens,), generator=rng)
    xt = torch.where(torch.arange(num_tokens) % 2 == 0, MASK_ID, x0)
    xt[1::8] = MASK_ID + 1
    return xt, x0, 18 * torch.rand(num_tokens, generator=rng) - 9


def hybrid(vocab_size: int) -> MixingSchedule:
    return MixingSchedule(vocab_size, MASK_ID, 0.0)


def masked(vocab_size: int) -> MixingSchedule:
    return MixingSchedule(vocab_size, MASK_ID, -1000.0)


def ways_on_logits(num_tokens: int, vocab_size: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """A forward and backward pass from `logits` to their gradient, by way."""
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(num_tokens, vocab_size, generator=rng).to(DTYPES[dtype]).requires_grad_()
    xt, x0, log_snr = draw_tokens(num_tokens, vocab_size)
    schedule = hybrid(vocab_size)
    compiled_dense = torch.compile(partial(dense_gidd_loss, schedule=schedule))
    compiled_entropy = torch.compile(F.cross_entropy)

    def gradient(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss_of(logits), logits)[0]

    def ours(impl: Any) -> Callable[[], Tensor]:
        return lambda: gradient(
            lambda x: gidd_loss(x, xt, x0, log_snr, schedule, impl=impl).loss.sum()
        )

    ways: dict[str, Callable[[], Any]] = {
        "cross-entropy": lambda: gradient(lambda x: F.cross_entropy(x, x0, reduction="sum")),
        "cross-entropy, compiled": lambda: gradient(
            lambda x: compiled_entropy(x, x0, reduction="sum")
        ),
        "hybrid, chunked": ours("chunked"),
        "hybrid, compiled": ours("compiled"),
    }
    if 4 * DENSE_TENSORS * num_tokens * vocab_size < bytes_in("/proc/meminfo", "MemAvailable"):
        ways["hybrid, dense"] = lambda: gradient(
            lambda x: dense_gidd_loss(x, xt, x0, log_snr, schedule).loss.sum()
        )
        ways["hybrid, dense compiled"] = lambda: gradient(
            lambda x: compiled_dense(x, xt, x0, log_snr).loss.sum()
        )
    return ways


def ways_fused(
    num_tokens: int, vocab_size: int, width: int, dtype: str
) -> dict[str, Callable[[], Any]]:
    """A forward and backward pass from hidden states and weight to their gradients, by way.

    All but the dense ones add the weight's to a float32 tensor.
    """
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, width, generator=rng).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(vocab_size, width, generator=rng) / 16).to(DTYPES[dtype])
    leaves = hidden, weight.requires_grad_()
    xt, x0, log_snr = draw_tokens(num_tokens, vocab_size)
    is_masked = xt == MASK_ID
    total = torch.full((vocab_size, width), 0.0)

    def products() -> Any:
        with torch.no_grad():
            options = HeadOptions(None, summed=True, sum_hidden_grad=False, weight_grad=total)
            grads = HeadGradients(*leaves, options)
            for part, rows in chunks_of_logits(*leaves, options):
                grads.add(rows, part)
            return grads.finished()

    def ours(schedule: MixingSchedule, impl: Any, summed: bool = True) -> Callable[[], Any]:
        def run() -> Any:
            loss = linear_gidd_loss(
                *leaves, xt, x0, log_snr, schedule, summed=summed, weight_grad=total, impl=impl
            ).loss
            return torch.autograd.grad(loss.sum(), leaves)

        return run

    def ours_masked() -> Any:
        rows = (x[is_masked] for x in (xt, x0, log_snr))
        loss = linear_gidd_loss(
            hidden[is_masked], weight, *rows, masked(vocab_size), summed=True, weight_grad=total
        ).loss
        return torch.autograd.grad(loss.sum(), leaves)

    def entropy() -> Any:
        loss = linear_cross_entropy(*leaves, x0, vocab_size, summed=True, weight_grad=total)
        return torch.autograd.grad(loss.sum(), leaves)

    def dense(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss_of(hidden @ weight.t()), leaves)

    ways: dict[str, Callable[[], Any]] = {
        "matrix products": products,
        "hybrid": ours(hybrid(vocab_size), "auto"),
        "hybrid, chunked": ours(hybrid(vocab_size), "chunked"),
        "hybrid, logits made again": ours(hybrid(vocab_size), "auto", summed=False),
        "masked, half of the tokens": ours_masked,
        "cross-entropy": entropy,
    }
    available = bytes_in("/proc/meminfo", "MemAvailable")
    num_logits = num_tokens * vocab_size
    if num_logits <= DENSE_LOGITS and 4 * DENSE_TENSORS * num_logits < available:
        ways["hybrid, dense"] = dense(
            lambda x: dense_gidd_loss(x, xt, x0, log_snr, hybrid(vocab_size)).loss.sum()
        )
    if 4 * 5 * num_logits < available:
        ways["cross-entropy, dense"] = dense(lambda x: F.cross_entropy(x, x0, reduction="sum"))
    return ways


BUILDERS = {"logits": ways_on_logits, "fused": ways_fused}


def times_of(kind: str, case: dict[str, Any], repetitions: int, max_seconds: float) -> Any:
    """Summaries by way, with the median ratio to the first way."""
    ways = BUILDERS[kind](**case)
    times = alternate(ways, repetitions, max_seconds=max_seconds)
    first = next(iter(times.values()))
    return {way: x.summary() | {"ratio": x.relative_to(first)} for way, x in times.items()}


def bytes_of(kind: str, case: dict[str, Any], way: str) -> int:
    """Peak memory of one call beyond its inputs and their gradients, compiled before."""
    ways = BUILDERS[kind](**case)
    ways[way]()
    dtype = DTYPES[case["dtype"]].itemsize
    if kind == "logits":
        gradients = case["num_tokens"] * case["vocab_size"]
    else:
        is_dense = way.endswith("dense")
        gradients = (case["num_tokens"] + is_dense * case["vocab_size"]) * case["width"]
    return max(peak_memory(ways[way]) - dtype * gradients, 0)


def measure(kind: str, case: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per way and allocator; both allocators for the first case on logits.

    Memory of the forms to compare with is measured in FP32.
    """
    call = call_here if arguments.quick else call_in_child
    rows = []
    is_first = kind == "logits" and (case["num_tokens"], case["vocab_size"]) == ON_LOGITS[0]
    for allocator in ("default", "kept") if is_first else ("default",):
        timing = {"kind": kind, "case": case, "repetitions": arguments.repetitions,
                  "max_seconds": arguments.max_seconds}  # fmt: skip
        times = call(f"{HERE}:times_of", timing, allocator=allocator)
        for way, summary in times.items():
            row = {"tokens": case["num_tokens"], "vocabulary": case["vocab_size"],
                   "dtype": case["dtype"], "width": case.get("width"), "way": way,
                   "allocator": allocator, **summary}  # fmt: skip
            is_ours = way in ("hybrid", "hybrid, chunked", "hybrid, compiled", "cross-entropy")
            if allocator == "default" and (case["dtype"] == "FP32" or is_ours):
                size = call(f"{HERE}:bytes_of", {"kind": kind, "case": case, "way": way})
                row["peak_bytes"] = size
                row["peak_of_logits"] = size / (4 * case["num_tokens"] * case["vocab_size"])
            rows.append(row)
    return rows


def growth(sizes: list[tuple[int, int]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Hybrid loss fused with a head of width 256, by tokens and by vocabulary."""
    call = call_here if arguments.quick else call_in_child
    rows = []
    for num_tokens, vocab_size in sizes:
        case = {"num_tokens": num_tokens, "vocab_size": vocab_size, "width": 256, "dtype": "FP32"}
        timing = {"case": case, "repetitions": arguments.repetitions}
        row = call(f"{HERE}:hybrid_alone", timing)
        size = call(f"{HERE}:bytes_of", {"kind": "fused", "case": case, "way": "hybrid"})
        rows.append({"tokens": num_tokens, "vocabulary": vocab_size, "dtype": "FP32",
                     "way": "hybrid", "peak_bytes": size, **row})  # fmt: skip
    return rows


def hybrid_alone(case: dict[str, Any], repetitions: int) -> dict[str, Any]:
    ways = ways_fused(**case)
    return alternate({"hybrid": ways["hybrid"]}, repetitions)["hybrid"].summary()


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of time and memory between the ends of each range."""
    results = []
    for name, other in (("tokens", "vocabulary"), ("vocabulary", "tokens")):
        least = min(row[other] for row in rows)
        line = sorted((row for row in rows if row[other] == least), key=lambda row: row[name])
        first, last = line[0], line[-1]
        span = math.log(last[name] / first[name])
        time = math.log(last["median_s"] / first["median_s"]) / span
        change = (last["peak_bytes"] - first["peak_bytes"]) / 2**20
        results.append({"range": f"{name} {first[name]} to {last[name]}", "exponent": time,
                        "memory_change_mib": change})  # fmt: skip
    return results


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=15.0, help="per case of a table")
    arguments = parser.parse_args()
    on_logits, fused, sizes = ON_LOGITS, FUSED, GROWTH
    if arguments.quick:
        on_logits, fused, sizes = [(16, 512)], [(32, 512, 16)], [(16, 512), (32, 512), (16, 1024)]
        arguments.repetitions = 1
    logits_rows, fused_rows = [], []
    for dtype in ("FP32",) if arguments.quick else DTYPES:
        for tokens, vocabulary in on_logits:
            case = {"num_tokens": tokens, "vocab_size": vocabulary, "dtype": dtype}
            logits_rows += measure("logits", case, arguments)
        for tokens, vocabulary, width in fused:
            case = {"num_tokens": tokens, "vocab_size": vocabulary, "width": width, "dtype": dtype}
            fused_rows += measure("fused", case, arguments)
    grown = growth(sizes, arguments)
    memory = [Column("peak_bytes", "peak MiB", ".0f", 2**-20),
              Column("peak_of_logits", "of FP32 logits", ".3f")]  # fmt: skip
    tables = [
        Table("On given logits", [*SHARED_COLUMNS, Column("ratio", "over cross-entropy", ".2f"),
              Column("allocator", "allocator"), *memory], logits_rows),
        Table("Fused with the head", [Column("width", "h"), *SHARED_COLUMNS,
              Column("ratio", "over the products", ".2f"), *memory], fused_rows),
        Table("Growth, width 256", [*SHARED_COLUMNS, memory[0]], grown),
        Table("Growth over each range", [Column("range", "range"),
              Column("exponent", "time grows with the power", ".2f"),
              Column("memory_change_mib", "peak changes by MiB", ".0f")], slopes(grown)),
    ]  # fmt: skip
    Report("loss", vars(arguments), tables).finish(arguments.json)


if __name__ == "__main__":
    main()
