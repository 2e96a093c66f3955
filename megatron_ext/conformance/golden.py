"""A folder of recorded numbers: what it holds, read with errors that name the file."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from megatron_ext.diffusion.schedule import MixingSchedule

_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class GoldenError(ValueError):
    """A recorded file that cannot be read or lacks something its check needs: a failure."""


class Unsupported(ValueError):
    """A check that cannot be made at this layout or with these options: listed, not a failure."""


class Arrays:
    """The arrays of one .npz file, read on demand."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._file = np.load(path, allow_pickle=False)
            self.keys = tuple(self._file.files)
        except (*_UNREADABLE, AttributeError) as error:
            raise GoldenError(f"{path.name} cannot be read: {error}") from error
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.keys:
            raise GoldenError(f"{self.name} has no {key!r}")
        self._read.add(key)
        try:
            return self._file[key]
        except _UNREADABLE as error:
            raise GoldenError(f"{self.name}: {key!r} cannot be read: {error}") from error

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def number(self, key: str, default: float | None = None) -> float:
        """A scalar entry; `default` where it is absent and one is given.

        A float32 is read as the shortest decimal that rounds to it, which is the number meant: the
        float64 truth was computed with 0.3, not with the float32 next to it.
        """
        if key not in self.keys and default is not None:
            return default
        value = self[key]
        if value.size != 1:
            raise GoldenError(f"{self.name}: {key!r} has shape {value.shape}, expected a number")
        scalar = value.reshape(())
        return float(str(scalar[()])) if value.dtype == np.float32 else scalar.item()

    def integer(self, key: str) -> int:
        return int(self.number(key))

    def tensor(self, key: str, device: torch.device) -> torch.Tensor:
        """An entry as a tensor; integers become int64, as ids are everywhere."""
        value = torch.from_numpy(np.array(self[key]))
        is_integer = not (value.is_floating_point() or value.dtype == torch.bool)
        return value.to(device, torch.int64 if is_integer else value.dtype)

    def matching(self, pattern: str) -> Iterator[re.Match[str]]:
        """Matches of the whole key, in the order of the file."""
        return (match for key in self.keys if (match := re.fullmatch(pattern, key)))

    def prefixes(self, pattern: str) -> list[str]:
        """The distinct first groups of the keys that match, in the order of the file."""
        return list(dict.fromkeys(match[1] for match in self.matching(pattern)))

    def unread(self) -> list[str]:
        """Keys that nothing has asked for."""
        return [key for key in self.keys if key not in self._read]

    def ignore(self, pattern: str) -> bool:
        """Mark matching keys as known; whether there were any."""
        keys = [match.string for match in self.matching(pattern)]
        self._read.update(keys)
        return bool(keys)


class Golden:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(path.name for path in folder.iterdir())

    def matching(self, pattern: str) -> list[re.Match[str]]:
        """Matches of whole file names, numbers in numerical order."""

        def key(match: re.Match[str]) -> list[Any]:
            return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", match.string)]

        found = (re.fullmatch(pattern, name) for name in self.names)
        return sorted((match for match in found if match), key=key)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def arrays(self, name: str) -> Arrays:
        return Arrays(self._existing(name))

    def json(self, name: str) -> Any:
        try:
            return json.loads(self._existing(name).read_text())
        except ValueError as error:
            raise GoldenError(f"{name} is not valid JSON: {error}") from error

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        path = self._existing(name)
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise GoldenError(f"{name} cannot be read: {error}") from error

    def _existing(self, name: str) -> Path:
        if name not in self.names:
            raise GoldenError(f"there is no {name}")
        return self.folder / name


def recorded_schedule(
    arrays: Arrays,
    *,
    vocab_size: int | None = None,
    mask_token_id: int | None = None,
    shift: float | None = None,
    scale: float | None = None,
) -> MixingSchedule:
    """The schedule that a file was recorded with; arguments replace its entries.

    Raises `Unsupported` for a scale that the schedule refuses.
    """
    limits = {
        name: arrays.number(name) for name in ("min_log_snr", "max_log_snr") if name in arrays
    }
    scale = arrays.number("scale", 1.0) if scale is None else scale
    if not 0 < scale <= 1:
        raise Unsupported(f"scale {scale:g} gives no Markov chain; the schedule takes (0, 1]")
    try:
        return MixingSchedule(
            vocab_size=arrays.integer("vocab_size") if vocab_size is None else vocab_size,
            mask_token_id=arrays.integer("mask_id") if mask_token_id is None else mask_token_id,
            shift=arrays.number("shift") if shift is None else shift,
            scale=scale,
            **limits,
        )
    except ValueError as error:
        raise GoldenError(f"{arrays.name}: {error}") from error
