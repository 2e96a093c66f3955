"""What a run reports: one writer for console, progress bar, metrics.jsonl, TensorBoard and wandb.

Tags are fixed (`train/loss`, `valid/elbo`, ...); units are nats per token unless the name says
otherwise. Only the rank that owns the log writes; on the others every method does nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_ext.config import Config
from megatron_ext.training.step import NUM_BINS, LossSums


def averages(sums: LossSums, prefix: str, config: Config) -> dict[str, float]:
    """Means per noised token, with the bound by log-SNR bin (named by its lower edge).

    NaN where there was no token, as after nothing but skipped steps.
    """
    count = sums.count.item() or math.nan
    values = {
        f"{prefix}/{name}": getattr(sums, name).item() / count
        for name in ("loss", "elbo", "kl", "is_div")
    }
    if config.diffusion.objective == "ar":
        return values
    low = config.diffusion.min_log_snr
    width = (config.diffusion.max_log_snr - low) / NUM_BINS
    for i in range(NUM_BINS):
        if sums.count_by_bin[i] > 0:
            mean = (sums.elbo_by_bin[i] / sums.count_by_bin[i]).item()
            values[f"{prefix}/elbo_by_log_snr/{low + i * width:+.0f}"] = mean
    return values


class MetricsLog:
    """Writes records of a run where this process is the one to do so."""

    def __init__(self, config: Config, *, is_writer: bool, first_step: int) -> None:
        self.is_writer, self.config = is_writer, config
        self.bar: tqdm | None = None
        self.jsonl = self.events = self.tensorboard = self.wandb = None
        self.has_complained = False
        if not is_writer:
            return
        if config.checkpoint.save is not None:
            root = Path(config.checkpoint.save)
            root.mkdir(parents=True, exist_ok=True)
            self.jsonl, self.events = _appended(root / "metrics.jsonl"), root / "events.jsonl"
        self._open_tensorboard(config)
        if config.logging.wandb_project is not None:
            self._open_wandb(config)
        if config.logging.progress_bar and sys.stderr.isatty():
            self.bar = tqdm(
                total=config.training.train_iters, initial=first_step, unit="step", smoothing=0.1
            )

    def _open_tensorboard(self, config: Config) -> None:
        folder = config.logging.tensorboard_dir
        if folder is None and config.checkpoint.save is not None:
            folder = str(Path(config.checkpoint.save) / "tensorboard")
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder)

    def _open_wandb(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"--wandb-project is {config.logging.wandb_project!r}: the wandb package is not "
                "installed; pip install wandb, or leave the flag out."
            ) from error
        self.wandb = wandb.init(project=config.logging.wandb_project, config=config.as_dict())

    def message(self, text: str) -> None:
        """One line on the console, above the progress bar."""
        if self.is_writer:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, loss: float) -> None:
        """Move the progress bar by one step."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update()

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write values of `step` (completed updates) everywhere but the console."""
        if not self.is_writer:
            return
        with self._tolerant():
            if self.jsonl is not None:
                line = {"step": step, "time": round(time.time(), 3), **values}
                self.jsonl.write(json.dumps(line, allow_nan=True) + "\n")
        with self._tolerant():
            self._record_for_tensorboard(step, values)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def _record_for_tensorboard(self, step: int, values: Mapping[str, Any]) -> None:
        if self.tensorboard is None:
            self._open_tensorboard(self.config)
        writer, self.tensorboard = self.tensorboard, None
        if writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)
        # One that raised is not used again: it says the same for ever.
        self.tensorboard = writer

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Something out of the ordinary, as a line of events.jsonl."""
        if self.is_writer and self.events is not None:
            line = {"event": kind, "step": step, "time": round(time.time(), 3), **values}
            with self._tolerant(), _appended(self.events) as file:
                file.write(json.dumps(line, allow_nan=True) + "\n")

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A full disk costs records, not the run."""
        try:
            yield
            self.has_complained = False
        except OSError as error:
            if not self.has_complained:
                self.message(f"metrics are not written: {error}")
            self.has_complained = True

    def close(self) -> None:
        for sink in (self.bar, self.jsonl, self.tensorboard):
            if sink is not None:
                with self._tolerant():
                    sink.close()
        if self.wandb is not None:
            self.wandb.finish()


def _appended(path: Path) -> TextIO:
    """The file opened to append whole lines, though a killed run may have left half of one."""
    file = path.open("a+b")
    is_cut = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) and file.read() != b"\n"
    text = TextIOWrapper(file, line_buffering=True)
    if is_cut:
        text.write("\n")
    return text
