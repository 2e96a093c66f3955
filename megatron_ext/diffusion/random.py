"""Random numbers as a pure function of (seed, index, purpose, draw).

Nothing here has state that outlives a call: whoever asks for the numbers of global sample 12345
gets the same ones, on any rank, in any order, before and after a restart. The generator is
Philox4x64-10, a bijection of a 256-bit counter under a 128-bit key, laid out as

    key      seed (64 bits) | purpose (64 bits)
    counter  0 ... 2^128 - 1 (advances by one per four outputs) | draw (64 bits) | index (64 bits)

A stream holds 2^130 outputs of 64 bits before its counter runs into the next draw's. Two streams
that differ in index or draw alone encrypt disjoint sets of counters under one key, so they share no
block; two that differ in seed or purpose use different keys.
"""

from __future__ import annotations

import operator
from enum import IntEnum

import numpy as np

_WORD = 1 << 64


class Purpose(IntEnum):
    """What numbers are for. The values are part of a run's identity: add, never renumber."""

    ORDER = 0
    """Order of documents and samples."""
    EMPTY_TOKENS = 1
    """How many empty tokens a sequence gets, and where."""
    PROMPT = 2
    """Whether a sequence has a prompt, and its length."""
    INFILL = 3
    """Whether a sequence has infilling, and which tokens it leaves clean."""
    LOG_SNR = 4
    """Noise levels of training sequences."""
    CORRUPTION = 5
    """Which tokens of a training sequence are replaced, and by what."""
    VALIDATION_LOG_SNR = 6
    """Offset of the validation grid of noise levels."""
    VALIDATION_CORRUPTION = 7
    """Which tokens of a validation sequence are replaced, and by what."""
    SAMPLING = 8
    """Generation from the model."""
    WEIGHTS = 9
    """Initial weights."""
    MOCK_DATA = 10
    """Made-up tokens."""


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands a bit generator its key as it stands: numpy hashes integer seeds, and draws entropy
    from the operating system (8 microseconds) even where a key is given."""

    def __init__(self, seed: int, purpose: int) -> None:
        self._key = np.array([seed, purpose], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        assert n_words == 2 and dtype == np.uint64, "Philox asks for a key of two 64-bit words"
        return self._key


def generator(seed: int, index: int, purpose: Purpose, draw: int = 0) -> np.random.Generator:
    """A fresh generator at the start of the stream of (seed, index, purpose, draw).

    `seed` is any integer and counts modulo 2^64, so -1 and 2^64 - 1 are one seed. `index` is the
    global sample index, or a hash of a name; `draw` numbers repeated draws for one index. Both
    must lie in [0, 2^64). Raises `ValueError` for anything else.
    """
    counter = np.zeros(4, dtype=np.uint64)
    counter[2] = _word("draw", draw)
    counter[3] = _word("index", index)
    key = _Key(_integer("--seed", seed) % _WORD, Purpose(purpose))
    return np.random.Generator(np.random.Philox(key, counter=counter))


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}: give an integer.") from None


def _word(name: str, value: int) -> int:
    number = _integer(name, value)
    if not 0 <= number < _WORD:
        raise ValueError(f"{name} is {value!r}: give an integer in [0, 2^64).")
    return number
