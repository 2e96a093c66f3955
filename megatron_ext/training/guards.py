"""When a run stops before its last step, and with which exit code.

    0   all steps done
    85  stopped on request, checkpoint saved: SIGTERM or SIGUSR1, --exit-duration-in-mins,
        --exit-interval; start the same command with --load to go on
    86  --max-consecutive-bad-steps non-finite losses or gradients in a row; the last good
        weights are saved

torchrun reports any code other than 0 of a worker as its own exit code 1 and prints the worker's.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from megatron_ext.config import TrainingConfig

EXIT_DONE = 0
EXIT_RESUME = 85
EXIT_DIVERGED = 86


class StopGuard:
    """Collects reasons to stop; all ranks come to the same decision at the end of a step."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.started = time.monotonic()
        self.signal_name: str | None = None
        self.bad_steps = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = signal.Signals(number).name

    def record(self, *, applied: bool) -> None:
        """Count non-finite steps in a row."""
        self.bad_steps = 0 if applied else self.bad_steps + 1

    def decide(self, completed_steps: int) -> tuple[int, str] | None:
        """(exit code, reason) if the run must stop after this step. A collective: 8 bytes."""
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
            4: (EXIT_DIVERGED, f"{self.bad_steps} non-finite steps in a row"),
        }[int(flag.item())]
