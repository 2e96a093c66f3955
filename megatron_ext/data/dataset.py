"""The datasets of a run from --data-path, --valid-data-path, --test-data-path and --split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from megatron_ext.data.blend import BlendedDataset
from megatron_ext.data.indexed import IndexedTokens, open_indexed
from megatron_ext.data.packing import PackedDataset, PackedSample

__all__ = ["BlendedDataset", "Datasets", "PackedDataset", "PackedSample", "build_datasets"]


class Datasets(NamedTuple):
    """What a run reads."""

    train: BlendedDataset
    valid: BlendedDataset | None
    """Finite and in the order of the files; None where nothing is set aside."""
    test: BlendedDataset | None


@dataclass(frozen=True)
class _Packing:
    """How tokens become sequences; the same for all datasets of a run."""

    seq_length: int
    seed: int
    extra_tokens: int
    aligned_eos_id: int | None


@dataclass(frozen=True)
class _Blend:
    """Open files and their weights as a flag gave them."""

    flag: str
    files: list[IndexedTokens]
    weights: list[Fraction] | None
    """None: in proportion to their size."""

    def build(
        self, packing: _Packing, share: tuple[float, float], *, shuffle: bool
    ) -> BlendedDataset:
        """The documents between two fractions of every file."""
        parts = []
        for file in self.files:
            first, last = (round(bound * file.num_documents) for bound in share)
            if file.starts(first, first)[0] == file.starts(last, last)[0]:
                raise ValueError(
                    f"{self.flag} {file.prefix}: --split leaves no documents of "
                    f"{file.num_documents} for {'training' if shuffle else 'validation'}; change "
                    "it, or give --valid-data-path."
                )
            parts.append(
                PackedDataset(
                    file,
                    packing.seq_length,
                    packing.seed,
                    first_document=first,
                    last_document=last,
                    shuffle=shuffle,
                    extra_tokens=packing.extra_tokens,
                    aligned_eos_id=packing.aligned_eos_id,
                )
            )
            if not shuffle and len(parts[-1]) == 0:
                raise ValueError(
                    f"{self.flag} {file.prefix}: {parts[-1].num_tokens} tokens for validation are "
                    f"less than one sequence of --seq-length {packing.seq_length}; set aside more "
                    "with --split or --valid-data-path, or none with --split 100,0,0."
                )
        sizes = [part.num_tokens if shuffle else len(part) for part in parts]
        return BlendedDataset(parts, self.weights or sizes)


def build_datasets(
    data_path: Sequence[str],
    valid_data_path: Sequence[str],
    test_data_path: Sequence[str],
    split: str,
    seq_length: int,
    seed: int,
    vocab_size: int | None,
    tokenizer_fingerprint: str | None = None,
    extra_tokens: int = 0,
    aligned_eos_id: int | None = None,
) -> Datasets:
    """Open and check all files and divide them; `ValueError` names the flag, the file, the fault.

    A path list is prefixes, `a b`, blended in proportion to their tokens, or weights and prefixes,
    `0.7 a 0.3 b`, as in Megatron. Without separate validation or test data, `split` divides every
    file by documents, in the order of the file: `969,30,1` for training, validation and test.
    With either, `data_path` is all for training. The arguments behind `split` are explained at
    `PackedDataset` and `open_indexed`.

    Same on every rank, and no communication. The first start reads every .bin once to check its
    ids; where many ranks share a folder, let one of them call this before the others.
    """
    if not data_path:
        raise ValueError("--data-path is empty: give prefixes of .bin/.idx files, or --mock-data.")

    def opened(flag: str, arguments: Sequence[str]) -> _Blend:
        weights, prefixes = parse_blend(flag, arguments)
        files = [
            open_indexed(
                prefix,
                vocab_size=vocab_size,
                tokenizer_fingerprint=tokenizer_fingerprint,
                flag=flag,
            )
            for prefix in prefixes
        ]
        return _Blend(flag, files, weights)

    packing = _Packing(seq_length, seed, extra_tokens, aligned_eos_id)
    data = opened("--data-path", data_path)
    everything = (0.0, 1.0)
    if valid_data_path or test_data_path:
        separate = [
            opened(flag, paths).build(packing, everything, shuffle=False) if paths else None
            for flag, paths in (
                ("--valid-data-path", valid_data_path),
                ("--test-data-path", test_data_path),
            )
        ]
        return Datasets(data.build(packing, everything, shuffle=True), *separate)
    bounds = split_bounds(split)
    shares = list(zip(bounds, bounds[1:], strict=False))
    train, valid, test = shares
    return Datasets(
        data.build(packing, train, shuffle=True),
        data.build(packing, valid, shuffle=False) if valid[0] < valid[1] else None,
        _test_if_large_enough(data, packing, test),
    )


def _test_if_large_enough(
    data: _Blend, packing: _Packing, share: tuple[float, float]
) -> BlendedDataset | None:
    """The default --split sets a thousandth aside: no test data, not an error, of a small file."""
    for file in data.files:
        first, last = (round(bound * file.num_documents) for bound in share)
        tokens = file.starts(last, last)[0] - file.starts(first, first)[0]
        if tokens < packing.seq_length + packing.extra_tokens:
            return None
    return data.build(packing, share, shuffle=False)


def parse_blend(flag: str, arguments: Sequence[str]) -> tuple[list[Fraction] | None, list[str]]:
    """(weights or None, prefixes) from `a b` or `0.7 a 0.3 b`."""
    numbers = [_as_number(argument) for argument in arguments]
    if all(number is None for number in numbers):
        return None, list(arguments)
    is_alternating = len(arguments) % 2 == 0 and all(
        (number is not None) == (position % 2 == 0) for position, number in enumerate(numbers)
    )
    weights = [number for number in numbers[::2] if number is not None]
    if not is_alternating or any(weight <= 0 for weight in weights):
        raise ValueError(
            f"{flag} {' '.join(arguments)}: give prefixes alone, or a positive weight before every "
            "prefix, such as 0.7 a 0.3 b."
        )
    return weights, list(arguments[1::2])


def _as_number(argument: str) -> Fraction | None:
    try:
        return Fraction(argument)
    except (ValueError, ZeroDivisionError):
        return None


def split_bounds(split: str) -> np.ndarray:
    """float64 [4]: where training, validation and test begin and end, 0 to 1 of the documents."""
    try:
        shares = np.array([float(share) for share in split.split(",")])
        is_valid = len(shares) <= 3 and (shares >= 0).all() and shares.sum() > 0 and shares[0] > 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"--split is {split!r}: give three shares for training, validation and test such as "
            "969,30,1, none negative and the first above 0."
        )
    shares = np.pad(shares, (0, 3 - len(shares)))
    return np.concatenate([[0.0], np.cumsum(shares) / shares.sum()])
