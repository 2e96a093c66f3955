"""The recorded models and files of `tests/golden/dev`."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from megatron_ext.hf import GiddConfig, GiddForDiffusionLM

FOLDER = Path(__file__).resolve().parents[1] / "golden/dev"


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def recorded_model(name: str, **changes: Any) -> GiddForDiffusionLM:
    """Model A or B with its recorded weights."""
    settings = json.loads((FOLDER / f"model_{name}_config.json").read_text())
    model = GiddForDiffusionLM(GiddConfig(**settings | changes)).eval()
    model.load_state_dict(load_file(FOLDER / f"model_{name}.safetensors"), strict=True)
    return model


@lru_cache
def generations() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "generation_index.json").read_text())
