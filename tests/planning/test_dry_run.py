"""Dry runs against formulas, against torch's own counter, and against real steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.config import Config, ModelConfig
from megatron_ext.measure.memory import peak_memory
from megatron_ext.planning.dry_run import StepReport, dry_run
from megatron_ext.planning.measured import config_of, measured_peaks
from megatron_ext.planning.validation import MEMORY_CASES
from megatron_ext.presets import MODEL_PRESETS, total_parameters
from megatron_ext.scaling.flops import model_flops_per_token
from tests.distributed import run_ranks
from tests.planning.cases import FOUR_RANKS, layout, real_step, small

ROOT = Path(__file__).parents[2]
VOCABULARY = 131072
DENSE = {"attention_impl": "reference", "loss_impl": "reference"}
"""Implementations by definition: no product is made twice."""


def preset(name: str, **sections: dict) -> Config:
    model = ModelConfig(**MODEL_PRESETS[name], vocab_size=VOCABULARY)
    return small(training={"micro_batch_size": 1, "global_batch_size": 1}).with_sections(
        model=vars(model), **sections
    )


def product_flops(model: ModelConfig, num_keys: int) -> int:
    """FLOPs of a sequence's products, forward and backward, each made once."""
    width = model.head_width * model.num_attention_heads
    layer = 4 * model.hidden_size * width + 2 * model.hidden_size * model.ffn_width
    per_token = 6 * model.num_layers * layer + 12 * model.num_layers * width * num_keys
    return model.seq_length * (per_token + 6 * model.hidden_size * VOCABULARY)


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_products_of_the_real_model_are_those_of_the_formula(name: str) -> None:
    config = preset(name, precision=DENSE)
    run = dry_run(config, 1)
    # The learned key is one more key.
    assert run.total_flops == product_flops(config.model, config.model.seq_length + 1)
    # MFU's formula counts vectors as if they were multiplied, and no learned key.
    mfu = model_flops_per_token(config.model, VOCABULARY) * config.model.seq_length
    assert run.total_flops == pytest.approx(mfu, rel=2e-3)
    assert run.num_parameters == total_parameters(config.model, VOCABULARY)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_gpus_products_are_the_formulas_and_what_its_kernels_make_again(
    recompute: str | None,
) -> None:
    config = preset(
        "gidd-25m", precision={"bf16": True}, parallel={"recompute_granularity": recompute}
    )
    model, run = config.model, dry_run(config, 1)
    attention = model.num_layers * 4 * model.hidden_size * model.seq_length**2
    # flash-attn makes the scores again: five products backward for two forward. The learned key
    # and value are a key more of 2048, in products of their own.
    assert run.flops["attention"]["forward"] == pytest.approx(attention, rel=1e-3)
    assert run.flops["attention"]["backward"] == pytest.approx(2.5 * attention, rel=1e-3)
    layers = product_flops(model, 0) - run.flops["head"]["loss"]
    assert run.flops["layers"]["forward"] + run.flops["layers"]["backward"] == layers
    again = {"layers": layers // 3, "attention": attention} if recompute else {}
    for kind in ("layers", "attention"):
        assert run.flops[kind].get("recompute", 0) == pytest.approx(again.get(kind, 0), rel=1e-3)


@pytest.mark.parametrize("num_layers", [2, 4])
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_the_host_waits_three_times_per_step_however_much_is_in_it(
    num_layers: int, num_microbatches: int
) -> None:
    """For megatron-core's number of tokens, the gradient norm and the loss."""
    batch = {"micro_batch_size": 1, "global_batch_size": num_microbatches}
    config = small(model={"num_layers": num_layers}, training=batch)
    assert dry_run(config, 1).host_reads == 3


def test_products_agree_with_torchs_counter_on_a_real_step(single_rank: None) -> None:
    config = small(precision=DENSE)
    with FlopCounterMode(display=False) as counter:
        report = real_step(config)
    assert report.total_flops == counter.get_total_flops() > 0


@pytest.fixture(scope="module")
def real() -> list[dict[str, StepReport]]:
    """Steps over gloo, by rank and case."""
    return run_ranks(4, _take_steps, FOUR_RANKS)


def _take_steps(rank: int, cases: dict[str, Config]) -> dict[str, StepReport]:
    from tests.planning.cases import take_steps

    return take_steps(rank, cases)


@pytest.mark.parametrize(
    ("case", "rank"),
    [*((case, index % 4) for index, case in enumerate(FOUR_RANKS)), ("tp2_pp2_sp", 3)],
)
def test_a_dry_rank_sends_multiplies_and_holds_what_a_real_one_does(
    case: str, rank: int, real: list[dict[str, StepReport]]
) -> None:
    dry, taken = dry_run(FOUR_RANKS[case], 4, rank, device="cpu"), real[rank][case]
    assert dry.collectives == taken.collectives
    assert dry.flops == taken.flops
    assert dry.num_parameters == taken.num_parameters
    # But for a number or two that somebody still holds, and at the peak for a message that a thread
    # of gloo has sent and not yet let go: a layer's, or the loss's statistics of all tp ranks and
    # this one. More in all, never less.
    shape, few = FOUR_RANKS[case], 64
    message = 4 * shape.model.seq_length * shape.model.hidden_size * shape.training.micro_batch_size
    statistics = 4 * 3 * shape.model.seq_length * shape.training.micro_batch_size
    statistics *= shape.parallel.tensor_model_parallel_size + 1
    late = {"activations": message, "loss": statistics}
    assert dry.bytes_at_rest == pytest.approx(taken.bytes_at_rest, abs=few)
    for category, count in taken.bytes_at_peak.items():
        slack = few + late.get(category, 0)
        assert dry.bytes_at_peak[category] == pytest.approx(count, abs=slack), category
    assert -few <= taken.peak_bytes - dry.peak_bytes <= message + few


def test_bytes_of_collectives_follow_from_the_layout(real: list[dict[str, StepReport]]) -> None:
    config, run = FOUR_RANKS["tp2_pp2_sp"], real[0]["tp2_pp2_sp"]
    model, micro = config.model, run.num_microbatches
    hidden = model.seq_length * config.training.micro_batch_size * model.hidden_size * 4
    rows = {(r["group"], r["operation"], r["num_bytes"]): r["count"] for r in run.collectives}
    assert rows["pp", "send", hidden // 2] == micro
    assert rows["pp", "receive", hidden // 2] == micro
    layers = model.num_layers // 2
    # Forward: before each of two column-parallel products, and again in its backward pass, where
    # the gradient of the row-parallel product before is gathered, too; that of the embedding.
    assert rows["tp", "all-gather", hidden] == micro * (layers * 2 * 3 + 1)
    # After each row-parallel product, of column-parallel ones' gradients, and the embedding.
    assert rows["tp", "reduce-scatter", hidden] == micro * (layers * 2 * 2 + 1)


def test_what_one_stage_sends_the_next_receives() -> None:
    config = small(parallel=layout(pp=4), training={"global_batch_size": 12})
    runs = [dry_run(config, 8, rank, device="cpu") for rank in (0, 2, 4, 6)]

    def messages(run: StepReport, operation: str) -> int:
        return sum(row["count"] for row in run.collectives if row["operation"] == operation)

    assert [messages(run, "send") for run in runs] == [3, 6, 6, 3]
    assert [messages(run, "receive") for run in runs] == [3, 6, 6, 3]
    whole = total_parameters(config.model, 200 + 56)
    assert sum(run.num_parameters for run in runs) == whole


def test_memory_of_a_process_is_within_a_tenth_of_its_dry_run() -> None:
    ranks, sections = MEMORY_CASES["BF16"]
    (measured,) = measured_peaks(sections, ranks)
    planned = dry_run(config_of(sections), ranks, device="cpu").peak_bytes
    assert measured > 300 << 20
    assert planned == pytest.approx(measured, rel=0.1)


def test_a_cluster_takes_a_few_megabytes_of_this_machine() -> None:
    parallel = layout(tp=4, sequence_parallel=True)
    config = preset("gidd-unif-10b", parallel=parallel, precision={"bf16": True}).with_sections(
        training={"global_batch_size": 256}
    )
    runs: list[StepReport] = []
    used = peak_memory(lambda: runs.append(dry_run(config, 1024, 1023)))
    assert runs[0].peak_bytes > 15 << 30
    assert used < 256 << 20


def test_a_dry_run_leaves_nothing_behind(single_rank: None) -> None:
    dry_run(small(parallel=layout(tp=2)), 2, device="cpu")
    assert not torch.distributed.is_initialized()
    report = real_step(small())
    assert report.world_size == 1
    assert report.collectives == []


@pytest.mark.parametrize(
    ("sections", "world_size", "rank", "message"),
    [
        ({"parallel": layout(tp=2)}, 3, 0, "tensor-model-parallel-size is 2"),
        ({}, 3, 0, "global-batch-size is 8"),
        ({}, 4, 4, "--rank is 4"),
        ({"precision": {"attention_impl": "te"}}, 1, 0, "--attention-impl is 'te'"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused(
    sections: dict, world_size: int, rank: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(small(**sections), world_size, rank)
    assert not torch.distributed.is_initialized()


def test_described_kernels_refuse_numbers() -> None:
    from megatron_ext.kernels.attention import attention
    from megatron_ext.kernels.vocabulary.passes import passes_of

    x = torch.zeros(2, 1, 1, 8)
    with pytest.raises(ValueError, match="dry runs only"):
        attention(x, x, x, impl="described")
    with pytest.raises(ValueError, match="dry runs only"):
        passes_of("described").statistics(x[0, 0], torch.zeros(8), torch.ones(()))


def test_the_tool_reports_the_first_and_the_last_stage(tmp_path: Path) -> None:
    command = [
        sys.executable, "tools/dry_run.py", "--world-size", "4", "--device", "cpu",
        "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "2",
        "--seq-length", "32", "--vocab-size", "128", "--micro-batch-size", "1",
        "--pipeline-model-parallel-size", "2", "--json", str(tmp_path / "runs.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, last = json.loads((tmp_path / "runs.json").read_text())
    assert (first["rank"], last["rank"]) == (0, 3)
    assert "head" in last["flops"]
    assert "head" not in first["flops"]
    assert done.stdout.count("planned, not measured") == 2
    bad = subprocess.run(
        [*command, "--seq-length", "x"], cwd=ROOT, capture_output=True, check=False
    )
    assert bad.returncode != 0
