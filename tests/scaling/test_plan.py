"""Plans: nothing twice, inside the budget, horizons harvested. Launches: states and scripts."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from megatron_ext.cli import load_config
from megatron_ext.optim.schedule import LearningRateSchedule
from megatron_ext.scaling import launch as launching
from megatron_ext.scaling.collect import collect, read_table, write_table
from megatron_ext.scaling.ladder import coverage, describe, make_plan, read_plan, write_plan
from megatron_ext.scaling.study import Anneal, Study, read_study

RECIPE = {
    "model": {"seq_length": 128, "vocab_size": 512},
    "data": {"mock_data": True, "mask_token_id": 3, "pad_token_id": 2},
    "training": {"global_batch_size": 8, "micro_batch_size": 8},
}
SIZES = {
    f"d{width}": {"num_layers": 2, "hidden_size": width, "num_attention_heads": 2}
    for width in (16, 24, 32, 48)
}
NOISES = {
    "masked": {"diffusion": {"objective": "masked"}},
    "ar": {"diffusion": {"objective": "ar"}, "optimizer": {"lr": 0.05}},
}


def study(tmp_path: Path, **changes: Any) -> Study:
    values = {
        "recipe": RECIPE, "output": str(tmp_path / "out"), "sizes": SIZES, "noises": NOISES,
        "budgets_flops": (2e10, 4e10, 8e10), **changes,
    }  # fmt: skip
    return Study(**values)


def finish(run, losses: dict[int, float], code: int = 0) -> None:
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": step, "valid/elbo": loss, "train/elbo": loss})
        for step, loss in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "exit_code").write_text(f"{code}\n")


def test_one_run_per_setting_reaches_the_largest_horizon(tmp_path: Path) -> None:
    plan, configs = make_plan(study(tmp_path))
    assert len(plan.runs) == len(SIZES) * len(NOISES)
    for run in plan.runs:
        wanted = 8e10 / run.flops_per_token
        assert wanted <= run.tokens < wanted + 1024 * (run.eval_interval + 1)
        assert run.steps % run.eval_interval == 0
        config = configs[run.name]
        rates = LearningRateSchedule(
            config.optimizer.lr, config.training.train_iters, 0, config.optimizer.lr_wsd_decay_iters
        )
        assert rates.lr(config.training.train_iters - 1) == config.optimizer.lr
        assert config.optimizer.lr == (0.05 if run.noise == "ar" else 0.3)


def test_every_budget_is_harvested_from_validations_of_the_longest_run(tmp_path: Path) -> None:
    wide = study(tmp_path, points_per_run=16, budgets_flops=(1e11, 2e11, 4e11, 8e11))
    plan, _ = make_plan(wide)
    for run in plan.runs:
        for budget in plan.budgets_flops:
            step = budget / run.flops_per_token / (run.tokens / run.steps)
            nearest = round(step / run.eval_interval) * run.eval_interval
            assert abs(nearest - step) <= 0.5 * run.eval_interval
            assert nearest >= run.eval_interval


def test_sweep_multiplies_and_doubles_are_refused(tmp_path: Path) -> None:
    sweep = study(
        tmp_path, batch_sizes=(8, 16, 8), learning_rates={8: (0.1, 0.2), 16: (0.2,)},
        seeds={"d16": (0, 1), None: (0,)}, budgets_flops=(), horizons_tokens=(1e5, 2e5),
    )  # fmt: skip
    plan, configs = make_plan(sweep)
    assert len(plan.runs) == 3 * (len(SIZES) + 1) * len(NOISES)
    assert {run.tokens // run.steps for run in plan.runs} == {1024, 2048}
    assert all(run.tokens >= 2e5 for run in plan.runs)
    twice = study(tmp_path, noises={**NOISES, "again": NOISES["masked"]})
    with pytest.raises(ValueError, match="are the same run"):
        make_plan(twice)


def test_budgets_follow_from_the_whole_compute(tmp_path: Path) -> None:
    given = study(tmp_path, budgets_flops=(), total_flops=1e13, num_budgets=4, budget_ratio=3)
    plan, _ = make_plan(given)
    assert 0.9e13 < plan.total_flops <= 1e13
    ratios = [b / a for a, b in zip(plan.budgets_flops, plan.budgets_flops[1:], strict=False)]
    assert ratios == pytest.approx([3, 3, 3])
    with pytest.raises(ValueError, match="total_flops is"):
        make_plan(replace(given, budgets_flops=(1e14,)))


def test_budget_that_fits_two_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a minimum over sizes needs three"):
        make_plan(study(tmp_path, max_tokens=3e5))
    plan, _ = make_plan(study(tmp_path, min_tokens=6e4))
    table = coverage(study(tmp_path, min_tokens=6e4), plan)
    assert len(table[2e10]) < len(table[8e10])


def test_annealing_branches_from_a_saved_checkpoint_and_ends_at_the_same_tokens(
    tmp_path: Path,
) -> None:
    plan, configs = make_plan(
        study(tmp_path, anneal=Anneal(fraction=0.25, horizons=(0.5, 1.0), sizes=("d16",)))
    )
    branches = [run for run in plan.runs if run.parent is not None]
    assert len(branches) == 4
    by_name = {run.name: run for run in plan.runs}
    for branch in branches:
        parent, config = by_name[branch.parent], configs[branch.name]
        assert config.checkpoint.ckpt_step % configs[parent.name].checkpoint.save_interval == 0
        assert branch.steps % parent.eval_interval == 0
        assert branch.parent_step == pytest.approx(0.75 * branch.steps, abs=parent.eval_interval)
        rates = LearningRateSchedule(
            config.optimizer.lr, branch.steps, 0, config.optimizer.lr_wsd_decay_iters
        )
        assert rates.lr(branch.parent_step) == config.optimizer.lr
        assert rates.lr(branch.steps - 1) < 0.2 * config.optimizer.lr
    assert plan.total_flops < 1.5 * make_plan(study(tmp_path))[0].total_flops


def test_plan_survives_writing_and_configurations_start_the_runs(tmp_path: Path) -> None:
    plan, configs = make_plan(study(tmp_path))
    write_plan(plan, configs)
    assert read_plan(plan.output) == plan
    for run in plan.runs:
        path = Path(plan.output) / "configs" / f"{run.name}.yaml"
        assert load_config(path) == configs[run.name]
    assert "budget 8e+10" in describe(plan, study(tmp_path), 1e12)
    more, more_configs = make_plan(study(tmp_path, seeds={None: (0, 1)}))
    write_plan(more, more_configs)
    Path(more.runs[0].folder).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds runs that this plan does not have"):
        write_plan(*make_plan(study(tmp_path, budgets_flops=(3e10, 6e10))))


def test_larger_budgets_continue_the_runs_that_there_are(tmp_path: Path) -> None:
    plan, configs = make_plan(study(tmp_path))
    write_plan(plan, configs)
    first = plan.runs[0]
    finish(first, {first.steps: 3.0}, code=0)
    assert launching.state_of(first) == "finished"
    longer, longer_configs = make_plan(study(tmp_path, budgets_flops=(4e10, 8e10, 16e10)))
    write_plan(longer, longer_configs)
    again = next(run for run in longer.runs if run.name == first.name)
    assert again.steps > first.steps and launching.state_of(again) == "stopped"
    assert again in launching.due(longer)
    with pytest.raises(ValueError, match="holds runs that this plan does not have"):
        write_plan(plan, configs)
    cosine = {"optimizer": {"lr_decay_style": "cosine"}}
    decaying = {name: config.with_sections(**cosine) for name, config in longer_configs.items()}
    longest, _ = make_plan(study(tmp_path, budgets_flops=(8e10, 16e10, 32e10)))
    with pytest.raises(ValueError, match="holds runs that this plan does not have"):
        write_plan(longest, decaying)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [1e12]}, "did you mean .*budgets_flops"),
        ({"sizes": {"a": "gidd-26m"}}, "known presets"),
        ({"horizons_tokens": [1e6]}, "give one of"),
        ({"seeds": {"d17": [0]}}, "known sizes"),
        ({"budgets_flops": ["many"]}, "expected numbers"),
        ({"noises": {"m": {"difusion": {}}}}, "unknown section"),
        ({"noises": {"m": {"diffusion": {"objectiv": "ar"}}}}, "objectiv"),
        ({"anneal": {"share": 0.2}}, "known names"),
        ({"keep_schedule": True}, "one horizon"),
    ],
)
def test_mistakes_in_a_study_file_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    tree = {
        "recipe": "base.yaml", "output": "out", "sizes": SIZES, "noises": NOISES,
        "budgets_flops": [2e10, 4e10, 8e10],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**tree, **change}))
    with pytest.raises(ValueError, match=message):
        make_plan(read_study(tmp_path / "study.yaml"))


def test_states_of_runs_and_what_is_due(tmp_path: Path) -> None:
    plan, configs = make_plan(study(tmp_path))
    write_plan(plan, configs)
    first, second, third, fourth, *_ = plan.runs
    finish(first, {first.steps: 3.0})
    finish(second, {10: 3.0}, code=85)
    finish(third, {10: float("nan")}, code=86)
    finish(fourth, {}, code=2)
    states = [launching.state_of(run) for run in plan.runs[:5]]
    assert states == ["finished", "stopped", "diverged", "failed", "waiting"]
    # Under torchrun the command's code says nothing; the run's own is in exit.json.
    (Path(fourth.folder) / "exit.json").write_text(json.dumps({"code": 85}))
    assert launching.state_of(fourth) == "stopped"
    (Path(fourth.folder) / "exit.json").unlink()
    due = {run.name for run in launching.due(plan)}
    assert second.name in due and due.isdisjoint({first.name, third.name, fourth.name})
    assert {third.name, fourth.name} < {r.name for r in launching.due(plan, retry_failed=True)}
    table, checks = collect(plan)
    assert set(checks.diverged) == {third.name}
    assert checks.unfinished[second.name].startswith("stopped at step 10")
    assert first.name not in checks.unfinished
    assert table.set_index("run").loc[first.name, "flops"] == pytest.approx(
        first.tokens * first.flops_per_token
    )
    assert "1 finished" in launching.status_table(plan)


def test_repeated_validations_keep_the_later_and_are_reported(tmp_path: Path) -> None:
    plan, configs = make_plan(study(tmp_path))
    run = plan.runs[0]
    finish(run, {run.steps: 3.0})
    path = Path(run.folder) / "metrics.jsonl"
    path.write_text(
        path.read_text() + json.dumps({"step": run.steps, "valid/elbo": 2.9}) + '\n{"step": 1'
    )
    table, checks = collect(plan)
    assert list(table["loss"]) == [2.9]
    assert run.name in checks.duplicated


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_table_survives_writing(tmp_path: Path, ending: str) -> None:
    plan, _ = make_plan(study(tmp_path))
    for run in plan.runs[:2]:
        finish(run, {10: 3.25, run.steps: 3.0})
    table, _ = collect(plan)
    write_table(table, tmp_path / f"table.{ending}")
    read = read_table(tmp_path / f"table.{ending}")
    pd.testing.assert_frame_equal(read, table, check_dtype=False, rtol=1e-7)
    with pytest.raises(ValueError, match="--table is"):
        write_table(table, tmp_path / "table.txt")


def test_slurm_array_runs_each_line_once(tmp_path: Path) -> None:
    """The array's script is run by bash for every index, with a command that notes its config."""
    plan, configs = make_plan(study(tmp_path, anneal=Anneal(sizes=("d16",))))
    write_plan(plan, configs)
    noted = tmp_path / "noted"
    program = tmp_path / "program.sh"
    program.write_text(f'#!/bin/bash\necho "$@" >> {noted}\n')
    program.chmod(0o755)
    scripts = launching.write_slurm(plan, 2, [str(program)], ["--gres=gpu:8"])
    assert len(scripts) == 2
    text = scripts[0].read_text()
    assert "#SBATCH --gres=gpu:8" in text and "%2" in text
    last = int(text.split("--array=0-")[1].split("%")[0])
    assert last + 1 == sum(run.parent is None for run in plan.runs)
    for index in range(last + 1):
        environment = {"SLURM_ARRAY_TASK_ID": str(index), "PATH": "/usr/bin:/bin"}
        subprocess.run(["bash", str(scripts[0])], env=environment, check=True)
    ran = [line.split("/")[-1].removesuffix(".yaml") for line in noted.read_text().splitlines()]
    assert sorted(ran) == sorted(run.name for run in plan.runs if run.parent is None)


def test_branch_continues_its_own_checkpoint_once_it_has_one(tmp_path: Path) -> None:
    plan, configs = make_plan(study(tmp_path, anneal=Anneal(sizes=("d16",))))
    write_plan(plan, configs)
    branch = next(run for run in plan.runs if run.parent is not None)
    line = launching.command_of(branch, plan, ["echo"])
    for expected in ("", f"--load {branch.folder} --ckpt-step None"):
        subprocess.run(["bash", "-c", line], check=True)
        last = (Path(branch.folder) / "log.txt").read_text().splitlines()[-1]
        assert last.endswith(expected or f"{branch.name}.yaml")
        (Path(branch.folder) / "latest").write_text("5")
    order = [run.name for run in launching.in_order(plan)]
    assert order.index(branch.parent) < order.index(branch.name)
