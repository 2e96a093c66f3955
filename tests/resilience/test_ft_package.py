"""--enable-ft-package with nvidia-resiliency-ext's own monitor, where the package is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.resilience import program
from tests.resilience.program import FLAGS, MOCK, run_program

IS_INSTALLED = importlib.util.find_spec("nvidia_resiliency_ext") is not None
FLAG = ["--save-interval", "0", "--hang-timeout-minutes", "0", "--enable-ft-package"]


def monitored(rank: int, struck: int, folder: str) -> None:
    """What ft_launcher does for a rank: a monitor process behind a socket; then one rank hangs."""
    from nvidia_resiliency_ext.fault_tolerance import FaultToleranceConfig, RankMonitorServer

    config = FaultToleranceConfig(
        workload_check_interval=0.5, initial_rank_heartbeat_timeout=60.0,
        rank_heartbeat_timeout=7.0, enable_nic_monitor=False,
    )  # fmt: skip
    socket = f"{folder}/{rank}.sock"
    RankMonitorServer.run_in_subprocess(config, socket)
    os.environ["FT_RANK_MONITOR_IPC_SOCKET"] = socket
    program.hang(rank, struck, holds_the_interpreter=True)


@pytest.mark.skipif(not IS_INSTALLED, reason="nvidia-resiliency-ext is not installed")
def test_a_rank_without_heartbeats_is_ended_by_the_monitor(tmp_path: Path) -> None:
    ended = run_program(tmp_path / "logs", [*FLAGS, *MOCK, *FLAG], monitored, 1, str(tmp_path))
    assert ended.codes[1] == -9, ended.output
    assert ended.codes[0] not in (0, None)


@pytest.mark.skipif(IS_INSTALLED, reason="nvidia-resiliency-ext is installed")
def test_the_flag_is_refused_without_the_package(tmp_path: Path) -> None:
    ended = run_program(tmp_path / "logs", [*FLAGS, *MOCK, *FLAG], world_size=1)
    assert ended.codes == [2]
    assert "--enable-ft-package is True: nvidia-resiliency-ext is not installed" in ended.output[0]
