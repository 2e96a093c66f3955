"""When a run stops before its last step, and with which exit code.

    0   all steps done
    2   configuration, data, checkpoint or folder refused; one line says why
    85  stopped on request, checkpoint saved: SIGTERM or SIGUSR1, --exit-duration-in-mins,
        --exit-interval; start the same command with --load to go on
    86  diverged: --max-consecutive-bad-steps in a row without an update, or a loss spike after
        --max-rollbacks; the last good weights are saved
    87  hung: no progress for --hang-timeout-minutes; every rank printed its stacks
    88  --max-failed-saves checkpoints in a row, or the last one, could not be written

torchrun reports any code other than 0 of a worker as its own exit code 1, prints the worker's, and
starts the workers again while --max-restarts allows. A stop on request and a divergence must not be
started again on the spot, so under --max-restarts these two end with 0. What happened is in
`<save>/exit.json` in any case, for scripts that decide about a requeue.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch

from megatron_ext.config import TrainingConfig

EXIT_DONE = 0
EXIT_RESUME = 85
EXIT_DIVERGED = 86
EXIT_HUNG = 87
EXIT_NOT_SAVED = 88

Stop = tuple[int, str]
"""Exit code and reason."""


def write_exit(save: str | None, code: int, reason: str, step: int) -> None:
    """Leave `exit.json` in the run's folder; for one rank, at the end of the run."""
    if save is not None:
        text = json.dumps({"code": code, "reason": reason, "step": step, "time": time.time()})
        with contextlib.suppress(OSError):
            (Path(save) / "exit.json").write_text(text + "\n")


def forget_exit(save: str | None) -> None:
    """Remove what an earlier start of the run left: a killed run leaves no exit.json."""
    if save is not None:
        (Path(save) / "exit.json").unlink(missing_ok=True)


def process_code(code: int) -> int:
    """The code to end this process with: 0 where torchrun would start it again for nothing."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return EXIT_DONE if restarts and code in (EXIT_RESUME, EXIT_DIVERGED) else code


class StopGuard:
    """Collects reasons to stop; all ranks come to the same decision at the end of a step."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.started = time.monotonic()
        self.signal_name: str | None = None
        self.bad_steps = 0
        self.stop: Stop | None = None
        """A reason that all ranks know already; it comes first."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = signal.Signals(number).name

    def record(self, *, applied: bool) -> None:
        """Count steps without an update in a row."""
        self.bad_steps = 0 if applied else self.bad_steps + 1

    def decide(self, completed_steps: int) -> Stop | None:
        """(exit code, reason) if the run must stop after this step. A collective: 8 bytes."""
        if self.stop is not None:
            return self.stop
        local = 0
        limit = self.config.exit_duration_in_mins
        if limit is not None and time.monotonic() - self.started > 60 * limit:
            local = 1
        if self.signal_name is not None:
            local = 2
        interval, is_last = self.config.exit_interval, completed_steps >= self.config.train_iters
        if interval and completed_steps % interval == 0 and not is_last:
            local = 3
        if self.bad_steps >= self.config.max_consecutive_bad_steps:
            local = 4
        flag = torch.tensor([local], device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return {
            0: None,
            1: (EXIT_RESUME, f"--exit-duration-in-mins {limit} is over"),
            2: (EXIT_RESUME, f"received {self.signal_name or 'a signal on another rank'}"),
            3: (EXIT_RESUME, f"--exit-interval {self.config.exit_interval}"),
            4: (EXIT_DIVERGED, f"{self.bad_steps} steps in a row without an update"),
        }[int(flag.item())]
