"""A run from its configuration to its exit code, on one rank in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import manifest
from megatron_ext.cli import load_config
from megatron_ext.config import Config
from megatron_ext.training.guards import EXIT_DIVERGED, EXIT_DONE, EXIT_RESUME
from megatron_ext.training.loop import train
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_rank", "signal_handlers")


def run_config(save: Path | None, **sections: dict[str, Any]) -> Config:
    """A small run that logs every step."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2},
        "logging": {"log_interval": 1, "progress_bar": False},
        "checkpoint": {"save": None if save is None else str(save)},
        "training": {"micro_batch_size": 8, "train_iters": 4},
    }
    names = {**defaults, **sections}
    return tiny_config(
        **{name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names}
    )


def with_documents(prefix: str) -> dict[str, Any]:
    return {"mock_data": False, "data_path": (prefix,), "split": "80,20,0"}


def records(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def losses(save: Path) -> list[tuple[int, float, float]]:
    return [
        (record["step"], record["train/loss"], record["train/grad_norm"])
        for record in records(save)
        if "train/loss" in record
    ]


def test_metrics_have_every_documented_tag(document_prefix: str, tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        data=with_documents(document_prefix),
        logging={"peak_flops": 1e12},
        training={"eval_draws": 16},
    )
    assert train(config) == EXIT_DONE
    *steps, valid = records(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert {
            "train/loss", "train/elbo", "train/kl", "train/is_div", "train/grad_norm", "train/lr",
            "train/tokens", "train/skipped_steps", "train/param_norm", "perf/tokens_per_s",
            "perf/step_time_s", "perf/mfu",
        } <= record.keys()  # fmt: skip
        assert record["train/tokens"] == record["step"] * 8 * 32
        assert record["train/loss"] == pytest.approx(
            record["train/kl"] + record["train/is_div"], rel=1e-5
        )
    assert {"valid/elbo", "valid/elbo_standard_error", "valid/sequences"} <= valid.keys()
    by_level = [name for name in valid if name.startswith("valid/elbo_by_log_snr/")]
    assert 4 < len(by_level) <= 9


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(run_config(tmp_path)) == EXIT_DONE
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(loss)) for step, loss, _ in losses(tmp_path)]


def test_the_saved_configuration_starts_the_same_run(tmp_path: Path) -> None:
    config = run_config(tmp_path / "first", noise={"p_linear": 0.25}, optimizer={"lr": 0.03})
    assert train(config) == EXIT_DONE
    again = load_config(tmp_path / "first" / "config.yaml")
    assert again == config
    again = again.with_sections(checkpoint={"save": str(tmp_path / "second")})
    assert train(again) == EXIT_DONE
    assert losses(tmp_path / "second") == losses(tmp_path / "first")


def test_evaluation_does_not_change_training(document_prefix: str, tmp_path: Path) -> None:
    data = with_documents(document_prefix)
    for name, training in {
        "never": {"skip_eval": True},
        "often": {"eval_interval": 1, "eval_draws": 3},
        "some": {"eval_interval": 2, "eval_iters": 1},
    }.items():
        assert train(run_config(tmp_path / name, data=data, training=training)) == EXIT_DONE
    for name in ("often", "some"):
        assert losses(tmp_path / name) == losses(tmp_path / "never")
    bounds = [r["step"] for r in records(tmp_path / "often") if "valid/elbo" in r]
    assert bounds == [1, 2, 3, 4]
    assert not any("valid/elbo" in r for r in records(tmp_path / "never"))


def test_saving_and_restarting_does_not_change_training(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(run_config(whole)) == EXIT_DONE
    checkpoint = {"save": str(parts), "load": str(parts), "save_interval": 1, "keep_last": 2}
    config = run_config(parts, checkpoint=checkpoint, training={"exit_interval": 3})
    assert train(config) == EXIT_RESUME
    assert manifest.complete_steps(parts) == [2, 3]
    assert train(config) == EXIT_DONE
    assert manifest.complete_steps(parts) == [3, 4]
    assert losses(parts) == losses(whole)
    assert train(config) == EXIT_DONE
    assert losses(parts) == losses(whole)


def test_exit_interval_stops_with_the_code_to_resume_but_not_at_the_end(tmp_path: Path) -> None:
    config = run_config(tmp_path / "a", training={"exit_interval": 2})
    assert train(config) == EXIT_RESUME == 85
    assert manifest.latest_step(tmp_path / "a") == 2
    assert train(run_config(tmp_path / "b", training={"exit_interval": 4})) == EXIT_DONE == 0
    assert manifest.latest_step(tmp_path / "b") == 4


def test_exit_duration_saves_and_stops_after_the_step(tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"exit_duration_in_mins": 1e-6})
    assert train(config) == EXIT_RESUME
    assert manifest.latest_step(tmp_path) == 1


def test_a_diverged_run_stops_with_its_code_and_the_last_finite_weights(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        optimizer={"lr": 1e38, "lr_warmup_iters": 0, "lr_decay_style": "constant"},
        training={"train_iters": 20, "max_consecutive_bad_steps": 3},
    )
    assert train(config) == EXIT_DIVERGED == 86
    written = records(tmp_path)
    assert [record["train/skipped_steps"] for record in written] == [0, 1, 2, 3]
    assert math.isnan(written[-1]["train/loss"])
    assert manifest.latest_step(tmp_path) == 4


def test_a_run_that_never_takes_a_step_can_still_be_saved_and_continued(tmp_path: Path) -> None:
    checkpoint = {"save": str(tmp_path), "load": str(tmp_path)}
    # The first logits overflow: nothing is ever applied.
    model = {"num_layers": 2, "head_init_std": 1e38}
    training = {"max_consecutive_bad_steps": 1}
    config = run_config(tmp_path, model=model, checkpoint=checkpoint, training=training)
    assert train(config) == EXIT_DIVERGED
    assert manifest.latest_step(tmp_path) == 1
    assert train(config) == EXIT_DIVERGED
    assert manifest.latest_step(tmp_path) == 2


def test_a_folder_with_another_run_is_not_overwritten(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    assert train(config) == EXIT_DONE
    with pytest.raises(ValueError, match="--save is .* it holds checkpoints already"):
        train(config)
    own = {"save": str(tmp_path), "load": f"{tmp_path}/../{tmp_path.name}", "finetune": True}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="--finetune is True: .*choose another --save"):
        train(run_config(tmp_path, checkpoint=own))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_parameter_norm_counts_every_weight_once(tmp_path: Path) -> None:
    assert train(run_config(tmp_path)) == EXIT_DONE
    from megatron_ext.training.loop import Trainer

    trainer = Trainer.build(run_config(tmp_path, checkpoint={"load": str(tmp_path)}))
    trainer.load()
    squares = sum(p.double().square().sum() for p in trainer.model[0].parameters())
    norm = records(tmp_path)[-1]["train/param_norm"]
    assert norm == pytest.approx(torch.as_tensor(squares).sqrt().item(), rel=1e-6)
