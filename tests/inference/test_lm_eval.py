"""The model `gidd` in lm-evaluation-harness, on tasks from local files.

lm_eval runs in processes of its own: where it looks for data is decided when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from tests.distributed import run_ranks
from tests.inference.folders import character_folder

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm_eval is not installed (requirements.txt has its pin)"
)

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
STOP = "e"
"""A character, so that samples of a model of noise do stop."""
GENERATED = 10
CHOICES = [
    {"question": "two and two", "choices": ["four", "a horse"], "answer": 0},
    {"question": "the capital", "choices": ["of", "is it", "no"], "answer": 2},
    {"question": "", "choices": ["zz", "the"], "answer": 1},
]
COMMON = {"test_split": "test", "dataset_path": "json", "metadata": {"version": 1}}
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "problems": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": GENERATED, "do_sample": True},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
SETTINGS = {"num_draws": 3, "steps": 6, "block_length": 8, "seed": 9}


PROBLEMS = Path(__file__).with_name("gsm_symbolic.jsonl")
"""Problems in the manner of GSM8K: `create_dataset("gsm_symbolic", size=8, seed=0)` of
reasoning-gym 0.1.25 (Apache-2.0)."""


def word_problems() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed")
def test_the_recorded_problems_are_those_of_the_generator() -> None:
    import reasoning_gym

    data = reasoning_gym.create_dataset("gsm_symbolic", size=8, seed=0)
    made = [{name: entry[name] for name in ("question", "answer")} for entry in data]
    assert made == word_problems()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of characters in `hf`, tasks in `tasks`, and the environment without a network."""
    path = tmp_path_factory.mktemp("tasks")
    character_folder(path / "hf")
    (path / "tasks").mkdir()
    texts = [{"text": "a text of more than one window " * 3}, {"text": "short"}]
    for name, records in (("choice", CHOICES), ("problems", word_problems()), ("texts", texts)):
        data = path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        task = {"task": name, **COMMON, **TASKS[name]}
        task["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (path / f"tasks/{name}.yaml").write_text(yaml.safe_dump(task))
    added = {**OFFLINE, "HF_HOME": str(path / "cache")}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    yield path
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


def harness(rank: int, folder: Path, batch_sizes: list[int], **changes: Any) -> list[Any]:
    """Results of all tasks at each batch size, as lm_eval returns them on this rank."""
    del rank
    import lm_eval
    from lm_eval.tasks import TaskManager

    import megatron_ext.inference.lm_eval_model  # noqa: F401

    torch.set_num_threads(1)
    return [
        lm_eval.simple_evaluate(
            model="gidd",
            model_args={"load": str(folder / "hf"), **SETTINGS, **changes},
            batch_size=size,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
            bootstrap_iters=0,
        )
        for size in batch_sizes
    ]


def expected(rank: int, folder: Path) -> dict[str, Any]:
    """The same figures without lm_eval."""
    del rank
    from dataclasses import replace

    from megatron_ext.hf.sampling_gidd import sample
    from megatron_ext.hf.steps_gidd import SamplingConfig
    from megatron_ext.inference.likelihood import LikelihoodConfig, index_of, score
    from megatron_ext.inference.load import load_model
    from megatron_ext.inference.reports import Edges, corpus_of_texts, encode_pair, score_pairs
    from megatron_ext.inference.scorers import scorer_of

    torch.set_num_threads(1)
    model = load_model(folder / "hf")
    config = LikelihoodConfig(num_draws=SETTINGS["num_draws"], seed=SETTINGS["seed"], batch_size=2)
    pairs = [
        encode_pair(model.tokenizer, x["question"], " " + text)
        for x in CHOICES
        for text in x["choices"]
    ]
    likely = [value for value, *_ in score_pairs(model, pairs, config, Edges())]

    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()]
    items = corpus_of_texts(texts, model.tokenizer, model.context, append_eos=False).items
    items = [replace(item, index=index_of(item.tokens)) for item in items]
    nats = score(scorer_of(model), items, config).nats.sum()

    sampling = SamplingConfig(
        steps=SETTINGS["steps"], block_length=SETTINGS["block_length"], max_length=GENERATED,
        seed=SETTINGS["seed"],
    )  # fmt: skip
    questions = [json.loads(line)["question"] for line in (folder / "problems.jsonl").open()]
    room = model.context - GENERATED
    prompts = [model.tokenizer.encode(text)[-room:] for text in questions]
    rows = [index_of([0, *model.tokenizer.encode(text)]) for text in questions]
    ids = sample(
        model.denoiser, model.schedule, prompts, model.context, sampling, rows=rows
    ).tolist()
    new = [model.tokenizer.decode(row[max(map(len, prompts)) :]) for row in ids]
    return {
        "likely": likely,
        "bits_per_byte": nats / len("".join(texts).encode()) / 0.6931471805599453,
        "new": [text.split("<|eos|>")[0].split(STOP)[0] for text in new],
    }


def responses(result: dict[str, Any], task: str) -> list[Any]:
    """What the model answered, by document."""
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def likelihoods(result: dict[str, Any]) -> list[float]:
    return [float(x[0][0]) for answers in responses(result, "choice") for x in answers]


def refusals(rank: int, folder: Path) -> list[str]:
    """What wrong arguments are answered; that repeated prompts draw anew, whatever their order; and
    whether a greedy completion is told."""
    del rank
    from lm_eval.api.instance import Instance

    from megatron_ext.hf.steps_gidd import SamplingConfig
    from megatron_ext.inference.lm_eval_model import GiddLM

    load = str(folder / "hf")
    messages = []
    for arguments in (
        {"draws": 3}, {"num_draws": 0}, {"method": "best"}, {"load": None}, {"batch_size": "auto"},
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            GiddLM(**{"load": load} | arguments)
        messages.append(str(caught.value))
    ranking = GiddLM(load=load, times="grid")
    with pytest.raises(ValueError) as caught:
        ranking.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a text",), 0)])
    messages.append(str(caught.value))
    model = GiddLM(load=load, num_draws=1, check_greedy=True, score_eos=True)
    with pytest.raises(ValueError) as caught:
        model._sampling_of({"until": [], "beams": 4})
    messages.append(str(caught.value))
    prompt = "two and two"
    config = model._sampling_of({"until": ["x"], "max_gen_toks": 3})[0]
    assert (config.temperature, config.max_length) == (0.0, 3)
    assert model._sampling_of({"do_sample": True, "temperature": 0.7})[0].temperature == 0.7
    ids = model.model.tokenizer.encode(prompt)
    adaptive = SamplingConfig(
        method="adaptive", temperature=0.0, max_length=3, block_length=3, steps=3
    )
    said = model._sampled([ids], adaptive)[0]
    assert model._are_greedy([(ids, said)]) == [len(said) == 3]
    again, other = (
        Instance("generate_until", {}, (text, {"until": [], "do_sample": True}), 0)
        for text in (prompt, "the capital")
    )
    first, second, third = model.generate_until([again, again, other])
    assert first != second
    assert model.generate_until([other, again, again]) == [third, first, second]
    request = Instance("loglikelihood", {}, (prompt, " four"), 0)
    ((value, is_greedy),) = model.loglikelihood([request])
    assert value < 0 and is_greedy is False
    return messages


class Alone(NamedTuple):
    """What one rank finds."""

    small: dict[str, Any]
    """Results at batch size 1."""
    large: dict[str, Any]
    """Results at batch size 8."""
    known: dict[str, Any]
    messages: list[str]


def all_of_one_rank(rank: int, folder: Path) -> Alone:
    return Alone(*harness(rank, folder, [1, 8]), expected(rank, folder), refusals(rank, folder))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    return run_ranks(1, all_of_one_rank, folder)[0]


def test_harness_figures_are_those_of_the_library(alone: Alone) -> None:
    small, large, known, _ = alone
    for result in (small, large):
        assert likelihoods(result) == pytest.approx(known["likely"], rel=1e-4)
        found = result["results"]["texts"]["bits_per_byte,none"]
        assert found == pytest.approx(known["bits_per_byte"], rel=1e-4)
    best, values = [], iter(known["likely"])
    for record in CHOICES:
        scores = [next(values) for _ in record["choices"]]
        best.append(scores.index(max(scores)) == record["answer"])
    assert large["results"]["choice"]["acc,none"] == pytest.approx(sum(best) / len(best))
    for result in (small, large):
        answers = [text for ((text,),) in responses(result, "problems")]
        assert answers == known["new"]
    assert len(set(answers)) > 4 and not any(STOP in text for text in answers)
    assert large["results"]["problems"]["exact_match,none"] == 0.0

    recorded = large["config"]
    assert recorded["likelihood"]["num_draws"] == SETTINGS["num_draws"]
    assert recorded["likelihood"]["seed"] == SETTINGS["seed"]
    assert recorded["likelihood"]["precision"] == "float32"
    assert recorded["likelihood"]["mean_standard_error"] > 0
    assert (recorded["sampling"]["method"], recorded["sampling"]["steps"]) == ("ancestral", 6)


def test_the_command_on_two_ranks_counts_right_answers_and_agrees_with_one(
    folder: Path, alone: Alone, tmp_path: Path
) -> None:
    """Half of the problems get for an answer what the model is about to say."""
    records = [json.loads(line) for line in (folder / "problems.jsonl").open()]
    for record, said in list(zip(records, alone.known["new"], strict=True))[:4]:
        record["answer"] = said
    data = tmp_path / "answered.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {"task": "answered", **COMMON, **TASKS["problems"]}
    task["dataset_kwargs"] = {"data_files": {"test": str(data)}}
    (folder / "tasks/answered.yaml").write_text(yaml.safe_dump(task))
    arguments = ",".join(f"{k}={v}" for k, v in {"load": folder / "hf", **SETTINGS}.items())
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        ROOT / "tools/evaluate_tasks.py", "run", "--model", "gidd", "--model_args", arguments,
        "--tasks", "answered", "choice", "texts", "--include_path", folder / "tasks",
        "--batch_size", 8, "--output_path", tmp_path / "results",
    ]  # fmt: skip
    done = subprocess.run([str(x) for x in line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["sampling"]["steps"] == SETTINGS["steps"]
    found, known = results["results"], alone.large["results"]
    assert found["choice"]["acc,none"] == known["choice"]["acc,none"]
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(
        known["texts"]["bits_per_byte,none"], rel=1e-4
    )
    error = alone.large["config"]["likelihood"]["mean_standard_error"]
    assert results["config"]["likelihood"]["mean_standard_error"] == pytest.approx(error, rel=1e-3)
    assert found["answered"]["exact_match,none"] == 0.5


def test_wrong_arguments_are_named(alone: Alone) -> None:
    parts = "draws", "num_draws", "method", "load=FOLDER", "--batch_size", "no bound", "beams"
    for message, part in zip(alone.messages, parts, strict=True):
        assert part in message
