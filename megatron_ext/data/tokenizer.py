"""Tokenizers: a Hugging Face `tokenizer.json` or a SentencePiece `.model` behind one interface.

Text is always data: a special token spelled out in it, such as `<|mask|>`, is encoded as ordinary
characters and never becomes the special id. (The published GIDD tokenizer does turn the spelled-out
mask into the mask id; a corpus that mentions it would then train on impossible positions.)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ext.data.indexed import sha256_of_file

SpecialName = Literal["bos", "eos", "pad", "mask"]

CUSTOMARY_SPELLINGS: dict[SpecialName, tuple[str, ...]] = {
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>"),
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "mask": ("<|mask|>", "<mask>", "[MASK]"),
}
"""Looked up, in this order, where the tokenizer's own configuration names no such token."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """Text to ids and back, and the ids with a meaning."""

    path: str
    """The file the vocabulary came from."""
    fingerprint: str
    """sha256 of that file."""
    vocab_size: int
    """Largest id plus one, special tokens included."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    mask_id: int | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no special tokens added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens spelled out where the vocabulary spells them."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, no special tokens added."""
        return self.encode_batch([text])[0]

    def special_id(self, name: SpecialName) -> int:
        """The id of a special token; `ValueError` says how to give it where it is unknown."""
        found = getattr(self, f"{name}_id")
        if found is None:
            raise ValueError(
                f"--tokenizer-model {self.path} names no {name} token: give --{name}-token-id, or "
                f'set "{name}_token" in the tokenizer_config.json beside it.'
            )
        return found


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`."""

    backend: Any

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer(Tokenizer):
    """A `sentencepiece.SentencePieceProcessor`."""

    backend: Any

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.backend.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(id) for id in ids])


def load_tokenizer(
    path: str | Path,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    mask_token_id: int | None = None,
) -> Tokenizer:
    """Open a folder with `tokenizer.json`, such a file, or a SentencePiece `.model`.

    Special ids come from the arguments, else from `tokenizer_config.json` or
    `special_tokens_map.json` beside the file, else from customary spellings in the vocabulary; an
    id that none of them gives is None. `ValueError` for anything that is not a tokenizer and for
    ids outside the vocabulary.
    """
    given: dict[SpecialName, int | None] = {
        "bos": bos_token_id,
        "eos": eos_token_id,
        "pad": pad_token_id,
        "mask": mask_token_id,
    }
    file = _vocabulary_file(Path(path))
    tokenizer = _open_sentencepiece if file.suffix == ".model" else _open_hugging_face
    return tokenizer(file, given)


def _vocabulary_file(path: Path) -> Path:
    if path.is_file() and path.suffix in (".json", ".model"):
        return path
    if path.is_dir():
        candidates = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    raise ValueError(
        f"--tokenizer-model {path}: give a folder with tokenizer.json, a tokenizer.json, or a "
        "SentencePiece .model file."
    )


def _open_hugging_face(path: Path, given: dict[SpecialName, int | None]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise ValueError(f"--tokenizer-model {path} is not a tokenizer.json: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    named = _named_special_tokens(path.parent)
    ids = {}
    for name, spellings in CUSTOMARY_SPELLINGS.items():
        candidates = (named[name],) if name in named else spellings
        found = (backend.token_to_id(spelling) for spelling in candidates)
        ids[name] = next((id for id in found if id is not None), None)
    return HuggingFaceTokenizer(
        path=str(path),
        fingerprint=sha256_of_file(path),
        vocab_size=vocab_size,
        backend=backend,
        **_special_ids(ids, given, vocab_size, path),
    )


def _named_special_tokens(folder: Path) -> dict[SpecialName, str]:
    """Spellings of the special tokens as the Hugging Face configuration files name them."""
    named: dict[SpecialName, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            contents = json.loads((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"--tokenizer-model {folder / file} is not JSON: {error}") from error
        for name in CUSTOMARY_SPELLINGS:
            token = contents.get(f"{name}_token")
            if token is not None:
                named[name] = token["content"] if isinstance(token, dict) else token
    return named


def _open_sentencepiece(path: Path, given: dict[SpecialName, int | None]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        backend = SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise ValueError(
            f"--tokenizer-model {path} is not a SentencePiece model: {error}"
        ) from error

    def customary(name: SpecialName) -> int | None:
        ids = ((spelling, backend.piece_to_id(spelling)) for spelling in CUSTOMARY_SPELLINGS[name])
        return next((id for piece, id in ids if backend.id_to_piece(id) == piece), None)

    own = {"bos": backend.bos_id(), "eos": backend.eos_id(), "pad": backend.pad_id(), "mask": -1}
    ids = {name: id if id >= 0 else customary(name) for name, id in own.items()}
    vocab_size = backend.vocab_size()
    return SentencePieceTokenizer(
        path=str(path),
        fingerprint=sha256_of_file(path),
        vocab_size=vocab_size,
        backend=backend,
        **_special_ids(ids, given, vocab_size, path),
    )


def _special_ids(
    found: dict[SpecialName, int | None],
    given: dict[SpecialName, int | None],
    vocab_size: int,
    path: Path,
) -> dict[str, int | None]:
    for name, id in given.items():
        if id is not None and not 0 <= id < vocab_size:
            raise ValueError(
                f"--{name}-token-id is {id}: --tokenizer-model {path} has ids 0 to "
                f"{vocab_size - 1}."
            )
    return {f"{name}_id": found[name] if given[name] is None else given[name] for name in found}
