"""Complete or absent: how a checkpoint folder becomes visible, and how damage is found.

    <save>/latest                 step of the newest complete checkpoint
    <save>/iter_0000100/          a complete checkpoint; manifest.json lists every file
    <save>/iter_0000100.partial/  one that is being written, or that a killed run left behind
    <save>/iter_0000100.replaced/ one that is being deleted
    <save>/iter_0000100.damaged/  one that was found damaged; the run went on from an earlier one

A checkpoint is written under its `.partial` name, read back once for checksums, given its manifest,
renamed, and only then named by `latest`. A reader never sees half of one, whenever a run is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
LATEST = "latest"
RESERVE = ".reserve"
"""Room kept free while a checkpoint is written; gone when it is complete."""


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"iter_{step:07d}"


def partial_folder(root: Path, step: int) -> Path:
    return root / f"iter_{step:07d}.partial"


def replaced_folder(root: Path, step: int) -> Path:
    return root / f"iter_{step:07d}.replaced"


def complete_folder(root: Path, step: int) -> Path | None:
    """The folder with the complete checkpoint of `step`, `None` where there is none.

    A run killed between the two renames of `publish` leaves it under its `.partial` name.
    """
    for folder in (checkpoint_folder(root, step), partial_folder(root, step)):
        if (folder / MANIFEST).is_file():
            return folder
    return None


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(
        int(path.parent.name.removeprefix("iter_"))
        for path in root.glob(f"iter_*/{MANIFEST}")
        if path.parent.name.removeprefix("iter_").isdigit()
    )


def latest_step(root: Path) -> int | None:
    """The step that `latest` names, or `None` where nothing was saved.

    Where `latest` is missing or unreadable, the newest complete checkpoint stands in for it.
    """
    with contextlib.suppress(OSError, ValueError):
        return int((root / LATEST).read_text())
    return max(complete_steps(root), default=None)


def steps_to_try(root: Path) -> list[int]:
    """Complete checkpoints to go on from, best first: the latest and those before it."""
    latest = latest_step(root)
    if latest is None:
        return []
    earlier = [step for step in complete_steps(root) if step < latest]
    return ([latest] if complete_folder(root, latest) else []) + earlier[::-1]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`, durable before it becomes visible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def payload_files(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, in a fixed order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def size_without_shards(root: Path) -> int:
    """Bytes of the newest checkpoint's files that are not shards; 0 where there is none."""
    for step in complete_steps(root)[-1:]:
        files = checkpoint_folder(root, step).iterdir()
        return sum(path.stat().st_size for path in files if path.suffix != ".distcp")
    return 0


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of the named files."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        for name in names
    }


def begin(root: Path, step: int) -> Path:
    """An empty partial folder for the checkpoint of `step`."""
    partial, final = partial_folder(root, step), checkpoint_folder(root, step)
    if (partial / MANIFEST).is_file() and not final.exists():
        os.rename(partial, final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(root: Path, step: int, files: dict[str, dict[str, int | str]]) -> None:
    """Turn the partial folder of `step` into a checkpoint and point `latest` at it."""
    partial, final = partial_folder(root, step), checkpoint_folder(root, step)
    for name in files:
        _fsync(partial / name)
    write_atomically(partial / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
    if final.exists():
        _set_aside(root, step)
    os.rename(partial, final)
    _fsync(root)
    write_atomically(root / LATEST, f"{step}\n")


def discard(root: Path, step: int) -> None:
    """Remove what a failed save left, as far as that is possible."""
    shutil.rmtree(partial_folder(root, step), ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of a checkpoint's files by name; `ValueError` where it is not readable."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"--load: {folder} is not a complete checkpoint: it has no {MANIFEST}.")
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name: {"bytes": facts["bytes"], "sha256": facts["sha256"]}
                for name, facts in files.items()}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--load: {path} is damaged: {error}.") from error


def damaged_files(folder: Path, expected: dict[str, dict[str, int | str]]) -> list[str]:
    """What is wrong with the files listed in `expected`, one line each; empty when all is well."""
    problems = []
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}")
        elif file_digest(path) != facts["sha256"]:
            problems.append(f"{name} does not match its checksum")
    return problems


def _set_aside(root: Path, step: int) -> None:
    """Take a checkpoint away under the name of one that is to be deleted."""
    replaced = replaced_folder(root, step)
    shutil.rmtree(replaced, ignore_errors=True)
    os.rename(checkpoint_folder(root, step), replaced)


def set_aside_damaged(root: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that it no longer counts as one; returns its name."""
    damaged = root / f"iter_{step:07d}.damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    folder = complete_folder(root, step)
    if folder is not None:
        os.rename(folder, damaged)
    return damaged


def remove_old(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints (0 keeps all) and what killed runs left.

    For the run that writes to `root`, right after it published: nothing else is being written.
    """
    newest = latest_step(root)
    for step in complete_steps(root)[:-keep_last] if keep_last else []:
        if step != newest:
            _set_aside(root, step)
    for folder in root.glob("iter_*"):
        if folder.suffix in (".partial", ".replaced"):
            shutil.rmtree(folder)
