"""Texts, and indexed files made without the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "def f(x):\n    if x:\n\treturn  x ** 2\n\n\n",
    "\u65e5\u672c\u8a9e\u306e\u6587 emoji \U0001f600\u200d\U0001f469 and \u03b2\u03b3",
    "  leading, trailing and   inner    runs     of      spaces        \r\n\t\tend  ",
    "literal <|mask|> and <|eos|> in the text, <s> and </s> too",
    "a",
    "\n",
]


def write_with_megatron(
    prefix: Path, documents: Sequence[Sequence[np.ndarray]], dtype: type = np.int32
) -> Path:
    """Documents, each a list of sequences, by megatron-core's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate(sequences), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix
