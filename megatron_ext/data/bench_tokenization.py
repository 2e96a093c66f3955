"""Tokenization: MB of text per second and core, against plain `tokenizers`.

    python -m megatron_ext.data.bench_tokenization [--quick] [--json FILE]

`tokenizers` is `encode_batch` on texts in memory, in batches of 1,024, nothing written;
`encode_batch_fast` is the same without offsets. Every repetition opens the vocabulary anew, so its
cache of words fills up as it does in a job. `preprocess` is this project's whole job: JSON
lines from disk to .bin/.idx with counts, checksums, fsync and the merge. The text is the Python
standard library's source, the vocabulary is learned from it. One thread.
"""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from megatron_ext.data.preprocess import PreprocessConfig, merge, plan, run_task
from megatron_ext.data.train_bpe import save_tokenizer, train_bpe
from megatron_ext.measure import Column, Report, Table, alternate, bench_parser

BATCH = 1024
COLUMNS = [
    Column("way", "way"),
    Column("median_s", "s", ".3g"),
    Column("lower_quartile_s", "lower quartile", ".3g"),
    Column("upper_quartile_s", "upper quartile", ".3g"),
    Column("mb_per_s", "MB/s", ".2f"),
    Column("times_tokenizers", "time / tokenizers", ".2f"),
]


def library_texts(max_bytes: int) -> list[str]:
    """Source files of the standard library, up to about `max_bytes` together."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        size += len(texts[-1].encode())
        if size >= max_bytes:
            break
    return texts


def encode_plainly(file: str, method: str, texts: list[str]) -> int:
    """Tokens that `tokenizers` alone makes of texts in memory; opens the vocabulary, as a job."""
    backend = Tokenizer.from_file(file)
    backend.encode_special_tokens = True
    encode = getattr(backend, method)
    total = 0
    for start in range(0, len(texts), BATCH):
        encodings = encode(texts[start : start + BATCH], add_special_tokens=False)
        total += sum(len(encoding.ids) for encoding in encodings)
    return total


def preprocess(source: Path, tokenizer: Path, output: Path) -> int:
    """The job of `tools/preprocess_data.py` in this process; tokens written."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    job = plan(
        PreprocessConfig(
            input=(str(source),),
            output_prefix=str(output / "text"),
            tokenizer_model=str(tokenizer),
        )
    )
    assert job is not None
    for task in range(len(job.tasks)):
        run_task(job.config.folder, task)
    return merge(job.config.folder)["tokens"]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--vocab-size", type=int, default=32768)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    repetitions = 5
    if arguments.quick:
        arguments.megabytes, arguments.vocab_size, repetitions = 0.2, 512, 1
    texts = library_texts(int(arguments.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(train_bpe(texts, arguments.vocab_size), folder / "tokenizer")
        source = folder / "text.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        file = str(folder / "tokenizer" / "tokenizer.json")
        times = alternate(
            {
                "tokenizers": lambda: encode_plainly(file, "encode_batch", texts),
                "encode_batch_fast": lambda: encode_plainly(file, "encode_batch_fast", texts),
                "preprocess": lambda: preprocess(source, folder / "tokenizer", folder / "output"),
            },
            repetitions,
        )
    rows = [
        {
            "way": way,
            **timing.summary(),
            "mb_per_s": size / 1e6 / timing.median,
            "times_tokenizers": timing.relative_to(times["tokenizers"]),
        }
        for way, timing in times.items()
    ]
    title = f"Tokenization of {size / 1e6:.1f} MB, vocabulary {arguments.vocab_size:,}, one core"
    Report("tokenization", vars(arguments), [Table(title, COLUMNS, rows)]).finish(arguments.json)


if __name__ == "__main__":
    main()
