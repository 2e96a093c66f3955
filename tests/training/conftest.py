"""Data that the training tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import pytest

from tests.data.corpora import write_with_megatron
from tests.training.tiny import VOCABULARY


@pytest.fixture(scope="session")
def document_prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 documents of 3 to 40 tokens: several in a sequence, some longer than one."""
    rng = np.random.default_rng(11)
    documents = [[rng.integers(4, VOCABULARY, rng.integers(3, 41))] for _ in range(60)]
    folder = tmp_path_factory.mktemp("documents")
    return str(write_with_megatron(folder / "documents", documents))


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Gives back the handlers that a run in this process replaces."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    known = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, known, strict=True):
        signal.signal(number, handler)
