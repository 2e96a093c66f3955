"""The whole chain as users type it, on models of a few thousand weights."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from megatron_ext.cli import load_config
from megatron_ext.scaling.ladder import read_plan
from tests.data.corpora import write_with_megatron

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    f"d{width}": {"num_layers": 1, "hidden_size": width, "num_attention_heads": 2}
    for width in (8, 16, 24, 32)
}


def scaling_laws(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "tools/scaling_laws.py", *words], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned, launched and collected study on made-up documents."""
    root = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    documents = [[rng.integers(4, 32, 200)] for _ in range(40)]
    prefix = write_with_megatron(root / "documents", documents)
    recipe = {
        "model": {"seq_length": 32, "vocab_size": 32, "make_vocab_size_divisible_by": 1},
        "diffusion": {"objective": "masked"},
        "noise": {"max_empty_fraction": 0.0},
        "data": {
            "data_path": [str(prefix)], "split": "80,20,0", "mask_token_id": 3, "num_workers": 0,
        },
        "optimizer": {"lr": 0.1},
        "training": {"global_batch_size": 4, "micro_batch_size": 4, "eval_iters": 4},
        "logging": {"log_interval": 2, "progress_bar": False},
    }  # fmt: skip
    study = {
        "recipe": "base.yaml", "output": str(root / "out"), "sizes": SIZES,
        "noises": {"masked": {}}, "budgets_flops": ["4e7", "8e7", "1.6e8"], "points_per_run": 8,
        "anneal": {"fraction": 0.25, "sizes": ["d32"]},
    }  # fmt: skip
    (root / "base.yaml").write_text(yaml.safe_dump(recipe))
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    assert "5 runs" in scaling_laws("plan", str(root / "study.yaml"))
    out = root / "out"
    train = f'echo threads $OMP_NUM_THREADS; exec {sys.executable} pretrain_diffusion.py "$@"'
    command = shlex.join(["bash", "-c", train, "run"])
    shown = scaling_laws("launch", str(out), "--jobs", "2", "--command", command)
    assert "5 finished" in shown
    assert "none diverged" in scaling_laws("collect", str(out))
    return out


def test_table_has_every_horizon_of_every_run(folder: Path) -> None:
    table = pd.read_csv(folder / "runs.csv").fillna({"parent": ""})
    for run in read_plan(folder).runs:
        own = table[table["run"] == run.name]
        interval = run.eval_interval or run.steps
        assert list(own["step"]) == list(range(interval, run.steps + 1, interval))
        assert own["state"].unique() == ["finished"]
        np.testing.assert_allclose(own["flops"], own["tokens"] * run.flops_per_token, rtol=1e-6)
        metrics = [
            json.loads(line)
            for line in (Path(run.folder) / "metrics.jsonl").read_text().splitlines()
        ]
        bounds = [record["valid/elbo"] for record in metrics if "valid/elbo" in record]
        np.testing.assert_allclose(own["loss"], bounds, rtol=1e-6)


def test_annealed_branch_shares_its_parents_steps_and_no_more(folder: Path) -> None:
    branch = next(run for run in read_plan(folder).runs if run.parent is not None)
    log = (Path(branch.folder) / "log.txt").read_text()
    assert f"from step {branch.parent_step} to {branch.steps}" in log


def test_runs_beside_each_other_share_the_cores(folder: Path) -> None:
    share = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    expected = os.environ.get("OMP_NUM_THREADS", share)
    for run in read_plan(folder).runs:
        assert f"threads {expected}\n" in (Path(run.folder) / "log.txt").read_text()


def test_fit_plot_and_predict_follow(folder: Path) -> None:
    shown = scaling_laws("fit", str(folder), "--num-draws", "100")
    fits = json.loads((folder / "fits.json").read_text())
    frontier = fits["noises"]["masked"]["frontier"]["paper"]
    assert [m["budget"] for m in frontier["minima"]] == [4e7, 8e7, 1.6e8]
    # Random text has nothing to learn: the tool must say so, in the file and on the console.
    assert not frontier["laws"] and frontier["refusals"]
    assert "refused" in shown
    assert fits["anneal"]["masked"]["num_branches"] == 1
    scaling_laws("plot", str(folder))
    for name in ("curves", "isoflop-paper", "residuals"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / "figures" / f"{name}.svg").read_text()
    page = (folder / "figures" / "report.html").read_text()
    assert page.count("<img") >= 3 and "refused" in page
    words = ("predict", "--noise", "masked", "--flops", "1e9", "--fits")
    refused = scaling_laws(*words, str(folder / "fits.json"), code=2)
    assert "no frontier to predict from" in refused


def test_a_second_launch_has_nothing_to_do(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    assert scaling_laws("launch", str(folder), "--mode", "commands").strip() == ""
    scaling_laws("launch", str(folder), "--command", "false")
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}


def test_published_prediction_writes_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    words = ("predict", "--noise", "uniform", "--flops", "1e21", "--recipe")
    assert "19 layers of 3072" in scaling_laws(*words, str(recipe))
    assert load_config(recipe).model.num_layers == 19
