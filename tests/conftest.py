"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides when it is first imported whether its kernels run in the interpreter.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for GPUs are left out where there is none."""
    skip = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture
def single_rank() -> Iterator[None]:
    """This process as a run of one rank: one thread, and no process groups left behind."""
    from megatron_ext.parallel.groups import shutdown_parallel

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    shutdown_parallel()
    torch.set_num_threads(threads)
