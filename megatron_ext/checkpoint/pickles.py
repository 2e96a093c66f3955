"""Reading checkpoints without running what a file names.

Two kinds of pickle are inside megatron-core's checkpoints: `.metadata`, which
torch.distributed.checkpoint unpickles without restriction, and the objects in `common.pt` and the
shards, which `torch.load` reads. A pickle can name any function to be called with any arguments, so
the first is read here with a list of the classes it may name before anybody else reads it, and the
second are read as plain values, whatever the caller asked for.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, Metadata

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *((f"{_CHECKPOINT}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *((f"{_CHECKPOINT}.planner", name) for name in (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
}  # fmt: skip


def _member(kind: Any, name: str) -> Enum:
    """What Python 3.11.0 to 3.11.3 pickle a member of an enumeration as: getattr(kind, name)."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"names {name!r} of {kind!r}, which no checkpoint needs")
    return kind[name]


class _PlainMetadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's `.metadata`.

    Raises `ValueError` where it is no pickle, or one that names anything but what
    torch.distributed.checkpoint writes; nothing of it has run then.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _PlainMetadata(file).load()
    except OSError as error:
        raise ValueError(f"--load: {folder} is not a checkpoint: {error}") from error
    except Exception as error:
        # Damaged pickles raise almost anything.
        raise ValueError(f"--load: {path} is refused: it {_reason(error)}.") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"--load: {path} is refused: it holds a {type(metadata).__name__}.")
    return metadata


def _reason(error: Exception) -> str:
    is_ours = isinstance(error, pickle.UnpicklingError) and str(error).startswith("names ")
    return str(error) if is_ours else f"is damaged ({type(error).__name__}: {error})"


class PlainReader(FileSystemReader):
    """torch's reader of a checkpoint folder with `read_metadata` of this module."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        return read_metadata(Path(self.path))


_ONLY, _NOT_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def plain_values_only() -> Iterator[None]:
    """Within it every `torch.load` of this process takes tensors and plain values, no code."""
    before = {name: os.environ.pop(name, None) for name in (_ONLY, _NOT_ONLY)}
    os.environ[_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def untrusted(folder: Path) -> Iterator[None]:
    """For reading a checkpoint: plain values only, and `ValueError` for what asks for more."""
    try:
        with plain_values_only():
            yield
    except (CheckpointException, pickle.UnpicklingError) as error:
        lines = [line for line in str(error).splitlines() if "rror: " in line]
        said = lines[-1].strip() if lines else str(error).splitlines()[0]
        raise ValueError(f"--load: {folder} is refused: {said}") from error
