"""Input pipeline: tokens per second of one core, from .bin/.idx to noised micro-batches.

    python -m megatron_ext.data.bench [--quick] [--json FILE]

`read` takes packed sequences from the memory map, in the page cache; `with noise` is what training
does per micro-batch: read, draw levels, prompts, empty tokens and corruption, stack. One thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch

from megatron_ext.config import Config
from megatron_ext.data.batches import BatchSource, RankPosition
from megatron_ext.data.dataset import build_datasets
from megatron_ext.data.indexed import IndexedWriter, dtype_for_vocabulary
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.measure import Column, Report, Table, alternate, bench_parser

VOCAB_SIZE, MASK_ID, PAD_ID = 131072, 3, 2
MEAN_DOCUMENT = 700
COLUMNS = [
    Column("sequences", "sequences", "d"),
    Column("seq_length", "of tokens", ",d"),
    Column("objective", "objective"),
    Column("way", "way"),
    Column("median_ms", "ms", ".3f"),
    Column("lower_quartile_ms", "lower quartile", ".3f"),
    Column("upper_quartile_ms", "upper quartile", ".3f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
]


def write_tokens(prefix: Path, num_tokens: int) -> None:
    """Random ids in documents of skewed lengths, `MEAN_DOCUMENT` tokens in the mean."""
    numbers = np.random.default_rng(0)
    with IndexedWriter(prefix, dtype_for_vocabulary(VOCAB_SIZE)) as writer:
        while num_tokens > 0:
            length = 1 + int(numbers.exponential(MEAN_DOCUMENT))
            writer.append(numbers.integers(4, VOCAB_SIZE, length))
            num_tokens -= length


def build_source(prefix: Path, sequences: int, seq_length: int, objective: str) -> BatchSource:
    config = Config().with_sections(
        model={"seq_length": seq_length, "vocab_size": VOCAB_SIZE},
        diffusion={"objective": objective},
        training={"micro_batch_size": sequences, "global_batch_size": sequences},
    )
    data = build_datasets([str(prefix)], [], [], "100,0,0", seq_length, 0, VOCAB_SIZE)
    schedule = MixingSchedule(VOCAB_SIZE, MASK_ID, config.diffusion.shift)
    return BatchSource(data.train, schedule, config, RankPosition(0, 1, 0, 1), PAD_ID)


def ways_of(source: BatchSource) -> dict[str, Callable[[], object]]:
    """Both ways, each over successive steps."""
    steps, reads = count(), count()

    def read() -> None:
        for indices in source.sample_indices(next(reads)):
            for index in indices:
                source.dataset.sample(index)

    return {"read": read, "with noise": lambda: source.step(next(steps))}


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, default=50_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repetitions = 2000
    if arguments.quick:
        arguments.num_tokens, repetitions = 50_000, 3
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "tokens")
        write_tokens(prefix, arguments.num_tokens)
        for sequences, seq_length in ((2, 512), (8, 2048)):
            for objective in ("hybrid", "masked"):
                source = build_source(prefix, sequences, seq_length, objective)
                times = alternate(ways_of(source), repetitions, max_seconds=10)
                for way, timing in times.items():
                    milliseconds = [1000 * x for x in (timing.median, *timing.quartiles)]
                    names = ("median_ms", "lower_quartile_ms", "upper_quartile_ms")
                    rows.append(
                        {
                            "sequences": sequences, "seq_length": seq_length,
                            "objective": objective, "way": way,
                            **dict(zip(names, milliseconds, strict=True)),
                            "tokens_per_s": sequences * seq_length / timing.median,
                        }
                    )  # fmt: skip
    title = f"Input pipeline, one core, vocabulary {VOCAB_SIZE:,}"
    Report("data", vars(arguments), [Table(title, COLUMNS, rows)]).finish(arguments.json)


if __name__ == "__main__":
    main()
