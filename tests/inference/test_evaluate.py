"""The evaluation tool: the same figures from every form of a model, and figures that mean it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from megatron_ext.data.batches import BatchSource, RankPosition
from megatron_ext.data.executors import ExecutorConfig, preprocess
from megatron_ext.data.indexed import open_indexed
from megatron_ext.data.packing import PackedDataset
from megatron_ext.data.preprocess import PreprocessConfig
from megatron_ext.inference.evaluate import EvaluateConfig, evaluate
from megatron_ext.inference.likelihood import LikelihoodConfig
from megatron_ext.inference.load import load_model
from megatron_ext.inference.reports import encode_pair
from megatron_ext.inference.sample_quality import maximum_mean_discrepancy, pieces, token_entropy
from megatron_ext.training.evaluation import evaluate as validate
from tests.distributed import run_ranks
from tests.inference.folders import (
    SPECIAL,
    hugging_face_folder,
    run_config,
    sentences,
    training_run,
    word_tokenizer,
)

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path: Path, records: list[Any], key: str = "text") -> str:
    rows = [x if isinstance(x, dict) else {key: x} for x in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, `run`, `text.jsonl`, `questions.jsonl`."""
    path = tmp_path_factory.mktemp("evaluate")
    torch.set_num_threads(1)
    hugging_face_folder(path / "hf")
    training_run(path / "run")
    write_lines(path / "text.jsonl", sentences(5))
    questions = [
        {"prompt": "w3 w7 ", "completions": ["w1 w2", "w5", "w9 w9 w9 w9"]},
        {"prompt": "", "completions": ["w0 w0", "w80"]},
    ]
    write_lines(path / "questions.jsonl", questions)
    return path


SETTINGS = LikelihoodConfig(num_draws=3, batch_size=4, seed=5)


def reports_of_rank(rank: int, folder: str, layout: dict[str, int]) -> dict[str, Any]:
    """Bound and choices on one rank; `layout` empty means replicas of the Hugging Face folder."""
    del rank
    torch.set_num_threads(1)
    path = Path(folder)
    load = str(path / ("run" if layout else "hf"))
    return {
        "bound": evaluate(
            EvaluateConfig(load=load, input=(str(path / "text.jsonl"),), **layout), SETTINGS
        )[0],
        "choices": evaluate(
            EvaluateConfig(load=load, completions=path / "questions.jsonl", **layout), SETTINGS
        )[0],
    }


def figures(report: dict[str, Any]) -> list[float]:
    """All numbers of a report, in order."""
    if isinstance(report, dict):
        return [x for value in report.values() for x in figures(value)]
    if isinstance(report, list):
        return [x for value in report for x in figures(value)]
    return [float(report)] if isinstance(report, int | float) else []


def reports_of_ranks(
    rank: int, folder: str, judge: Path, layouts: list[dict[str, int]]
) -> list[dict[str, Any]]:
    reports = [reports_of_rank(rank, folder, layout) for layout in layouts]
    return [*reports, judged(judge, "good")]


def test_every_form_and_layout_gives_the_same_report(
    folder: Path, judge: Path, single_rank: None
) -> None:
    expected = reports_of_rank(0, str(folder), {})
    assert len(figures(expected)) > 60
    quality = figures(judged(judge, "good"))
    layouts: list[dict[str, int]] = [
        {}, {"tensor_model_parallel_size": 1}, {"tensor_model_parallel_size": 2},
    ]  # fmt: skip
    for *reports, of_samples in run_ranks(2, reports_of_ranks, str(folder), judge, layouts):
        assert figures(of_samples) == pytest.approx(quality)
        for report in reports:
            np.testing.assert_allclose(figures(report), figures(expected), rtol=2e-4, atol=1e-5)


def test_units_of_the_bound_follow_from_each_other(folder: Path, single_rank: None) -> None:
    report = reports_of_rank(0, str(folder), {})["bound"]
    texts = sentences(5)
    num_tokens = sum(len(text.split()) + 1 for text in texts)
    assert (report["num_tokens"], report["unit"]) == (num_tokens, "documents")
    assert report["num_bytes"] == sum(len(text.encode()) for text in texts)
    assert report["num_sequences"] > len(texts), "long texts have several windows"
    assert report["nats_per_token"]["num_units"] == len(texts)
    nats = report["nats_per_token"]["mean"] * num_tokens
    assert report["bits_per_byte"]["mean"] == pytest.approx(
        nats / report["num_bytes"] / math.log(2)
    )
    for end in ("mean", "low", "high"):
        assert report["perplexity"][end] == pytest.approx(math.exp(report["nats_per_token"][end]))
    assert (report["num_draws"], report["seed"], report["precision"]) == (3, 5, "float32")


def test_the_bound_of_packed_data_is_that_of_the_runs_validation(
    folder: Path, tmp_path: Path, single_rank: None
) -> None:
    source = PreprocessConfig(
        input=(str(folder / "text.jsonl"),),
        output_prefix=str(tmp_path / "tokens"),
        tokenizer_model=str(folder / "run/tokenizer"),
    )
    manifest = preprocess(source, ExecutorConfig(workers=1))
    assert manifest is not None
    packed = PackedDataset(open_indexed(source.output_prefix), seq_length=48, seed=0, shuffle=False)
    config = run_config(folder / "run").with_sections(
        training={"seed": SETTINGS.seed, "eval_draws": 3, "micro_batch_size": 2}
    )
    model = load_model(folder / "run").denoiser.model
    batches = BatchSource(packed, model.schedule, config, RankPosition(0, 1, 0, 1), None)
    expected = validate([model], batches, len(packed), config, model.groups, torch.device("cpu"))
    report, _ = evaluate(
        EvaluateConfig(load=str(folder / "run"), data_path=source.output_prefix),
        replace(SETTINGS, times="even"),
    )
    assert report["num_sequences"] == len(packed) == expected.num_sequences > 1
    found = report["nats_per_token"]
    assert found["mean"] == pytest.approx(expected.elbo, rel=1e-6)
    assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-5)
    bits = found["mean"] / math.log(2) / (manifest["utf8_bytes"] / manifest["tokens"])
    assert report["bits_per_byte"]["mean"] == pytest.approx(bits)


class LongestPieces:
    """Tokens are the longest pieces known, greedily; ids are their places."""

    pieces = ("the", "th", "he", "t", "h", "e", "o", "r", "y", " ")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            ids.append(next(i for i, piece in enumerate(self.pieces) if text.startswith(piece)))
            text = text[len(self.pieces[ids[-1]]) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("th", "e"), ("th", "eory"), ("the ", "the"), ("t", "he"), ("", "the"), ("the ", " y")],
)
def test_prompt_and_completion_are_encoded_to_their_own_text(prompt: str, text: str) -> None:
    """Also where a token of the vocabulary spans both, which leaves no tokens, or wrong ones."""
    tokenizer = LongestPieces()
    front, tokens = encode_pair(tokenizer, prompt, text)  # type: ignore[arg-type]
    assert tokens and tokenizer.decode([*front, *tokens]) == prompt + text
    assert tokenizer.decode(front) == prompt.rstrip()


def test_choices_are_bounds_and_their_maximum(folder: Path, single_rank: None) -> None:
    report = reports_of_rank(0, str(folder), {})["choices"]
    for answer, counts in zip(report["answers"], ([2, 1, 4], [2, 1]), strict=True):
        likely = [choice["log_likelihood"] for choice in answer["completions"]]
        assert [choice["num_tokens"] for choice in answer["completions"]] == counts
        assert answer["argmax"] == int(np.argmax(likely))
        assert max(likely) < 0
        assert all(choice["standard_error"] > 0 for choice in answer["completions"])


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model that has learned how frequent the words are, and texts to show it."""
    path = tmp_path_factory.mktemp("judge")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), bos_token=SPECIAL[0], eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
    )  # fmt: skip
    torch.manual_seed(0)
    size = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 97}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    texts = [tokenizer.encode(text)[:24] for text in sentences(2500, seed=3)]
    texts = [ids for ids in texts if len(ids) == 24]
    for step in range(60):
        batch = torch.tensor([[0, *ids] for ids in texts[step * 16 : step * 16 + 16]])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_lines(path / "reference.jsonl", sentences(40, seed=10, longest=40))
    write_lines(path / "good.jsonl", sentences(30, seed=11, longest=40))
    write_lines(path / "repeated.jsonl", ["w0 " * 20] * 30)
    return path


def judged(judge: Path, samples: str) -> dict[str, Any]:
    config = EvaluateConfig(
        generative_perplexity=True, judge=str(judge), samples=(str(judge / f"{samples}.jsonl"),),
        reference=(str(judge / "reference.jsonl"),),
    )  # fmt: skip
    return evaluate(config, SETTINGS)[0]


def test_repetition_pleases_the_judge_and_is_exposed(judge: Path, single_rank: None) -> None:
    real, fake = (judged(judge, name) for name in ("good", "repeated"))
    perplexity = {x["samples"]["perplexity"]["mean"] for x in (real, fake)}
    assert fake["samples"]["perplexity"]["mean"] < real["reference"]["perplexity"]["mean"] / 3
    assert min(perplexity) == fake["samples"]["perplexity"]["mean"], "and so it would win"
    assert fake["samples"]["token_entropy"]["mean"] == 0
    entropy = real["reference"]["token_entropy"]
    assert entropy["low"] < real["samples"]["token_entropy"]["mean"] < entropy["high"] * 1.1
    assert fake["distance"]["p_value"] < 0.01 < 0.05 < real["distance"]["p_value"]
    assert fake["distance"]["squared_mmd"] > 10 * abs(real["distance"]["squared_mmd"])


def test_one_good_sample_over_and_over_is_exposed_by_the_distance_alone(
    judge: Path, single_rank: None
) -> None:
    """Entropy and perplexity of each are those of a good sample."""
    write_lines(judge / "copied.jsonl", sentences(3, seed=11, longest=40)[-1:] * 30)
    real, fake = (judged(judge, name) for name in ("good", "copied"))
    assert fake["samples"]["token_entropy"]["mean"] > real["samples"]["token_entropy"]["low"] - 0.5
    assert fake["distance"]["p_value"] < 0.01
    assert fake["distance"]["squared_mmd"] > 10 * abs(real["distance"]["squared_mmd"])


def test_the_distance_is_the_textbooks() -> None:
    """Gretton et al. 2012, lemma 6, as sums over pairs."""
    numbers = np.random.default_rng(1)
    one, other = numbers.normal(size=(5, 3)), numbers.normal(1.0, size=(7, 3))
    pooled = np.concatenate([one, other])
    scaled = pooled / pooled.std(axis=0, ddof=1)
    squared = ((scaled[:, None] - scaled) ** 2).sum(-1)
    above = np.sort(squared[np.triu_indices(12, 1)])
    kernel = np.exp(-squared / above[(len(above) - 1) // 2])
    first, second = range(5), range(5, 12)
    expected = (
        np.mean([kernel[i, j] for i in first for j in first if i != j])
        + np.mean([kernel[i, j] for i in second for j in second if i != j])
        - 2 * np.mean([kernel[i, j] for i in first for j in second])
    )
    assert maximum_mean_discrepancy(one, other)[0] == pytest.approx(expected)


def test_the_distance_is_unbiased_and_its_test_has_its_level() -> None:
    numbers = np.random.default_rng(0)
    results = [
        maximum_mean_discrepancy(*(numbers.normal(size=(n, 4)) for n in (8, 12)), permutations=99)
        for _ in range(150)
    ]
    values, p_values = (np.array(x) for x in zip(*results, strict=True))
    assert abs(values.mean()) < 4.5 * values.std() / math.sqrt(len(values))
    assert 0.0 <= np.mean(p_values <= 0.1) <= 0.2
    moved = numbers.normal(size=(12, 4)) + 2
    assert maximum_mean_discrepancy(numbers.normal(size=(8, 4)), moved)[1] < 0.01


def test_reference_pieces_have_the_lengths_of_the_samples() -> None:
    texts = [[1, 2, 3, 4], [5], [6, 7], [8, 9], [10]]
    assert pieces(texts, [3, 2]) == [[1, 2, 3], [5, 6], [8, 9, 10]]


def test_entropy_is_that_of_the_frequencies() -> None:
    assert token_entropy([]) == token_entropy([4, 4, 4]) == 0
    assert token_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert token_entropy([1, 1, 2]) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_the_command_prints_and_writes_and_refuses(folder: Path, tmp_path: Path) -> None:
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, ROOT / "tools/evaluate.py", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True)

    done = command(
        "--load", folder / "hf", "--input", folder / "text.jsonl", "--num-sequences", 2,
        "--num-draws", 2, "--output", tmp_path / "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['nats_per_token']['mean']:.4f}" in done.stdout


QUESTIONS = Path("questions.jsonl")
QUALITY = {"generative_perplexity": True, "samples": ("a.jsonl",)}


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"load": "nowhere"}, "--data-path"),
        ({"input": ("a",)}, "--load"),
        ({"input": ("a",), "completions": QUESTIONS}, "--completions"),
        ({"load": "a", "input": ("a",), "num_sequences": 0}, "--num-sequences is 0"),
        ({"load": "a", "completions": QUESTIONS, "num_sequences": 3}, "--num-sequences is 3"),
        ({"load": "a", "input": ("a",), "score_eos": True}, "--score-eos"),
        ({"load": "a", "input": ("a",), "samples": ("b",)}, "--samples"),
        ({"judge": "a"}, "--judge is 'a': it is for --generative-perplexity"),
        (QUALITY, "--judge"),
        (QUALITY | {"judge": "a", "load": "b"}, "--load"),
        (QUALITY | {"judge": "nowhere"}, "--judge nowhere"),
    ],
)
def test_options_without_effect_are_refused(
    given: dict[str, Any], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    single_rank: None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(ValueError, match=advice):
        evaluate(EvaluateConfig(**given), SETTINGS)


@pytest.mark.parametrize("change", [{"effective_log_snr": True}, {"times": "grid"}])
def test_what_bounds_nothing_is_refused_for_texts(folder: Path, change: dict[str, Any]) -> None:
    config = EvaluateConfig(load=str(folder / "hf"), input=(str(folder / "text.jsonl"),))
    with pytest.raises(ValueError, match="no bound"):
        evaluate(config, replace(SETTINGS, **change))


def test_texts_without_a_character_are_refused(tmp_path: Path, folder: Path) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(ValueError, match="no text"):
        evaluate(EvaluateConfig(load=str(folder / "hf"), input=(empty,)), SETTINGS)


def test_folders_that_are_no_whole_diffusion_model_are_refused(
    folder: Path, judge: Path, tmp_path: Path, single_rank: None
) -> None:
    """transformers would draw what is missing and evaluate that."""

    def refused(part: str) -> None:
        with pytest.raises(ValueError, match=part):
            load_model(tmp_path)

    shutil.copytree(folder / "hf", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused("missing: model.norm.weight")
    save_file(weights | {"model.norm.weight": norm, "model.more": norm.clone()},
              tmp_path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    refused("unexpected: model.more")
    (tmp_path / "model.safetensors").unlink()
    refused("model.safetensors")
    with pytest.raises(ValueError, match="'gpt2'"):
        load_model(judge)
    of_diffusion = EvaluateConfig(**QUALITY | {
        "judge": str(folder / "hf"), "samples": (str(judge / "good.jsonl"),),
    })  # fmt: skip
    with pytest.raises(ValueError, match="--judge .* causal"):
        evaluate(of_diffusion, SETTINGS)


@pytest.mark.parametrize(
    "line", ['{"prompt": "a"}', '{"prompt": "a", "completions": []}', "[]", '{"prompt": 1', "7"]
)
def test_malformed_questions_are_named_by_line(tmp_path: Path, line: str) -> None:
    from megatron_ext.inference.reports import read_questions

    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "a", "completions": ["b"]}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3"):
        read_questions(path)
