"""The same bits every time, for the same layout on the same machines.

Data, noise, initial weights and their order are functions of the seed in any case. What is left are
algorithms that add in an order of the moment: `--deterministic` has torch refuse those it knows,
and fixes the choices of cuBLAS, NCCL and Transformer Engine, which read them from the environment.
"""

from __future__ import annotations

import os

import torch

_REQUIRED = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
_ALSO_ALLOWED = {
    "CUBLAS_WORKSPACE_CONFIG": (":16:8",),
    "NCCL_ALGO": ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}


def require_determinism() -> None:
    """Switch it on for this process; call it before the first CUDA operation.

    Raises `ValueError` where a variable of the environment asks for the opposite.
    """
    for name, value in _REQUIRED.items():
        found = os.environ.setdefault(name, value)
        if found != value and found not in _ALSO_ALLOWED.get(name, ()):
            raise ValueError(
                f"--deterministic is True: the environment has {name}={found}; unset it, or set it "
                f"to {value}."
            )
    torch.use_deterministic_algorithms(True)
