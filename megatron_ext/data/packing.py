"""Packed sequences from indexed tokens: sample i is a pure function of (files, seed, i).

The documents of an epoch are put into an order keyed by (seed, epoch) and joined; the epochs'
streams follow one another without a gap and are cut into sequences of `seq_length` (paper appendix
on data: no padding, no boundaries). A sequence belongs to the epoch in which it begins and may run
into the next, so in every epoch every token is seen exactly once, whatever the lengths. The
sequences of an epoch are handed out in a second order keyed by (seed, epoch).

Memory per process: 12 to 16 bytes per document and 4 to 8 per sequence, for each of the last two
epochs; tokens stay in the page cache. Orders come from sorting raw Philox outputs, whose bits numpy
guarantees, and not from `Generator.permutation`, whose algorithm may change between versions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np

from megatron_ext.data.indexed import IndexedTokens
from megatron_ext.diffusion.random import Purpose, generator

T = TypeVar("T")
DOCUMENTS, SEQUENCES = 0, 1
"""Draws of the two orders of an epoch."""
EPOCHS_IN_MEMORY = 2


class PackedSample(NamedTuple):
    """One sequence."""

    tokens: np.ndarray
    """[seq_length + extra_tokens] int64."""
    documents: np.ndarray
    """[seq_length + extra_tokens] int32: 0 for the sequence's first document, 1 for the next."""


class _Epoch(NamedTuple):
    order: np.ndarray
    """[d] documents in the order of the stream, counted from the first of the slice."""
    ends: np.ndarray
    """[d] int64, where each ends in the epoch's stream."""


def keyed_order(seed: int, epoch: int, draw: int, count: int) -> np.ndarray:
    """A permutation of range(count) keyed by its arguments, in the smallest of uint32 and int64."""
    keys = generator(seed, epoch, Purpose.ORDER, draw).bit_generator.random_raw(count)
    order = np.argsort(keys, kind="stable")
    return order.astype(np.uint32) if count < 1 << 32 else order


def _remembered(cache: OrderedDict[int, T], epoch: int, make: Callable[[], T]) -> T:
    """The cache's value for an epoch, made where absent; the epoch unused longest is forgotten."""
    if epoch not in cache:
        while len(cache) >= EPOCHS_IN_MEMORY:
            cache.popitem(last=False)
        cache[epoch] = make()
    cache.move_to_end(epoch)
    return cache[epoch]


class PackedDataset:
    """Documents [first_document, last_document) of a file as an endless run of sequences.

    `shuffle=False` (validation) keeps the order of the file and is finite: `len()` sequences, the
    tokens after the last whole one left out. `extra_tokens` lengthens every sequence by the tokens
    that follow it, without moving where sequences begin: 1 for next-token prediction.

    `aligned_eos_id` reproduces the reference: an EOS of that id that would be the first token of a
    sequence is left out. The epochs then differ in length, and reaching epoch e computes the orders
    of all before it. None keeps every EOS.
    """

    def __init__(
        self,
        data: IndexedTokens,
        seq_length: int,
        seed: int,
        *,
        first_document: int = 0,
        last_document: int | None = None,
        shuffle: bool = True,
        extra_tokens: int = 0,
        aligned_eos_id: int | None = None,
    ) -> None:
        self._data = data
        self._seq_length = seq_length
        self._seed = seed
        self._first = first_document
        self._last = data.num_documents if last_document is None else last_document
        self._shuffle = shuffle
        self._extra = extra_tokens
        self._aligned_eos_id = aligned_eos_id
        bounds = data.starts(self._first, self._last)
        self.num_tokens = int(bounds[-1] - bounds[0])
        """Tokens of the slice."""
        if self.num_tokens == 0:
            raise ValueError(
                f"{data.prefix}: documents {self._first} to {self._last} hold no tokens."
            )
        self._epoch_starts = [0]
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._sequence_orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()

    @property
    def identity(self) -> dict[str, str | int]:
        """What the samples depend on beside flags: which documents of what file."""
        return {
            "prefix": self._data.prefix,
            "documents": self._data.num_documents,
            "tokens": self._data.num_tokens,
            "first document": self._first,
            "last document": self._last,
            "fingerprint": self._data.fingerprint(),
        }

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token, taken over the whole file; None where it is unknown."""
        return self._data.bytes_per_token

    def __len__(self) -> int:
        """Sequences of a finite dataset."""
        if self._shuffle:
            raise TypeError("a shuffled dataset has no end")
        with self._lock:
            return max(0, (self._epoch_start(1) - self._extra) // self._seq_length)

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, position in the endless stream of its first token) of sample `index`."""
        if not self._shuffle:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)} from {self._data.prefix}")
            return 0, index * self._seq_length
        with self._lock:
            epoch = self._epoch_at(index * self._seq_length)
            first, last = self._first_sequence(epoch), self._first_sequence(epoch + 1)
            order = _remembered(
                self._sequence_orders,
                epoch,
                lambda: keyed_order(self._seed, epoch, SEQUENCES, last - first),
            )
        return epoch, (first + int(order[index - first])) * self._seq_length

    def sample(self, index: int) -> PackedSample:
        """Sequence `index`, any non-negative integer (below `len()` when finite)."""
        epoch, position = self.locate(index)
        length = self._seq_length + self._extra
        tokens = np.empty(length, np.int64)
        documents = np.empty(length, np.int32)
        filled = number = 0
        while filled < length:
            with self._lock:
                stream = self._epoch(epoch)
                start = self._epoch_start(epoch)
            offset = position + filled - start
            slot = int(np.searchsorted(stream.ends, offset, side="right"))
            while filled < length and slot < len(stream.ends):
                begin = int(stream.ends[slot - 1]) if slot else 0
                piece = self._document(int(stream.order[slot]))
                piece = piece[offset - begin : int(stream.ends[slot]) - begin][: length - filled]
                tokens[filled : filled + len(piece)] = piece
                documents[filled : filled + len(piece)] = number
                filled += len(piece)
                offset += len(piece)
                number += len(piece) > 0
                slot += 1
            epoch += 1
        return PackedSample(tokens, documents)

    def _document(self, number: int) -> np.ndarray:
        return self._data.document(self._first + number)

    def _epoch(self, epoch: int) -> _Epoch:
        return _remembered(self._epochs, epoch, lambda: self._order_documents(epoch))

    def _order_documents(self, epoch: int) -> _Epoch:
        lengths = np.diff(self._data.starts(self._first, self._last))
        count = len(lengths)
        order = (
            keyed_order(self._seed, epoch, DOCUMENTS, count) if self._shuffle else np.arange(count)
        )
        ends = np.cumsum(lengths[order])
        if self._aligned_eos_id is not None:
            ends -= self._dropped_before(order, ends, self._epoch_start(epoch))
        return _Epoch(order, ends)

    def _dropped_before(self, order: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """int64 [d]: how many EOS are dropped up to and with each document.

        Each drop moves all that follows, so the next one is looked for behind it, in windows of
        about the distance at which drops occur.
        """
        dropped = np.zeros(len(ends), np.int64)
        slot = shift = 0
        while slot < len(ends):
            window = start + ends[slot : slot + self._seq_length] - 1 - shift
            following = slot + len(window)
            for candidate in slot + np.flatnonzero(window % self._seq_length == 0):
                document = self._document(int(order[candidate]))
                if len(document) and document[-1] == self._aligned_eos_id:
                    dropped[candidate] = 1
                    shift += 1
                    following = int(candidate) + 1
                    break
            slot = following
        return np.cumsum(dropped)

    def _epoch_start(self, epoch: int) -> int:
        """Position in the endless stream at which an epoch begins."""
        if self._aligned_eos_id is None:
            return epoch * self.num_tokens
        while len(self._epoch_starts) <= epoch:
            last = len(self._epoch_starts) - 1
            length = int(self._epoch(last).ends[-1])
            self._epoch_starts.append(self._epoch_starts[last] + length)
        return self._epoch_starts[epoch]

    def _epoch_at(self, position: int) -> int:
        if self._aligned_eos_id is None:
            return position // self.num_tokens
        while self._epoch_starts[-1] <= position:
            self._epoch_start(len(self._epoch_starts))
        return bisect_right(self._epoch_starts, position) - 1

    def _first_sequence(self, epoch: int) -> int:
        """The first sequence that begins in an epoch."""
        return -(-self._epoch_start(epoch) // self._seq_length)
