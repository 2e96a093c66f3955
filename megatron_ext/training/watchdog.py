"""A rank that stops making progress says where it is and ends, and so does every rank that waits.

One rank that hangs (a dead file system, a lost network, a deadlock) leaves all others waiting in a
collective. Each rank counts for itself the time since it last got ahead; when that is over, a
thread writes the stacks of all threads to stderr, lets the other ranks do the same, and ends the
process with a code that a supervisor can restart. A thread that needs the interpreter is no help
against a call that holds it, so faulthandler's, which does not, stands behind it and ends the
process with code 1.

SIGUSR2 prints the stacks of a rank without ending it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from types import TracebackType

from megatron_ext.config import Config, require
from megatron_ext.training.guards import EXIT_HUNG

_SHARE_OF_COLLECTIVE_TIMEOUT = 0.9
_HEARTBEAT_SECONDS = 5.0


def timeout_seconds(config: Config) -> float:
    """How long a rank may make no progress; 0 for ever."""
    minutes = config.resilience.hang_timeout_minutes
    if minutes is None:
        minutes = _SHARE_OF_COLLECTIVE_TIMEOUT * config.parallel.distributed_timeout_minutes
    return 60 * minutes


class Watchdog:
    """Watches over this process between `__enter__` and `__exit__`; `beat` is progress."""

    def __init__(self, config: Config) -> None:
        self.timeout = timeout_seconds(config)
        self.grace = min(10.0, self.timeout / 2)
        self.rank = os.environ.get("RANK", "0")
        self.doing, self.since = "start-up", time.monotonic()
        self.heartbeats = _Heartbeats() if config.resilience.enable_ft_package else None
        self.is_over = threading.Event()

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.beat("start-up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_over.set()
        faulthandler.cancel_dump_traceback_later()
        if self.heartbeats is not None:
            self.heartbeats.close()

    def beat(self, doing: str) -> None:
        """This rank got ahead and goes on with `doing`."""
        self.doing, self.since = doing, time.monotonic()
        if self.timeout:
            faulthandler.dump_traceback_later(self.timeout + 2 * self.grace, exit=True)
        if self.heartbeats is not None:
            self.heartbeats.send()

    def _watch(self) -> None:
        while True:
            left = self.since + self.timeout - time.monotonic()
            if left <= 0:
                break
            if self.is_over.wait(left):
                return
        os.write(2, self._report().encode())
        time.sleep(self.grace)
        os._exit(EXIT_HUNG)

    def _report(self) -> str:
        lines = [
            f"no progress for {time.monotonic() - self.since:.0f} s in {self.doing}; "
            f"stacks of all threads, then exit code {EXIT_HUNG}"
        ]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines.append(f"thread {names.get(ident, ident)}:")
                lines += "".join(traceback.format_stack(frame)).rstrip().split("\n")
        return "".join(f"[rank {self.rank}] {line}\n" for line in lines)


class _Heartbeats:
    """nvidia-resiliency-ext's heartbeats to the ft_launcher that started this process."""

    def __init__(self) -> None:
        try:
            from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
        except ImportError as error:
            raise ValueError(
                "--enable-ft-package is True: nvidia-resiliency-ext is not installed; pip install "
                "it, or leave the flag out."
            ) from error
        require(
            "FT_RANK_MONITOR_IPC_SOCKET" in os.environ, "enable_ft_package", True,
            "this process was not started by ft_launcher; start it so, or leave the flag out.",
        )  # fmt: skip
        self.client = RankMonitorClient()
        self.client.init_workload_monitoring()
        self.sent = 0.0

    def send(self) -> None:
        if time.monotonic() - self.sent > _HEARTBEAT_SECONDS:
            self.client.send_heartbeat()
            self.sent = time.monotonic()

    def close(self) -> None:
        self.client.shutdown_workload_monitoring()
