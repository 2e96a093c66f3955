"""Tokenize text into Megatron's .bin/.idx with a manifest.

    python tools/preprocess_data.py --input corpus.jsonl --tokenizer-model tokenizer \\
        --output-prefix data/corpus

Stopped at any moment, the same command continues where it was.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.data.executors import ExecutorConfig, preprocess  # noqa: E402
from megatron_ext.data.preprocess import PreprocessConfig  # noqa: E402


def run(
    config: tyro.conf.OmitArgPrefixes[PreprocessConfig],
    executor: tyro.conf.OmitArgPrefixes[ExecutorConfig],
) -> None:
    began = time.monotonic()
    manifest = preprocess(config, executor)
    prefix = config.output_prefix
    if manifest is None:
        waiting = executor.executor == "slurm" and not Path(prefix + ".json").is_file()
        print(f"{prefix}: {'submitted' if waiting else 'complete already, nothing to do'}.")
        return
    seconds = time.monotonic() - began
    size = manifest["utf8_bytes"] or manifest["bin"]["bytes"]
    print(
        f"{prefix}: {manifest['documents']} documents, {manifest['tokens']} tokens"
        + (f", {size / manifest['tokens']:.3f} bytes/token" if manifest["utf8_bytes"] else "")
        + f"; {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"
    )


def main() -> None:
    try:
        tyro.cli(run, description=__doc__)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
