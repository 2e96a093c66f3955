"""What the tests let child processes do."""

from __future__ import annotations

import ctypes
import os

from megatron_ext.measure.machine import bytes_in

MEBIBYTE = 1 << 20


def resident_after_free(num_bytes: int) -> int:
    """Resident bytes that stay after a block of malloc was written and freed."""
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    before = bytes_in("/proc/self/status", "VmRSS")
    block = library.malloc(num_bytes)
    ctypes.memset(block, 1, num_bytes)
    library.free(block)
    return bytes_in("/proc/self/status", "VmRSS") - before


def resident_after_free_kept(num_bytes: int) -> list[int]:
    """The same for memory that the process was told to keep: 1 where it will, and the bytes."""
    from megatron_ext.parallel.cpu import keep_freed_memory

    will_keep = keep_freed_memory()
    return [int(will_keep), resident_after_free(num_bytes)]


def process_and_double(number: int) -> list[int]:
    print("a child may print")
    return [os.getpid(), 2 * number]


def fail() -> None:
    raise RuntimeError("as asked")
