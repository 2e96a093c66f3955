"""A save that is killed at any point leaves a checkpoint to go on from.

Every change that a save makes to its folder is once the last thing before SIGKILL: shards, the
manifest, renames, `latest`, the deletion of old checkpoints. Afterwards the folder must load (its
checksums are verified), and the next save must work and tidy up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.training import find_checkpoint, verify_checkpoint
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.groups import initialize_distributed
from tests.checkpoint.killed_saves import save_step


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start in milliseconds, because their parent has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.tiny", "tests.checkpoint.killed_saves"])
    return context


def save(
    processes: ForkServerContext, root: Path, step: int, kill_before: int | None = None
) -> int | None:
    """Save in a process of its own; the number of changes it made, or `None` if it was killed."""
    counts: Any = processes.SimpleQueue()
    process = processes.Process(target=save_step, args=(str(root), step, kill_before, counts))
    process.start()
    process.join(120)
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0
    return counts.get()


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext) -> Path:
    """Complete checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        assert save(processes, root, step)
    return root


@pytest.mark.parametrize("step", [3, 2], ids=["a_new_step", "the_latest_step_again"])
@pytest.mark.usefixtures("single_rank")
def test_a_save_killed_at_any_point_leaves_a_checkpoint_to_go_on_from(
    step: int, two_saved: Path, processes: ForkServerContext, tmp_path: Path
) -> None:
    initialize_distributed(ParallelConfig())
    changes = save(processes, shutil.copytree(two_saved, tmp_path / "count"), step)
    assert changes is not None and changes > 8
    roots = {
        kill_before: shutil.copytree(two_saved, tmp_path / str(kill_before))
        for kill_before in range(1, changes + 1)
    }
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda item: save(processes, item[1], step, item[0]), roots.items())
        assert set(ends) == {None}
    seen = set()
    for root in roots.values():
        folder = find_checkpoint(root)
        verify_checkpoint(folder)
        seen.add(manifest.latest_step(root))
        assert folder.name.split(".")[0] == f"iter_{manifest.latest_step(root):07d}"
        for known in manifest.complete_steps(root):
            verify_checkpoint(manifest.checkpoint_folder(root, known))
    assert seen == {2, step}


@pytest.mark.usefixtures("single_rank")
def test_the_save_after_a_killed_one_removes_what_it_left(
    two_saved: Path, processes: ForkServerContext, tmp_path: Path
) -> None:
    initialize_distributed(ParallelConfig())
    root = shutil.copytree(two_saved, tmp_path / "run")
    assert save(processes, root, 3, kill_before=3) is None
    assert manifest.partial_folder(root, 3).is_dir()
    assert save(processes, root, 4)
    assert manifest.complete_steps(root) == [2, 4]
    assert sorted(p.name for p in root.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
