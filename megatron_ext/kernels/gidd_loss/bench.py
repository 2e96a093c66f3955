"""Time and peak memory of the loss, forward and backward: dense on logits against fused in chunks.

    python -m megatron_ext.kernels.gidd_loss.bench [--quick] [--json FILE]

`reference` multiplies all logits out and leaves the rest to autograd; `chunked` is what training
runs. Both start from hidden states [T, h] and the head's weight [V, h] in float32. Every case runs
in a process of its own, since a process's peak memory only ever grows. Peak memory is the
resident memory a call needs beyond its inputs and their gradients, read from Linux's /proc.
The dense form holds about fifteen tensors of [T, V]; it is left out where half of the free memory
would not take them. Times are medians, memory is of the first call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.gidd_loss import linear_gidd_loss

WIDTH = 256
MASK_ID = 3
DENSE_TENSORS = 15
MAX_SECONDS = 20.0
FULL = {"vocab_size": (4096, 32768, 131072), "num_tokens": (256, 512, 1024, 2048)}
QUICK = {"vocab_size": (4096, 16384), "num_tokens": (128, 256, 512)}


def measure(
    impl: str, num_tokens: int, vocab_size: int, repeats: int = 7
) -> dict[str, float] | None:
    """Median seconds and peak bytes of a call in this process; nothing where it may not fit."""
    if impl == "reference":
        needed = 4 * DENSE_TENSORS * num_tokens * vocab_size
        if needed > _bytes_in("/proc/meminfo", "MemAvailable") / 2:
            return None
    schedule = MixingSchedule(vocab_size, MASK_ID, 0.0)
    # The first call of a process loads libraries and starts threads.
    call_once(impl, draw_inputs(8, 64), MixingSchedule(64, MASK_ID, 0.0))
    inputs = draw_inputs(num_tokens, vocab_size)
    before = reset_peak()
    call_once(impl, inputs, schedule)
    gradients = 4 * WIDTH * (num_tokens + vocab_size)
    peak = _bytes_in("/proc/self/status", "VmHWM") - before - gradients
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < MAX_SECONDS:
        start = time.perf_counter()
        call_once(impl, inputs, schedule)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_bytes": max(peak, 0)}


def draw_inputs(num_tokens: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """hidden, weight, xt, x0, log_snr; half of the tokens are masked, some replaced."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, generator=rng)
    weight = torch.randn(vocab_size, WIDTH, generator=rng) / 16
    x0 = torch.randint(MASK_ID + 1, vocab_size, (num_tokens,), generator=rng)
    xt = torch.where(torch.arange(num_tokens) % 2 == 0, MASK_ID, x0)
    xt[::8] = MASK_ID + 1
    log_snr = 18 * torch.rand(num_tokens, generator=rng) - 9
    return hidden.requires_grad_(), weight.requires_grad_(), xt, x0, log_snr


def call_once(impl: str, inputs: tuple[torch.Tensor, ...], schedule: MixingSchedule) -> None:
    for x in inputs[:2]:
        x.grad = None
    linear_gidd_loss(*inputs, schedule, impl=impl).loss.sum().backward()


def reset_peak() -> int:
    """Forget the process's peak so far; returns the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _bytes_in("/proc/self/status", "VmRSS")


def _bytes_in(path: str, field: str) -> int:
    line = next(x for x in Path(path).read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure_in_child(**case: Any) -> dict[str, float] | None:
    command = [sys.executable, "-m", "megatron_ext.kernels.gidd_loss.bench"]
    result = subprocess.run(
        [*command, "--case", json.dumps(case)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout)


def describe_machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    if models:
        name = models[0].split(":")[1].strip()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


HEADER = (
    f"{'V':>7} {'T':>5} {'logits MiB':>10} | {'dense s':>8} {'fused s':>8} {'ratio':>6} | "
    f"{'dense MiB':>9} {'fused MiB':>9} {'ratio':>6}"
)


def format_row(vocab_size: int, num_tokens: int, dense: dict | None, fused: dict) -> str:
    def ratio(field: str) -> str:
        return f"{dense[field] / max(fused[field], 1e-9):.2f}" if dense else "-"

    def mebibytes(result: dict | None) -> str:
        return f"{result['peak_bytes'] / 2**20:.0f}" if result else "-"

    dense_seconds = f"{dense['seconds']:.3f}" if dense else "-"
    return (
        f"{vocab_size:>7} {num_tokens:>5} {4 * vocab_size * num_tokens / 2**20:>10.0f} | "
        f"{dense_seconds:>8} {fused['seconds']:>8.3f} {ratio('seconds'):>6} | "
        f"{mebibytes(dense):>9} {mebibytes(fused):>9} {ratio('peak_bytes'):>6}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**arguments.case)))
        return
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"hidden width {WIDTH}, float32; ratios are dense / fused; - does not fit\n{HEADER}")
    sizes = QUICK if arguments.quick else FULL
    rows = []
    for vocab_size in sizes["vocab_size"]:
        for num_tokens in sizes["num_tokens"]:
            case = {"vocab_size": vocab_size, "num_tokens": num_tokens}
            dense, fused = (
                measure_in_child(impl=impl, **case) for impl in ("reference", "chunked")
            )
            print(format_row(dense=dense, fused=fused, **case), flush=True)
            rows.append({**case, "reference": dense, "chunked": fused})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
