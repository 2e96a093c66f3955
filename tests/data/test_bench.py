"""The ways that the tokenization bench compares make the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ext.data.bench_tokenization import encode_plainly, library_texts, preprocess
from megatron_ext.data.train_bpe import save_tokenizer, train_bpe


def test_all_ways_make_the_same_number_of_tokens(tmp_path: Path) -> None:
    texts = library_texts(50_000)
    save_tokenizer(train_bpe(texts, 400), tmp_path)
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = str(tmp_path / "tokenizer.json")
    plain = encode_plainly(file, "encode_batch", texts)
    assert plain > 10_000
    assert encode_plainly(file, "encode_batch_fast", texts) == plain
    num_documents = sum(bool(text) for text in texts)
    assert preprocess(source, tmp_path, tmp_path / "output") == plain + num_documents
