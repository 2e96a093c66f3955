"""Sample order against a plain walk over the documents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedTokens, open_indexed
from megatron_ext.data.packing import DOCUMENTS, PackedDataset, keyed_order
from tests.data.corpora import write_with_megatron

EOS = 1_000_000


def distinct_documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which no token occurs twice."""
    return np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])


def opened(folder: Path, documents: list[np.ndarray]) -> IndexedTokens:
    return open_indexed(write_with_megatron(folder / "data", [[doc] for doc in documents]))


def some_lengths(count: int, longest: int = 60) -> list[int]:
    return np.random.default_rng(5).integers(1, longest, count).tolist()


def stream(documents: list[np.ndarray], seed: int, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, running number of the document) of the first epochs, joined one by one."""
    order = [i for e in range(epochs) for i in keyed_order(seed, e, DOCUMENTS, len(documents))]
    tokens = np.concatenate([documents[i] for i in order])
    numbers = np.repeat(np.arange(len(order)), [len(documents[i]) for i in order])
    return tokens, numbers


@pytest.mark.parametrize("seq_length", [1, 7, 16, 64, 500])
def test_every_token_is_seen_exactly_once_in_every_epoch(tmp_path: Path, seq_length: int) -> None:
    documents = distinct_documents(some_lengths(30))
    total = sum(map(len, documents))
    dataset = PackedDataset(opened(tmp_path, documents), seq_length, seed=7)
    num_samples = -(-seq_length * total // seq_length)
    samples = [dataset.sample(i).tokens for i in range(num_samples)]
    counts = np.bincount(np.concatenate(samples), minlength=total)
    assert counts.tolist() == [seq_length] * total, "seq_length epochs end at a sequence's end"
    begins = [dataset.locate(i)[1] for i in range(num_samples)]
    assert sorted(begins) == list(range(0, num_samples * seq_length, seq_length))


@pytest.mark.parametrize("lengths", [some_lengths(30), [3], [1, 0, 2, 0, 0, 1], [90, 200]])
def test_sequences_are_cut_from_the_joined_epochs(tmp_path: Path, lengths: list[int]) -> None:
    documents = distinct_documents(lengths)
    dataset = PackedDataset(opened(tmp_path, documents), 16, seed=3, extra_tokens=1)
    samples = 3 * max(sum(lengths) // 16, 2)
    tokens, numbers = stream(documents, 3, epochs=5 + 20 * 16 * 9 // sum(lengths))
    for index in range(samples):
        _, begin = dataset.locate(index)
        sample = dataset.sample(index)
        window = slice(begin, begin + 17)
        assert np.array_equal(sample.tokens, tokens[window])
        expected = np.unique(numbers[window], return_inverse=True)[1]
        assert np.array_equal(sample.documents, expected)
        assert (sample.tokens.dtype, sample.documents.dtype) == (np.int64, np.int32)


def test_a_sample_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    data = opened(tmp_path, distinct_documents(some_lengths(50)))
    forward = PackedDataset(data, 16, seed=1)
    expected = {i: forward.sample(i) for i in range(400)}
    shuffled = np.random.default_rng(0).permutation(400).tolist()
    scattered = PackedDataset(data, 16, seed=1)
    with ThreadPoolExecutor(4) as pool:
        for index, sample in zip(shuffled, pool.map(scattered.sample, shuffled), strict=True):
            assert np.array_equal(sample.tokens, expected[index].tokens)
            assert np.array_equal(sample.documents, expected[index].documents)
    other = PackedDataset(data, 16, seed=2)
    assert not np.array_equal(other.sample(0).tokens, expected[0].tokens)


def test_the_order_is_the_same_in_every_version() -> None:
    assert keyed_order(0, 0, DOCUMENTS, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_epochs_have_different_orders_of_documents_and_of_sequences(tmp_path: Path) -> None:
    documents = distinct_documents([16] * 64)
    dataset = PackedDataset(opened(tmp_path, documents), 16, seed=0)
    epochs = np.array([[dataset.sample(64 * e + i).tokens[0] for i in range(64)] for e in range(3)])
    begins = np.array([[dataset.locate(64 * e + i)[1] for i in range(64)] for e in range(3)])
    for rows in (epochs, begins % (64 * 16)):
        assert all(sorted(row) == sorted(rows[0]) for row in rows)
        agreements = [(rows[a] == rows[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert max(agreements) < 0.1
    assert {dataset.locate(i)[0] for i in range(64)} == {0}


def test_validation_is_finite_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    documents = distinct_documents(some_lengths(30))
    joined = np.concatenate(documents[4:20])
    dataset = PackedDataset(
        opened(tmp_path, documents), 16, 0, first_document=4, last_document=20, shuffle=False
    )
    assert len(dataset) == len(joined) // 16
    found = np.concatenate([dataset.sample(i).tokens for i in range(len(dataset))])
    assert np.array_equal(found, joined[: len(found)])
    with pytest.raises(IndexError):
        dataset.sample(len(dataset))
    with pytest.raises(TypeError, match="no end"):
        len(PackedDataset(opened(tmp_path, documents), 16, 0))


def test_extra_tokens_leave_the_sequences_where_they_are(tmp_path: Path) -> None:
    data = opened(tmp_path, distinct_documents([64, 64]))
    plain = PackedDataset(data, 16, seed=4)
    longer = PackedDataset(data, 16, seed=4, extra_tokens=1)
    for index in range(40):
        assert np.array_equal(plain.sample(index).tokens, longer.sample(index).tokens[:16])
    assert len(PackedDataset(data, 16, 0, shuffle=False, extra_tokens=1)) == 7
    assert len(PackedDataset(data, 16, 0, shuffle=False)) == 8


@pytest.mark.parametrize("longest", [6, 40])
def test_aligned_eos_is_dropped_as_by_the_reference_buffer(tmp_path: Path, longest: int) -> None:
    """The rule as it was described: append a document, then EOS unless the buffer is then full."""
    lengths = some_lengths(200, longest)
    bare = distinct_documents(lengths)
    with_eos = [np.append(doc, EOS) for doc in bare]
    dataset = PackedDataset(opened(tmp_path, with_eos), 8, seed=9, aligned_eos_id=EOS)
    buffer: list[int] = []
    for epoch in range(4):
        for index in keyed_order(9, epoch, DOCUMENTS, 200):
            buffer.extend(bare[index].tolist())
            if len(buffer) % 8:
                buffer.append(EOS)
    for index in range(3 * sum(lengths) // 8):
        _, begin = dataset.locate(index)
        assert dataset.sample(index).tokens.tolist() == buffer[begin : begin + 8]
        assert dataset.sample(index).tokens[0] != EOS


def test_a_slice_without_tokens_is_refused(tmp_path: Path) -> None:
    data = opened(tmp_path, distinct_documents([5, 0, 5]))
    with pytest.raises(ValueError, match=r"data: documents 1 to 2 hold no tokens"):
        PackedDataset(data, 4, 0, first_document=1, last_document=2)
