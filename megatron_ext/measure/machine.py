"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_INSTRUCTIONS = {"avx512f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
"""Linux's names of CPU features that decide how fast FP32 and BF16 matrices multiply."""


def bytes_in(path: str, field: str) -> int:
    """A field in kB of one of Linux's status files, in bytes."""
    line = next(x for x in Path(path).read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads of torch, memory and versions; absent packages are `None`."""
    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        facts = {key.strip(): value.strip() for key, value in pairs}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "instructions": [name for flag, name in _INSTRUCTIONS.items() if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(bytes_in("/proc/meminfo", "MemTotal") / 2**30, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": _version("megatron-core"),
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def format_machine(machine: dict[str, Any]) -> str:
    """One line of `describe_machine`."""
    instructions = "/".join(machine["instructions"]) or "no AVX512"
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    return (
        f"{device}{machine['cpu']} ({instructions}), {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB; python {machine['python']}, "
        f"torch {machine['torch']}, megatron-core {machine['megatron_core']}, "
        f"transformers {machine['transformers']}"
    )
