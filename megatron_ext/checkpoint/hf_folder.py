"""Folders in the published Hugging Face format: safetensors read lazily and written in pieces.

Only safetensors are read, whose headers are JSON: nothing of a folder is ever unpickled or run.
Reading maps one tensor at a time and lets go of it; writing lays out every shard from names, shapes
and dtypes first and then fills in tensors in any order, so neither needs memory for more than the
tensor at hand.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "*.model",
)  # fmt: skip
_CODE = Path(__file__).parents[1] / "hf"


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says about a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A dtype, or the header's word for one that is not a floating point number's."""


class PublishedWeights(Mapping[str, Tensor]):
    """The tensors of a folder by key; each access reads the tensor from its file.

    Raises `ValueError` naming the file for a folder that is incomplete or not of the format.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        index = self._index(folder)
        files = sorted(set(index.values())) if index is not None else [SINGLE]
        for name in files:
            for key, tensor in _header(folder / name).items():
                if index is not None and index.get(key) != name:
                    raise ValueError(f"{folder / name}: {INDEX} does not have {key} in this file.")
                self.tensors[key] = tensor
        absent = sorted(set(index or ()) - set(self.tensors))
        if absent:
            raise ValueError(f"{folder / index[absent[0]]}: {absent[0]} is not in it.")  # type: ignore[index]

    @staticmethod
    def _index(folder: Path) -> dict[str, str] | None:
        """File of each key; None for a folder with a single file."""
        path = folder / INDEX
        if not path.is_file():
            if not (folder / SINGLE).is_file():
                raise ValueError(
                    f"{folder}: neither {SINGLE} nor {INDEX} is in it; only safetensors are read."
                )
            return None
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{path}: it has no weight_map.")
        for name in index.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{path}: {name!r} is not a file of this folder.")
        return index

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self.tensors[key].file, framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: StoredTensor(
                    path,
                    tuple(piece.get_shape()),
                    _DTYPES.get(piece.get_dtype(), piece.get_dtype()),
                )
                for key, piece in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ValueError` names the file where there is none."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return contents


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB"; `ValueError` names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    size = 0
    if match is not None:
        power = " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size <= 0:
        raise ValueError(f"--max-shard-size is {text!r}: give a size such as 5GB or 500MB.")
    return size


class ShardWriter:
    """Writes `model.safetensors`, or shards of at most `max_bytes` with their index.

    `layout` names every tensor with shape and dtype; a tensor larger than a shard has one of its
    own. The files have their final size from the start; `write` fills in one tensor.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        max_bytes: int,
    ) -> None:
        self.folder, self.layout = folder, layout
        self.bytes = {
            key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in layout.items()
        }
        self.places: dict[str, tuple[Path, int]] = {}
        self.missing = set(layout)
        shards: list[list[str]] = [[]]
        for key, size in self.bytes.items():
            if shards[-1] and sum(self.bytes[k] for k in shards[-1]) + size > max_bytes:
                shards.append([])
            shards[-1].append(key)
        for number, keys in enumerate(shards, 1):
            name = SINGLE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(folder / name, keys)
        if len(shards) > 1:
            weight_map = {key: path.name for key, (path, _) in self.places.items()}
            index = {"metadata": {"total_size": sum(self.bytes.values())}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _lay_out(self, path: Path, keys: list[str]) -> None:
        """Write a shard's header and reserve its data; wide numbers first, so all are aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key in sorted(keys, key=lambda key: -self.layout[key][1].itemsize):
            shape, dtype = self.layout[key]
            end = offset + self.bytes[key]
            header[key] = {
                "dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]
            }  # fmt: skip
            self.places[key] = (path, offset)
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            file.truncate(start + offset)
        for key in keys:
            self.places[key] = (path, start + self.places[key][1])

    def write(self, key: str, tensor: Tensor) -> None:
        shape, dtype = self.layout[key]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), f"{key} is not as laid out"
        path, offset = self.places[key]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()))
        self.missing.discard(key)


def copy_code(folder: Path) -> None:
    """The model's files, links resolved, so that the folder stands on its own."""
    for path in sorted(_CODE.glob("*_gidd.py")):
        shutil.copyfile(path, folder / path.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder."""
    return sorted(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))
