"""One small model as a Hugging Face folder and as a training run, with a tokenizer of words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron_ext.checkpoint.hf_config import model_config
from megatron_ext.checkpoint.hf_weights import load_published_weights
from megatron_ext.checkpoint.training import CheckpointWriter, Position
from megatron_ext.cli import dump_config
from megatron_ext.config import Config
from megatron_ext.data.train_bpe import save_tokenizer
from megatron_ext.model.diffusion_model import DiffusionModel
from megatron_ext.parallel.groups import initialize_parallel, shutdown_parallel
from megatron_ext.training.build import build_schedule, open_tokenizer, resolve_vocabulary
from tests.hf.golden import recorded_model

SHIFT = 0.0
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"]
WORDS = [f"w{i}" for i in range(92)]


def word_tokenizer() -> Tokenizer:
    """Ids 0 to 96 of the recorded models: special tokens, an unknown word, w0 to w91."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentences(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of frequent and rare words, some longer than the context."""
    numbers = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(WORDS) + 1)
    return [
        " ".join(numbers.choice(WORDS, size=numbers.integers(5, longest), p=shares / shares.sum()))
        for _ in range(count)
    ]


def character_folder(folder: Path) -> Path:
    """The recorded model with a tokenizer of printable characters."""
    printable = [chr(i) for i in range(32, 127) if chr(i) not in "`^~{"] + ["\n"]
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, "<unk>", *printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    recorded_model("A", noise_type=SHIFT).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def hugging_face_folder(folder: Path) -> Path:
    recorded_model("A", noise_type=SHIFT).save_pretrained(folder)
    save_tokenizer(word_tokenizer(), folder)
    return folder


def run_config(folder: Path) -> Config:
    source = recorded_model("A")
    return Config(model=model_config(source.config.to_dict())).with_sections(
        data={"tokenizer_model": str(folder / "tokenizer")},
        model={"make_vocab_size_divisible_by": 1},
        diffusion={"objective": "hybrid", "mixing_shift": SHIFT},
    )


def training_run(folder: Path) -> Path:
    """A checkpoint of the same weights at step 7, as a run of one rank writes it."""
    save_tokenizer(word_tokenizer(), folder / "tokenizer")
    config = run_config(folder)
    groups = initialize_parallel(config.parallel)
    vocabulary = resolve_vocabulary(config, open_tokenizer(config.data))
    model = DiffusionModel(
        config, vocabulary.size, build_schedule(config, vocabulary), groups
    ).eval()
    load_published_weights([model], recorded_model("A").state_dict(), vocabulary.size)
    dump_config(config, folder / "config.yaml")
    CheckpointWriter(folder).save([model], None, Position(7, 0, 0))
    shutdown_parallel()
    return folder
