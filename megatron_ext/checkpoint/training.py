"""Save and load a whole run: weights, optimizer state and position, at any layout.

megatron-core's `dist_checkpointing` writes every tensor under its global name and shape, so a
checkpoint loads at any other tp, pp, cp and dp, virtual stages included. Noise, data order and the
schedule are functions of the step, hence the step is all the rest there is to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.identity import require_same, run_identity, weights_identity
from megatron_ext.parallel.cpu import enable_cpu
from megatron_ext.parallel.parameters import complete_parameters

enable_cpu()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int
    consumed_samples: int
    consumed_tokens: int


def _state(
    model: list[torch.nn.Module], optimizer: Any, position: Position, *, is_loading: bool
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
    state["position"] = {
        "step": position.step,
        "consumed_samples": position.consumed_samples,
        "consumed_tokens": position.consumed_tokens,
    }
    config, schedule = chunks[0].settings, chunks[0].schedule
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
        if torch.distributed.get_rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)

    def save(self, model: list[torch.nn.Module], optimizer: Any, position: Position) -> None:
        """Write the checkpoint of `position.step`; replaces one of the same step."""
        self.finish()
        complete_parameters(model)
        folder = manifest.partial_folder(self.root, position.step)
        if torch.distributed.get_rank() == 0:
            manifest.begin(self.root, position.step)
        torch.distributed.barrier()
        request = dist_checkpointing.save(
            _state(model, optimizer, position, is_loading=False),
            str(folder),
            async_sharded_save=self.queue is not None,
            validate_access_integrity=True,
        )
        if self.queue is None:
            self._complete(position.step)
        else:
            request.add_finalize_fn(lambda: self._complete(position.step))
            self.queue.schedule_async_request(request)

    def poll(self) -> None:
        """Complete a background write if every rank has finished its part."""
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background write and complete it."""
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=True)

    def _complete(self, step: int) -> None:
        """Read every file back for its checksum, each rank its share, then publish."""
        torch.distributed.barrier()
        folder = manifest.partial_folder(self.root, step)
        shares = [None] * torch.distributed.get_world_size()
        mine = _share([str(p.relative_to(folder)) for p in manifest.payload_files(folder)])
        torch.distributed.all_gather_object(shares, manifest.describe_files(folder, mine))
        if torch.distributed.get_rank() == 0:
            files = {name: facts for share in shares for name, facts in (share or {}).items()}
            manifest.publish(self.root, step, dict(sorted(files.items())))
            manifest.remove_old(self.root, self.keep_last)
        torch.distributed.barrier()


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


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest, each rank its share; all ranks raise together."""
    expected = manifest.read_manifest(folder)
    mine = {name: expected[name] for name in _share(list(expected))}
    found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, manifest.damaged_files(folder, mine))
    problems = [problem for share in found for problem in share]
    if problems:
        raise ValueError(
            f"--load: checkpoint {folder} is damaged: {'; '.join(problems)}. "
            "Load an earlier one with --ckpt-step."
        )


def load_checkpoint(folder: Path, model: list[torch.nn.Module], optimizer: Any | None) -> Position:
    """Fill weights (and optimizer state unless it is absent) from `folder`, at this layout.

    Raises `ValueError` for a damaged checkpoint, and for one of another model or, where there is
    an optimizer to continue, of another kind of run.
    """
    verify_checkpoint(folder)
    wanted = _state(model, optimizer, Position(0, 0, 0), is_loading=True)
    saved = dist_checkpointing.load_common_state_dict(str(folder))
    require_same(saved["weights_identity"], wanted["weights_identity"], folder, "")
    if optimizer is not None:
        if saved["run_identity"] is None:
            raise ValueError(f"--load: {folder} holds weights only; give --finetune to use them.")
        hint = "; keep it to continue, or take the weights alone with --finetune"
        require_same(saved["run_identity"], wanted["run_identity"], folder, hint)
    state = dist_checkpointing.load(wanted, str(folder))
    chunks = unwrap_model(model)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{i}"], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return Position(**state["position"])
