"""FP8 in the layers: Transformer Engine's modules, or an emulation of their numbers on any device.

What runs in FP8 are the four linear layers of a transformer layer (QKV, attention output, both
feed-forward matrices). Embedding, attention, norms, residual stream, output head and loss stay in
the precision of the run.

`layer_modules` says which classes stand in a layer. Parameters have the same names and shapes in
all cases: Transformer Engine's norm and linear layers are taken unfused, because its fused
`LayerNormLinear` would call the gain `linear_qkv.layer_norm_weight`.

Emulated layers are megatron-core's own with another matrix product. Collectives beyond those: with
delayed scaling one all-reduce(max) of one number per operand and product over tp x cp x dp, as
Transformer Engine reduces them; with the others none. A scale belongs to what a rank multiplies:
an input gathered over tp has one scale everywhere, a piece of a weight its own (tensorwise).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ext.config import Config, Float8Config, PrecisionConfig, require
from megatron_ext.kernels.float8 import CurrentScaling, DelayedScaling, Quantizer, float8_linear
from megatron_ext.model.norms import CompiledRMSNorm, RMSNorm

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.tensor_parallel.layers import (  # isort: skip
    ColumnParallelLinear,
    RowParallelLinear,
)
from megatron.core.tensor_parallel.mappings import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


class LayerModules(NamedTuple):
    """Classes, or functions that build modules, for the places of a layer."""

    norm: Any
    column: Any
    """Linear layer whose output is split on tp."""
    row: Any
    """Linear layer whose input is split on tp."""


def require_transformer_engine(precision: PrecisionConfig) -> None:
    """Raise `ValueError` where --transformer-impl asks for what this machine does not have."""
    if precision.transformer_impl == "local":
        return
    from megatron.core.extensions.transformer_engine import HAVE_TE

    for is_met, problem in (
        (
            importlib.util.find_spec("transformer_engine") is not None,
            "the package transformer-engine is not installed; see docs/install.md",
        ),
        (HAVE_TE, "transformer-engine is installed but `import transformer_engine.pytorch` fails"),
        (torch.cuda.is_available(), "Transformer Engine needs a CUDA device, and there is none"),
    ):
        advice = f"{problem}, or give --transformer-impl local."
        require(is_met, "transformer_impl", precision.transformer_impl, advice)


def transformer_engine_modules() -> LayerModules:
    """megatron-core's wrappers of Transformer Engine's linear layers, and its norm.

    megatron-core's wrapper of the norm would keep gains in bfloat16. The engine's optimizer
    checkpoints number parameters by dtype, so that a run with local layers, whose gains are
    float32, would then load its masters into other parameters, without an error.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
        te,
    )

    class EngineRMSNorm(te.pytorch.RMSNorm):
        """Norm over the last dimension; `weight` [h] float32, same on tp."""

        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
            super().__init__(
                hidden_size,
                eps=eps,
                sequence_parallel=config.sequence_parallel,
                zero_centered_gamma=config.layernorm_zero_centered_gamma,
                dtype=torch.float32,
                device=torch.cuda.current_device() if torch.cuda.is_available() else None,
            )

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    return LayerModules(EngineRMSNorm, TEColumnParallelLinear, TERowParallelLinear)


def layer_modules(config: Config, groups: ProcessGroupCollection, layer: int) -> LayerModules:
    """The modules of a layer, counted from 0 over the whole model.

    Compiled norms stand in the place of Transformer Engine's, too.
    """
    is_compiled = config.precision.compile_layers
    if config.precision.transformer_impl == "transformer_engine":
        modules = transformer_engine_modules()
        return modules._replace(norm=CompiledRMSNorm) if is_compiled else modules
    norm = CompiledRMSNorm if is_compiled else RMSNorm
    if not config.fp8.fp8_emulate or not config.fp8.quantizes(layer, config.model.num_layers):
        return LayerModules(norm, ColumnParallelLinear, RowParallelLinear)
    build = _quantizer_builder(config.fp8, groups)
    return LayerModules(
        norm,
        _with_quantizer(EmulatedColumnParallelLinear, build),
        _with_quantizer(EmulatedRowParallelLinear, build),
    )


def _quantizer_builder(fp8: Float8Config, groups: ProcessGroupCollection) -> Callable:
    def reduce(amax: Tensor) -> None:
        if groups.tp_dp_cp.size() > 1:
            torch.distributed.all_reduce(
                amax, op=torch.distributed.ReduceOp.MAX, group=groups.tp_dp_cp
            )

    def build() -> Quantizer:
        assert fp8.fp8_format is not None
        if fp8.fp8_recipe != "delayed":
            return CurrentScaling(fp8.fp8_recipe, fp8.fp8_format)
        return DelayedScaling(
            fp8.fp8_format,
            length=fp8.fp8_amax_history_len,
            uses_maximum=fp8.fp8_amax_compute_algo == "max",
            margin=fp8.fp8_margin,
            reduce=reduce,
            device=torch.cuda.current_device() if torch.cuda.is_available() else None,
        )

    return build


def _with_quantizer(layer: type[_Emulated], build: Callable[[], Quantizer]) -> type:
    """A subclass whose instances have a quantizer each: specs take classes, and no arguments."""
    return type(layer.__name__, (layer,), {"build_quantizer": staticmethod(build)})


class _Emulated:
    """The matrix product and the saved state of an emulated layer."""

    build_quantizer: Callable[[], Quantizer]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantizer = type(self).build_quantizer()

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        **unused: Any,
    ) -> Tensor:
        """In place of megatron-core's product; gathers and reduces what that would."""
        assert not unused.get("gradient_accumulation_fusion"), "it needs the engine's own product"
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = float8_linear(input, weight, self.quantizer)
        return output if bias is None else output + bias

    def get_extra_state(self) -> Tensor | None:
        """Scales and history of delayed scaling, under the key of Transformer Engine's state."""
        return self.quantizer.state() if isinstance(self.quantizer, DelayedScaling) else None

    def set_extra_state(self, state: Any) -> None:
        """Continue with `get_extra_state`'s; start anew from a run without FP8 or with another."""
        if isinstance(self.quantizer, DelayedScaling) and _is_emulated(state):
            self.quantizer.load(state)


class EmulatedColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """`y/tp = x weight^T` with rounded operands; weight [o/tp, i]."""


class EmulatedRowParallelLinear(_Emulated, RowParallelLinear):
    """`y = sum over tp of x/tp weight^T` with rounded operands; weight [o, i/tp]."""


def begin_step(model: list[torch.nn.Module]) -> None:
    """Tell emulated layers that the optimizer has changed their weights."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, _Emulated) and isinstance(module.quantizer, DelayedScaling):
                module.quantizer.begin_step()


def readable_state(state: dict[str, Any], precision: PrecisionConfig) -> dict[str, Any]:
    """A checkpoint's values for layers of this kind.

    Transformer Engine would take an emulation's scales for a pickle of its own; without them it
    starts its scales anew, as from a run without FP8. The other way layers see to it themselves.
    """
    if precision.transformer_impl == "local":
        return state
    return {
        name: None if name.endswith("_extra_state") and _is_emulated(value) else value
        for name, value in state.items()
    }


def _is_emulated(state: Any) -> bool:
    """Whether a layer's saved state is `_Emulated`'s; Transformer Engine's is bytes."""
    return isinstance(state, Tensor) and state.dtype == torch.float32 and state.dim() == 2
