"""Save and load a whole run: weights, optimizer state and position, at any layout.

megatron-core's `dist_checkpointing` writes every tensor under its global name and shape, so a
checkpoint loads at any other tp, pp, cp and dp, virtual stages included. Noise, data order and the
schedule are functions of the step, hence the step is all the rest there is to save.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.changes import comparable
from megatron_ext.checkpoint.identity import require_same, run_identity, weights_identity
from megatron_ext.checkpoint.pickles import read_metadata, untrusted
from megatron_ext.model.float8 import readable_state
from megatron_ext.parallel.cpu import enable_cpu
from megatron_ext.parallel.groups import device_of_rank
from megatron_ext.parallel.parameters import complete_parameters
from megatron_ext.parallel.versions import save_request

enable_cpu()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
_RESERVE_BYTES = 1 << 20
"""Room that rank 0 keeps for the small files it writes after the shards."""


class SaveFailed(Exception):
    """A checkpoint could not be written. Raised on every rank; earlier checkpoints are whole."""


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    skipped_steps: int = 0
    """Batches left out when a run went back to a checkpoint: step k reads batch k + skipped."""


def _state(
    model: list[torch.nn.Module],
    optimizer: Any,
    position: Position,
    *,
    is_loading: bool,
    memory: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The sharded state dict; `optimizer` may be absent (weights only)."""
    chunks = unwrap_model(model)
    metadata = {**_SHARDING, "dp_cp_group": chunks[0].groups.dp_cp}
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }
    if optimizer is not None:
        # Nested: chunks count their layers from 0 in these dictionaries.
        weights = {name: state[name] for name in names}
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        )
    state["position"] = asdict(position)
    config, schedule = chunks[0].settings, chunks[0].schedule
    state["config"] = comparable(config)
    state["memory"] = memory or {}
    state["weights_identity"] = weights_identity(config, schedule)
    state["run_identity"] = None if optimizer is None else run_identity(config)
    return state


class CheckpointWriter:
    """Writes checkpoints of one run below `root`, in the foreground or in the background.

    All ranks call every method together. A background write is finished by `poll` between steps,
    or by `finish`; `latest` moves only then.
    """

    def __init__(self, root: str | Path, *, async_save: bool = False, keep_last: int = 0) -> None:
        self.root, self.keep_last = Path(root), keep_last
        self.queue = AsyncCallsQueue() if async_save else None
        self.device, self.step = device_of_rank(), -1
        self.published = 0
        """Checkpoints completed by this writer."""

    def save(
        self,
        model: list[torch.nn.Module],
        optimizer: Any,
        position: Position,
        memory: dict[str, Any] | None = None,
    ) -> None:
        """Write the checkpoint of `position.step`; replaces one of the same step.

        `memory` are plain values, same on all ranks, that the run wants back (`read_memory`).
        Raises `SaveFailed` on every rank, with nothing left of the attempt, where a rank could not
        write its part: a full disk, a folder that cannot be written.
        """
        self.finish()
        complete_parameters(model)
        step = position.step
        folder = manifest.partial_folder(self.root, step)
        state = _state(model, optimizer, position, is_loading=False, memory=memory)
        request: list[Any] = []
        self._attempt(step, lambda: self._begin(step))
        self._attempt(step, lambda: request.append(save_request(state, folder)))
        (write,) = request
        write.finalize_fns.insert(0, self._release)
        write.add_finalize_fn(lambda: self._complete(step))
        self.step = step
        if self.queue is None:
            self._finalize(write.execute_sync)
        else:
            self.queue.schedule_async_request(write)

    def poll(self) -> None:
        """Complete a background write if every rank has finished its part."""
        if self.queue is not None:
            queue = self.queue
            self._finalize(lambda: queue.maybe_finalize_async_calls(blocking=False))

    def finish(self) -> None:
        """Wait for a background write and complete it."""
        if self.queue is not None:
            queue = self.queue
            self._finalize(lambda: queue.maybe_finalize_async_calls(blocking=True))

    def _begin(self, step: int) -> None:
        """An empty folder, made by rank 0, and room for what it writes beside the shards.

        The engine tells all ranks of a shard that could not be written, but not of the files that
        rank 0 alone writes before and after: for each of these occasions a share of the room.
        """
        if torch.distributed.get_rank() != 0:
            return
        manifest.begin(self.root, step)
        room = max(_RESERVE_BYTES, 2 * manifest.size_without_shards(self.root))
        with (self.root / manifest.RESERVE).open("wb") as file:
            file.write(bytes(2 * room))
            file.flush()
            os.fsync(file.fileno())
            file.truncate(room)

    def _release(self) -> None:
        if torch.distributed.get_rank() == 0:
            (self.root / manifest.RESERVE).unlink(missing_ok=True)

    def _finalize(self, work: Callable[[], Any]) -> None:
        """The engine's completion of a write, which raises on all ranks if it does on one."""
        try:
            work()
        except CheckpointException as error:
            self._fail(self.step, error)

    def _complete(self, step: int) -> None:
        """Read every file back for its checksum, each rank its share, then publish."""
        torch.distributed.barrier()
        folder = manifest.partial_folder(self.root, step)
        described: dict[str, dict[str, int | str]] = {}

        def describe() -> None:
            mine = _share([str(p.relative_to(folder)) for p in manifest.payload_files(folder)])
            described.update(manifest.describe_files(folder, mine))

        def publish() -> None:
            if torch.distributed.get_rank() == 0:
                files = {name: facts for share in shares for name, facts in share.items()}
                manifest.publish(self.root, step, dict(sorted(files.items())))
                manifest.remove_old(self.root, self.keep_last)

        self._attempt(step, describe)
        shares: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(shares, described)
        self._attempt(step, publish)
        self.published += 1

    def _attempt(self, step: int, work: Callable[[], Any]) -> None:
        """This rank's part of a save; where one rank's fails the save fails on all."""
        failure: Exception | CheckpointException | None = None
        try:
            work()
        except (OSError, RuntimeError) as error:
            failure = error
        failed = torch.tensor([failure is not None], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(failed)
        if failed.item():
            self._fail(step, failure)

    def _fail(self, step: int, error: BaseException | None) -> None:
        """Gather what went wrong, remove what was written, raise. A collective."""
        mine = _failures(error)
        shares: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(shares, mine)
        if torch.distributed.get_rank() == 0:
            manifest.discard(self.root, step)
            self._release()
        torch.distributed.barrier()
        said = list(dict.fromkeys(line for share in shares for line in share))
        raise SaveFailed(
            f"the checkpoint of step {step} could not be written to {self.root}: {'; '.join(said)}"
        )


def _failures(error: BaseException | None) -> list[str]:
    """One line for each rank whose part failed, as far as this rank knows."""
    if error is None:
        return []
    if isinstance(error, CheckpointException):
        found = {rank: cause for rank, (cause, _) in error.failures.items()}
    else:
        found = {torch.distributed.get_rank(): error}
    return [f"rank {rank}: {cause}" for rank, cause in found.items()]


def _share(names: list[str]) -> list[str]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return sorted(names)[rank::size]


def has_checkpoint(root: str | Path) -> bool:
    """Whether any complete checkpoint was saved below `root`."""
    return manifest.latest_step(Path(root)) is not None


def find_checkpoint(root: str | Path, step: int | None = None) -> Path:
    """The folder of `step`, or of the latest complete checkpoint below `root`.

    Raises `ValueError` naming the flag where there is none.
    """
    root = Path(root)
    wanted = manifest.latest_step(root) if step is None else step
    if wanted is None:
        raise ValueError(f"--load is {str(root)!r}: there is no complete checkpoint in it.")
    folder = manifest.complete_folder(root, wanted)
    if folder is None:
        known = ", ".join(map(str, manifest.complete_steps(root))) or "none"
        asks = f"--load is {str(root)!r} and its latest" if step is None else "--ckpt-step"
        raise ValueError(
            f"{asks} is {wanted}: {root} has no such checkpoint; complete steps: {known}."
        )
    return folder


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files, each rank checking its share; same on all ranks."""
    mine: list[str] = []
    try:
        expected = manifest.read_manifest(folder)
        share = {name: expected[name] for name in _share(list(expected))}
        mine += manifest.damaged_files(folder, share)
        if torch.distributed.get_rank() == 0 and not mine:
            read_metadata(folder)
    except (OSError, ValueError) as error:
        mine.append(str(error).removeprefix("--load: "))
    found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, mine)
    return list(dict.fromkeys(problem for share in found for problem in share))


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest, each rank its share; all ranks raise together."""
    problems = damage(folder)
    if problems:
        raise ValueError(
            f"--load: checkpoint {folder} is damaged: {'; '.join(problems)}. "
            "Load an earlier one with --ckpt-step."
        )


def newest_intact(root: Path, *, set_aside: bool) -> tuple[Path, list[str]]:
    """The newest checkpoint below `root` without damage, and a line for each that was passed over.

    With `set_aside` the damaged ones are renamed, so that they no longer count as checkpoints. A
    collective. Raises `ValueError` where every checkpoint is damaged.
    """
    known = [(manifest.latest_step(root), manifest.steps_to_try(root))]
    torch.distributed.broadcast_object_list(known, src=0)
    latest, steps = known[0]
    passed_over = []
    if latest is not None and latest not in steps:
        passed_over.append(f"there is no checkpoint of step {latest}, the latest")
    for step in steps:
        folder = manifest.complete_folder(root, step)
        assert folder is not None, f"{root}: the checkpoint of step {step} is not on every node"
        problems = damage(folder)
        if not problems:
            return folder, passed_over
        line = f"checkpoint {folder} is damaged and passed over: {'; '.join(problems)}"
        if set_aside:
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                manifest.set_aside_damaged(root, step)
            torch.distributed.barrier()
            line += f" (renamed to iter_{step:07d}.damaged)"
        passed_over.append(line)
    reasons = "; ".join(passed_over) or "there is no complete checkpoint in it"
    raise ValueError(f"--load is {str(root)!r}: {reasons}.")


def read_memory(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration, memory) that a checkpoint was saved with; empty where it has none."""
    with untrusted(folder):
        common = dist_checkpointing.load_common_state_dict(str(folder))
    return common.get("config") or {}, common.get("memory") or {}


def load_checkpoint(
    folder: Path, model: list[torch.nn.Module], optimizer: Any | None, *, is_verified: bool = False
) -> Position:
    """Fill weights (and optimizer state unless it is absent) from `folder`, at this layout.

    Raises `ValueError` for a damaged checkpoint (unless `damage` has just been asked), and for one
    of another model or, where there is an optimizer to continue, of another kind of run.
    """
    if not is_verified:
        verify_checkpoint(folder)
    wanted = _state(model, optimizer, Position(0, 0, 0), is_loading=True)
    with untrusted(folder):
        saved = dist_checkpointing.load_common_state_dict(str(folder))
    require_same(saved["weights_identity"], wanted["weights_identity"], folder, "")
    if optimizer is not None:
        if saved["run_identity"] is None:
            raise ValueError(f"--load: {folder} holds weights only; give --finetune to use them.")
        hint = "; keep it to continue, or take the weights alone with --finetune"
        require_same(saved["run_identity"], wanted["run_identity"], folder, hint)
    with untrusted(folder):
        state = dist_checkpointing.load(wanted, str(folder))
    chunks = unwrap_model(model)
    for i, chunk in enumerate(chunks):
        values = state["model" if len(chunks) == 1 else f"model{i}"]
        chunk.load_state_dict(readable_state(values, chunk.settings.precision), strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return Position(**state["position"])
