"""Plans against dry runs, published runs, and the rules of the configuration."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli import parse
from megatron_ext.config import Config, ModelConfig
from megatron_ext.planning import validation
from megatron_ext.planning.anchors import ANCHORS
from megatron_ext.planning.calibration import OTHER_STACKS, all_tests, error_of, rates
from megatron_ext.planning.dry_run import dry_run
from megatron_ext.planning.footprint import OPTIMIZER_TILE, footprint
from megatron_ext.planning.hardware import GPUS
from megatron_ext.planning.planner import (
    MEMORY_BAND,
    PLANNED,
    RESERVED_BYTES,
    TIME_BAND,
    plan,
)
from megatron_ext.planning.shapes import Shape, Spread
from megatron_ext.planning.step_time import FUSED_LAYER, layer_traffic, step_time
from megatron_ext.presets import MODEL_PRESETS
from tests.planning.cases import layout

ROOT = Path(__file__).parents[2]


def run_of(
    world: int = 1, micro: int = 2, count: int = 1, parallel: dict[str, Any] | None = None,
    loss_impl: str = "auto", **model: Any,
) -> tuple[Config, Spread]:  # fmt: skip
    """A run of a middling model; `count` micro-batches."""
    shape = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 4, "seq_length": 512}
    config = Config().with_sections(
        model=shape | {"vocab_size": 8192} | model, parallel=parallel or {},
        precision={"bf16": True, "compile_layers": True, "loss_impl": loss_impl},
    )  # fmt: skip
    batch = micro * count * world // config.parallel.model_parallel_size
    config = config.with_sections(training={"micro_batch_size": micro, "global_batch_size": batch})
    return config, Spread.of(config, world)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"micro": 4},
    "wide table": {"world": 8, "vocab_size": 65536},
    "tp2 pp2": {"world": 8, "count": 4, "parallel": layout(2, 2, sequence_parallel=True)},
    "pp4 gelu": {
        "world": 8, "micro": 4, "count": 6, "parallel": layout(pp=4), "activation": "gelu",
    },
    "recompute": {
        "world": 16, "micro": 16, "num_layers": 8,
        "parallel": layout(recompute_granularity="full"),
    },
    "tp4 cp2 swiglu": {
        "world": 8, "micro": 8, "parallel": layout(4, cp=2, sequence_parallel=True),
        "activation": "swiglu",
    },
    "pp2 vpp2": {"world": 2, "micro": 4, "count": 4, "parallel": layout(pp=2, virtual=2)},
    "dense loss": {"micro": 4, "loss_impl": "reference"},
    "no qk norm": {"micro": 4, "qk_norm": "none", "kv_channels": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_memory_is_that_of_the_dry_run(name: str) -> None:
    config, spread = run_of(**LAYOUTS[name])
    ends = {0, spread.gpus - 1} if spread.pipeline > 1 else {0}
    runs = [dry_run(config, spread.gpus, rank) for rank in ends]
    planned = footprint(config.model, config.model.vocab_size, spread, config.precision.loss_impl)
    assert planned.total == pytest.approx(max(run.peak_bytes for run in runs), rel=0.04)


def test_the_optimizers_tile_is_the_planned_one() -> None:
    from megatron_ext.optim.laprop import GPU_TILE_ELEMENTS

    assert GPU_TILE_ELEMENTS == OPTIMIZER_TILE


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "swiglu", "qk_norm": "none"},
     {"activation": "gelu", "ffn_hidden_size": 1024, "kv_channels": 256}],
)  # fmt: skip
def test_planned_traffic_of_a_layer_is_what_its_operations_move(changes: dict[str, Any]) -> None:
    few, many = (
        run_of(
            world=2,
            micro=8,
            parallel=layout(2, sequence_parallel=True),
            num_layers=layers,
            **changes,
        )  # fmt: skip
        for layers in (1, 3)
    )
    counted = {
        phase: (dry_run(many[0], 2).traffic_bytes[phase] - dry_run(few[0], 2).traffic_bytes[phase])
        / 2
        for phase in ("forward", "backward")
    }
    model, tokens = many[0].model, 8 * 512
    traffic, shape = layer_traffic(model), Shape.of(model, 8192)
    assert traffic.forward.of(shape, 2) * tokens == pytest.approx(counted["forward"], rel=0.03)
    backward = traffic.backward.of(shape, 2) * tokens
    backward += traffic.per_parameter * shape.layer_parameters / 2
    assert backward == pytest.approx(counted["backward"], rel=0.05)


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: f"{anchor.group} {anchor.name}")
def test_published_shapes_have_the_published_sizes(anchor: Any) -> None:
    size, shape = float(anchor.name.split("B")[0]), anchor.shape
    # Some models share one table between embedding and head.
    is_tied = anchor.group in ("llm-foundry", "MegaDLMs")
    tied = shape.table_parameters if is_tied else 0
    assert (shape.parameters - tied) / 1e9 == pytest.approx(size, rel=0.03)


LEVELS = {
    # mean and worst error of the model to beat
    "Megatron-LM": (0.055, 0.124),
    "llm-foundry": (0.080, 0.227),
}


def test_step_times_of_unseen_runs_are_planned_better_than_the_level_to_beat() -> None:
    tests = {test.tested_on: test for test in all_tests()}
    assert all(test.tested_on not in test.fitted_on for test in all_tests())
    for group, (mean, worst) in LEVELS.items():
        assert tests[group].mean < mean
        assert tests[group].worst < worst
    banded = [test.worst for test in all_tests() if test.tested_on not in OTHER_STACKS]
    assert len(banded) == 3
    assert max(banded) < TIME_BAND


def test_the_page_states_the_errors_that_the_model_makes() -> None:
    page = validation.PAGE.read_text()
    assert validation.section(page, "errors") == validation.errors_table()
    assert validation.section(page, "hardware") == validation.hardware_table()
    measured = validation.section(page, "memory")
    rows = [line.split("|")[1:-1] for line in measured.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == sum(ranks for ranks, _ in validation.MEMORY_CASES.values())
    assert max(abs(float(row[-1].strip(" %+"))) for row in rows) < 100 * MEMORY_BAND


def test_a_slower_machine_or_a_wrong_rate_is_noticed() -> None:
    anchor = ANCHORS[0]
    twice = replace(rates(), product=rates().product / 2)
    assert error_of(anchor, twice) > error_of(anchor, rates()) + 0.3
    slow = replace(GPUS["H100"], bf16_flops=500e12)
    times = [
        step_time(anchor.shape, anchor.spread, gpu, rates(), FUSED_LAYER).total
        for gpu in (slow, GPUS["H100"])
    ]
    assert times[0] > 1.3 * times[1]


@pytest.mark.parametrize(
    ("model", "batch", "gpu", "count"),
    [("gidd-unif-3b", 512, "H100", 8), ("gidd-unif-10b", 1024, "H100", 256),
     ("gidd-25m", 256, "A100", 8), ("gidd-unif-10b", 512, "B200", 64)],
)  # fmt: skip
def test_plans_are_runs_that_fit_fastest_first(
    model: str, batch: int, gpu: str, count: int
) -> None:
    plans = plan(model, batch, gpu, count)
    assert plans
    for one in plans:
        assert one.config.num_microbatches(count) == one.spread.num_microbatches >= 1
        need = one.memory_bytes * (1 + MEMORY_BAND) + RESERVED_BYTES
        assert need <= GPUS[gpu].memory_bytes
    times = [one.step_time_s for one in plans]
    assert all(later > 0.98 * earlier for earlier, later in zip(times, times[1:], strict=False))
    layouts = [one.spread for one in plans]
    assert len(set(layouts)) == len(layouts)


def test_more_gpus_take_less_time_and_never_more_than_their_share() -> None:
    times = [plan("gidd-unif-3b", 1024, "H100", n, limit=1)[0].step_time_s for n in (8, 64, 512)]
    assert times[0] > times[1] > times[2]
    assert times[0] <= 8 * times[1] * 1.05
    assert times[1] <= 8 * times[2] * 1.05


def test_what_does_not_fit_is_left_out() -> None:
    assert plan("gidd-unif-10b", 64, "A100", 1) == []
    assert plan("gidd-unif-3b", 512, "H100", 7) == []


def test_the_best_plans_step_needs_the_memory_that_was_planned() -> None:
    plans = plan("gidd-202m", 256, "H100", 64)
    best = next(x for x in plans if x.spread.num_microbatches <= 4)
    peak = max(dry_run(best.config, 64, rank).peak_bytes for rank in (0, 63))
    assert best.memory_bytes == pytest.approx(peak, rel=MEMORY_BAND)


def test_a_plans_command_starts_the_planned_run() -> None:
    given = ["--objective", "masked", "--num-layers", "8", "--vocab-size", "1024"]
    base = parse(given)
    for one in plan(base.model, 64, "H100", 16, base=base)[::40]:
        words = shlex.split(one.command(*given))
        assert words[:3] == ["torchrun", "--nproc-per-node", "8"]
        flags = words[words.index("pretrain_diffusion.py") + 1 :]
        assert parse(flags) == one.config
    preset = plan("gidd-25m", 64, "H100", 8, limit=1)[0]
    planned = parse(preset.flags)
    assert planned == preset.config
    assert planned.model == ModelConfig(**MODEL_PRESETS["gidd-25m"])


def test_every_planned_figure_says_so(tmp_path: Path) -> None:
    summary = plan("gidd-25m", 64, "H100", 8, limit=1)[0].summary()
    assert summary["note"] == PLANNED == "planned, not measured"
    assert summary["memory_band"] == "+-10%"
    assert summary["time_band"] == "+-25%"
    command = [
        sys.executable, "tools/plan.py", "--gpu", "H100", "--gpus", "64",
        "--model-preset", "gidd-202m", "--global-batch-size", "256", "--top", "2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{PLANNED}: memory +-10%, time +-25%" in done.stdout
    assert "pretrain_diffusion.py --model-preset gidd-202m --global-batch-size 256" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gidd-3b", 8, "H100", 8), "--model-preset is 'gidd-3b'"),
        (("gidd-25m", 8, "V100", 8), "--gpu is 'V100'"),
    ],
)
def test_unknown_names_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_fp8_plans_are_faster_runs_of_transformer_engine() -> None:
    both = plan("gidd-unif-10b", 1024, "H100", 256, precisions=["bf16", "fp8"])
    bf16, fp8 = (next(x for x in both if x.spread.precision == kind) for kind in ("bf16", "fp8"))
    assert both[0] is fp8
    assert fp8.time.products < 0.7 * bf16.time.products
    assert fp8.config.fp8.fp8_format == "hybrid"
    flags = fp8.flags
    assert flags[flags.index("--transformer-impl") + 1] == "transformer_engine"
    assert parse(flags) == fp8.config


def test_fp8_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="A100 has no FP8"):
        plan("gidd-25m", 8, "A100", 8, precisions=["fp8"])
