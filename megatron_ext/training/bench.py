"""Training step: against the same model in plain torch, other models, and its matrix products.

    python -m megatron_ext.training.bench [--quick] [--json FILE]

`hybrid` and `masked` are this project's step (one rank, gloo) with those objectives, the first also
with `--compile-layers`; the others are those of `training.comparison`, so far as memory holds them
beside each other. The floor is the model's FLOPs (forward and backward, head included) at the rate
at which this machine multiplies the matrices of the step, measured in turn with the steps. MFU is
the share of the rate of one large square product of the same type. Times are with freed memory
kept, as the training program runs, and with glibc's default, for sizes after the first those of the
hybrid and dense forms alone. Peak memory is what a step needs beyond weights, gradients and
optimizer state, each way in a process of its own, with freed memory given back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch

from megatron_ext.config import Config, ModelConfig
from megatron_ext.data.batches import BatchSource, RankPosition
from megatron_ext.data.mock import MockDataset
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.measure import (
    Allocator,
    Column,
    MatrixProduct,
    Report,
    Table,
    Timing,
    alternate,
    bench_parser,
    call_here,
    call_in_child,
    linear_products,
    multiply,
    multiply_elements,
    multiply_flops,
    peak_memory,
)
from megatron_ext.measure.machine import bytes_in
from megatron_ext.presets import MODEL_PRESETS, total_parameters
from megatron_ext.scaling.flops import model_flops_per_token
from megatron_ext.training.comparison import Rival, RivalStep
from megatron_ext.training.loop import Trainer
from megatron_ext.training.step_profile import GROUPS, profile_steps

COMPILED = "hybrid, compiled layers"
OURS = ("hybrid", COMPILED, "masked")
WAYS = (*OURS, *get_args(Rival))
COMPARED = ("hybrid", "dense", "dense, compiled loss")
"""Timed with glibc's default for every size."""
MODULE = "megatron_ext.training.bench"
SEQUENCES = 2
SHAPE = {"seq_length": 512}
QUICK_MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "seq_length": 64}
MASK_ID, PAD_ID = 3, 2

STEP_COLUMNS = [
    Column("model", "model"),
    Column("vocab_size", "vocabulary", ",d"),
    Column("precision", "type"),
    Column("allocator", "freed memory"),
    Column("way", "way"),
    Column("median_s", "s", ".3g"),
    Column("lower_quartile_s", "lower quartile", ".3g"),
    Column("upper_quartile_s", "upper quartile", ".3g"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("times_floor", "time / floor", ".2f"),
    Column("times_floor_fp32", "time / FP32 floor", ".2f"),
    Column("times_hybrid", "time / hybrid", ".2f"),
    Column("mfu", "MFU %", ".0f", 100),
    Column("peak_bytes", "memory, MiB", ",.0f", 2**-20),
]
PROFILE_COLUMNS = [
    Column("model", "model"),
    Column("vocab_size", "vocabulary", ",d"),
    Column("precision", "type"),
    Column("total_s", "step, s", ".3g"),
    *(Column(group, f"{group}, %", ".1f", 100) for group in GROUPS),
]
INPUT_COLUMNS = [
    Column("model", "model"),
    Column("vocab_size", "vocabulary", ",d"),
    Column("precision", "type"),
    Column("input_ms", "preparing a batch, ms", ".3f"),
    Column("input_share", "% of the step", ".2f", 100),
]


def run_config(case: dict[str, Any], way: str = "hybrid") -> Config:
    """The run that a case measures; the noise is the default recipe's."""
    return Config().with_sections(
        model={**case["shape"], "vocab_size": case["vocab_size"]},
        diffusion={"objective": "masked" if way == "masked" else "hybrid"},
        data={
            "mock_data": True, "mask_token_id": MASK_ID, "pad_token_id": PAD_ID, "num_workers": 0,
        },
        optimizer={"clip_grad": 0.0},
        precision={"bf16": case["precision"] == "bf16", "compile_layers": way == COMPILED},
        training={
            "micro_batch_size": case["sequences"], "global_batch_size": case["sequences"],
        },
    )  # fmt: skip


def build_step(way: str, case: dict[str, Any]) -> tuple[Callable[[], object], int]:
    """A training step on one fixed batch, and the bytes of gradients that are made inside it."""
    config = run_config(case, way)
    if way in OURS:
        trainer = Trainer.build(config)
        batches = trainer.source.step(0)
        return lambda: trainer.train_step(batches), 0
    (batch,) = source_of(config).step(0)
    bf16 = case["precision"] == "bf16"
    rival = RivalStep(way, config.model, schedule_of(config), bf16=bf16)  # type: ignore[arg-type]
    return lambda: rival(batch), 4 * rival.num_parameters


def schedule_of(config: Config) -> MixingSchedule:
    assert config.model.vocab_size is not None
    return MixingSchedule(config.model.vocab_size, MASK_ID, config.diffusion.shift)


def source_of(config: Config) -> BatchSource:
    """The run's micro-batches."""
    schedule = schedule_of(config)
    data = MockDataset(schedule.vocab_size, config.model.seq_length, config.training.seed)
    return BatchSource(data, schedule, config, RankPosition(0, 1, 0, 1), PAD_ID)


def products_of_step(model: ModelConfig, vocab_size: int, num_tokens: int) -> list[MatrixProduct]:
    """Products of all linear layers and the head, forward and backward."""
    h, f, width = model.hidden_size, model.ffn_width, model.head_width * model.num_attention_heads
    widths = [(h, 3 * width), (width, h), (h, f), (f, h)]
    layers = [x for i, o in widths for x in linear_products(num_tokens, i, o, model.num_layers)]
    return layers + linear_products(num_tokens, h, vocab_size)


def bytes_needed(way: str, case: dict[str, Any]) -> tuple[int, int]:
    """Rough memory of a way: what stays between its steps, and what a step needs beside that."""
    model = run_config(case).model
    logits = 4 * case["sequences"] * model.seq_length * case["vocab_size"]
    copies = 1 if way in OURS else {"modernbert": 4, "llama": 4}.get(way, 14)
    stays = 18 if way in OURS else 16
    return stays * total_parameters(model, case["vocab_size"]), copies * logits + 2**30


def groups_that_fit(case: dict[str, Any], memory: float) -> list[list[str]]:
    """The ways in groups that memory holds at the same time, `hybrid` first in each.

    Ways of a group take turns, so that one step at a time needs memory. A way that does not fit
    beside `hybrid` is left out.
    """
    groups: list[list[str]] = []
    for way in case["ways"]:
        if way == "hybrid":
            continue
        for group in [*groups, ["hybrid"]]:
            stays, steps = zip(*(bytes_needed(x, case) for x in [*group, way]), strict=True)
            if sum(stays) + max(steps) <= memory:
                if group not in groups:
                    groups.append(group)
                group.append(way)
                break
    return groups or [["hybrid"]]


def time_case(case: dict[str, Any]) -> dict[str, Any]:
    """Times of the case's ways, of the step's matrix products, and of preparing a batch."""
    config = run_config(case)
    num_tokens = case["sequences"] * config.model.seq_length
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    products = products_of_step(config.model, case["vocab_size"], num_tokens)
    square = [MatrixProduct(case["square"], case["square"], case["square"])]
    ways: dict[str, Callable[[], object]] = {way: build_step(way, case)[0] for way in case["ways"]}
    ways |= {"products": multiply(products, dtype), "square": multiply(square, dtype)}
    if dtype != torch.float32:
        ways["products, fp32"] = multiply(products, torch.float32)
    source = source_of(config)
    ways["input"] = lambda: source.step(1)
    times = alternate(ways, case["repetitions"], max_seconds=case["max_seconds"])
    flops = model_flops_per_token(config.model, case["vocab_size"]) * num_tokens
    all_flops = flops / multiply_flops(products)
    floor = scaled(times["products"], all_flops)
    floor_fp32 = scaled(times.get("products, fp32", times["products"]), all_flops)
    peak = multiply_flops(square) / min(times["square"].seconds)
    rows = [
        {
            "way": way,
            **timing.summary(),
            "tokens_per_s": num_tokens / timing.median,
            "times_floor": timing.relative_to(floor),
            "times_floor_fp32": timing.relative_to(floor_fp32),
            "times_hybrid": timing.relative_to(times["hybrid"]),
            "mfu": flops / timing.median / peak,
        }
        for way, timing in [*((way, times[way]) for way in case["ways"]), ("floor", floor)]
    ]
    share = times["input"].relative_to(times["hybrid"])
    return {
        "rows": rows,
        "input": {"input_ms": 1000 * times["input"].median, "input_share": share},
        "products_flops_per_s": multiply_flops(products) / times["products"].median,
        "square_flops_per_s": peak,
    }


def scaled(timing: Timing, factor: float) -> Timing:
    return replace(timing, seconds=tuple(factor * x for x in timing.seconds))


def memory_case(case: dict[str, Any], way: str) -> int | None:
    """Peak bytes of a second step beyond weights, gradients and optimizer state, if it fits."""
    if sum(bytes_needed(way, case)) > 0.9 * bytes_in("/proc/meminfo", "MemAvailable"):
        return None
    step, gradients = build_step(way, case)
    step()
    return max(peak_memory(step) - gradients, 0)


def profile_case(case: dict[str, Any]) -> dict[str, float]:
    """Seconds per step by what they are for."""
    trainer = Trainer.build(run_config(case))
    batches = trainer.source.step(0)
    return profile_steps(
        lambda: trainer.train_step(batches), trainer.model[0].module, case["repetitions"]
    )


def cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Model x vocabulary x precision; models but the first at the first vocabulary alone."""
    if arguments.quick:
        shared = {"sequences": SEQUENCES, "repetitions": 1, "max_seconds": 10, "square": 128}
        ways = [x for x in WAYS if "compiled" not in x]
        shape = {"model": "tiny", "shape": QUICK_MODEL, "vocab_size": 512, "ways": ways}
        return [{**shape, **shared, "precision": "bf16"}]
    shared = {"sequences": SEQUENCES, "repetitions": 5, "max_seconds": 120, "square": 4096}
    return [
        {
            "model": name, "shape": {**MODEL_PRESETS[name], **SHAPE}, "ways": list(WAYS),
            "vocab_size": vocab_size, "precision": precision, **shared,
        }
        for name in arguments.models
        for vocab_size in arguments.vocab_sizes
        for precision in arguments.precisions
        if arguments.models[0] == name or arguments.vocab_sizes[0] == vocab_size
    ]  # fmt: skip


def time_in_groups(
    case: dict[str, Any], allocator: Allocator, call: Callable[..., Any]
) -> dict[str, Any]:
    """`time_case` in as many processes as memory demands; of what repeats, the first counts."""
    model = run_config(case).model
    num_tokens = case["sequences"] * model.seq_length
    products = products_of_step(model, case["vocab_size"], num_tokens)
    # In both types, if the case is in BF16.
    held = (6 if case["precision"] == "bf16" else 4) * multiply_elements(products)
    free = 0.85 * bytes_in("/proc/meminfo", "MemAvailable") - held
    rows: dict[str, dict[str, Any]] = {}
    results = []
    for group in groups_that_fit(case, free):
        arguments = {"case": {**case, "ways": group}}
        results.append(call(f"{MODULE}:time_case", arguments, allocator=allocator))
        for row in results[-1]["rows"]:
            rows.setdefault(row["way"], row)
    return {**results[0], "rows": rows}


def measure(
    case: dict[str, Any],
    tables: dict[str, Table],
    allocators: dict[Allocator, list[str]],
    call: Callable[..., Any],
) -> None:
    """Measure one case and add its rows to the tables.

    `allocators` has the ways to time with each; `call` is that of `call_in_child`.
    """
    name = {key: case[key] for key in ("model", "vocab_size", "precision")}
    peaks = {way: call(f"{MODULE}:memory_case", {"case": case, "way": way}) for way in case["ways"]}
    for allocator, ways in allocators.items():
        found = time_in_groups({**case, "ways": ways}, allocator, call)
        returned = "given back" if allocator == "default" else "kept"
        for way in [*ways, "floor"]:
            row = {**name, "allocator": returned, "way": way, "peak_bytes": peaks.get(way)}
            tables["step"].rows.append(row | found["rows"].get(way, {}))
        if allocator == "kept":
            tables["input"].rows.append({**name, **found["input"]})
    seconds = call(f"{MODULE}:profile_case", {"case": case}, allocator="kept")
    total = sum(seconds.values())
    shares = {group: value / total for group, value in seconds.items()}
    tables["profile"].rows.append({**name, "total_s": total, **shares})
    print(f"measured {name}", file=sys.stderr, flush=True)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["gidd-25m", "gidd-85m"])
    parser.add_argument("--vocab-sizes", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    arguments = parser.parse_args()
    length = (QUICK_MODEL if arguments.quick else SHAPE)["seq_length"]
    tables = {
        "step": Table(f"Training step, {SEQUENCES} x {length} tokens", STEP_COLUMNS),
        "profile": Table("Where the time of the hybrid step goes", PROFILE_COLUMNS),
        "input": Table("Input pipeline, one thread, not overlapped", INPUT_COLUMNS),
    }
    report = Report("step", vars(arguments), list(tables.values()))
    for case in cases(arguments):
        # For one size it is enough to see what the allocator does to the others.
        sizes = (arguments.models[0], arguments.vocab_sizes[0])
        is_first = (case["model"], case["vocab_size"]) == sizes
        compared = [way for way in case["ways"] if is_first or way in COMPARED]
        allocators: dict[Allocator, list[str]] = {"kept": case["ways"], "default": compared}
        # A tiny case is not worth a dozen processes.
        call = call_here if arguments.quick else call_in_child
        measure(case, tables, allocators, call)
        if arguments.json is not None:
            report.write(arguments.json)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
