"""What a run changed since the checkpoint that it continues, and whether it may.

Three kinds of change. Another model or optimizer is always refused (`identity`). Another objective,
noise, seed, or other data would go on without an error with another experiment: refused unless
named by `--accept-changes`. All else (layout, learning rate, length, logging) is said and done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_ext.config import Config, flag

_DECISIVE_SECTIONS = ("diffusion", "noise")
_DECISIVE_FIELDS = (
    "seed", "split", "reset_attention_mask", "drop_aligned_eos",
    "pad_token_id",
)  # fmt: skip
_NOT_KEPT = ("checkpoint", "logging")
_NOT_COMPARED = ("data_path", "valid_data_path", "test_data_path", "tokenizer_model")
"""Fields that tell where things are; what is in the data files is compared instead."""


def comparable(config: Config) -> dict[str, dict[str, Any]]:
    """The sections that a checkpoint keeps, to be compared when a run continues from it."""
    return {name: tree for name, tree in config.as_dict().items() if name not in _NOT_KEPT}


class Change(NamedTuple):
    """A field whose value is not the checkpoint's."""

    name: str
    before: Any
    now: Any
    is_decisive: bool

    def __str__(self) -> str:
        return f"{flag(self.name)} {_shown(self.before)} -> {_shown(self.now)}"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "nothing"
    return str(value)


def config_changes(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> list[Change]:
    """Fields that both configurations have with different values, in the order of `now`."""
    changes = []
    for section, fields in now.items():
        known = before.get(section, {})
        for name, value in fields.items():
            if name in _NOT_COMPARED or name not in known or known[name] == value:
                continue
            is_decisive = section in _DECISIVE_SECTIONS or name in _DECISIVE_FIELDS
            changes.append(Change(name, known[name], value, is_decisive))
    return changes


def data_changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """What differs between the training data of a checkpoint and a run's; empty where nothing."""
    if len(before) != len(now):
        return f"{len(before)} files then, {len(now)} now"
    for number, (old, new) in enumerate(zip(before, now, strict=True), start=1):
        different = [name for name in new if name != "prefix" and old.get(name) != new[name]]
        if different:
            facts = ", ".join(
                f"other {name}"
                if name == "fingerprint"
                else f"{name} {old.get(name)} -> {new[name]}"
                for name in different
            )
            return f"file {number}, {new['prefix']} (then {old['prefix']}): {facts}"
    return ""


def require_accepted(changes: Sequence[Change], data: str, accepted: Sequence[str]) -> None:
    """Raise `ValueError` naming every decisive change that is not in `accepted`."""
    refused = [str(change) for change in changes if change.is_decisive]
    names = [change.name for change in changes if change.is_decisive]
    if data:
        refused.append(f"--data-path: {data}")
        names.append("data_path")
    known = {name.replace("-", "_").lstrip("_") for name in accepted}
    open_ = [line for line, name in zip(refused, names, strict=True) if name not in known]
    if open_:
        missing = " ".join(name.replace("_", "-") for name in names if name not in known)
        raise ValueError(
            f"--load: the run is not the one of the checkpoint: {'; '.join(open_)}. Undo that, "
            f"give --accept-changes {missing} to go on with it, or --finetune to start a new run "
            "from the weights."
        )
