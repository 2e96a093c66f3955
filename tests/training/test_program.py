"""`pretrain_diffusion.py` as a program: signals, exit codes, messages."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.checkpoint import manifest

ROOT = Path(__file__).parents[2]
RUN = [
    "pretrain_diffusion.py", "--mock-data", "--vocab-size", "61", "--mask-token-id", "3",
    "--pad-token-id", "2", "--num-layers", "1", "--hidden-size", "32", "--seq-length", "32",
    "--micro-batch-size", "2", "--global-batch-size", "4", "--log-interval", "1",
    "--train-iters", "100000",
]  # fmt: skip
START_SECONDS = 400
"""Patience with a machine that does much else."""


def wait_for_first_step(save: Path, process: subprocess.Popen) -> None:
    path, deadline = save / "metrics.jsonl", time.monotonic() + START_SECONDS
    while not (path.is_file() and path.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)


def started(command: list[str], save: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, "--save", str(save), "--load", str(save)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_sigterm_saves_and_exits_with_the_code_to_resume(tmp_path: Path) -> None:
    process = started([sys.executable, *RUN], tmp_path)
    wait_for_first_step(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 85, output
    step = manifest.latest_step(tmp_path)
    assert step is not None and f"stopping at step {step}: received SIGTERM" in output

    process = started([sys.executable, *RUN, "--train-iters", str(step + 2)], tmp_path)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, output
    assert f"from step {step} to {step + 2}" in output
    assert manifest.latest_step(tmp_path) == step + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-length", "0"], "--seq-length is 0: give a number above zero."),
        (["--config", "absent.yaml"], "--config is 'absent.yaml': there is no such file."),
        (["--model-preset", "gidd-3b"], "--model-preset is 'gidd-3b'; did you mean"),
        (["--global-batch-size", "3"], "--global-batch-size is 3: it must be a multiple of 2"),
        (["--load", "/nonexistent"], "--load is '/nonexistent': there is no complete checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *RUN, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS,
    )  # fmt: skip
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("pretrain_diffusion.py: ") and message in line
    assert "Traceback" not in done.stderr
    # A CUDA build of torch where there is no GPU has something to say itself.
    lines = [x for x in done.stderr.strip().splitlines() if "No CUDA runtime is found" not in x]
    assert len(lines) == 1, done.stderr
