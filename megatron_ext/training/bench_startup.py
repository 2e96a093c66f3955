"""Start-up: from the start of the process to the first step, and what the imports cost.

    python -m megatron_ext.training.bench_startup [--quick] [--json FILE]

Every repetition is a new process with files in the page cache. The second table sums up
`python -X importtime` by the package that the time is spent in.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from megatron_ext.measure import Column, Report, Table, bench_parser
from megatron_ext.presets import MODEL_PRESETS

STAGES = "megatron_ext.training.startup_stages"
QUICK_MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
STAGE_COLUMNS = [
    Column("stage", "stage"),
    Column("median_s", "s", ".2f"),
    Column("min_s", "fastest", ".2f"),
    Column("max_s", "slowest", ".2f"),
    Column("until_s", "done after, s", ".2f"),
]
IMPORT_COLUMNS = [
    Column("package", "package"),
    Column("seconds", "s", ".2f"),
    Column("share", "%", ".0f", 100),
    Column("modules", "modules", "d"),
]


def start_once(case: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage of one start, in their order."""
    command = [sys.executable, "-m", STAGES, str(time.time()), json.dumps(case)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    done = json.loads(output.splitlines()[-1])
    ends = list(done.values())
    return {
        name: end - begin
        for name, begin, end in zip(done, [0.0, *ends[:-1]], ends, strict=True)
    }  # fmt: skip


def imported_packages() -> list[dict[str, Any]]:
    """Import time of the entry by top-level package, longest first."""
    command = [sys.executable, "-X", "importtime", "-c", "import megatron_ext.training.loop"]
    report = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    seconds: dict[str, list[float]] = {}
    for line in report.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[0].strip().isdigit():
            package = fields[2].strip().split(".")[0]
            name = package if package not in sys.stdlib_module_names else "standard library"
            seconds.setdefault(name, []).append(int(fields[0]) / 1e6)
    total = sum(map(sum, seconds.values()))
    rows = [
        {"package": name, "seconds": sum(x), "share": sum(x) / total, "modules": len(x)}
        for name, x in seconds.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="gidd-25m")
    parser.add_argument("--vocab-size", type=int, default=32768)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.vocab_size = 512
    shape = QUICK_MODEL if arguments.quick else MODEL_PRESETS[arguments.model]
    case = {
        "model": {**shape, "seq_length": 64, "vocab_size": arguments.vocab_size},
        "data": {"mock_data": True, "mask_token_id": 3, "pad_token_id": 2, "num_workers": 0},
        "training": {"micro_batch_size": 1, "global_batch_size": 1},
    }
    repetitions = 1 if arguments.quick else 5
    if not arguments.quick:
        start_once(case)
    starts = [start_once(case) for _ in range(repetitions)]
    rows, until = [], 0.0
    for stage in starts[0]:
        values = [start[stage] for start in starts]
        until += statistics.median(values)
        rows.append(
            {
                "stage": stage, "median_s": statistics.median(values), "min_s": min(values),
                "max_s": max(values), "until_s": until,
            }
        )  # fmt: skip
    title = f"Start of {arguments.model} with {arguments.vocab_size:,} ids on 1 x 64 tokens"
    tables = [
        Table(title, STAGE_COLUMNS, rows),
        Table("Imports by package", IMPORT_COLUMNS, imported_packages()[:10]),
    ]
    Report("startup", vars(arguments), tables).finish(arguments.json)


if __name__ == "__main__":
    main()
