"""Small corpora and tokenizers that the tests of the data path share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.train_bpe import save_tokenizer, train_bpe
from tests.data.corpora import TEXTS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe(TEXTS, 400), folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece unigram model of 300 ids with byte fallback and no mask or pad token."""
    import sentencepiece

    path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 3),
            model_writer=file,
            vocab_size=330,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


@pytest.fixture
def random_documents() -> list[np.ndarray]:
    """40 documents of 1 to 60 tokens below 1000."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 1000, rng.integers(1, 61)) for _ in range(40)]
