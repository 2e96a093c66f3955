"""Documents out of source files: which files, how they are cut into pieces, and reading a piece.

A piece is a part of a file that can be read on its own: a byte range of an uncompressed .jsonl, row
groups of a .parquet, any other file whole. Pieces of all files in order are all documents in order,
each once, however the pieces are distributed. A .txt file is one document.

Compressed files (.gz, .zst, .bz2, .lz4) are opened by pyarrow, which reads files of several frames
to the end and reports a truncated one; the zstandard package's reader silently returns less for
both.
"""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

JSON_LINES, PLAIN_TEXT, PARQUET = (".jsonl", ".ndjson", ".json"), (".txt", ".md"), (".parquet",)
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
RECORDS_AT_ONCE = 1024

OnBadRecord = Callable[[str], None]
"""Called with a description of a record that cannot be read: raises, or counts and goes on."""


class Piece(NamedTuple):
    """Part of a file; `start` and `stop` are bytes, row groups, or 0 and 1 for a whole file."""

    path: str
    start: int
    stop: int
    weight: int
    """Bytes on disk, about; for balancing and progress."""


def file_kind(path: Path) -> str | None:
    """The suffix that says how to read a file, compression aside; None for unknown ones."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    return kind if kind in JSON_LINES + PLAIN_TEXT + PARQUET else None


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (searched through, sorted) and patterns, in the order given.

    In folders a `.json` is passed over: it is as often a manifest or a tokenizer as text.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            if file_kind(path) is None:
                raise ValueError(f"--input {name}: {_accepted()}")
            files.append(path)
            continue
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(name, recursive=True))
        kinds = (None, ".json") if path.is_dir() else (None,)
        readable = sorted(file for file in found if file.is_file() and file_kind(file) not in kinds)
        if not readable:
            raise ValueError(f"--input {name}: no file found. {_accepted()}")
        files.extend(readable)
    if not files:
        raise ValueError("--input: give at least one file, folder or pattern.")
    return files


def _accepted() -> str:
    return (
        f"Files end in {', '.join(JSON_LINES + PLAIN_TEXT + PARQUET)}, all but .parquet "
        f"optionally followed by {', '.join(COMPRESSED)}."
    )


def cut_into_pieces(files: Sequence[Path], target_bytes: int) -> list[Piece]:
    """Pieces of about `target_bytes`, in order."""
    return [piece for file in files for piece in _pieces_of_file(file, target_bytes)]


def _pieces_of_file(path: Path, target_bytes: int) -> Iterator[Piece]:
    size = path.stat().st_size
    kind = file_kind(path)
    if kind in PARQUET:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = file.metadata.num_row_groups
        per_piece = max(1, target_bytes * groups // max(size, 1))
        for start in range(0, groups, per_piece):
            stop = min(start + per_piece, groups)
            yield Piece(str(path), start, stop, size * (stop - start) // groups)
    elif kind in JSON_LINES and path.suffix.lower() not in COMPRESSED:
        for start in range(0, size, target_bytes):
            stop = min(start + target_bytes, size)
            yield Piece(str(path), start, stop, stop - start)
    else:
        yield Piece(str(path), 0, 1, size)


def read_texts(piece: Piece, text_key: str, on_bad_record: OnBadRecord) -> Iterator[str]:
    """The texts of a piece, in order, all of them encodable as UTF-8."""
    kind = file_kind(Path(piece.path))
    if kind in PARQUET:
        records = _parquet_texts(piece, text_key, on_bad_record)
    elif kind in JSON_LINES:
        records = _json_texts(piece, text_key, on_bad_record)
    else:
        records = _plain_text(piece, on_bad_record)
    for where, text in records:
        if not isinstance(text, str):
            on_bad_record(f"{where}: {text_key!r} is {type(text).__name__}, not text")
        elif not _is_encodable(text):
            on_bad_record(f"{where}: the text holds half of a surrogate pair and is not Unicode")
        else:
            yield text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open(path: str) -> io.BufferedIOBase:
    if Path(path).suffix.lower() in COMPRESSED:
        return io.BufferedReader(pyarrow.input_stream(path, compression="detect"), 1 << 20)  # type: ignore[arg-type]
    return open(path, "rb", buffering=1 << 20)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin within the piece."""
    is_whole = Path(piece.path).suffix.lower() in COMPRESSED
    with _open(piece.path) as file:
        position = 0
        if piece.start > 0:
            file.seek(piece.start - 1)
            position = piece.start - 1 + len(file.readline())
        while is_whole or position < piece.stop:
            line = file.readline()
            if not line:
                break
            yield position, line
            position += len(line)


def _json_texts(
    piece: Piece, text_key: str, on_bad_record: OnBadRecord
) -> Iterator[tuple[str, object]]:
    for position, line in _lines(piece):
        where = f"{piece.path}, line at byte {position}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            on_bad_record(f"{where}: not JSON ({error})")
            continue
        if not isinstance(record, dict) or text_key not in record:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            on_bad_record(f"{where}: no key {text_key!r} in {keys}; give --json-keys")
            continue
        yield where, record[text_key]


def _plain_text(piece: Piece, on_bad_record: OnBadRecord) -> Iterator[tuple[str, object]]:
    with _open(piece.path) as file:
        contents = file.read()
    try:
        yield piece.path, contents.decode("utf-8")
    except UnicodeDecodeError as error:
        on_bad_record(f"{piece.path}: not UTF-8 ({error})")


def _parquet_columns(piece: Piece, column: str) -> Iterator[tuple[int, pyarrow.Array]]:
    """(row within the piece, values) in batches."""
    with pyarrow.parquet.ParquetFile(piece.path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f"{piece.path} has no column {column!r}; it has {', '.join(names)}.")
        row = 0
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(RECORDS_AT_ONCE, row_groups=groups, columns=[column]):
            yield row, batch.column(0)
            row += len(batch)


def _parquet_texts(
    piece: Piece, column: str, on_bad_record: OnBadRecord
) -> Iterator[tuple[str, object]]:
    for first, values in _parquet_columns(piece, column):
        for row, text in enumerate(values.to_pylist(), first):
            yield f"{piece.path}, row groups from {piece.start}, row {row}", text


def read_tokens(
    piece: Piece, column: str, vocab_size: int, on_bad_record: OnBadRecord
) -> Iterator[np.ndarray]:
    """Documents of a parquet piece of tokens: int64 [n] each, ids within the vocabulary."""
    if file_kind(Path(piece.path)) not in PARQUET:
        raise ValueError(f"--tokens-column reads .parquet files, not {piece.path}.")
    for first, values in _parquet_columns(piece, column):
        kind = values.type
        is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        if not (is_list and pyarrow.types.is_integer(kind.value_type)):
            raise ValueError(f"{piece.path}: {column!r} holds {kind}, not lists of integers.")
        for row, document in enumerate(values, first):
            where = f"{piece.path}, row groups from {piece.start}, row {row}"
            ids = document.values
            if ids is None or ids.null_count:
                on_bad_record(f"{where}: tokens are missing")
                continue
            tokens = ids.to_numpy().astype(np.int64)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                on_bad_record(
                    f"{where}: token id {tokens.max() if tokens.min() >= 0 else tokens.min()} is "
                    f"outside the vocabulary [0, {vocab_size}) of --tokenizer-model"
                )
                continue
            yield tokens
