"""Checkpoints: GB/s of saving and loading a run against the disk's own rate.

    python -m megatron_ext.training.bench_checkpoint [--quick] [--folder FOLDER] [--json FILE]

`write` puts the checkpoint's bytes into one file and waits for the disk (fsync); `save` is what a
run does: megatron-core's sharded format, every file read back for its checksum, made durable, then
published. `asynchronous save` is the time for which training stands still. `read` and `load` start
with the files out of the page cache; `load` compares all checksums first. Weights and optimizer
state, one rank.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.training import (
    CheckpointWriter,
    Position,
    find_checkpoint,
    load_checkpoint,
)
from megatron_ext.measure import Column, Report, Table, Timing, alternate, bench_parser
from megatron_ext.presets import MODEL_PRESETS
from megatron_ext.training.bench import QUICK_MODEL, run_config
from megatron_ext.training.loop import Trainer

BLOCK = 1 << 24
COLUMNS = [
    Column("way", "way"),
    Column("median_s", "s", ".3g"),
    Column("lower_quartile_s", "lower quartile", ".3g"),
    Column("upper_quartile_s", "upper quartile", ".3g"),
    Column("gb_per_s", "GB/s", ".2f"),
    Column("times_disk", "time / disk", ".2f"),
]


def write_plainly(path: Path, num_bytes: int) -> None:
    """Write so many bytes that no disk can compress, and wait until they are there."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for start in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def read_plainly(paths: list[Path]) -> int:
    """Bytes of all files, each read through once."""
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                total += len(block)
    return total


def drop_from_cache(paths: list[Path]) -> None:
    """Ask the kernel to forget the files' pages, once they are on the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Saves:
    """Checkpoints of one trainer in folders below `root`."""

    def __init__(self, trainer: Trainer, root: Path) -> None:
        self.trainer, self.root = trainer, root
        self.pending: CheckpointWriter | None = None

    def save(self, name: str) -> None:
        trainer = self.trainer
        CheckpointWriter(self.root / name).save(trainer.model, trainer.optimizer, Position(1, 0, 0))

    def begin(self, name: str) -> None:
        """Start an asynchronous save, which `wait` completes."""
        self.pending = CheckpointWriter(self.root / name, async_save=True)
        self.pending.save(self.trainer.model, self.trainer.optimizer, Position(1, 0, 0))

    def wait(self) -> None:
        assert self.pending is not None, "no save was begun"
        self.pending.finish()

    def load(self, name: str) -> None:
        folder = find_checkpoint(self.root / name)
        load_checkpoint(folder, self.trainer.model, self.trainer.optimizer)

    def files(self, name: str) -> list[Path]:
        return [path for path in sorted((self.root / name).rglob("*")) if path.is_file()]

    def remove(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)


def measure(trainer: Trainer, root: Path, repetitions: int) -> tuple[int, dict[str, Timing]]:
    """Bytes of a checkpoint, and the times of everything."""
    saves = Saves(trainer, root)
    saves.save("kept")
    files = saves.files("kept")
    num_bytes = sum(path.stat().st_size for path in files)
    plain = root / "plain"

    def finish_background() -> None:
        saves.wait()
        saves.remove("background")

    times = alternate(
        {
            "write": lambda: write_plainly(plain, num_bytes),
            "save": lambda: saves.save("again"),
            "asynchronous save": lambda: saves.begin("background"),
            "read": lambda: read_plainly(files),
            "load": lambda: saves.load("kept"),
        },
        repetitions,
        warmup=0,
        before={"read": lambda: drop_from_cache(files), "load": lambda: drop_from_cache(files)},
        after={
            "write": plain.unlink,
            "save": lambda: saves.remove("again"),
            "asynchronous save": finish_background,
        },
    )
    return num_bytes, times


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--folder", help="where to write; the system's temporary folder if absent")
    parser.add_argument("--model", default="gidd-85m")
    parser.add_argument("--vocab-size", type=int, default=131072)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.vocab_size = 512
    case: dict[str, Any] = {
        "shape": QUICK_MODEL if arguments.quick else MODEL_PRESETS[arguments.model],
        "vocab_size": arguments.vocab_size, "precision": "bf16", "sequences": 2,
    }  # fmt: skip
    trainer = Trainer.build(run_config(case))
    trainer.train_step(trainer.source.step(0))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        num_bytes, times = measure(trainer, Path(root), 1 if arguments.quick else 5)
    disk = {"read": times["read"], "load": times["read"]}
    rows = [
        {
            "way": way,
            **timing.summary(),
            "gb_per_s": num_bytes / 1e9 / timing.median,
            "times_disk": timing.relative_to(disk.get(way, times["write"])),
        }
        for way, timing in times.items()
    ]
    title = f"Checkpoint of {num_bytes / 1e9:.2f} GB (BF16 with FP32 masters and optimizer state)"
    Report("checkpoint", vars(arguments), [Table(title, COLUMNS, rows)]).finish(arguments.json)


if __name__ == "__main__":
    main()
