"""Samples of a list of prompts: a function of the list, not of how it is worked through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.cli import dump_config
from megatron_ext.config import ParallelConfig
from megatron_ext.hf.steps_gidd import SamplingConfig
from megatron_ext.inference.generate import HOLE_TEXT, generate
from megatron_ext.inference.load import load_model
from megatron_ext.model.norms import RMSNorm
from tests.distributed import run_ranks
from tests.inference.folders import hugging_face_folder, run_config, training_run

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 48
"""Positions of the recorded models."""
PROMPTS = [
    "w3 w7 w1",
    " ".join(f"w{i}" for i in range(CONTEXT - 5)),
    "",
    "w3 w7 w1",
    f"w5 {HOLE_TEXT} w6 {HOLE_TEXT} {HOLE_TEXT} w9",
    "w1 w2 w3 w4 w5 w6 w7 w8 w9",
]
"""Equal ones, one that leaves five positions, an empty one, one with holes."""
CONFIGS = [
    SamplingConfig(steps=6, block_length=8, max_length=20, seed=5),
    SamplingConfig(
        method="adaptive", tokens_per_step=3, steps=6, block_length=8, max_length=20, seed=6,
        correction_steps=2, mode="window", look_ahead=3,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` and `run`, the same weights."""
    path = tmp_path_factory.mktemp("generate")
    hugging_face_folder(path / "hf")
    training_run(path / "run")
    return path


def samples_at(path: Path, batch_size: int, layout: ParallelConfig) -> list[list[list[int]]]:
    """New tokens of every prompt under every configuration."""
    model = load_model(path, parallel=layout)
    return [
        [sample.ids for sample in generate(model, PROMPTS, config, batch_size=batch_size)]
        for config in CONFIGS
    ]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[list[int]]]:
    torch.set_num_threads(1)
    return samples_at(folder / "hf", 1, ParallelConfig())


@pytest.mark.parametrize("batch_size", [2, 3, 6])
def test_samples_do_not_depend_on_the_batch_size(
    folder: Path, alone: list[list[list[int]]], batch_size: int
) -> None:
    assert samples_at(folder / "hf", batch_size, ParallelConfig()) == alone
    for samples in alone:
        assert samples[0] != samples[3], "equal prompts draw under their own numbers"
        assert len(samples[1]) <= 5 < max(map(len, samples))


def test_a_run_of_engine_and_compiled_layers_is_sampled_by_plain_ones(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    trained = run_config(folder / "run").with_sections(
        precision={"bf16": True, "transformer_impl": "transformer_engine", "compile_layers": True}
    )
    dump_config(trained, tmp_path / "run/config.yaml")
    model = load_model(tmp_path / "run").denoiser.model
    assert type(model.decoder.final_layernorm) is RMSNorm
    plain = load_model(folder / "run").denoiser.model
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=4e-3, atol=0)


def samples_of_rank(rank: int, path: Path) -> list[list[list[list[int]]]]:
    del rank
    torch.set_num_threads(1)
    layouts = ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2})
    return [samples_at(path, 6, ParallelConfig(**layout)) for layout in layouts]


def test_all_ranks_of_a_split_model_draw_what_the_hugging_face_model_draws(
    folder: Path, alone: list[list[list[int]]]
) -> None:
    for by_layout in run_ranks(2, samples_of_rank, folder / "run"):
        for samples in by_layout:
            assert samples == alone


def test_the_command_reads_and_writes_json_lines(
    folder: Path, alone: list[list[list[int]]], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text, "more": 1}) for text in PROMPTS]
    prompts.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")

    def command() -> subprocess.CompletedProcess[str]:
        line = [
            sys.executable, ROOT / "tools/generate.py", "--load", folder / "hf", "--input", prompts,
            "--output", tmp_path / "out/samples.jsonl", "--seed", 5, "--steps", 6,
            "--block-length", 8, "--max-length", 20, "--batch-size", 4,
        ]  # fmt: skip
        return subprocess.run([str(x) for x in line], capture_output=True, text=True)

    done = command()
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    written = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").open()]
    assert [record["prompt"] for record in written] == PROMPTS
    assert [record["ids"] for record in written] == alone[0]
    tokenizer = load_model(folder / "hf").tokenizer
    for record in written:
        prefix = tokenizer.encode(record["prompt"].split(HOLE_TEXT)[0])
        assert record["text"] == tokenizer.decode([*prefix, *record["ids"]])
    prompts.write_text(lines[0] + '\n{"text": "w1"}\n')
    done = command()
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].endswith('line 2: no "prompt" in it.')


def test_a_trace_ends_with_the_context_of_each_sequence(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder / "hf")
    drawn = list(generate(model, PROMPTS, CONFIGS[0], trace=tmp_path / "trace.json"))
    sequences = json.loads((tmp_path / "trace.json").read_text())["sequences"]
    for sample, sequence in zip(drawn, sequences, strict=True):
        blocks = [block["steps"][-1]["ids"] for block in sequence["blocks"]]
        first = sequence["blocks"][0]["first"]
        assert first == len(sequence["prompt"])
        assert first + sum(map(len, blocks)) <= CONTEXT
        recorded = [id for block in blocks for id in block if id != model.tokenizer.pad_id]
        assert recorded[: len(sample.ids)] == sample.ids
