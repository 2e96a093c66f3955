"""Compile the Triton passes for GPUs that are not here, and read what they use.

    python -m megatron_ext.kernels.vocabulary.ahead_of_time

Needs triton alone (its wheel brings ptxas and cuobjdump). Prints registers per thread, bytes that
spill to local memory, and shared memory per program, for sm_80 (A100), sm_90 (H100) and sm_100
(B200).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 90, 100)
_VECTORS = {"lse", "weight_p", "r", "weight_v", "shift", "bias", "scale"}
_RESULTS = {"peak", "total", "sum_f", "sum_tau"}


class Usage(NamedTuple):
    """What a compiled kernel needs."""

    kernel: str
    dtype: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def kernels() -> dict[str, tuple[object, dict[str, object]]]:
    """Kernels by name with their compile-time constants."""
    from megatron_ext.kernels.vocabulary import passes_triton as passes

    block = {"BLOCK": passes.BLOCK}
    return {
        "statistics": (passes.statistics_kernel, block),
        "tail_sums": (passes.tail_sums_kernel, block),
        "gradient": (passes.gradient_kernel, block | {"HAS_TAIL": True}),
        "gradient of masked": (passes.gradient_kernel, block | {"HAS_TAIL": False}),
    }


def _signature(names: list[str], dtype: str, constants: dict[str, object]) -> dict[str, str]:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("rows", "out"):
            return f"*{dtype}"
        if name in _VECTORS | _RESULTS:
            return "*fp32"
        return "*i64" if name == "skip" else "i32"

    return {name: kind(name) for name in names}


def compiled(kernel: object, constants: dict[str, object], dtype: str, architecture: int) -> bytes:
    """The cubin of a kernel for logits of a dtype in Triton's spelling (fp32, bf16)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_ext.kernels.vocabulary.passes_triton import NUM_WARPS

    signature = _signature(kernel.arg_names, dtype, constants)  # type: ignore[attr-defined]
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": NUM_WARPS}).asm["cubin"]


def usage(kernel: str, dtype: str, architecture: int, cubin: bytes) -> Usage:
    """Read with the cuobjdump of triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    numbers = {
        key: int(value) for key, value in re.findall(r"(REG|LOCAL|STACK|SHARED):(\d+)", text)
    }
    spilled = numbers["LOCAL"] + numbers["STACK"]
    return Usage(kernel, dtype, architecture, numbers["REG"], spilled, numbers["SHARED"])


def all_usages() -> Iterator[Usage]:
    for name, (kernel, constants) in kernels().items():
        for dtype in ("fp32", "bf16"):
            for architecture in ARCHITECTURES:
                cubin = compiled(kernel, constants, dtype, architecture)
                yield usage(name, dtype, architecture, cubin)


def main() -> None:
    print("| kernel | logits | sm | registers per thread | spilled bytes | shared bytes |")
    print("|---|---|---|---|---|---|")
    for row in all_usages():
        print(f"| {' | '.join(str(x) for x in row)} |")


if __name__ == "__main__":
    main()
