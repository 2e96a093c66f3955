"""Random numbers are a function of (seed, index, purpose, draw), and look like random numbers."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_ext.diffusion.random import Purpose, generator
from tests.diffusion.bounds import assert_uncorrelated, assert_uniform


def _first(seed: int, index: int, purpose: Purpose, draw: int = 0, count: int = 4) -> bytes:
    return generator(seed, index, purpose, draw).random(count).tobytes()


def test_numbers_depend_on_nothing_but_the_key() -> None:
    keys = [(1, index, purpose, 0) for index in range(20) for purpose in Purpose]
    straight = [_first(*key) for key in keys]
    shuffled = list(range(len(keys)))
    random.Random(0).shuffle(shuffled)
    again = {}
    for position in shuffled:
        np.random.seed(position), torch.manual_seed(position)
        generator(7, 7, Purpose.ORDER).random(position)
        again[position] = _first(*keys[position])
    assert straight == [again[position] for position in range(len(keys))]
    with ThreadPoolExecutor(4) as pool:
        assert straight == list(pool.map(lambda key: _first(*key), keys))


def test_every_part_of_the_key_gives_another_stream() -> None:
    seeds, indices, draws = (0, 1, 2**32, 2**63), (0, 1, 2**32, 2**64 - 1), (0, 1, 2**40)
    streams = {
        _first(seed, index, purpose, draw)
        for seed in seeds
        for index in indices
        for purpose in Purpose
        for draw in draws
    }
    assert len(streams) == len(seeds) * len(indices) * len(Purpose) * len(draws)


def test_streams_of_neighbouring_keys_share_no_block() -> None:
    """Philox counters of indices and draws are far apart: long streams do not run into others."""
    blocks: set[bytes] = set()
    keys = [(index, draw) for index in (0, 1, 2) for draw in (0, 1, 2)]
    for index, draw in keys:
        raw = generator(5, index, Purpose.CORRUPTION, draw).bit_generator.random_raw(40_000)
        blocks.update(block.tobytes() for block in raw.reshape(-1, 4))
    assert len(blocks) == len(keys) * 10_000


def test_a_stream_is_that_of_the_published_philox() -> None:
    """Philox4x64-10 of counter and key zero, its authors' known answer.

    The first block numpy returns is that of counter 1, so the counter is set one before zero.
    """
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    numbers = generator(0, 0, Purpose.ORDER)
    state = numbers.bit_generator.state
    state["state"]["counter"][:] = 2**64 - 1
    numbers.bit_generator.state = state
    assert numbers.bit_generator.random_raw(4).tolist() == known


@pytest.mark.parametrize("purpose", [Purpose.PROMPT, Purpose.LOG_SNR, Purpose.CORRUPTION])
def test_first_numbers_of_successive_indices_are_uniform_and_independent(purpose: Purpose) -> None:
    """What decides about a sequence is the first number of its stream."""
    first = np.array([generator(3, index, purpose).random() for index in range(20_000)])
    assert_uniform(first)
    assert_uncorrelated(first[1:], first[:-1])
    other = Purpose.INFILL
    assert_uncorrelated(first, [generator(3, index, other).random() for index in range(20_000)])
    assert_uncorrelated(first, [generator(4, index, purpose).random() for index in range(20_000)])
    assert_uncorrelated(
        first, [generator(3, index, purpose, draw=1).random() for index in range(20_000)]
    )


def test_seeds_count_modulo_two_to_the_64() -> None:
    assert _first(-1, 0, Purpose.ORDER) == _first(2**64 - 1, 0, Purpose.ORDER)
    assert _first(2**64, 0, Purpose.ORDER) == _first(0, 0, Purpose.ORDER)


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "1"])
def test_an_index_or_draw_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="index"):
        generator(0, value, Purpose.ORDER)
    with pytest.raises(ValueError, match="draw"):
        generator(0, 0, Purpose.ORDER, value)


def test_numbers_of_purposes_are_never_renumbered() -> None:
    """They are part of every run's identity: a changed number is another noise."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "ORDER": 0, "EMPTY_TOKENS": 1, "PROMPT": 2, "INFILL": 3, "LOG_SNR": 4, "CORRUPTION": 5,
        "VALIDATION_LOG_SNR": 6, "VALIDATION_CORRUPTION": 7, "SAMPLING": 8, "WEIGHTS": 9,
        "MOCK_DATA": 10,
    }  # fmt: skip
