"""Peak memory of importing and exporting models of 24 and 48 layers, in a process of its own.

    python -m tests.checkpoint.conversion_memory FOLDER

prints one JSON list: for each conversion the bytes of the weights and how far resident memory rose
above where it stood before (the kernel's high-water mark, reset in between). A conversion of two
layers comes first, so that what is loaded once does not count.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.export_hf import export_run
from megatron_ext.checkpoint.hf_config import PUBLISHED_IDS, published_fields
from megatron_ext.checkpoint.hf_folder import ShardWriter
from megatron_ext.checkpoint.hf_names import is_norm_gain, published_shapes
from megatron_ext.checkpoint.import_hf import import_folder
from megatron_ext.config import Config, ModelConfig

LAYERS = (2, 24, 48)
WIDTH = 320
"""2.5 MB per layer in bfloat16."""


def write_folder(folder: Path, layers: int) -> int:
    """A model in a single file, written tensor by tensor; its bytes."""
    model = ModelConfig(
        num_layers=layers, hidden_size=WIDTH, num_attention_heads=5, seq_length=64, vocab_size=1000
    )
    folder.mkdir()
    fields = published_fields(Config(model=model), 1000, PUBLISHED_IDS, "bfloat16")
    (folder / "config.json").write_text(json.dumps(fields))
    layout = {
        key: (shape, torch.float32 if is_norm_gain(key) else torch.bfloat16)
        for key, shape in published_shapes(model, 1000).items()
    }
    writer = ShardWriter(folder, layout, 2**60)
    for seed, (key, (shape, dtype)) in enumerate(layout.items()):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        writer.write(key, numbers.to(dtype))
    return sum(writer.bytes.values())


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rise(conversion: Callable[[], Any]) -> int:
    """Bytes by which resident memory rose at most during a call."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    conversion()
    return _resident("VmHWM") - before


def main(root: Path) -> None:
    torch.set_num_threads(1)
    report = []
    for layers in LAYERS:
        source, run, exported = (root / f"{name}{layers}" for name in ("source", "run", "exported"))
        size = write_folder(source, layers)
        into = rise(lambda source=source, run=run: import_folder(source, run))  # type: ignore[misc]
        out = rise(lambda run=run, exported=exported: export_run(run, exported))  # type: ignore[misc]
        report.append({"layers": layers, "bytes": size, "import": into, "export": out})
        for folder in (source, run, exported):
            shutil.rmtree(folder)
    print(json.dumps(report[1:]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
