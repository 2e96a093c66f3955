"""Attention inputs with every kind of visibility, and gradients of an implementation on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ext.diffusion.visibility import attention_mask_from_visibility
from megatron_ext.kernels.attention import attention_reference
from tests.kernels.samples import draw_normal

BATCH, HEADS, HEAD_WIDTH = 4, 3, 16
Function = Callable[..., Tensor]
"""query, key, value, visibility, and keywords as `attention` takes them."""


@dataclass(frozen=True)
class Case:
    """`length` keys, of which queries [first, first + count) are this call's."""

    length: int
    kind: str = "prompts"
    first: int = 0
    count: int | None = None
    rules: dict[str, bool] = field(default_factory=dict)

    @property
    def num_queries(self) -> int:
        return self.length - self.first if self.count is None else self.count

    def visibility(self) -> Tensor | None:
        """Prompts of no, one, a third of and all tokens; or three documents with the same."""
        if self.kind == "open":
            return None
        result = torch.ones(BATCH, 2, self.length, dtype=torch.int32)
        for row, prompt in enumerate((0, 1, self.length // 3, self.length)):
            result[row, 0, :prompt] = 0
        if self.kind == "documents":
            for row in range(BATCH):
                result[row, 1, self.length // 4 + row :] = 5
                result[row, 1, self.length // 2 + row :] = 7
        if self.kind == "scattered":
            # Levels and documents in no order.
            draw = draw_normal(BATCH, 2, self.length, seed=11)
            result = (draw > 0).int()
        return result

    def mask(self) -> Tensor:
        """The definition: bool [b, queries, keys]."""
        visibility = self.visibility()
        if visibility is None:
            visibility = torch.zeros(BATCH, 2, self.length, dtype=torch.int32)
        mask = attention_mask_from_visibility(visibility, **self.rules)
        return mask[:, self.first : self.first + self.num_queries]

    def keywords(self) -> dict[str, Any]:
        return {"first_query": self.first, **self.rules}


CASES = {
    "open": Case(63, "open"),
    "one": Case(1),
    "one_causal": Case(1, rules={"causal": True}),
    "prompts": Case(63),
    "prompts_127": Case(127),
    "causal_prompts": Case(63, rules={"causal_prompt": True}),
    "documents": Case(63, "documents"),
    "causal": Case(63, "open", rules={"causal": True}),
    "causal_documents": Case(127, "documents", rules={"causal": True}),
    "causal_prompts_documents": Case(63, "documents", rules={"causal_prompt": True}),
    "piece": Case(127, first=31, count=32),
    "last_piece": Case(127, "documents", first=95),
    "first_causal_piece": Case(64, "open", count=16, rules={"causal": True}),
    "causal_piece": Case(64, "documents", first=16, count=32, rules={"causal": True}),
    "causal_prompts_piece": Case(64, first=16, count=16, rules={"causal_prompt": True}),
    "scattered": Case(63, "scattered"),
    "scattered_causal": Case(63, "scattered", first=20, count=30, rules={"causal": True}),
}
REGULAR = [name for name, case in CASES.items() if case.kind != "scattered"]
"""What batches contain: a prompt in front, documents one after the other."""


def draw_inputs(case: Case, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """query, key, value, k_bias, v_bias; scores have a standard deviation of scale^2."""
    shapes = [
        (case.num_queries, BATCH, HEADS, HEAD_WIDTH),
        *[(case.length, BATCH, HEADS, HEAD_WIDTH)] * 2,
        *[(HEADS, HEAD_WIDTH)] * 2,
    ]
    scales = (scale, scale, 1.0, scale, 1.0)
    return [
        draw_normal(*shape, seed=seed + index, scale=factor).to(dtype)
        for index, (shape, factor) in enumerate(zip(shapes, scales, strict=True))
    ]


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and the gradient of every input, for one drawn gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    grad = draw_normal(*output.shape, seed=99).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad, allow_unused=True)]


def reference_of(case: Case, softcap: float | None, *, has_token: bool = True) -> Function:
    """The dense definition on this case, as a function of the inputs."""

    def function(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        token = {"k_bias": bias[0], "v_bias": bias[1]} if has_token else {}
        return attention_reference(query, key, value, case.mask(), softcap=softcap, **token)

    return function
