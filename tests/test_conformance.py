"""The suite of recorded numbers as a command: it checks everything, and it can fail."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.distributed import run_ranks
from tests.naive_recordings import record

ROOT = Path(__file__).resolve().parents[1]
DEV = ROOT / "tests" / "golden" / "dev"
SETTINGS = {"generation_index.json"}
"""Files without a check of their own: they say how another one is to be read."""
E2E = ("e2e_train.npz", "e2e_grads_step0.safetensors", "e2e_params_final.safetensors")
MODEL_A = ("model_A.safetensors", "model_A_config.json", "model_A_io.npz")

Outcome = tuple[str, int]
"""Text and exit code of one run of the suite."""


def run_suites(rank: int, jobs: list[tuple[str, dict, dict]]) -> list[Outcome]:
    """In one process group, the suite on each (folder, parallel section, precision section)."""
    from megatron_ext.config import ParallelConfig, PrecisionConfig
    from megatron_ext.conformance.run import open_folder, run, session_config, start_session

    del rank
    outcomes = []
    for folder, parallel, precision in jobs:
        config = session_config(ParallelConfig(**parallel), PrecisionConfig(**precision), 1)
        outcomes.append(run(start_session(open_folder(Path(folder)), config)))
    return outcomes


def run_tool(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(ranks)]
    command = [*launcher, str(ROOT / "tools" / "conformance.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def rows(text: str) -> dict[str, str]:
    """Verdict of each check in a table."""
    return {
        re.split(r"\s{2,}", line)[0]: line.split()[-1]
        for line in text.splitlines()
        if line.endswith(("  ok", "  FAIL"))
    }


def failed(outcome: Outcome) -> list[str]:
    return [name for name, verdict in rows(outcome[0]).items() if verdict == "FAIL"]


def assert_all_was_checked(text: str, folder: Path) -> None:
    """No failure, and every file of the folder stands behind at least one check."""
    checked = rows(text)
    assert set(checked.values()) == {"ok"}, text
    for path in folder.iterdir():
        stem = re.sub(r"^(model_.+?)(\.safetensors|_config\.json|_io\.npz)$", r"\1 ", path.name)
        is_checked = any(name.startswith(stem) for name in checked)
        assert is_checked != (path.name in SETTINGS), f"{path.name}\n{text}"
    assert text.strip().splitlines()[-1].startswith("conformance: PASSED"), text


def test_recorded_numbers_are_met_on_one_rank() -> None:
    result = run_tool("--golden", str(DEV))
    assert result.returncode == 0, result.stdout + result.stderr
    assert_all_was_checked(result.stdout, DEV)


def test_recorded_numbers_are_met_under_torchrun_with_tensor_parallelism() -> None:
    result = run_tool("--golden", str(DEV), "--tensor-model-parallel-size", "2", ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_all_was_checked(result.stdout, DEV)


def test_recorded_numbers_are_met_at_other_layouts_of_two_ranks() -> None:
    layouts: list[tuple[dict, dict]] = [
        ({"pipeline_model_parallel_size": 2}, {}),
        ({"context_parallel_size": 2}, {}),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
        ({"use_distributed_optimizer": False}, {"loss_impl": "reference"}),
    ]
    jobs = [(str(DEV), *layout) for layout in layouts]
    for outcomes in run_ranks(2, run_suites, jobs):
        for text, code in outcomes:
            assert code == 0, text
            assert_all_was_checked(text, DEV)


def test_the_recorded_trajectory_is_met_with_every_switch(tmp_path: Path) -> None:
    for name in (*E2E, *MODEL_A):
        shutil.copy(DEV / name, tmp_path)
    switches: list[tuple[dict, dict]] = [
        ({}, {"attention_impl": "reference"}),
        ({}, {"loss_impl": "reference"}),
        ({}, {"loss_impl": "compiled", "loss_chunk_size": 7}),
        ({"recompute_granularity": "selective"}, {}),
        ({"recompute_granularity": "full"}, {}),
        ({}, {"compile_layers": True}),
    ]
    for text, code in run_ranks(1, run_suites, [(str(tmp_path), *x) for x in switches])[0]:
        assert code == 0, text
        assert_all_was_checked(text, tmp_path)


@pytest.mark.slow
def test_recorded_numbers_are_met_on_four_ranks() -> None:
    both = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute_granularity": "full",
    }
    jobs = [(str(DEV), {**both, "pipeline_model_parallel_size": 2}, {})]
    for text, code in run_ranks(4, run_suites, jobs)[0]:
        assert code == 0, text
        assert_all_was_checked(text, DEV)


def test_nothing_about_the_recorded_files_is_built_in(tmp_path: Path) -> None:
    record(tmp_path)
    jobs = [
        (str(tmp_path), {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
        (
            str(tmp_path),
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            {},
        ),
    ]
    for text, code in run_ranks(2, run_suites, jobs)[0]:
        assert code == 0, text
        assert_all_was_checked(text, tmp_path)
        assert "unknown" not in text


def change_array(key: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    """Change one element of an entry of an .npz file."""

    def damage(path: Path) -> None:
        with np.load(path) as file:
            entries = {name: file[name] for name in file.files}
        array = entries[key].copy()
        array.flat[array.size // 2] = change(array.flat[array.size // 2])
        np.savez(path, **{**entries, key: array})

    return damage


def change_tensor(key: str, amount: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        tensors[key].view(-1)[3] += amount
        safetensors.torch.save_file(tensors, path)

    return damage


def change_text(old: str, new: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


QUERY = "model.layers.1.self_attn.q_proj.weight"

DAMAGES: dict[str, tuple[tuple[str, ...], str, Callable[[Path], None], str]] = {
    "schedule": (
        (), "schedule.npz", change_array("loss_weights_2", lambda x: x + 1e-5),
        "schedule.npz loss_weights",
    ),
    "loss": (
        (), "loss_1.npz", change_array("s1_grad", lambda x: x + 1e-4),
        "loss_1.npz chunked float32",
    ),
    "truth": (
        (), "loss_3.npz", change_array("s2_truth64_loss", lambda x: x + 1e-6),
        "loss_3.npz reference float64 against truth",
    ),
    "large loss": (
        (), "loss_V131072.npz", change_array("b1_grad_at_idx", lambda x: x + 1e-4),
        "loss_V131072.npz chunked float32",
    ),
    "checksum": (
        (), "loss_V131072.npz", change_array("b2_seed", lambda x: x + 1),
        "loss_V131072.npz regenerated logits",
    ),
    "aggregation": (
        (), "loss_aggregation.npz", change_array("mean_metric_elbo", lambda x: x * 1.001),
        "loss_aggregation.npz mean",
    ),
    "attention mask": (
        (), "noise_masks.npz", change_array("prompt_causal_attn_mask", lambda x: ~x),
        "noise_masks.npz prompt_causal",
    ),
    "log-SNR": (
        (), "noise_masks.npz", change_array("log_snr_p_ind_0.5", lambda x: x + 1),
        "noise_masks.npz log_snr_p_ind_0.5",
    ),
    "empty tokens": (
        (), "noise_masks.npz", change_array("empty_out_pad2", lambda x: x + 1),
        "noise_masks.npz empty_out_pad2",
    ),
    "laprop": (
        (), "laprop.npz", change_array("c1_params_w", lambda x: x + 1e-4), "laprop.npz c1_* f32",
    ),
    "laprop in bf16": (
        (), "laprop.npz", change_array("c3_params_b", lambda x: x + 0.1), "laprop.npz c3_* bf16",
    ),
    "learning rates": (
        (), "wsd_schedule.json", change_text("0.25", "0.26"), "wsd_schedule.json",
    ),
    "labels": (
        (), "param_labels.json", change_text("bias_params", "bulk_params"), "param_labels.json",
    ),
    "layer": (
        MODEL_A, "model_A_io.npz", change_array("random_layer_out", lambda x: x + 1e-3),
        "model_A layer_out",
    ),
    "logits": (
        MODEL_A, "model_A_io.npz", change_array("shift5_logits", lambda x: x + 1e-3),
        "model_A shift5_logits",
    ),
    "bf16 logits": (
        MODEL_A, "model_A_io.npz", change_array("bf16_prompt_logits", lambda x: x + 20),
        "model_A bf16_logits",
    ),
    "weights": (
        MODEL_A, "model_A.safetensors", change_tensor(QUERY, 0.1), "model_A logits",
    ),
    "architecture": (
        MODEL_A, "model_A_config.json", change_text('"resid_scale": 4.0', '"resid_scale": 3.0'),
        "model_A layer_out",
    ),
    "unsupported architecture": (
        MODEL_A, "model_A_config.json", change_text('"is_causal": false', '"is_causal": true'),
        "model_A",
    ),
    "trained loss": (
        (*MODEL_A, *E2E), "e2e_train.npz", change_array("loss", lambda x: x * 1.001),
        "e2e_train.npz loss",
    ),
    "gradients": (
        (*MODEL_A, *E2E), "e2e_grads_step0.safetensors", change_tensor(QUERY, 0.01),
        "e2e_grads_step0.safetensors",
    ),
    "trained weights": (
        (*MODEL_A, *E2E), "e2e_params_final.safetensors", change_tensor(QUERY, 1e-3),
        "e2e_params_final.safetensors",
    ),
    "posterior": (
        (), "sampling_steps.npz", change_array("a2_p_hf", lambda x: x + 1e-3),
        "sampling_steps.npz posterior",
    ),
    "generation": (
        (*MODEL_A, "generation_index.json"), "generation.npz",
        change_array("g3_z_s", lambda x: x + 1), "generation.npz g3_ training model",
    ),
    "cut file": ((), "laprop.npz", cut_short, "laprop.npz"),
}  # fmt: skip
"""What is changed: (files it needs, changed file, the change, check that must name it)."""


def test_a_changed_number_of_any_kind_fails_its_check_and_no_other_file(tmp_path: Path) -> None:
    jobs: list[tuple[str, dict, dict]] = []
    for i, (others, file, damage, _) in enumerate(DAMAGES.values()):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in {*others, file}:
            shutil.copy(DEV / name, folder / name)
        damage(folder / file)
        jobs.append((str(folder), {}, {}))
    (outcomes,) = run_ranks(1, run_suites, jobs)
    for (kind, (_, file, _, check)), outcome in zip(DAMAGES.items(), outcomes, strict=True):
        assert outcome[1] == 1, f"{kind}: {outcome[0]}"
        assert check in failed(outcome), f"{kind}: {outcome[0]}"
        summary = outcome[0].splitlines()[-1]
        assert summary.startswith("conformance: FAILED") and check in summary
        stem = file.split(".")[0].split("_config")[0].split("_io")[0]
        assert file in E2E or all(name.startswith(stem) for name in failed(outcome)), outcome[0]


def test_absent_files_and_unfit_layouts_are_listed(tmp_path: Path) -> None:
    for name in ("wsd_schedule.json", *MODEL_A, "e2e_train.npz"):
        shutil.copy(DEV / name, tmp_path / name)
    shutil.copy(DEV / "model_B_io.npz", tmp_path / "model_B_io.npz")
    (tmp_path / "notes.txt").write_text("not a recording")
    jobs = [
        (str(tmp_path), {}, {"bf16": True}),
        (str(tmp_path), {"tensor_model_parallel_size": 3}, {}),
    ]
    in_bf16, unfit = run_ranks(3, run_suites, jobs)[0]
    for text, code in (in_bf16, unfit):
        assert code == 0, text
        assert rows(text)["wsd_schedule.json"] == "ok"
        for line in (
            "skipped: schedule.npz: no such file",
            "skipped: loss_{k}.npz: no such file",
            "skipped: e2e_grads_step0.safetensors: no such file",
            "skipped: model_B: no model_B.safetensors and no model_B_config.json",
            "skipped: notes.txt: unknown to this suite",
        ):
            assert line in text, text
    assert rows(in_bf16[0])["model_A bf16_logits"] == "ok"
    assert "skipped: e2e_train.npz: recorded in float32" in in_bf16[0]
    assert re.search(r"skipped: model_A: .*--tensor-model-parallel-size is 3", unfit[0])


def test_wrong_arguments_exit_with_two(tmp_path: Path) -> None:
    empty = run_tool("--golden", str(tmp_path))
    assert empty.returncode == 2 and "it holds none of schedule.npz" in empty.stderr
    impossible = run_tool("--golden", str(DEV), "--sequence-parallel")
    assert impossible.returncode == 2 and "--sequence-parallel" in impossible.stderr
    too_few_ranks = run_tool("--golden", str(DEV), "--tensor-model-parallel-size", "2")
    assert too_few_ranks.returncode == 2 and "number of ranks (1)" in too_few_ranks.stderr


LAYOUTS_OF_WEIGHTS = (
    {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    {"tensor_model_parallel_size": 2},
)


def load_and_return(rank: int, folder: str) -> tuple[list[dict], list[str]]:
    """Published tensors into a rank's model and out again, gathered over pp, at each layout; and
    what is said to tensors that do not fit."""
    from megatron_ext.checkpoint.hf_config import model_config
    from megatron_ext.checkpoint.hf_weights import load_published_weights, published_state
    from megatron_ext.config import Config, ParallelConfig
    from megatron_ext.diffusion.schedule import MixingSchedule
    from megatron_ext.parallel.groups import initialize_parallel
    from megatron_ext.training.build import build_model

    del rank
    shape = model_config(json.loads((Path(folder) / "model_C_config.json").read_text()))
    size = shape.vocab_size
    assert size is not None
    tensors = safetensors.torch.load_file(Path(folder) / "model_C.safetensors")
    returned = []
    for parallel in LAYOUTS_OF_WEIGHTS:
        config = Config(model=shape, parallel=ParallelConfig(**parallel))
        groups = initialize_parallel(config.parallel)
        model = build_model(config, size, MixingSchedule(size, 0, 0.0), groups)
        load_published_weights(model, tensors, size)
        stages: list[dict] = [{} for _ in range(groups.pp.size())]
        torch.distributed.all_gather_object(stages, published_state(model, size), group=groups.pp)
        returned.append({name: x for stage in stages for name, x in stage.items()})
    absent = {name: x for name, x in tensors.items() if name != QUERY}
    errors = []
    for damaged in (
        absent,
        {**tensors, "extra": tensors[QUERY]},
        {**tensors, QUERY: torch.ones(3)},
    ):
        try:
            load_published_weights(model, damaged, size)
        except ValueError as error:
            errors.append(str(error))
    return returned, errors


def test_published_weights_pass_through_any_layout_unchanged(tmp_path: Path) -> None:
    record(tmp_path)
    want = safetensors.torch.load_file(tmp_path / "model_C.safetensors")
    for returned, errors in run_ranks(2, load_and_return, str(tmp_path)):
        for got in returned:
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
        assert f"1 missing ({QUERY})" in errors[0]
        assert "1 unknown (extra)" in errors[1]
        assert QUERY in errors[2] and "shape" in errors[2]
