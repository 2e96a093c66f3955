"""Each fault of docs/resilience.md, put into a real run of several processes.

Every run is the training program on two ranks (`tests.resilience.program`). The oracle is the same
run without a fault: what goes on after the fault must be that run, to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.stored import StoredParameters
from megatron_ext.parallel.groups import refuse_stale_store
from tests.data.corpora import write_with_megatron
from tests.resilience import program
from tests.resilience.program import (
    FLAGS,
    MOCK,
    STEPS,
    events,
    exit_of,
    folders,
    losses,
    run_program,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a fault: checkpoints of steps 2, 4, 6 and 8."""
    root = tmp_path_factory.mktemp("whole")
    ended = run_program(root / "logs", [*FLAGS, *MOCK, *folders(root / "run")])
    assert ended.codes == [0, 0], ended.output
    assert exit_of(root / "run")["code"] == 0
    return root / "run"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", str(folder)], check=True)
            return
    pytest.skip("mounting a file system needs root")


def assert_same_weights(one: Path, other: Path) -> None:
    """Tensor by tensor: equal plain values may be pickled to other bytes."""
    stored = [StoredParameters(folder) for folder in (one, other)]
    assert stored[0].names() == stored[1].names() != set()
    for name in stored[0].names():
        shape = stored[0].facts(name)[0]
        assert torch.equal(*(parameters.read(name, shape) for parameters in stored)), name


def assert_goes_on_as(whole: Path, run: Path) -> None:
    assert losses(run) == losses(whole)
    assert manifest.latest_step(run) == STEPS
    assert exit_of(run)["code"] == 0


def test_a_full_disk_costs_checkpoints_but_not_the_run(whole: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    # In step 3 there is room for the reserve, but not for the shards; in step 5 for nothing.
    room = {3: 5 << 19, 5: 0, 7: -1}
    ended = run_program(
        small_disk.parent / "logs", [*FLAGS, *MOCK, *folders(run)],
        program.fill_disk, str(small_disk), room,
    )  # fmt: skip
    assert ended.codes == [0, 0], ended.output
    said = ended.output[0]
    for step in (4, 6):
        assert f"the checkpoint of step {step} could not be written" in said
    assert said.count("No space left on device") >= 2 and "metrics are not written" in said
    assert manifest.complete_steps(run) == [2, 8]
    assert not list(run.glob("*.partial"))
    assert_same_weights(run / "iter_0000002", whole / "iter_0000002")
    assert_goes_on_as(whole, run)
    assert "save_failed" in {event["event"] for event in events(run)}


def test_a_run_whose_saves_all_fail_stops_with_its_code(small_disk: Path) -> None:
    run = small_disk / "run"
    flags = [*FLAGS, *MOCK, *folders(run), "--max-failed-saves", "2"]
    ended = run_program(
        small_disk.parent / "logs", flags, program.fill_disk, str(small_disk), {1: 1 << 19}
    )
    assert ended.codes == [88, 88], ended.output
    assert "stopping at step 4: 2 checkpoints in a row could not be written" in ended.output[0]
    assert exit_of(run)["code"] == 88
    assert manifest.complete_steps(run) == []


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = [*FLAGS, *MOCK, "--save", str(tmp_path / "file" / "run")]
    ended = run_program(tmp_path / "logs", flags)
    assert ended.codes == [2, 2]
    for said in ended.output:
        (line,) = [line for line in said.splitlines() if line.startswith("pretrain_diffusion.py")]
        assert "--save is " in line and "cannot write there: Not a directory" in line


def test_a_folder_that_a_node_does_not_share_is_refused_on_all_ranks(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    run = tmp_path / "run"
    run.mkdir()
    flags = [*FLAGS, *MOCK, *folders(run), "--hang-timeout-minutes", "1"]
    ended = run_program(tmp_path / "logs", flags, program.on_a_disk_of_its_own, 1, str(run))
    assert ended.codes == [2, 2], ended.output
    for said in ended.output:
        assert "do not see there what rank 0 writes" in said
    assert list(run.iterdir()) == []


def test_damaged_checkpoints_are_passed_over_and_the_run_goes_on(whole: Path, copy: Path) -> None:
    shutil.rmtree(copy / "iter_0000008")
    shard = max((copy / "iter_0000006").glob("*.distcp"), key=lambda path: path.stat().st_size)
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    other = next((copy / "iter_0000004").glob("*.distcp"))
    size = other.stat().st_size
    os.truncate(other, size - 100)
    (copy / "metrics.jsonl").write_text('{"step": 7, "train/lo')
    ended = run_program(copy.parent / "logs", [*FLAGS, *MOCK, *folders(copy)])
    assert ended.codes == [0, 0], ended.output
    said = ended.output[0]
    assert "there is no checkpoint of step 8, the latest" in said
    assert f"{shard.name} does not match its checksum" in said
    assert f"{other.name} has {size - 100} bytes instead of {size}" in said
    assert "from step 2 to 8" in said
    assert {"iter_0000004.damaged", "iter_0000006.damaged"} <= {p.name for p in copy.iterdir()}
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text.split("\n", 1)[1])
    later = {step: values for step, values in losses(whole).items() if step > 2}
    assert losses(copy) == later
    assert_same_weights(copy / "iter_0000008", whole / "iter_0000008")


def test_a_rank_killed_in_a_save_loses_that_save_only(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*FLAGS, *MOCK, *folders(run), "--hang-timeout-minutes", "0.2"]
    ended = run_program(tmp_path / "killed", flags, program.die_in_a_save, 0, 4)
    assert ended.codes[0] == -9 and ended.codes[1] not in (0, None)
    assert manifest.complete_steps(run) == [2] and not (run / "exit.json").exists()
    assert (run / "iter_0000004.partial" / manifest.MANIFEST).is_file()
    ended = run_program(tmp_path / "again", flags)
    assert ended.codes == [0, 0], ended.output
    assert "from step 2 to 8" in ended.output[0]
    assert_goes_on_as(whole, run)


def test_a_killed_rank_and_the_end_of_the_time_lose_nothing_under_torchrun(
    whole: Path, tmp_path: Path
) -> None:
    """Started again by torchrun, stopped before the walltime, continued on fewer ranks."""
    run = tmp_path / "run"
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "1", "tests/resilience/supervised.py", *FLAGS, *MOCK, *folders(run),
    ]  # fmt: skip
    done = subprocess.run(
        torchrun, cwd=program.ROOT, capture_output=True, text=True, timeout=program.PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "from step 0 to 8" in said and "from step 4 to 8" in said, said
    assert "stopping at step 6: received SIGTERM" in said
    assert exit_of(run)["code"] == 85 and manifest.latest_step(run) == 6
    assert losses(run) == {step: x for step, x in losses(whole).items() if step <= 6}
    ended = run_program(tmp_path / "fewer", [*FLAGS, *MOCK, *folders(run)], world_size=1)
    assert ended.codes == [0], ended.output
    assert "2 -> 1 ranks" in ended.output[0] and "from step 6 to 8" in ended.output[0]
    for step in (7, 8):
        assert losses(run)[step] == pytest.approx(losses(whole)[step], rel=1e-5)


def test_restarts_that_would_not_find_each_other_are_refused_at_the_first_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun sets these two for its workers."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    refuse_stale_store()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--max-restarts is 3.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        refuse_stale_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    refuse_stale_store()


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_program(
        tmp_path / "logs", [*FLAGS, *MOCK, *folders(run)], program.signalled, 1, signal.SIGUSR1
    )
    assert ended.codes == [85, 85], ended.output
    assert "stopping at step 3: received" in ended.output[0]
    assert manifest.complete_steps(run) == [2, 3]
    assert exit_of(run) | {"time": 0} == {
        "code": 85, "reason": "received a signal on another rank", "step": 3, "time": 0,
    }  # fmt: skip


@pytest.mark.parametrize("holds_the_interpreter", [False, True], ids=["waiting", "in_a_call"])
def test_a_hung_rank_ends_all_ranks_with_their_stacks(
    holds_the_interpreter: bool, tmp_path: Path
) -> None:
    flags = [*FLAGS, *MOCK, "--save-interval", "0", "--hang-timeout-minutes", "0.05"]
    ended = run_program(tmp_path / "logs", flags, program.hang, 1, holds_the_interpreter)
    # Where the interpreter is held nothing but faulthandler can speak, and its code is 1.
    assert ended.codes == [87, 1 if holds_the_interpreter else 87], ended.output
    waiting, hung = ended.output
    assert "[rank 0] no progress for 3 s in step 3" in waiting and "optimizer_step" in waiting
    assert "program.py" in hung and "in hook" in hung
    assert "Timeout (" in hung if holds_the_interpreter else "[rank 1] no progress" in hung


def test_other_data_or_another_objective_is_refused_unless_meant(tmp_path: Path) -> None:
    """The cache beside the data is damaged, too; it is made again."""
    run, rng = tmp_path / "run", np.random.default_rng(11)
    documents = [[rng.integers(4, 2000, rng.integers(3, 41))] for _ in range(60)]
    data = write_with_megatron(tmp_path / "data", documents)
    cache = Path(f"{data}.scan.json")
    cache.write_text('{"key": {"bytes"')
    flags = [*FLAGS, "--data-path", str(data), "--split", "100,0,0", *folders(run)]
    first = run_program(tmp_path / "first", [*flags, "--exit-interval", "4"])
    assert first.codes == [85, 85], first.output
    assert json.loads(cache.read_text())["low"] >= 4
    with open(f"{data}.bin", "r+b") as file:
        file.seek(200)
        file.write(bytes([7]))
    changed = [*flags, "--objective", "masked", "--lr", "0.05"]
    refused = run_program(tmp_path / "refused", changed)
    assert refused.codes == [2, 2]
    (line,) = [x for x in refused.output[0].splitlines() if x.startswith("pretrain_diffusion.py")]
    assert "--objective hybrid -> masked" in line and f"file 1, {data}" in line
    assert "other fingerprint" in line and "--accept-changes objective data-path" in line
    assert "--lr" not in line
    meant = [*changed, "--accept-changes", "objective", "data-path"]
    ended = run_program(tmp_path / "meant", meant)
    assert ended.codes == [0, 0], ended.output
    assert "--lr 0.1 -> 0.05" in ended.output[0] and "from step 4 to 8" in ended.output[0]


def test_a_replayed_step_is_the_recorded_one(whole: Path, tmp_path: Path) -> None:
    """To the last bit at the run's layout, to rounding at another, from an earlier checkpoint."""
    report = tmp_path / "step.json"
    flags = ["--load", str(whole), "--step", "6", "--output", str(report)]
    for world_size, allowed in ((2, 0.0), (1, 1e-5)):
        ended = run_program(
            tmp_path / str(world_size), flags, world_size=world_size, entry=program.replay
        )
        assert ended.codes == [0] * world_size, ended.output
        replayed = json.loads(report.read_text())
        assert replayed["from_checkpoint"] == 4
        recorded = dict(zip(("loss", "grad_norm"), losses(whole)[6], strict=True))
        assert replayed["recorded"] == recorded
        assert max(replayed["differences"].values()) <= allowed
        assert [s["sample"] for s in replayed["sequences"]] == list(range(40, 48))
