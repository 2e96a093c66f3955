"""Collectives of a step by group, operation and size, in a real run or a dry one.

A message is counted once per rank that takes part, with the bytes of the whole tensor that the
operation is about: the gathered tensor of an all-gather, the tensor before the sum of a
reduce-scatter, all of a coalesced call's tensors. What crosses a link follows from that
(`wire_bytes`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.planning.watch import Phase

_OPERATIONS = {
    # operation of c10d: (name here, argument with the whole tensor)
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "alltoall_": ("all-to-all", 1),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
    "barrier": ("barrier", None),
}
_GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "MODEL_PARALLEL_GROUP": "tp-pp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "all",
    "EMBEDDING_GROUP": "embedding",
}
"""megatron-core's descriptions of its groups; others keep theirs."""


class Message(NamedTuple):
    """A kind of message."""

    group: str
    size: int
    """Ranks in the group."""
    operation: str
    num_bytes: int
    """Of the whole tensor."""


class CollectiveCounts:
    """How often each kind of message was sent; an observer of `Watch`. Groups of one send none."""

    def __init__(self) -> None:
        self.counts: Counter[Message] = Counter()

    def observe(self, function: Any, arguments: tuple[Any, ...], result: Any, phase: Phase) -> None:
        del result, phase
        if function.namespace != "c10d":
            return
        name = function._schema.name.removeprefix("c10d::")
        if name not in _OPERATIONS:
            raise NotImplementedError(f"{name} is not among the collectives known here")
        operation, position = _OPERATIONS[name]
        group = next(ProcessGroup.unbox(x) for x in arguments if isinstance(x, torch.ScriptObject))
        if group.size() == 1:
            return
        num_bytes = 0 if position is None else _bytes_of(arguments[position])
        self.counts[Message(_name_of(group), group.size(), operation, num_bytes)] += 1

    def total_bytes(self) -> dict[tuple[str, str], int]:
        """Bytes by (group, operation)."""
        totals: Counter[tuple[str, str]] = Counter()
        for message, count in self.counts.items():
            totals[message.group, message.operation] += message.num_bytes * count
        return dict(totals)


def wire_bytes(message: Message) -> float:
    """Bytes that a rank sends for a message in a ring, the fewest there can be."""
    share = (message.size - 1) / message.size
    match message.operation:
        case "all-reduce":
            return 2 * share * message.num_bytes
        case "all-gather" | "reduce-scatter" | "all-to-all":
            return share * message.num_bytes
        case "receive" | "barrier":
            return 0.0
        case _:
            return float(message.num_bytes)


def _name_of(group: ProcessGroup) -> str:
    description = group.group_desc
    if description.startswith("default"):
        return "world"
    return _GROUPS.get(description, description)


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes_of(part) for part in value)
