"""Comparisons over seeds: intervals that hold the truth, and refusals of unlike runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.cli import dump_config
from megatron_ext.config import Config
from megatron_ext.scaling.comparison import band, differences, last_common_step, read_variants

ROOT = Path(__file__).resolve().parents[2]


def write_run(
    folder: Path, losses: np.ndarray, seed: int, changes: dict[str, Any] | None = None
) -> Path:
    """A run's folder with a validation every ten steps."""
    config = Config().with_sections(training={"seed": seed}, checkpoint={"save": str(folder)})
    dump_config(config.with_sections(**(changes or {})), folder / "config.yaml")
    lines = [json.dumps({"step": 10 * i, "valid/elbo": v}) for i, v in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_variants(
    root: Path, rng: np.random.Generator, gap: float, seeds: dict[str, range]
) -> dict[str, list[Path]]:
    """Two variants `gap` apart; seeds share most of their luck between variants."""
    luck = 0.02 * rng.standard_normal(100)
    return {
        name: [
            write_run(
                root / f"{name}-{seed}",
                5 - 0.1 * np.arange(4) + luck[seed] + shift + 0.004 * rng.standard_normal(4), seed,
                {"optimizer": {"optimizer": "adamw" if name == "b" else "laprop"}},
            )
            for seed in seeds[name]
        ]
        for name, shift in (("a", 0.0), ("b", gap))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seeds", "is_paired"),
    [({"a": range(4), "b": range(4)}, True), ({"a": range(4), "b": range(10, 15)}, False)],
)
def test_intervals_of_differences_hold_the_truth(
    tmp_path: Path, seeds: dict[str, range], is_paired: bool
) -> None:
    hits, widths = 0, []
    for trial in range(60):
        groups = write_variants(tmp_path, np.random.default_rng(trial), 0.01, seeds)
        _, result = differences(read_variants(groups, "valid/elbo"), "a")
        assert result.interval is not None and result.is_paired == is_paired
        hits += result.interval[0] <= 0.01 <= result.interval[1]
        widths.append(result.interval[1] - result.interval[0])
    # 95 % of 60 is 57; fewer than 51 happens once in a thousand.
    assert hits >= 51
    # Pairing removes the luck that seeds share.
    assert (np.median(widths) < 0.025) == is_paired


def test_verdict_needs_an_interval_on_one_side(tmp_path: Path) -> None:
    many = {"a": range(4), "b": range(4)}
    for gap, verdict in ((0.1, "higher"), (-0.1, "lower"), (0.0, "no difference shown")):
        groups = write_variants(tmp_path, np.random.default_rng(1), gap, many)
        base, result = differences(read_variants(groups, "valid/elbo"), "a")
        assert (base.verdict, result.verdict) == ("baseline", verdict)
    groups = write_variants(tmp_path, np.random.default_rng(1), 9.0, {"a": range(1), "b": range(1)})
    _, result = differences(read_variants(groups, "valid/elbo"), "a")
    assert result.verdict == "one seed: no verdict"


def test_band_is_the_interval_of_the_mean(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(s), np.array([1.0 + s, 2.0]), s) for s in range(3)]
    steps, mean, half = band(read_variants({"a": folders}, "valid/elbo")["a"])
    assert list(steps) == [10, 20] and mean == pytest.approx([2, 2])
    # Student's t at two degrees of freedom, standard deviation one.
    assert half == pytest.approx([4.3027 / 3**0.5, 0], rel=1e-4)


def test_runs_of_a_variant_differ_in_their_seed_alone(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", np.ones(2), 0)
    other = write_run(tmp_path / "b", np.ones(2), 1, {"optimizer": {"lr": 0.7}})
    twin = write_run(tmp_path / "c", np.ones(2), 0)
    with pytest.raises(ValueError, match=r"differ in optimizer\.lr"):
        read_variants({"a": [first, other]}, "valid/elbo")
    with pytest.raises(ValueError, match="the same training.seed"):
        read_variants({"a": [first, twin]}, "valid/elbo")
    with pytest.raises(ValueError, match="has no 'valid/loss2'"):
        read_variants({"a": [first]}, "valid/loss2")


def test_values_are_compared_at_the_last_step_that_all_runs_have(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", np.array([3.0, 2.0]), 0)
    long = write_run(tmp_path / "long", np.array([3.0, 2.5, 1.0]), 0)
    variants = read_variants({"a": [short], "b": [long]}, "valid/elbo")
    assert last_common_step(variants) == 20
    assert [round(r.value, 3) for r in differences(variants, "a")] == [2.0, 2.5]


def test_command_writes_the_report(tmp_path: Path) -> None:
    many = {"a": range(3), "b": range(3)}
    groups = write_variants(tmp_path / "runs", np.random.default_rng(2), 0.1, many)
    words = [f"--run={name}={folder}" for name, folders in groups.items() for folder in folders]
    done = subprocess.run(
        [sys.executable, "tools/compare_runs.py", *words, "--output", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "higher paired" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "optimizer.optimizer &#x27;adamw&#x27;" in page or "optimizer.optimizer 'adamw'" in page
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
