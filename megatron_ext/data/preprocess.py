"""Text to `.bin/.idx`: a job cut into tasks, each task written whole or not at all, then one merge.

    <prefix>.parts/job.json        what is to be done: settings, and the pieces of every task
    <prefix>.parts/00012.bin .idx  tokens of task 12
    <prefix>.parts/00012.json      its counts; written last, so its presence means finished
    <prefix>.bin .idx              all tasks joined in order
    <prefix>.json                  the manifest: counts, tokenizer, checksums, sources; written last

Every file is written under a temporary name, made durable and renamed. A killed job therefore
continues by running the same command again: finished tasks are kept, others are done from their
beginning, and the result has the same bytes as that of a job that was never interrupted. The tasks
follow from the inputs alone, never from who runs them. `executors` runs them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ext.data.documents import (
    OnBadRecord,
    Piece,
    cut_into_pieces,
    find_files,
    read_texts,
    read_tokens,
)
from megatron_ext.data.indexed import (
    MANIFEST_FORMAT,
    IndexedWriter,
    dtype_for_vocabulary,
    open_indexed,
    read_manifest,
    sha256_of_file,
    write_index,
)
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to tokenize, and how."""

    input: tuple[str, ...]
    """Files, folders or patterns: .jsonl, .txt (a file is a document), .parquet; all but parquet
    optionally .gz, .zst, .bz2 or .lz4."""
    output_prefix: str
    """Write <prefix>.bin, <prefix>.idx and the manifest <prefix>.json."""
    tokenizer_model: str
    """Folder with tokenizer.json, or a SentencePiece .model file."""
    json_keys: str = "text"
    """Key of a JSON line, or column of a parquet file, that holds the text."""
    tokens_column: str | None = None
    """Parquet column of token ids: import them instead of tokenizing text."""
    append_eod: bool = True
    """End every document with EOS (imported documents that end with it get no second one)."""
    prepend_bos: bool = False
    """Begin every document with BOS."""
    bos_token_id: int | None = None
    """Id of BOS; the tokenizer's when absent."""
    eos_token_id: int | None = None
    """Id of EOS; the tokenizer's when absent."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Stop at a record that cannot be read, or leave it out and count it in the manifest."""
    task_mb: float | None = None
    """Input per task in MiB, the unit of resuming; chosen from the input's size when absent."""

    @property
    def folder(self) -> Path:
        """Where parts live until they are merged."""
        return Path(self.output_prefix + ".parts")

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(
            self.tokenizer_model, bos_token_id=self.bos_token_id, eos_token_id=self.eos_token_id
        )


@dataclass(frozen=True)
class Job:
    """A planned job; `job.json` holds it."""

    config: PreprocessConfig
    settings: dict[str, Any]
    """Everything the output depends on."""
    tasks: list[list[Piece]]

    @property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


@dataclass
class Counts:
    """What a task, or all of them, went through."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0
    empty_documents: int = 0
    bad_records: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{k: v + getattr(other, k) for k, v in asdict(self).items()})


def plan(config: PreprocessConfig) -> Job | None:
    """Write `job.json`, or take up the one of an interrupted run; None where all is done.

    `ValueError` where the prefix holds the output, or the parts, of a different job.
    """
    files = find_files(config.input)
    tokenizer = config.tokenizer()
    if config.append_eod:
        tokenizer.special_id("eos")
    if config.prepend_bos:
        tokenizer.special_id("bos")
    passive = {"input", "output_prefix", "tokenizer_model", "task_mb"}
    settings = {k: v for k, v in asdict(config).items() if k not in passive}
    settings["tokenizer"] = tokenizer.fingerprint
    settings["sources"] = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    job = Job(absolute(config), settings, [])
    if _is_done(job):
        return None
    path = config.folder / "job.json"
    if path.is_file():
        return _continued(job, path)
    if config.folder.exists():
        shutil.rmtree(config.folder)
    config.folder.mkdir(parents=True)
    job = replace(job, tasks=group_pieces(files, config.task_mb))
    contents = {"config": asdict(job.config), "settings": job.settings, "tasks": job.tasks}
    _write_json(path, contents)
    load_job.cache_clear()
    return job


def absolute(config: PreprocessConfig) -> PreprocessConfig:
    """The same with paths that hold in any working directory."""
    return replace(
        config,
        output_prefix=str(Path(config.output_prefix).resolve()),
        tokenizer_model=str(Path(config.tokenizer_model).resolve()),
    )


def _is_done(job: Job) -> bool:
    prefix = job.config.output_prefix
    manifest = read_manifest(prefix)
    advice = "Delete the old files, or choose another --output-prefix."
    if manifest is not None:
        if manifest["job"] != job.identity:
            raise ValueError(
                f"--output-prefix {prefix}: {prefix}.json was made from other inputs, another "
                f"tokenizer or other settings. {advice}"
            )
        open_indexed(prefix, flag="--output-prefix")
        return True
    if not (job.config.folder / "job.json").is_file():
        for suffix in ("bin", "idx", "json"):
            if Path(f"{prefix}.{suffix}").exists():
                raise ValueError(
                    f"--output-prefix {prefix}: {prefix}.{suffix} exists and is not from this "
                    f"tool. {advice}"
                )
    return False


def _continued(job: Job, path: Path) -> Job:
    started = load_job(path.parent)
    differing = [k for k, v in job.settings.items() if _plain(v) != started.settings.get(k)]
    if differing:
        raise ValueError(
            f"{path.parent} holds parts of an interrupted job that differs in "
            f"{', '.join(differing)}. Run that job again, or delete the folder."
        )
    return started


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def group_pieces(files: Sequence[Path], task_mb: float | None) -> list[list[Piece]]:
    """Tasks: runs of consecutive pieces of about `task_mb` MiB together.

    When absent, a 64th of the input, but at least 1 and at most 256 MiB.
    """
    total = sum(file.stat().st_size for file in files)
    chosen = min(max(total // 64, MIB), 256 * MIB) if task_mb is None else int(task_mb * MIB)
    target = max(chosen, 1)
    tasks: list[list[Piece]] = []
    weight = target
    for piece in cut_into_pieces(files, target):
        if weight + piece.weight > target:
            tasks.append([])
            weight = 0
        tasks[-1].append(piece)
        weight += piece.weight
    return tasks


@lru_cache(maxsize=2)
def load_job(folder: Path) -> Job:
    """The job whose parts live in `folder`."""
    contents = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    tasks = [[Piece(*piece) for piece in pieces] for pieces in contents["tasks"]]
    config = PreprocessConfig(**contents["config"] | {"input": tuple(contents["config"]["input"])})
    return Job(config, contents["settings"], tasks)


def part(folder: Path, task: int) -> Path:
    """Path of a task's files without suffix."""
    return folder / f"{task:05d}"


def is_finished(folder: Path, task: int) -> bool:
    return Path(f"{part(folder, task)}.json").is_file()


def run_task(folder: Path, task: int) -> None:
    """Tokenize one task; nothing where it is finished. Safe to run twice, even at the same time."""
    if is_finished(folder, task):
        return
    job = load_job(folder)
    tokenizer = _cached_tokenizer(job.config)
    counts = Counts()

    def on_bad_record(fault: str) -> None:
        if job.config.on_bad_record == "error":
            raise ValueError(f"{fault}. (--on-bad-record skip leaves such records out.)")
        counts.bad_records += 1

    final = str(part(folder, task))
    temporary = f"{final}.{os.uname().nodename}.{os.getpid()}"
    with IndexedWriter(temporary, dtype_for_vocabulary(tokenizer.vocab_size)) as writer:
        for tokens in _documents(job, task, tokenizer, counts, on_bad_record):
            writer.append(tokens)
    counts.documents, counts.tokens = writer.summary
    for suffix in ("bin", "idx"):
        os.replace(f"{temporary}.{suffix}", f"{final}.{suffix}")
    _write_json(Path(final + ".json"), asdict(counts))


@lru_cache(maxsize=2)
def _cached_tokenizer(config: PreprocessConfig) -> Tokenizer:
    return config.tokenizer()


def _documents(
    job: Job, task: int, tokenizer: Tokenizer, counts: Counts, on_bad_record: OnBadRecord
) -> Iterator[np.ndarray]:
    """Tokens of a task's documents with BOS and EOS as configured; empty documents left out."""
    config = job.config
    before = [tokenizer.special_id("bos")] if config.prepend_bos else []
    after = [tokenizer.special_id("eos")] if config.append_eod else []
    for piece in job.tasks[task]:
        if config.tokens_column is not None:
            documents = read_tokens(
                piece, config.tokens_column, tokenizer.vocab_size, on_bad_record
            )
        else:
            texts = read_texts(piece, config.json_keys, on_bad_record)
            documents = _tokenized(texts, tokenizer, counts)
        for tokens in documents:
            if len(tokens) == 0:
                counts.empty_documents += 1
                continue
            is_ended = config.tokens_column is not None and tokens[-1:].tolist() == after
            yield np.concatenate([before, tokens, [] if is_ended else after]).astype(np.int64)


def _tokenized(texts: Iterable[str], tokenizer: Tokenizer, counts: Counts) -> Iterator[np.ndarray]:
    batch: list[str] = []
    size = 0
    for text in texts:
        num_bytes = len(text.encode())
        counts.utf8_bytes += num_bytes
        batch.append(text)
        size += num_bytes
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield from (np.array(ids, np.int64) for ids in tokenizer.encode_batch(batch))
            batch, size = [], 0
    yield from (np.array(ids, np.int64) for ids in tokenizer.encode_batch(batch))


def merge(folder: Path) -> dict[str, Any]:
    """Join all tasks in order into the final files; the manifest that was written."""
    job = load_job(folder)
    unfinished = [task for task in range(len(job.tasks)) if not is_finished(folder, task)]
    if unfinished:
        raise RuntimeError(
            f"{folder}: {len(unfinished)} of {len(job.tasks)} tasks are unfinished, the first is "
            f"{unfinished[0]}. Run the same command again."
        )
    tokenizer = job.config.tokenizer()
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    counts = Counts()
    lengths: list[np.ndarray] = []
    joined = folder / "joined"
    digest = hashlib.sha256()
    with open(f"{joined}.bin", "wb") as output:
        for task in range(len(job.tasks)):
            path = part(folder, task)
            counts += Counts(**json.loads(Path(f"{path}.json").read_text()))
            with open(f"{path}.bin", "rb") as source:
                while block := source.read(16 * MIB):
                    output.write(block)
                    digest.update(block)
            lengths.append(_lengths(path))
        output.flush()
        os.fsync(output.fileno())
    if counts.tokens == 0:
        raise ValueError(f"--input {' '.join(job.config.input)}: no text in any document.")
    write_index(f"{joined}.idx", dtype, np.concatenate(lengths))
    manifest = _manifest(job, tokenizer, counts, dtype, joined, digest.hexdigest())
    prefix = job.config.output_prefix
    for suffix in ("bin", "idx"):
        os.replace(f"{joined}.{suffix}", f"{prefix}.{suffix}")
    _write_json(Path(prefix + ".json"), manifest)
    open_indexed(
        prefix,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        flag="--output-prefix",
    )
    _remove_parts(folder)
    return manifest


def _lengths(path: Path) -> np.ndarray:
    """int32 [d] tokens of a part's documents."""
    if os.path.getsize(f"{path}.bin") == 0:
        return np.zeros(0, np.int32)
    data = open_indexed(path, flag="part")
    return np.diff(data.starts(0, data.num_documents)).astype(np.int32)


def _manifest(
    job: Job, tokenizer: Tokenizer, counts: Counts, dtype: np.dtype, joined: Path, bin_digest: str
) -> dict[str, Any]:
    def file_entry(suffix: str, digest: str) -> dict[str, Any]:
        return {"bytes": os.path.getsize(f"{joined}.{suffix}"), "sha256": digest}

    settings = job.settings
    return {
        "format": MANIFEST_FORMAT,
        **asdict(counts),
        "utf8_bytes": counts.utf8_bytes or None,
        "dtype": dtype.name,
        "append_eod": settings["append_eod"],
        "prepend_bos": settings["prepend_bos"],
        "tokenizer": {
            "path": tokenizer.path,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "bin": file_entry("bin", bin_digest),
        "idx": file_entry("idx", sha256_of_file(f"{joined}.idx")),
        "sources": [{"path": path, "bytes": size} for path, size, _ in settings["sources"]],
        "job": job.identity,
    }


def _remove_parts(folder: Path) -> None:
    """Delete what the merge used up, `job.json` last; logs stay for whoever wrote them."""
    for path in folder.glob("[0-9]*.*"):
        path.unlink()
    (folder / "job.json").unlink(missing_ok=True)
    load_job.cache_clear()


def _write_json(path: Path, contents: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(contents, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
