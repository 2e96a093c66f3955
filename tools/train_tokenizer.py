"""Train a byte-level BPE tokenizer and write it as a Hugging Face folder.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 4096 --output tokenizer

Vocabulary: special tokens 0 to 3, runs of white space, the 256 bytes, then merges.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.data.documents import cut_into_pieces, find_files, read_texts  # noqa: E402
from megatron_ext.data.train_bpe import save_tokenizer, train_bpe  # noqa: E402


def texts_of(inputs: tuple[str, ...], text_key: str, max_mb: float | None) -> Iterator[str]:
    """Texts in order until `max_mb` MiB of UTF-8 are reached."""

    def refuse(fault: str) -> None:
        raise ValueError(fault)

    left = float("inf") if max_mb is None else max_mb * 2**20
    for piece in cut_into_pieces(find_files(inputs), 2**40):
        for text in read_texts(piece, text_key, refuse):
            if left <= 0:
                return
            left -= len(text.encode())
            yield text


def run(
    input: tuple[str, ...],
    output: Path,
    vocab_size: int = 32768,
    json_keys: str = "text",
    max_mb: float | None = None,
    published_quirks: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer and write it as a Hugging Face folder.

    Args:
        input: files, folders or patterns as tools/preprocess_data.py takes them.
        output: folder to write.
        vocab_size: ids, with the special tokens, runs of white space and bytes.
        json_keys: key or column that holds the text.
        max_mb: train on the first so many MiB of text; all of it when absent.
        published_quirks: a leading space before every piece, and only bytes that occur, as the
            published tokenizer has it; decoding is then not exact.
    """
    tokenizer = train_bpe(
        texts_of(input, json_keys, max_mb), vocab_size, published_quirks=published_quirks
    )
    save_tokenizer(tokenizer, output)
    print(f"{output}: {tokenizer.get_vocab_size()} ids")


def main() -> None:
    try:
        tyro.cli(run)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
