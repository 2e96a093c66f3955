"""GPUs as numbers: peaks of the data sheets, dense, per GPU, in its usual 8-GPU node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the node's network."""

    name: str
    bf16_flops: float
    fp8_flops: float | None
    memory_bytes: float
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """NVLink, bytes per second each way."""
    network_bandwidth: float
    """Bytes per second each way."""
    source: str
    gpus_per_node: int = 8


_NVIDIA = "https://www.nvidia.com/en-us/data-center/"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312e12, None, 80e9, 2.0e12, 300e9, 25e9, f"{_NVIDIA}a100/ (80 GB SXM), "
            "DGX A100: 8 x 200 Gb/s"),
        Gpu("H100", 989e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9, f"{_NVIDIA}h100/ (SXM), "
            "DGX H100: 8 x 400 Gb/s"),
        Gpu("H200", 989e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9, f"{_NVIDIA}h200/ (SXM), "
            "DGX H200: 8 x 400 Gb/s"),
        Gpu("B200", 2250e12, 4500e12, 180e9, 8.0e12, 900e9, 50e9, f"{_NVIDIA}dgx-b200/, "
            "8 x 400 Gb/s"),
        Gpu("GB200", 2450e12, 4900e12, 186e9, 8.0e12, 900e9, 50e9, f"{_NVIDIA}gb200-nvl72/, "
            "72 GPUs share NVLink", gpus_per_node=72),
    )
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """The row of the table; raises `ValueError` with the names there are."""
    if name not in GPUS:
        raise ValueError(f"--gpu is {name!r}: choose one of {', '.join(GPUS)}.")
    return GPUS[name]
