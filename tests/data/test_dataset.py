"""Datasets from flags: blends, splits, separate files, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.dataset import Datasets, build_datasets, parse_blend, split_bounds
from tests.data.corpora import write_with_megatron


@pytest.fixture
def prefixes(tmp_path: Path) -> dict[str, str]:
    """a: 100 documents of 20 tokens from 0; b: 50 from 10,000; short: one of 10 tokens."""
    found = {}
    for name, count, first in (("a", 100, 0), ("b", 50, 10_000)):
        tokens = np.split(first + np.arange(20 * count), count)
        found[name] = str(write_with_megatron(tmp_path / name, [[doc] for doc in tokens]))
    found["short"] = str(write_with_megatron(tmp_path / "short", [[np.arange(10)]]))
    return found


def build(
    data: Sequence[str],
    valid: Sequence[str] = (),
    test: Sequence[str] = (),
    split: str = "90,8,2",
    vocab_size: int = 20_000,
) -> Datasets:
    return build_datasets(data, valid, test, split, seq_length=16, seed=0, vocab_size=vocab_size)


def test_blends_are_written_as_in_megatron() -> None:
    assert parse_blend("--data-path", ["a"]) == (None, ["a"])
    assert parse_blend("--data-path", ["a", "b"]) == (None, ["a", "b"])
    weights = [Fraction("0.7"), Fraction("0.3")]
    assert parse_blend("--data-path", ["0.7", "a", "0.3", "b"]) == (weights, ["a", "b"])


@pytest.mark.parametrize(
    "arguments", [["0.7", "a", "b"], ["a", "0.3"], ["0.7", "a", "0", "b"], ["1"], ["-1", "a"]]
)
def test_a_malformed_blend_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="--data-path .*: give prefixes alone, or a positive"):
        parse_blend("--data-path", arguments)


def test_split_divides_documents_in_order_and_without_overlap(prefixes: dict[str, str]) -> None:
    train, valid, test = build([prefixes["a"]])
    assert valid is not None and test is not None
    per_epoch = 90 * 20 // 16
    seen = np.unique(np.concatenate([train.sample(i).tokens for i in range(3 * per_epoch)]))
    assert (seen.min(), seen.max(), len(seen)) == (0, 90 * 20 - 1, 90 * 20)
    assert (len(valid), len(test)) == (8 * 20 // 16, 2 * 20 // 16)
    assert valid.sample(0).tokens.tolist() == list(range(1800, 1816))
    assert test.sample(0).tokens.tolist() == list(range(1960, 1976))
    assert split_bounds("969,30,1").tolist() == pytest.approx([0, 0.969, 0.999, 1])


def test_no_share_means_no_dataset(prefixes: dict[str, str]) -> None:
    assert build([prefixes["a"]], split="100,0,0")[1:] == (None, None)
    assert build([prefixes["a"]], split="1")[1:] == (None, None)
    assert build([prefixes["a"]], split="969,30,1")[2] is None, "a thousandth of 100 is nothing"


def test_separate_validation_data_leaves_all_of_data_path_to_training(
    prefixes: dict[str, str],
) -> None:
    train, valid, test = build([prefixes["a"]], valid=[prefixes["b"]])
    assert valid is not None and test is None
    assert train.num_tokens == 2000
    assert len(valid) == 1000 // 16
    assert valid.sample(0).tokens.tolist() == list(range(10_000, 10_016))


@pytest.mark.parametrize(
    ("weights", "share"), [(None, 2 / 3), (("0.25", "0.75"), 0.25), (("3", "1"), 0.75)]
)
def test_training_follows_the_weights_or_the_sizes(
    prefixes: dict[str, str], weights: tuple[str, str] | None, share: float
) -> None:
    a, b = prefixes["a"], prefixes["b"]
    train, _, _ = build([a, b] if weights is None else [weights[0], a, weights[1], b])
    from_a = [train.sample(i).tokens[0] < 10_000 for i in range(1200)]
    assert np.mean(from_a) == pytest.approx(share, abs=1 / 1200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": []}, "--data-path is empty"),
        ({"split": "9,1,x"}, "--split is '9,1,x'"),
        ({"split": "9,-1"}, "--split is '9,-1'"),
        ({"split": "0,1,0"}, "--split is '0,1,0'"),
        ({"split": "1000,1,0"}, r"--data-path .*a: --split leaves no documents of 100"),
        ({"valid": ["short"]}, r"--valid-data-path .*short: 10 tokens .* --seq-length 16"),
        ({"test": ["short"]}, r"--test-data-path .*short: 10 tokens"),
        ({"data": ["missing"]}, r"--data-path .*missing: there is no file .*missing\.bin"),
        ({"vocab_size": 1999}, r"--data-path .*a\.bin holds token id 1999"),
        ({"valid": ["b"], "vocab_size": 5000}, r"--valid-data-path .*b\.bin holds token id 10999"),
    ],
)
def test_what_cannot_be_read_is_refused_by_flag_and_file(
    prefixes: dict[str, str], arguments: dict, message: str
) -> None:
    for key in ("data", "valid", "test"):
        if key in arguments:
            arguments[key] = [prefixes.get(name, name) for name in arguments[key]]
    with pytest.raises(ValueError, match=message):
        build(**{"data": [prefixes["a"]], **arguments})
