"""Training of the byte-level BPE tokenizer (paper appendix on data; reference tokenizer).

Ids 0 to 3 are BOS, EOS, PAD and MASK, 4 to 15 runs of white space; then the 256 bytes, then merges.
Text is put into Unicode form NFC, cut at the runs of white space, cut by the pattern into words,
numbers and punctuation, and mapped to bytes. Decoding gives the NFC form of any text back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL_TOKENS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>", "mask": "<|mask|>"}
WHITESPACE_RUNS = (
    *(" " * count for count in (2, 3, 4, 6, 8, 12, 16)),
    "\n\n",
    "\n\n\n",
    "\t\t",
    "\t\t\t",
    "\t\t\t\t",
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(WHITESPACE_RUNS) + 256
SPLIT_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Contractions, words with one leading character, up to three digits, punctuation, line ends,
white space. Every character of a text falls into some piece."""


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, published_quirks: bool = False
) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` ids, or fewer where the text has no more merges.

    `published_quirks` reproduces two choices of the published tokenizer that lose information:
    every piece gets a leading space, and bytes not in `texts` are not in the vocabulary.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab-size is {vocab_size}: {SMALLEST_VOCABULARY} ids are taken by special tokens, "
            "runs of white space and bytes; give more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=published_quirks, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[
            AddedToken(token, normalized=False, special=True)
            for token in (*SPECIAL_TOKENS.values(), *WHITESPACE_RUNS)
        ],
        initial_alphabet=[] if published_quirks else pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos = SPECIAL_TOKENS["bos"], SPECIAL_TOKENS["eos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.token_to_id(bos)), (eos, tokenizer.token_to_id(eos))],
    )
    return _with_ordinary_whitespace(tokenizer)


def _with_ordinary_whitespace(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer marks all reserved tokens as special; runs of white space are text."""
    contents = json.loads(tokenizer.to_str())
    for token in contents["added_tokens"]:
        token["special"] = token["content"] not in WHITESPACE_RUNS
    return Tokenizer.from_str(json.dumps(contents))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **names,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, contents in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / file).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
