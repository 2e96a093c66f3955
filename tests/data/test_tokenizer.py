"""Tokenizers keep text intact and know their special ids."""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.data.train_bpe import SMALLEST_VOCABULARY, WHITESPACE_RUNS, train_bpe
from tests.data.corpora import TEXTS


def test_bpe_gives_back_the_nfc_form_of_any_text(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    rng = np.random.default_rng(0)
    alphabet = [
        *" \t\n\r'.,aZ09",
        "e\u0301",
        "\u00fc",
        "\u6f22",
        "\u1100\u1161",
        "\U0001f600",
        "\x00",
        "\u0378",
    ]
    random = ["".join(rng.choice(alphabet, rng.integers(0, 50))) for _ in range(300)]
    for text in TEXTS + random:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_bpe_reserves_the_ids_of_the_specification(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert [tokenizer.encode(run) for run in WHITESPACE_RUNS] == [[id] for id in range(4, 16)]
    assert tokenizer.vocab_size == 400


def test_special_tokens_spelled_out_in_text_stay_text(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    text = "<|bos|> <|eos|> <|pad|> <|mask|>"
    ids = tokenizer.encode(text)
    assert min(ids) >= 4
    assert tokenizer.decode(ids) == text


def test_batches_are_encoded_as_single_texts_are(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_training_is_reproducible() -> None:
    assert train_bpe(TEXTS, 350).to_str() == train_bpe(iter(TEXTS), 350).to_str()


def test_published_quirks_add_spaces_and_lose_unseen_bytes() -> None:
    quirky = train_bpe(TEXTS[:1], SMALLEST_VOCABULARY, published_quirks=True)
    decoded = quirky.decode(quirky.encode("fox.dog\u00e9,", add_special_tokens=False).ids)
    assert decoded == " fox .dog "


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--vocab-size is 271: 272 ids are taken"):
        train_bpe(TEXTS, 271)


def test_fingerprint_is_the_sha256_of_the_vocabulary_file(tokenizer_folder: Path) -> None:
    contents = (tokenizer_folder / "tokenizer.json").read_bytes()
    expected = hashlib.sha256(contents).hexdigest()
    assert load_tokenizer(tokenizer_folder).fingerprint == expected
    assert load_tokenizer(tokenizer_folder / "tokenizer.json").fingerprint == expected


def test_special_ids_follow_arguments_then_configuration_then_spelling(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).mask_id == 3
    config = {"mask_token": {"content": "\n\n"}, "eos_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, eos_token_id=9)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id) == (11, 9, 0)
    with pytest.raises(ValueError, match=r"--pad-token-id is 400: .* ids 0 to 399"):
        load_tokenizer(tmp_path, pad_token_id=400)


def test_sentencepiece_round_trips_and_says_how_to_name_a_mask(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    for text in (TEXTS[0], TEXTS[1], TEXTS[5]):
        ids = tokenizer.encode(text)
        assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (1, 2, None)
    with pytest.raises(ValueError, match=r"small\.model names no mask token.*--mask-token-id"):
        tokenizer.special_id("mask")
    assert load_tokenizer(sentencepiece_model, mask_token_id=7).special_id("mask") == 7


@pytest.mark.parametrize("name", ["absent", "tokenizer.json", "spm.model", "text.txt"])
def test_what_is_not_a_tokenizer_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name != "absent":
        path.write_text("{}")
    with pytest.raises(ValueError, match=f"--tokenizer-model .*{name}"):
        load_tokenizer(path)
