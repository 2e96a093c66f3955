"""Build our model on a recorded Transformer Engine and print what that was asked for, as JSON.

    python -m tests.model.transformer_engine.wiring 2.20.2

A process of its own, because megatron-core decides at its import whether there is one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.model.transformer_engine import stand_in

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def plain(value: Any) -> Any:
    """Something that JSON can hold."""
    if isinstance(value, bool | int | float | str | None):
        return value
    return str(value)


def parameters(config: Any) -> dict[str, list[Any]]:
    from megatron_ext.diffusion.schedule import MixingSchedule
    from megatron_ext.model.diffusion_model import DiffusionModel
    from megatron_ext.parallel.groups import initialize_parallel

    groups = initialize_parallel(config.parallel)
    schedule = MixingSchedule(61, 3, shift=0.0)
    model = DiffusionModel(config, 61, schedule, groups)
    return {name: [str(p.dtype), *p.shape] for name, p in model.named_parameters()}


def main() -> None:
    stand_in.install(sys.argv[1])
    from megatron_ext.model.translate import transformer_config
    from tests.training.tiny import tiny_config

    def config(impl: str, is_compiled: bool = False, **fp8: Any) -> Any:
        return tiny_config(
            model={"hidden_size": 128},
            precision={"bf16": True, "transformer_impl": impl, "compile_layers": is_compiled},
            training={"micro_batch_size": 4},
            fp8=fp8,
        )

    report: dict[str, Any] = {"local": parameters(config("local"))}
    stand_in.CALLS.clear()
    report["transformer_engine"] = parameters(config("transformer_engine"))
    report["layers"] = [[key, {k: plain(v) for k, v in a.items()}] for key, a in stand_in.CALLS]
    stand_in.CALLS.clear()
    report["compiled"] = parameters(config("transformer_engine", is_compiled=True))
    report["compiled_layers"] = sorted({key for key, _ in stand_in.CALLS})
    report["recipes"] = {}
    from megatron.core.fp8_utils import get_fp8_context

    for form in ("e4m3", "hybrid"):
        for recipe in RECIPES:
            stand_in.CALLS.clear()
            skips = recipe != "delayed"
            asked = config(
                "transformer_engine", fp8_format=form, fp8_recipe=recipe,
                fp8_param_gather=recipe != "mxfp8", first_last_layers_bf16=skips,
                fp8_margin=1, fp8_amax_history_len=16, fp8_amax_compute_algo="most_recent",
            )  # fmt: skip
            parameters(asked)
            initial = len([key for key, _ in stand_in.CALLS if "model_init" in key])
            for layer in range(asked.model.num_layers):
                get_fp8_context(transformer_config(asked), layer)
            report["recipes"][f"{form}/{recipe}"] = {
                "calls": [
                    [key, {k: plain(v) for k, v in arguments.items()}]
                    for key, arguments in stand_in.CALLS
                    if "Linear" not in key and "RMSNorm" not in key
                ],
                "initial": initial,
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
