"""What importing and exporting Hugging Face folders share: checks, checksums, all or nothing.

Both directions write into a folder beside the result, read everything back, compare SHA-256 sums of
every tensor with those of its source, and only then give the folder its name. A model never exists
in memory: the largest table is what bounds it (`megatron_ext.checkpoint.stored`).

    import   q, k, v, ... -> parameter, whole -> written as its layer's chunk -> read back
    export   chunks of every tp rank -> parameter, whole -> q, k, v, ... -> written -> read back

No process group is needed, and the layout of the run that wrote a checkpoint does not matter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint.hf_names import is_norm_gain
from megatron_ext.config import require

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""
HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
_WEIGHT_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    folder: Path
    num_parameters: int
    dtype: str
    """Of everything but the norm gains, which are float32."""


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).digest()


def dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_occupied(folder: Path, name: str) -> None:
    """Raise `ValueError` naming the flag where a result would overwrite something."""
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(is_free, name, str(folder), "it exists and is not empty; choose another folder.")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or is removed with an error."""
    output = output.resolve()
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.exists():
            output.rmdir()
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def progress(names: Mapping[str, Any], description: str) -> Iterator[str]:
    yield from tqdm(names, desc=description, unit="tensor", disable=None)


def require_layout(found: Mapping[str, tuple[Any, Any]], wanted: Layout, where: str) -> None:
    """Compare names, shapes and dtypes; `ValueError` names the first that differs."""
    for what, names in (("missing", wanted.keys() - found), ("unknown", found.keys() - wanted)):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{where}: {len(names)} {what} tensors ({some}).")
    for name, (shape, dtype) in wanted.items():
        if tuple(found[name][0]) != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(found[name][0])}, the model {shape}."
            )
        if found[name][1] != dtype:
            raise ValueError(
                f"{where}: {name} is {dtype_name(found[name][1])} instead of {dtype_name(dtype)}."
            )


def common_dtype(dtypes: Mapping[str, torch.dtype | str], where: str) -> torch.dtype:
    """The dtype of the embedding, which all but the norm gains must have."""
    name, dtype = next((item for item in dtypes.items() if not is_norm_gain(item[0])), ("", ""))
    if dtype not in _WEIGHT_DTYPES:
        known = " or ".join(dtype_name(x) for x in _WEIGHT_DTYPES)
        raise ValueError(f"{where}: {name} is {dtype_name(dtype)}; weights must be {known}.")
    assert isinstance(dtype, torch.dtype)
    return dtype


def with_dtypes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Layout:
    return {
        name: (shape, torch.float32 if is_norm_gain(name) else dtype)
        for name, shape in shapes.items()
    }
