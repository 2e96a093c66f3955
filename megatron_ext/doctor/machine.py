"""The machine: GPUs, limits, shared memory, and variables that slow runs down or hang them."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Callable

from megatron_ext.doctor.finding import Finding, Level
from megatron_ext.doctor.packages import imported, installed

GIB = 1 << 30
SMALLEST_SHARED_MEMORY = GIB
FEWEST_OPEN_FILES = 4096

_HARMFUL: dict[str, tuple[tuple[str, ...], Level, str, str]] = {
    # name: (values, level, what they do, remedy)
    "NCCL_P2P_DISABLE": (("1",), "warning", "GPUs of a node talk through memory", "unset it"),
    "NCCL_IB_DISABLE": (("1",), "warning", "nodes talk over TCP instead of InfiniBand", "unset it"),
    "NCCL_SHM_DISABLE": (("1",), "warning", "ranks of a node talk over the network", "unset it"),
    "NCCL_SOCKET_IFNAME": (
        ("lo",), "warning", "only ranks of one node can talk", "name the network interface",
    ),
    "NCCL_DEBUG": (("INFO", "TRACE"), "note", "NCCL logs much", "WARN is enough"),
    "NCCL_BLOCKING_WAIT": (("1",), "warning", "is obsolete", "unset it"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "warning", "collectives wait on the CPU", "unset it"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (
        ("0",), "problem", "a failed collective hangs for ever", "unset it",
    ),
    "CUDA_LAUNCH_BLOCKING": (("1",), "warning", "every kernel is waited for", "unset it"),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (
        ("1", "y", "yes", "true"), "problem", "torch.load runs code of files", "unset it",
    ),
}  # fmt: skip


def check_gpus() -> list[Finding]:
    torch = imported("torch")[0] if installed("torch") else None
    if torch is None or not torch.cuda.is_available():
        return []
    findings = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = (facts.major, facts.minor)
        able = [name for name, least in (("BF16", (8, 0)), ("FP8", (8, 9))) if capability >= least]
        text = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {' and '.join(able) or 'FP32'}"
        if "BF16" in able:
            findings.append(Finding("ok", f"gpu {index}", text))
        else:
            remedy = "leave out --bf16"
            findings.append(Finding("warning", f"gpu {index}", f"{text} only", remedy))
    return findings


def check_shared_memory(path: str = "/dev/shm") -> list[Finding]:
    if not os.path.isdir(path):
        return [Finding("warning", path, "missing: NCCL and data workers need it", "mount it")]
    size = os.statvfs(path).f_blocks * os.statvfs(path).f_frsize
    if size < SMALLEST_SHARED_MEMORY:
        return [
            Finding(
                "warning", path, f"{size / GIB:.2f} GiB: NCCL fails to start many ranks with less "
                "than 1 GiB", "give the container --ipc=host or --shm-size=16g",
            )
        ]  # fmt: skip
    return [Finding("ok", path, f"{size / GIB:.0f} GiB")]


def check_limits() -> list[Finding]:
    findings = []
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FEWEST_OPEN_FILES:
        remedy = "ulimit -n 65536 before the start"
        if most != resource.RLIM_INFINITY and most < FEWEST_OPEN_FILES:
            remedy = "raise the hard limit, in limits.conf or the container's settings"
        findings.append(
            Finding(
                "warning", "open files", f"at most {files}: sockets and shards need more", remedy
            )
        )
    else:
        findings.append(Finding("ok", "open files", f"at most {files}"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and os.path.isdir("/sys/class/infiniband"):
        findings.append(
            Finding(
                "warning", "locked memory", f"at most {locked // 1024} KiB: InfiniBand registers "
                "its buffers", "ulimit -l unlimited, or --ulimit memlock=-1 for a container",
            )
        )  # fmt: skip
    return findings


def check_variables() -> list[Finding]:
    findings = []
    for name, (values, level, effect, remedy) in _HARMFUL.items():
        found = os.environ.get(name)
        if found is not None and found in values:
            findings.append(Finding(level, name, f"is {found}: {effect}", remedy))
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        findings.append(
            Finding(
                "note", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "is not 1, which torchrun "
                "--max-restarts needs", "set it where you restart ranks (docs/resilience.md)",
            )
        )  # fmt: skip
    if "OMP_NUM_THREADS" not in os.environ:
        findings.append(
            Finding(
                "note", "OMP_NUM_THREADS", "is not set: torchrun sets 1, a single process takes "
                "all cores", "set it to cores / ranks of a node",
            )
        )  # fmt: skip
    return findings


def check_host_name() -> list[Finding]:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return [
            Finding(
                "problem", "host name", f"{name} has no address ({error}): ranks do not find each "
                "other", "add it to /etc/hosts or DNS",
            )
        ]  # fmt: skip
    return [Finding("ok", "host name", f"{name} is {address}")]


def check_compiler() -> list[Finding]:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return [Finding("ok", "compiler", shutil.which(name) or name)]
    return [
        Finding(
            "warning", "compiler", "no C compiler: torch.compile and Triton need one",
            "install gcc and the headers of Python",
        )
    ]  # fmt: skip


MACHINE_CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_gpus, check_shared_memory, check_limits, check_variables, check_host_name, check_compiler,
)  # fmt: skip
