"""What our layers and megatron-core ask of Transformer Engine is what its releases accept.

`tests/model/transformer_engine/<version>.json` was read from the released wheels; the model is
built on a package made of those signatures alone, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.kernels.float8 import DelayedScaling
from tests.model.transformer_engine.stand_in import HERE, VERSIONS

ROOT = Path(__file__).parents[2]
LINEAR = "transformer_engine.pytorch.module.linear.Linear"
NORM = "transformer_engine.pytorch.module.rmsnorm.RMSNorm"
RECIPE_CLASS = {
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


@pytest.fixture(scope="module", params=VERSIONS)
def built(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The report of a process that builds the model on one release."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.transformer_engine.wiring", request.param],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_two_releases_are_recorded_with_their_wheels() -> None:
    """One of the time of megatron-core 0.16.1, and the newest of the time of the record."""
    records = [json.loads((HERE / f"{version}.json").read_text()) for version in VERSIONS]
    assert [r["version"] for r in records] == VERSIONS == ["2.13.0", "2.20.2"]
    assert all(r["package"] == "transformer-engine" and len(r["sha256"]) == 64 for r in records)


def test_parameters_have_the_names_shapes_and_dtypes_of_local_layers(built: dict[str, Any]) -> None:
    """In their order, too: megatron-core's optimizer checkpoints go by dtype and order."""
    assert len(built["local"]) > 30
    assert list(built["transformer_engine"].items()) == list(built["local"].items())
    assert list(built["compiled"].items()) == list(built["local"].items())
    assert LINEAR in built["compiled_layers"] and NORM not in built["compiled_layers"]


def test_every_linear_layer_and_norm_is_transformer_engines(built: dict[str, Any]) -> None:
    names = [key for key, _ in built["layers"]]
    assert (names.count(LINEAR), names.count(NORM)) == (4 * 4, 2 * 4 + 1)
    linears = [arguments for key, arguments in built["layers"] if key == LINEAR]
    shapes = {(a["in_features"], a["out_features"], a["parallel_mode"]) for a in linears}
    assert shapes == {
        (128, 384, "column"), (128, 128, "row"), (128, 512, "column"), (512, 128, "row"),
    }  # fmt: skip
    assert all(a["params_dtype"] == "torch.bfloat16" for a in linears)
    norms = [arguments for key, arguments in built["layers"] if key == NORM]
    assert all(a["zero_centered_gamma"] is True and a["eps"] == 1e-6 for a in norms)


@pytest.mark.parametrize("form", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", RECIPE_CLASS)
def test_a_recipe_reaches_transformer_engine_as_asked(
    recipe: str, form: str, built: dict[str, Any]
) -> None:
    calls = built["recipes"][f"{form}/{recipe}"]["calls"]
    recipes = [a for key, a in calls if key.endswith(f"recipe.{RECIPE_CLASS[recipe]}")]
    contexts = [a for key, a in calls if key.endswith(".fp8_autocast")]
    # Layers 0 and 3 of 4 stay in BF16, except under delayed scaling, which covers all.
    assert len(contexts) == (4 if recipe == "delayed" else 2)
    assert all(a["enabled"] is True and a["fp8_recipe"] != "None" for a in contexts)
    assert {a["fp8_format"] for a in recipes} == {f"Format.{form.upper()}"}
    if recipe == "delayed":
        settings = {(a["margin"], a["amax_history_len"], a["amax_compute_algo"]) for a in recipes}
        assert settings == {(1, 16, "most_recent")}
    initial = built["recipes"][f"{form}/{recipe}"]["initial"]
    assert initial == {"delayed": 4, "mxfp8": 0}.get(recipe, 2), "--fp8-param-gather"


@pytest.mark.parametrize("version", VERSIONS)
def test_emulated_scales_are_those_of_the_release(version: str) -> None:
    """Recorded from the release's own code: zeros, infinities and tiny numbers among them."""
    for case in json.loads((HERE / f"{version}.json").read_text())["scaling"]:
        quantizer = DelayedScaling(
            "e4m3", length=case["length"], uses_maximum=case["algorithm"] == "max",
            margin=case["margin"], reduce=lambda amax: None,
        )  # fmt: skip
        for magnitudes, scales in zip(case["amax"], case["scale"], strict=True):
            for name, amax in zip(("input", "gradient"), magnitudes, strict=True):
                quantizer(name, torch.full((16, 16), amax), records=True)
            # Their division is a product with the reciprocal in Python, a division in their kernel.
            assert quantizer.scale[[0, 2]].tolist() == pytest.approx(scales, rel=2e-7)
        assert torch.equal(quantizer.history[:, [0, 2]], torch.tensor(case["history"]))
