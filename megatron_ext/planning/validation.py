"""What plans and dry runs were held against, as the tables of docs/planning.md.

    python -m megatron_ext.planning.validation           all tables (minutes of CPU time)
    python -m megatron_ext.planning.validation --errors  those of published runs alone (seconds)

Tables stand between `<!-- planning:NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from megatron_ext.planning.calibration import Test, all_tests, rates
from megatron_ext.planning.hardware import GPUS

PAGE = Path(__file__).resolve().parents[2] / "docs/planning.md"

_DATA = {"mock_data": True, "mask_token_id": 0, "pad_token_id": 1}


def _case(
    ranks: int = 1, batch: int = 8, micro: int = 8, **sections: dict[str, Any]
) -> tuple[int, dict[str, dict[str, Any]]]:
    model = {"num_layers": 4, "hidden_size": 256, "seq_length": 512, "vocab_size": 4096}
    return ranks, sections | {
        "model": model | sections.get("model", {}),
        "training": {"micro_batch_size": micro, "global_batch_size": batch},
        "data": _DATA,
    }


WIDE = {"hidden_size": 768, "num_attention_heads": 12, "seq_length": 256}
MEMORY_CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "FP32": _case(),
    "BF16": _case(precision={"bf16": True}),
    "FP32, wide": _case(batch=2, micro=2, model=WIDE),
    "BF16, wide, AdamW": _case(
        batch=2, micro=2, model=WIDE, precision={"bf16": True}, optimizer={"optimizer": "adamw"}
    ),
    "FP32, full recompute": _case(
        model={"num_layers": 12}, parallel={"recompute_granularity": "full"}
    ),
    "FP32, dense attention": _case(
        batch=4, micro=4, precision={"attention_impl": "reference"}
    ),
    "FP32, dense attention, selective recompute": _case(
        batch=4, micro=4, precision={"attention_impl": "reference"},
        parallel={"recompute_granularity": "selective"},
    ),
    "FP32, 32,768 ids": _case(model={"num_layers": 2, "vocab_size": 32768}),
    "FP32, masked, 4 micro-batches": _case(
        batch=16, micro=4, diffusion={"objective": "masked"}
    ),
    "tp 2, sequence parallel": _case(
        2, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}
    ),
}  # fmt: skip
"""Runs of which measured processes are compared with dry ones."""


class Memory(NamedTuple):
    """A process's memory, planned and measured."""

    case: str
    rank: int
    planned: int
    measured: int

    @property
    def relative(self) -> float:
        return self.planned / self.measured - 1


def measure_case(name: str) -> list[Memory]:
    """All ranks of a case, really run and dry."""
    from megatron_ext.planning.dry_run import dry_run
    from megatron_ext.planning.measured import config_of, measured_peaks

    ranks, sections = MEMORY_CASES[name]
    return [
        Memory(
            name, rank,
            dry_run(config_of(sections), ranks, rank, device="cpu").peak_bytes, measured,
        )
        for rank, measured in enumerate(measured_peaks(sections, ranks))
    ]  # fmt: skip


def memory_table(results: Iterable[Memory]) -> str:
    rows = ["| run | rank | planned, MiB | measured, MiB | error |", "|---|---|---|---|---|"]
    errors = []
    for result in results:
        rows.append(
            f"| {result.case} | {result.rank} | {result.planned / 2**20:,.0f} "
            f"| {result.measured / 2**20:,.0f} | {result.relative:+.1%} |"
        )
        errors.append(abs(result.relative))
    rows += ["", f"Worst error {max(errors):.1%}, median {median(errors):.1%}."]
    return "\n".join(rows)


def errors_table() -> str:
    """Of the step-time model on published runs that its fit has not seen."""
    lines = []
    for result in all_tests():
        lines += [_title(result), "", "| run | error |", "|---|---|"]
        lines += [f"| {name} | {error:+.1%} |" for name, error in result.errors.items()]
        lines += [
            "",
            f"Worst {result.worst:.1%}, median {result.median:.1%}, mean {result.mean:.1%}.",
            "",
        ]
    used = rates()
    lines.append(
        f"Plans use the rates of all BF16 runs and the FP8 runs of 2025: {used.product:.3f} of the "
        f"BF16 peak, {used.fp8:.3f} of the FP8 peak, width {used.narrow:.0f}."
    )
    return "\n".join(lines)


def _title(result: Test) -> str:
    return f"Fitted on {', '.join(result.fitted_on)}; tested on **{result.tested_on}**:"


def hardware_table() -> str:
    rows = [
        "| GPU | BF16, TFLOP/s | FP8, TFLOP/s | memory, GB | TB/s | NVLink, GB/s each way "
        "| network, Gb/s | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS.values():
        fp8 = "-" if gpu.fp8_flops is None else f"{gpu.fp8_flops / 1e12:,.0f}"
        rows.append(
            f"| {gpu.name} | {gpu.bf16_flops / 1e12:,.0f} | {fp8} | {gpu.memory_bytes / 1e9:.0f} "
            f"| {gpu.memory_bandwidth / 1e12:.2f} | {gpu.link_bandwidth / 1e9:.0f} "
            f"| {gpu.network_bandwidth * 8 / 1e9:.0f} | {gpu.source} |"
        )
    return "\n".join(rows)


def section(page: str, name: str) -> str:
    """The table of that name as it stands on the page."""
    match = re.search(rf"<!-- planning:{name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    if match is None:
        raise ValueError(f"{PAGE}: no section {name!r}")
    return match[1]


def put(page: str, name: str, text: str) -> str:
    """The page with another table of that name."""
    return page.replace(
        f"<!-- planning:{name} -->\n{section(page, name)}\n",
        f"<!-- planning:{name} -->\n{text}\n",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--errors", action="store_true", help="leave out the measured memory")
    arguments = parser.parse_args()
    tables = {"errors": errors_table(), "hardware": hardware_table()}
    if not arguments.errors:
        tables["memory"] = memory_table(x for name in MEMORY_CASES for x in measure_case(name))
    page = PAGE.read_text()
    for name, text in tables.items():
        page = put(page, name, text)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
