"""Peak memory of a call, and calls in processes of their own.

A process's peak only ever grows, and memory that an earlier call freed may still be resident, so
a case whose memory counts is measured in a child: `call_in_child("package.module:function", ...)`.

Fresh pages are several times slower to write than warm ones (the kernel zeroes them), and by
default glibc returns every large block to the kernel when it is freed. A way that allocates less
is then faster by more than its work; `Allocator` "kept" shows what remains where freed memory
stays in the process.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from megatron_ext.measure.machine import bytes_in

Allocator = Literal["default", "kept", "returned"]
"""glibc as it comes, with freed memory kept by the process, or with every block given back at once:
then resident memory is what is in use, without gaps."""

_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc: no block of its own mapping, nothing returned, the heap grown in large pieces."""
_RETURNED = {
    "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 10),
    "MALLOC_MMAP_MAX_": str(1 << 20),
}
"""glibc: a mapping of its own for every block from 64 KiB on."""


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes of resident memory that `call` needs beyond what was resident before it.

    Read from Linux's /proc. Memory that was free but resident before is given back first, so that
    the call cannot hide in it; even so a process of its own (`call_in_child`) is the sure way.
    """
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = bytes_in("/proc/self/status", "VmRSS")
    result = call()
    peak = bytes_in("/proc/self/status", "VmHWM")
    del result
    return max(peak - before, 0)


def call_in_child(
    target: str, arguments: dict[str, Any], *, allocator: Allocator = "default"
) -> Any:
    """`function(**arguments)` of `target` "package.module:function" in a fresh process.

    Arguments and result are JSON. What the child prints goes to this process's standard error.
    Raises `subprocess.CalledProcessError` where the child fails.
    """
    chosen = {"default": {}, "kept": _KEPT, "returned": _RETURNED}[allocator]
    others = _KEPT.keys() | _RETURNED.keys()
    environment = {name: x for name, x in os.environ.items() if name not in others} | chosen
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "megatron_ext.measure", "call", target]
        subprocess.run(
            [*command, json.dumps(arguments), str(result)],
            check=True, env=environment, stdout=sys.stderr.fileno(),
        )  # fmt: skip
        return json.loads(result.read_text())


def call_here(target: str, arguments: dict[str, Any], *, allocator: Allocator = "default") -> Any:
    """As `call_in_child` in this process with the allocator it has, for quick cases."""
    del allocator
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def answer_call(target: str, arguments: str, result: Path) -> None:
    """The child's side of `call_in_child`."""
    result.write_text(json.dumps(call_here(target, json.loads(arguments))))
