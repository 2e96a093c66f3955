"""Megatron's indexed token files: opened, checked, written.

A prefix names `<prefix>.bin`, all tokens back to back, and `<prefix>.idx`:

    9 bytes   magic MMIDIDX 0 0
    uint64    version, 1
    uint8     dtype code (4 int32, 8 uint16, ...)
    uint64    number of sequences s
    uint64    number of documents plus one, d + 1
    int32     [s] tokens of each sequence
    int64     [s] byte offset of each sequence
    int64     [d + 1] first sequence of each document; the last entry is s
    int8      [s] modes; multimodal files only, ignored here

Beside them `preprocess` leaves `<prefix>.json`, the manifest. Everything is read through memory
maps, so ranks on a node share the page cache. The format is spelled out here instead of importing
megatron-core's reader and writer because those take 5 s to import in every tokenization worker
(0.1 s without), keep Python objects per document, and answer a damaged file with a bare assertion;
tests compare both directions with megatron-core's.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
HEADER_BYTES = len(MAGIC) + HEADER.size
DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
"""Integer types by megatron-core's code."""
MANIFEST_FORMAT = "megatron_ext tokens 1"
CHUNK = 1 << 24
"""Entries looked at together when a whole file is checked."""
FINGERPRINT_PIECES, FINGERPRINT_PIECE = 256, 1024
"""Pieces of a file that its fingerprint covers, and the tokens in one."""


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def dtype_for_vocabulary(vocab_size: int) -> np.dtype:
    """The type megatron-core would choose: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class IndexedTokens:
    """An open, checked `.bin/.idx` pair."""

    prefix: str
    tokens: np.ndarray
    """[num_tokens] memory map of the whole .bin, of the file's dtype."""
    manifest: dict[str, Any] | None
    """Contents of `<prefix>.json`; None for files that `preprocess` did not write."""
    _pointers: np.ndarray
    _bounds: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of raw text per token over the whole file, EOS counted as a token.

        None where the manifest does not know (no manifest, imported tokens).
        """
        if self.manifest is None or not self.manifest.get("utf8_bytes"):
            return None
        return self.manifest["utf8_bytes"] / self.manifest["tokens"]

    def starts(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first + 1]: where documents first ... last begin, counted in tokens.

        Document `num_documents` begins where the file ends.
        """
        total = np.int64(self.num_tokens)
        sequences = np.asarray(self._bounds[first : last + 1])
        starts = np.full(len(sequences), total)
        inside = sequences < len(self._pointers)
        starts[inside] = self._pointers[sequences[inside]] // self.tokens.dtype.itemsize
        return starts

    def fingerprint(self) -> str:
        """A hash of all lengths and of 256 pieces of the tokens, spread evenly.

        It tells apart files that were written from other text, in another order or with another
        tokenizer, in the time of reading the index; `verify_checksums` reads everything.
        """
        digest = hashlib.sha256(f"{self.tokens.dtype.str} {self.num_tokens}".encode())
        for values in (self._pointers, self._bounds):
            for first in range(0, len(values), CHUNK):
                digest.update(values[first : first + CHUNK].tobytes())
        last = max(self.num_tokens - FINGERPRINT_PIECE, 0)
        for start in np.unique(np.linspace(0, last, FINGERPRINT_PIECES).astype(np.int64)):
            digest.update(self.tokens[start : start + FINGERPRINT_PIECE].tobytes())
        return digest.hexdigest()

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, all its sequences joined; a view of the memory map."""
        start, stop = self.starts(index, index + 1)
        return self.tokens[start:stop]


def open_indexed(
    prefix: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
    flag: str = "--data-path",
) -> IndexedTokens:
    """Open and check a prefix; `ValueError` naming `flag`, the file and the fault.

    Refused: missing files, wrong magic or version or dtype, a .bin or .idx of the wrong size,
    an index that contradicts itself, a manifest of other files, a manifest of another tokenizer,
    ids outside `[0, vocab_size)`. The id range is exact: the .bin is read once and the answer is
    kept in `<prefix>.scan.json` until the file's size or time changes (where the folder is
    read-only it is read at every start).
    """
    prefix = os.fspath(prefix)
    bin_path, idx_path = Path(prefix + ".bin"), Path(prefix + ".idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            is_file_name = prefix.endswith((".bin", ".idx"))
            hint = "; give the prefix without .bin or .idx" if is_file_name else ""
            raise ValueError(f"{flag} {prefix}: there is no file {path}{hint}.")
    dtype, pointers, bounds, num_tokens = _open_index(idx_path, flag)
    expected, actual = num_tokens * dtype.itemsize, bin_path.stat().st_size
    if actual != expected:
        raise ValueError(
            f"{flag} {prefix}: {bin_path} has {actual} bytes but {idx_path} describes {expected}; "
            "one of the two is truncated or belongs to other data. Write both again."
        )
    if num_tokens == 0:
        raise ValueError(f"{flag} {prefix}: there are no tokens in {bin_path}.")
    tokens = np.memmap(bin_path, dtype=dtype, mode="r")
    data = IndexedTokens(prefix, tokens, read_manifest(prefix), pointers, bounds)
    _check_manifest(data, tokenizer_fingerprint, flag)
    if vocab_size is not None:
        low, high = id_range(data)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{flag} {prefix}: {bin_path} holds token id {low if low < 0 else high}, outside "
                f"the vocabulary [0, {vocab_size}); it was written with another tokenizer, or "
                "--vocab-size is wrong."
            )
    return data


def _open_index(path: Path, flag: str) -> tuple[np.dtype, np.ndarray, np.ndarray, int]:
    """dtype, byte offsets [s], document bounds [d + 1] and number of tokens, all checked."""

    def refuse(fault: str) -> ValueError:
        return ValueError(f"{flag}: {path} {fault}")

    size = path.stat().st_size
    with path.open("rb") as file:
        magic, header = file.read(len(MAGIC)), file.read(HEADER.size)
    if magic != MAGIC:
        raise refuse("does not begin as a Megatron index does; it is not an .idx file.")
    if len(header) < HEADER.size:
        raise refuse(f"is truncated: {size} bytes do not hold the header.")
    version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != 1:
        raise refuse(f"has format version {version}; only version 1 is known.")
    if code not in DTYPES:
        raise refuse(f"has dtype code {code}; tokens have one of {sorted(DTYPES)}.")
    expected = HEADER_BYTES + 12 * num_sequences + 8 * num_bounds
    if size not in (expected, expected + num_sequences):
        raise refuse(
            f"has {size} bytes, but {num_sequences} sequences in {num_bounds - 1} documents take "
            f"{expected}; it is truncated or damaged."
        )
    offsets = np.cumsum([HEADER_BYTES, 4 * num_sequences, 8 * num_sequences])
    lengths, pointers, bounds = (
        np.memmap(path, dtype=kind, mode="r", offset=int(offset), shape=(int(count),))
        if count
        else np.zeros(0, kind)
        for kind, offset, count in zip(
            (np.int32, np.int64, np.int64),
            offsets,
            (num_sequences, num_sequences, num_bounds),
            strict=True,
        )
    )
    if num_bounds == 0 or bounds[0] != 0 or bounds[-1] != num_sequences or not _is_sorted(bounds):
        raise refuse("is damaged: the documents' bounds do not run from 0 to the last sequence.")
    num_tokens = 0
    for first in range(0, num_sequences, CHUNK):
        piece = lengths[first : first + CHUNK].astype(np.int64)
        ends = num_tokens + np.cumsum(piece)
        if piece.min() < 0 or not np.array_equal(
            pointers[first : first + CHUNK], (ends - piece) * DTYPES[code].itemsize
        ):
            raise refuse("is damaged: the sequences' offsets do not follow from their lengths.")
        num_tokens = int(ends[-1])
    return DTYPES[code], pointers, bounds, num_tokens


def _is_sorted(values: np.ndarray) -> bool:
    return all(
        bool(np.all(np.diff(values[first : first + CHUNK + 1]) >= 0))
        for first in range(0, len(values), CHUNK)
    )


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """The manifest at `<prefix>.json`; None where there is none or the file is something else."""
    path = Path(prefix + ".json")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_manifest = isinstance(contents, dict) and contents.get("format") == MANIFEST_FORMAT
    return contents if is_manifest else None


def _check_manifest(data: IndexedTokens, tokenizer_fingerprint: str | None, flag: str) -> None:
    manifest = data.manifest
    if manifest is None:
        return
    found = (manifest["documents"], manifest["tokens"])
    if found != (data.num_documents, data.num_tokens):
        raise ValueError(
            f"{flag} {data.prefix}: {data.prefix}.json counts {found[0]} documents and {found[1]} "
            f"tokens, the index {data.num_documents} and {data.num_tokens}; the manifest belongs "
            "to other files. Write the data again, or remove the manifest."
        )
    written_with = manifest["tokenizer"]
    if tokenizer_fingerprint not in (None, written_with["fingerprint"]):
        raise ValueError(
            f"{flag} {data.prefix}: the data was tokenized with {written_with['path']} (sha256 "
            f"{written_with['fingerprint'][:12]}), but the run's tokenizer has sha256 "
            f"{tokenizer_fingerprint[:12]}. Give --tokenizer-model the one the data was made with."
        )


def id_range(data: IndexedTokens) -> tuple[int, int]:
    """Smallest and largest token id of the file: remembered beside it, else read in chunks."""
    status = os.stat(data.prefix + ".bin")
    key = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    cache = Path(data.prefix + ".scan.json")
    try:
        known = json.loads(cache.read_text())
        low, high = known["low"], known["high"]
        if known["key"] == key and type(low) is int and type(high) is int:
            return low, high
    except (OSError, ValueError, KeyError, TypeError):
        pass
    pieces = [data.tokens[i : i + CHUNK] for i in range(0, data.num_tokens, CHUNK)]
    low = min(int(piece.min()) for piece in pieces)
    high = max(int(piece.max()) for piece in pieces)
    temporary = cache.with_name(f".{cache.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"key": key, "low": low, "high": high}))
        os.replace(temporary, cache)
    except OSError:
        temporary.unlink(missing_ok=True)
    return low, high


def verify_checksums(prefix: str) -> None:
    """Compare the files with the manifest's sha256; `ValueError` names the file that differs."""
    manifest = read_manifest(prefix)
    if manifest is None:
        raise ValueError(f"{prefix}.json: there is no manifest to compare with.")
    for suffix in ("bin", "idx"):
        found = sha256_of_file(f"{prefix}.{suffix}")
        if found != manifest[suffix]["sha256"]:
            raise ValueError(
                f"{prefix}.{suffix} has sha256 {found}, its manifest says "
                f"{manifest[suffix]['sha256']}: the file is damaged."
            )


class IndexSummary(NamedTuple):
    """What was written."""

    documents: int
    tokens: int


class IndexedWriter:
    """Writes documents of one sequence each to `<path>.bin` and `<path>.idx`; 4 bytes of memory
    per document. A context manager: the index is written on leaving without an exception."""

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype) -> None:
        self._path = os.fspath(path)
        self._dtype = np.dtype(dtype)
        self._lengths = array("i")
        self._bin = open(self._path + ".bin", "wb", buffering=1 << 20)  # noqa: SIM115

    def append(self, tokens: np.ndarray) -> None:
        """Add a document: integer [n], every value representable in the dtype."""
        self._bin.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(len(tokens))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _sync_and_close(self._bin)
        if kind is None:
            write_index(self._path + ".idx", self._dtype, np.asarray(self._lengths, np.int32))

    @property
    def summary(self) -> IndexSummary:
        lengths = np.asarray(self._lengths, np.int32)
        return IndexSummary(len(lengths), int(lengths.sum(dtype=np.int64)))


def write_index(path: str | os.PathLike[str], dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write the .idx of documents that hold one sequence each; `lengths` int32 [d]."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    count = len(lengths)
    with open(path, "wb") as file:
        file.write(MAGIC + HEADER.pack(1, code, count, count + 1))
        lengths.astype(np.int32).tofile(file)
        written = 0
        for first in range(0, count, CHUNK):
            piece = lengths[first : first + CHUNK].astype(np.int64)
            ends = written + np.cumsum(piece)
            ((ends - piece) * dtype.itemsize).tofile(file)
            written = int(ends[-1])
        np.arange(count + 1, dtype=np.int64).tofile(file)
        _sync_and_close(file)


def _sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
