"""Blends keep their proportions in every prefix."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.blend import BlendedDataset, interleave, whole_shares
from megatron_ext.data.indexed import open_indexed
from megatron_ext.data.packing import PackedDataset
from tests.data.corpora import write_with_megatron


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_every_prefix_is_within_one_sample_of_the_weights(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(2):
        weights = rng.dirichlet(np.full(count, 0.5)) + 1e-3
        shares = whole_shares(weights)
        choice = interleave(shares)
        fractions = np.array(shares) / sum(shares)
        assert np.abs(fractions - weights / weights.sum()).max() < count / 65536
        taken = np.cumsum(choice[:, None] == np.arange(count), axis=0)
        due = np.arange(1, len(choice) + 1)[:, None] * fractions
        bound = 1 - 1 / (2 * count - 2) if count > 1 else 0
        assert np.abs(taken - due).max() <= bound + 1e-9
        assert taken[-1].tolist() == shares


def test_decimal_weights_are_exact() -> None:
    assert whole_shares([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert whole_shares([Fraction(2), Fraction(1)]) == [2, 1]
    assert whole_shares([1, 10**9])[0] == 1, "a tiny weight still gets its turn"


@pytest.fixture
def parts(tmp_path: Path) -> list[PackedDataset]:
    """Finite datasets of 20, 6 and 9 sequences of four tokens; the tokens tell which is which."""
    datasets = []
    for number, sequences in enumerate((20, 6, 9)):
        tokens = 1000 * number + np.arange(4 * sequences)
        prefix = write_with_megatron(tmp_path / str(number), [[tokens]])
        datasets.append(PackedDataset(open_indexed(prefix), 4, 0, shuffle=False))
    return datasets


def test_each_dataset_hands_out_its_samples_in_order(parts: list[PackedDataset]) -> None:
    blend = BlendedDataset(parts, [Fraction("0.5"), Fraction("0.2"), Fraction("0.3")])
    located = [blend.locate(i) for i in range(1000)]
    for number, weight in enumerate((0.5, 0.2, 0.3)):
        own = [sample for dataset, sample in located if dataset == number]
        assert own == list(range(int(1000 * weight)))
    assert blend.locate(10**12)[1] == pytest.approx(0.5e12, rel=1e-9)


def test_a_finite_blend_ends_where_a_dataset_does(parts: list[PackedDataset]) -> None:
    blend = BlendedDataset(parts, [Fraction("0.5"), Fraction("0.2"), Fraction("0.3")])
    tokens = [blend.sample(i).tokens[0] for i in range(len(blend))]
    assert len(set(tokens)) == len(tokens)
    number, own = blend.locate(len(blend))
    assert own == len(parts[number])
    assert 28 <= len(blend) <= 32
    everything = BlendedDataset(parts, [20, 6, 9])
    assert len(everything) == 35


def test_weights_that_are_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match="weights are"):
        whole_shares([1.0, 0.0])
