"""Start-up of the distributed run: backend, device, megatron-core's process groups, seeds.

The order of ranks is megatron-core's default: tp varies fastest, then cp, dp, and pp slowest.
This is the only module that builds process groups or reads global parallel state; everything else
receives a `ProcessGroupCollection` (attributes tp, cp, dp, dp_cp, pp, mp, ...).
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from megatron_ext.config import ParallelConfig, require
from megatron_ext.parallel.cpu import enable_cpu

enable_cpu()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


def device_of_rank() -> torch.device:
    """The CUDA device of this process by `LOCAL_RANK`, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def refuse_stale_store() -> None:
    """Raise under `torchrun --max-restarts` where a restarted rank would not find the others.

    torchrun keeps one store for all starts, in which ranks read the addresses of the start before
    (pytorch issue 135712); found when the first fault is survived, unless it is asked beforehand.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts is {restarts}: restarted ranks would meet in a store with "
            "the addresses of those before. Start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment (and --standalone or "
            "--rdzv-backend c10d), or without --max-restarts."
        )


def initialize_distributed(parallel: ParallelConfig) -> None:
    """Join the group that torchrun describes in the environment, or one of a single rank."""
    device = device_of_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if torch.distributed.is_initialized():
        return
    backend = parallel.distributed_backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    require(
        backend == "gloo" or device.type == "cuda", "distributed_backend", backend,
        "there is no CUDA device; use gloo.",
    )  # fmt: skip
    refuse_stale_store()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout
        )


def initialize_parallel(parallel: ParallelConfig, seed: int = 0) -> ProcessGroupCollection:
    """Build megatron-core's groups for this layout and return them.

    Raises `ValueError` where tp x pp x cp does not divide the number of ranks. Layouts set up
    before by the same process are discarded first, so tests may call it repeatedly.
    """
    initialize_distributed(parallel)
    world_size = torch.distributed.get_world_size()
    size = parallel.model_parallel_size
    require(
        world_size % size == 0, "tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
        f"tp x pp x cp = {size} must divide the number of ranks ({world_size}).",
    )  # fmt: skip
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def shutdown_parallel() -> None:
    """Leave all process groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
