"""The file format is megatron-core's, and damage is found and named."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data.indexed import (
    HEADER_BYTES,
    MANIFEST_FORMAT,
    IndexedWriter,
    dtype_for_vocabulary,
    id_range,
    open_indexed,
    verify_checksums,
)
from tests.data.corpora import write_with_megatron

Edit = Callable[[bytearray], bytearray]


def overwrite(offset: int, value: bytes) -> Edit:
    def edit(contents: bytearray) -> bytearray:
        contents[offset : offset + len(value)] = value
        return contents

    return edit


def written(folder: Path, documents: list[np.ndarray], dtype: type = np.int32) -> str:
    return str(write_with_megatron(folder / "data", [[doc] for doc in documents], dtype))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_files_of_megatron_with_several_sequences_per_document_are_read(
    tmp_path: Path, random_documents: list[np.ndarray], dtype: type
) -> None:
    groups = [random_documents[:1], random_documents[1:4], [], random_documents[4:40]]
    groups[2] = [np.zeros(0, np.int64)]
    data = open_indexed(write_with_megatron(tmp_path / "data", groups, dtype), vocab_size=1000)
    assert (data.num_documents, data.num_tokens) == (4, sum(map(len, random_documents)))
    for index, sequences in enumerate(groups):
        assert np.array_equal(data.document(index), np.concatenate(sequences))
    assert data.manifest is None and data.bytes_per_token is None


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_written_are_the_bytes_that_megatron_writes(
    tmp_path: Path, random_documents: list[np.ndarray], dtype: type
) -> None:
    theirs = written(tmp_path, random_documents, dtype)
    with IndexedWriter(tmp_path / "ours", np.dtype(dtype)) as writer:
        for document in random_documents:
            writer.append(document)
    assert writer.summary == (40, sum(map(len, random_documents)))
    for suffix in (".bin", ".idx"):
        assert Path(theirs + suffix).read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()
    reader = IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(reader[i], doc) for i, doc in enumerate(random_documents))


def test_token_type_is_the_one_megatron_chooses() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (256, 65499, 65500, 65536, 131072):
        assert dtype_for_vocabulary(vocab_size) == DType.optimal_dtype(vocab_size)


NUM_SEQUENCES = 40
POINTERS = HEADER_BYTES + 4 * NUM_SEQUENCES
BOUNDS = POINTERS + 8 * NUM_SEQUENCES
DAMAGE = {
    "bin cut short": (".bin", lambda c: c[:-1], r"data\.bin has \d+ bytes but .*data\.idx descr"),
    "bin too long": (".bin", lambda c: c + b"\0\0\0\0", r"data\.bin has \d+ bytes but"),
    "idx cut short": (".idx", lambda c: c[:-8], r"data\.idx has \d+ bytes, but 40 sequences"),
    "idx without header": (".idx", lambda c: c[:20], r"data\.idx is truncated"),
    "idx empty": (".idx", lambda c: c[:0], r"data\.idx does not begin as a Megatron index"),
    "magic": (".idx", overwrite(0, b"X"), r"data\.idx does not begin as a Megatron index"),
    "version": (".idx", overwrite(9, struct.pack("<Q", 2)), r"data\.idx has format version 2"),
    "dtype unknown": (".idx", overwrite(17, b"\x63"), r"data\.idx has dtype code 99"),
    "dtype of floats": (".idx", overwrite(17, b"\x07"), r"data\.idx has dtype code 7"),
    "length": (".idx", overwrite(HEADER_BYTES, b"\x7f"), r"data\.idx is damaged: .*offsets"),
    "negative": (".idx", overwrite(HEADER_BYTES + 3, b"\xff"), r"data\.idx is damaged: .*offsets"),
    "offset": (".idx", overwrite(POINTERS + 8, b"\xff"), r"data\.idx is damaged: .*offsets"),
    "first bound": (".idx", overwrite(BOUNDS, b"\x01"), r"data\.idx is damaged: .*bounds"),
    "bounds unsorted": (".idx", overwrite(BOUNDS + 8, b"\x27"), r"data\.idx is damaged: .*bounds"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, random_documents: list[np.ndarray], damage: str
) -> None:
    suffix, edit, message = DAMAGE[damage]
    prefix = written(tmp_path, random_documents)
    path = Path(prefix + suffix)
    path.write_bytes(edit(bytearray(path.read_bytes())))
    with pytest.raises(ValueError, match=f"--valid-data-path.*{message}"):
        open_indexed(prefix, flag="--valid-data-path")


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_file_is_named(
    tmp_path: Path, random_documents: list[np.ndarray], missing: str
) -> None:
    prefix = written(tmp_path, random_documents)
    os.remove(prefix + missing)
    with pytest.raises(ValueError, match=rf"--data-path .*no file .*data\{missing}"):
        open_indexed(prefix)
    with pytest.raises(ValueError, match="give the prefix without"):
        open_indexed(prefix + ".bin")


def test_an_index_of_other_data_is_refused(
    tmp_path: Path, random_documents: list[np.ndarray]
) -> None:
    prefix = written(tmp_path, random_documents)
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", random_documents[:-1])
    os.replace(other + ".idx", prefix + ".idx")
    with pytest.raises(ValueError, match="one of the two is truncated or belongs to other data"):
        open_indexed(prefix)


def test_ids_outside_the_vocabulary_are_refused_wherever_they_are(
    tmp_path: Path, random_documents: list[np.ndarray]
) -> None:
    largest = int(max(doc.max() for doc in random_documents))
    prefix = written(tmp_path, random_documents)
    open_indexed(prefix, vocab_size=largest + 1)
    with pytest.raises(
        ValueError, match=rf"data\.bin holds token id {largest}, outside .*{largest}"
    ):
        open_indexed(prefix, vocab_size=largest)
    with open(prefix + ".bin", "r+b") as file:
        file.seek(400)
        file.write(struct.pack("<i", -5))
    os.utime(prefix + ".bin", ns=(1, 1))
    with pytest.raises(ValueError, match=r"data\.bin holds token id -5"):
        open_indexed(prefix, vocab_size=largest + 1)


def test_id_range_is_remembered_where_the_folder_can_be_written(
    tmp_path: Path, random_documents: list[np.ndarray]
) -> None:
    data = open_indexed(written(tmp_path, random_documents))
    joined = np.concatenate(random_documents)
    expected = (int(joined.min()), int(joined.max()))
    assert id_range(data) == expected
    cache = Path(data.prefix + ".scan.json")
    contents = json.loads(cache.read_text())
    cache.write_text(json.dumps(contents | {"high": 5}))
    assert id_range(data) == (expected[0], 5)
    cache.unlink()
    cache.mkdir()
    assert id_range(data) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", cache.name]


def manifest(of: list[np.ndarray], **changes: object) -> str:
    tokenizer = {"path": "tok/tokenizer.json", "fingerprint": "a" * 64}
    contents = {
        "format": MANIFEST_FORMAT,
        "documents": len(of),
        "tokens": sum(map(len, of)),
        "utf8_bytes": 2 * sum(map(len, of)),
        "tokenizer": tokenizer,
    }
    return json.dumps(contents | changes)


def test_data_of_another_tokenizer_is_refused(
    tmp_path: Path, random_documents: list[np.ndarray]
) -> None:
    prefix = written(tmp_path, random_documents)
    Path(prefix + ".json").write_text(manifest(random_documents))
    data = open_indexed(prefix, tokenizer_fingerprint="a" * 64)
    assert data.bytes_per_token == 2.0
    with pytest.raises(ValueError, match=r"tokenized with tok/tokenizer.json .*--tokenizer-model"):
        open_indexed(prefix, tokenizer_fingerprint="b" * 64)


def test_a_manifest_of_other_files_is_refused_and_other_json_is_not_one(
    tmp_path: Path, random_documents: list[np.ndarray]
) -> None:
    prefix = written(tmp_path, random_documents)
    Path(prefix + ".json").write_text(manifest(random_documents, documents=39))
    with pytest.raises(ValueError, match=r"data\.json counts 39 documents .* index 40"):
        open_indexed(prefix)
    Path(prefix + ".json").write_text('{"text": "a corpus"}\n{"text": "of two lines"}\n')
    assert open_indexed(prefix).manifest is None


def test_a_flipped_bit_is_found_by_the_checksums(
    tmp_path: Path, random_documents: list[np.ndarray]
) -> None:
    import hashlib

    prefix = written(tmp_path, random_documents)
    digests = {
        kind: {"sha256": hashlib.sha256(Path(f"{prefix}.{kind}").read_bytes()).hexdigest()}
        for kind in ("bin", "idx")
    }
    Path(prefix + ".json").write_text(manifest(random_documents, **digests))
    verify_checksums(prefix)
    contents = bytearray(Path(prefix + ".bin").read_bytes())
    contents[100] ^= 1
    Path(prefix + ".bin").write_bytes(contents)
    with pytest.raises(ValueError, match=r"data\.bin has sha256 .* is damaged"):
        verify_checksums(prefix)
