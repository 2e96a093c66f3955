"""Text on disk to tokens on disk: every format, interrupted jobs, refusals, SLURM."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ext.data.executors import ExecutorConfig, preprocess
from megatron_ext.data.indexed import open_indexed, verify_checksums
from megatron_ext.data.preprocess import PreprocessConfig
from megatron_ext.data.tokenizer import load_tokenizer
from tests.data.corpora import TEXTS

ROOT = Path(__file__).resolve().parents[2]
IN_LINE = ExecutorConfig(workers=1)
EOS = 1


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 0, "text": text}) + "\n" for text in texts).encode()


def write_source(folder: Path, kind: str, texts: list[str]) -> str:
    """The texts in a file (or folder of .txt) of a kind; what to give as --input."""
    path = folder / f"source.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)
    elif kind == "txt":
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:03d}.txt").write_bytes(text.encode())
    elif kind == "jsonl.zst":
        compress, lines = zstandard.ZstdCompressor().compress, json_lines(texts)
        path.write_bytes(compress(lines[:100]) + compress(lines[100:]))
    else:
        compress = {"jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress}.get(kind, bytes)
        path.write_bytes(compress(json_lines(texts)))
    return str(path)


def run(folder: Path, source: str, tokenizer: Path, **options: object) -> dict | None:
    config = PreprocessConfig(
        input=(source,),
        output_prefix=str(folder / "out"),
        tokenizer_model=str(tokenizer),
        **options,
    )
    return preprocess(config, IN_LINE)


@pytest.mark.parametrize("task_mb", [None, 1e-4])
@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "json", "parquet", "txt"]
)
def test_every_format_comes_back_as_the_text_it_was_with_eos(
    tmp_path: Path, tokenizer_folder: Path, kind: str, task_mb: float | None
) -> None:
    source = write_source(tmp_path, kind, TEXTS)
    manifest = run(tmp_path, source, tokenizer_folder, task_mb=task_mb)
    tokenizer = load_tokenizer(tokenizer_folder)
    data = open_indexed(tmp_path / "out", tokenizer_fingerprint=tokenizer.fingerprint)
    assert data.num_documents == len(TEXTS)
    for index, text in enumerate(TEXTS):
        *ids, last = data.document(index).tolist()
        assert last == EOS
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert manifest is not None and data.manifest == manifest
    assert manifest["documents"] == len(TEXTS)
    assert manifest["tokens"] == data.num_tokens
    assert manifest["utf8_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert data.tokens.dtype == np.uint16
    verify_checksums(str(tmp_path / "out"))
    expected = hashlib.sha256((tmp_path / "out.bin").read_bytes()).hexdigest()
    assert manifest["bin"] == {"bytes": 2 * data.num_tokens, "sha256": expected}
    assert not (tmp_path / "out.parts").exists()


def test_tokens_do_not_depend_on_tasks_workers_or_format(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    texts = TEXTS * 20
    found = set()
    for number, (kind, task_mb, workers) in enumerate(
        [("jsonl", None, 1), ("jsonl", 1e-3, 1), ("jsonl", 1e-3, 2), ("parquet", 1e-4, 1)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = PreprocessConfig(
            input=(write_source(folder, kind, texts),),
            output_prefix=str(folder / "out"),
            tokenizer_model=str(tokenizer_folder),
            task_mb=task_mb,
        )
        preprocess(config, ExecutorConfig(workers=workers))
        found.add((folder / "out.bin").read_bytes() + (folder / "out.idx").read_bytes())
    assert len(found) == 1


def test_bos_and_eos_are_options(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_source(tmp_path, "jsonl", ["a", "b"])
    run(tmp_path, source, tokenizer_folder, prepend_bos=True, append_eod=False, bos_token_id=7)
    data = open_indexed(tmp_path / "out")
    assert [data.document(i)[0] for i in range(2)] == [7, 7]
    assert EOS not in data.tokens


def test_a_sentencepiece_model_is_a_tokenizer_too(
    tmp_path: Path, sentencepiece_model: Path
) -> None:
    run(tmp_path, write_source(tmp_path, "jsonl", TEXTS[:2]), sentencepiece_model)
    data, tokenizer = open_indexed(tmp_path / "out"), load_tokenizer(sentencepiece_model)
    for index, text in enumerate(TEXTS[:2]):
        *ids, last = data.document(index).tolist()
        assert (tokenizer.decode(ids), last) == (text, tokenizer.eos_id)


def test_a_large_vocabulary_is_written_in_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|eos|>": 0, "rare": 65_600} | {f"w{i}": i for i in range(1, 65_600)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    run(tmp_path, write_source(tmp_path, "jsonl", ["w5 rare"]), tmp_path)
    data = open_indexed(tmp_path / "out")
    assert (data.tokens.dtype, data.tokens.tolist()) == (np.int32, [5, 65_600, 0])


def test_tokenized_parquet_is_imported_with_one_eos(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = [[5, 6, 7], [8, EOS], [], [399]] * 3
    table = pyarrow.table({"tokens": pyarrow.array(documents, pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, tmp_path / "pretok.parquet", row_group_size=5)
    manifest = run(
        tmp_path, str(tmp_path / "pretok.parquet"), tokenizer_folder, tokens_column="tokens"
    )
    data = open_indexed(tmp_path / "out")
    found = [data.document(i).tolist() for i in range(data.num_documents)]
    assert found == [[5, 6, 7, EOS], [8, EOS], [399, EOS]] * 3
    assert manifest is not None
    assert (manifest["empty_documents"], manifest["utf8_bytes"]) == (3, None)
    assert data.bytes_per_token is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_job_continues_to_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, workers: int
) -> None:
    source = tmp_path / "source.jsonl"
    source.write_bytes(json_lines([text * 40 for text in TEXTS] * 40))
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--tokenizer-model"]
    command += [tokenizer_folder, "--input", source, "--task-mb", "0.01", "--workers", str(workers)]
    killed = 0
    parts = tmp_path / "out.parts"
    while True:
        done = len(list(parts.glob("[0-9]*.json")))
        arguments = [*map(str, command), "--output-prefix", str(tmp_path / "out")]
        process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None and (
            killed == 2 or len(list(parts.glob("[0-9]*.json"))) < done + 5
        ):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
        assert not (tmp_path / "out.bin").exists()
    assert process.returncode == 0
    assert killed == 2
    config = PreprocessConfig(
        input=(str(source),),
        output_prefix=str(tmp_path / "whole"),
        tokenizer_model=str(tokenizer_folder),
    )
    preprocess(config, IN_LINE)
    for suffix in ("bin", "idx", "json"):
        ours, whole = (tmp_path / f"{name}.{suffix}" for name in ("out", "whole"))
        assert ours.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_a_finished_job_is_not_done_again(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_source(tmp_path, "jsonl", TEXTS)
    assert run(tmp_path, source, tokenizer_folder) is not None
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert run(tmp_path, source, tokenizer_folder) is None
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before


def test_output_of_a_different_job_is_never_replaced_or_mixed(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = write_source(tmp_path, "jsonl", TEXTS)
    run(tmp_path, source, tokenizer_folder)
    with pytest.raises(ValueError, match=r"--output-prefix .*out\.json was made from other inputs"):
        run(tmp_path, source, tokenizer_folder, append_eod=False)
    (tmp_path / "out.json").unlink()
    with pytest.raises(ValueError, match=r"out\.bin exists and is not from this tool"):
        run(tmp_path, source, tokenizer_folder)


def test_parts_of_a_different_job_are_refused_with_the_difference(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = Path(write_source(tmp_path, "jsonl", TEXTS))
    path.write_bytes(path.read_bytes() + b"not json\n")
    with pytest.raises(ValueError, match="not JSON"):
        run(tmp_path, str(path), tokenizer_folder)
    with pytest.raises(ValueError, match=r"out\.parts holds parts .* differs in append_eod\. "):
        run(tmp_path, str(path), tokenizer_folder, append_eod=False)
    path.write_bytes(json_lines(TEXTS))
    with pytest.raises(ValueError, match=r"differs in sources\. "):
        run(tmp_path, str(path), tokenizer_folder)


BAD_LINES = {
    "malformed": (b'{"text": "cut', r"line at byte \d+: not JSON"),
    "another key": (b'{"body": "x"}', r"line at byte \d+: no key 'text' in \['body'\]"),
    "no object": (b"[1, 2]", r"line at byte \d+: no key 'text' in list"),
    "no text": (b'{"text": 5}', r"line at byte \d+: 'text' is int, not text"),
    "half a pair": (b'{"text": "\\ud83d"}', r"line at byte \d+: .* surrogate pair"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_record_stops_the_job_or_is_counted(
    tmp_path: Path, tokenizer_folder: Path, fault: str
) -> None:
    line, message = BAD_LINES[fault]
    source = tmp_path / "source.jsonl"
    source.write_bytes(json_lines(TEXTS[:3]) + line + b"\n\n" + json_lines(TEXTS[3:]))
    with pytest.raises(ValueError, match=rf"source\.jsonl, {message}.*--on-bad-record skip"):
        run(tmp_path, str(source), tokenizer_folder)
    (tmp_path / "out.parts/job.json").unlink()
    manifest = run(tmp_path, str(source), tokenizer_folder, on_bad_record="skip")
    assert manifest is not None
    assert (manifest["bad_records"], manifest["documents"]) == (1, len(TEXTS))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_truncated_compressed_file_is_not_taken_for_a_short_one(
    tmp_path: Path, tokenizer_folder: Path, kind: str
) -> None:
    source = Path(write_source(tmp_path, kind, TEXTS * 50))
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(OSError, match="Truncated"):
        run(tmp_path, str(source), tokenizer_folder, on_bad_record="skip")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("absent.jsonl", None, "--input .*absent.jsonl: no file found"),
        ("source.pdf", b"x", "--input .*source.pdf: Files end in .jsonl"),
        ("empty.jsonl", b"", "--input .*empty.jsonl: no text in any document"),
        ("blank.jsonl", json_lines(["", ""]), "--input .*blank.jsonl: no text in any document"),
    ],
)
def test_input_without_text_is_refused_by_name(
    tmp_path: Path, tokenizer_folder: Path, name: str, contents: bytes | None, message: str
) -> None:
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, str(tmp_path / name), tokenizer_folder)


FAKE_SLURM = {
    "sbatch": """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
last = int(re.search(r"--array=0-(\\d+)", script).group(1))
for index in range(last + 1):
    env = os.environ | {{"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "here"}}
    subprocess.run(["bash", sys.argv[-1]], env=env | {{"RUN_OFFSET": "0"}}, check=True)
print("Submitted batch job 7")
""",
    "srun": '#!/bin/bash\nexec "${{@:4}}"\n',
    "scontrol": "#!/bin/bash\necho here\n",
    "merge_stats": "#!/bin/bash\n",
}
"""Commands that do at once what SLURM would do later."""


def test_slurm_array_and_merge_give_the_bytes_of_a_local_run(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in FAKE_SLURM.items():
        (commands / name).write_text(script.format(python=sys.executable))
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    source = write_source(tmp_path, "jsonl", TEXTS)
    config = PreprocessConfig(
        input=(source,),
        output_prefix=str(tmp_path / "slurm"),
        tokenizer_model=str(tokenizer_folder),
        task_mb=5e-4,
    )
    cluster = ExecutorConfig(
        executor="slurm",
        slurm_partition="any",
        slurm_args=("account=mine",),
        slurm_env_command=f"export PATH={commands}:$PATH",
    )
    assert preprocess(config, cluster) is None
    script = (tmp_path / "slurm.parts/log/launch_script.slurm").read_text()
    assert "--account=mine" in script and "--array=0-1" in script
    run(tmp_path, source, tokenizer_folder)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"slurm.{suffix}").read_bytes() == (
            tmp_path / f"out.{suffix}"
        ).read_bytes()
    assert preprocess(config, cluster) is None, "done: nothing is submitted"
    assert not (tmp_path / "slurm.parts").exists()


def test_a_cluster_without_its_partition_is_refused() -> None:
    with pytest.raises(ValueError, match="--executor slurm needs --slurm-partition"):
        ExecutorConfig(executor="slurm")
