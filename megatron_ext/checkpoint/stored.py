"""Weights of a training checkpoint, one parameter at a time, in one process without a group.

megatron-core's checkpoints are torch.distributed.checkpoint's: `.metadata` says where the chunks of
every tensor lie in the `.distcp` files. Parameters of layers are stacked, `decoder.layers.X`
[l, ...] for `decoder.layers.{i}.X`, a layer a chunk (or several, cut over tp). Reading puts the
chunks of one parameter together; writing asks for each parameter when its turn to be written has
come. Memory is that of a parameter and one of its chunks, whatever the number of layers.

Nothing that a file names is run (`checkpoint.pickles`).
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import (
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint.pickles import PlainReader, untrusted
from megatron_ext.parallel.cpu import enable_cpu
from megatron_ext.parallel.versions import common_in_shards

enable_cpu()

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # noqa: E402

COMMON = "common.pt"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LINEARS = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
"""Modules for which megatron-core stores an object (its extra state) per layer, empty here."""


def _stacked(name: str) -> tuple[str, int | None]:
    """Key of a parameter among stacked layers and the number of its layer, if it has one."""
    match = _LAYER.fullmatch(name)
    return (name, None) if match is None else (f"decoder.layers.{match[2]}", int(match[1]))


class _Destination(LoadPlanner):
    """Reads into a region of a stored tensor; `target` has the region's shape."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the plan is made by the reader of parameters")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = tuple(
            slice(offset, offset + length)
            for offset, length in zip(read_item.dest_offsets, read_item.lengths, strict=True)
        )
        return self.target[region]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class StoredParameters:
    """The weights in a checkpoint folder; optimizer state is not looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = PlainReader(folder)
        metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(metadata, True)
        self.tensors = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    def _place(self, name: str) -> tuple[str, int | None]:
        """Key and number in its first dimension (None where the key holds nothing else)."""
        return (name, None) if name in self.tensors else _stacked(name)

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Stored shape (padding rows included) and dtype; `KeyError` where there is none."""
        key, layer = self._place(name)
        tensor = self.tensors[key]
        if layer is not None and layer >= tensor.size[0]:
            raise KeyError(name)
        shape = tuple(tensor.size) if layer is None else tuple(tensor.size[1:])
        return shape, tensor.properties.dtype

    def names(self) -> set[str]:
        """Global names of everything stored."""
        found = set()
        for key, tensor in self.tensors.items():
            rest = key.removeprefix("decoder.layers.")
            if rest == key or rest.split(".")[0].isdigit():
                found.add(key)
            else:
                found |= {f"decoder.layers.{i}.{rest}" for i in range(tensor.size[0])}
        return found

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The leading `shape` of a parameter: all of it but padding rows."""
        key, layer = self._place(name)
        tensor = self.tensors[key]
        offsets = (0,) * len(shape) if layer is None else (layer, *(0 for _ in shape))
        sizes = shape if layer is None else (1, *shape)
        target = torch.empty(sizes, dtype=tensor.properties.dtype)
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, tensor, [region])
        covered = sum(math.prod(item.lengths) for item in items)
        assert covered == target.numel(), f"{self.folder}: chunks of {key} do not cover {name}"
        plan = self.reader.prepare_local_plan(LoadPlan(items))
        self.reader.read_data(plan, _Destination(target)).wait()
        return target if layer is None else target[0]


class _LazyParameters(SavePlanner):
    """Plans every parameter from its shape and dtype and reads it when it is written."""

    def __init__(
        self,
        layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        num_layers: int,
        read: Callable[[str], Tensor],
    ) -> None:
        self.layout, self.num_layers, self.read_parameter = layout, num_layers, read
        self.names: dict[tuple[str, torch.Size], str] = {}

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        del state_dict, storage_meta, is_coordinator

    def create_local_plan(self) -> SavePlan:
        tensors = [self._item(name, *facts) for name, facts in self.layout.items()]
        objects = [
            WriteItem(
                MetadataIndex(
                    f"decoder.layers.{module}._extra_state/shard_{i}_{self.num_layers}"
                ),
                WriteItemType.BYTE_IO,
            )
            for i in range(self.num_layers)
            for module in _LINEARS
        ]  # fmt: skip
        return SavePlan([*objects, *tensors])

    def _item(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> WriteItem:
        key, layer = _stacked(name)
        stacked = () if layer is None else (self.num_layers,)
        offsets = torch.Size([*(() if layer is None else (layer,)), *(0 for _ in shape)])
        sizes = torch.Size([*(1 for _ in stacked), *shape])
        self.names[key, offsets] = name
        return WriteItem(
            MetadataIndex(key, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, sizes),
                properties=TensorProperties(dtype=dtype),
                size=torch.Size([*stacked, *shape]),
            ),
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        assert write_item.tensor_data is not None and write_item.index.offset is not None
        name = self.names[write_item.index.fqn, write_item.index.offset]
        tensor = self.read_parameter(name)
        assert (tuple(tensor.shape), tensor.dtype) == self.layout[name], f"{name} changed its form"
        return tensor.reshape(write_item.tensor_data.chunk.sizes)


def write_checkpoint(
    folder: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    num_layers: int,
    read: Callable[[str], Tensor],
    common: dict[str, Any],
) -> None:
    """Write weights as megatron-core does at one rank: `layout` has shape and dtype by name.

    `read` returns one whole parameter and is called once for each, in turn. `common` is what all
    ranks share.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.save(
            {},
            storage_writer=FileSystemWriter(folder, thread_count=1),
            planner=_LazyParameters(layout, num_layers, read),
            no_dist=True,
        )
    torch.save(common, folder / COMMON)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def read_common(folder: Path) -> dict[str, Any]:
    """What all ranks of a checkpoint share; plain values only, no code is unpickled."""
    with untrusted(folder):
        if (folder / COMMON).is_file():
            return torch.load(folder / COMMON, map_location="cpu", weights_only=True)
        return common_in_shards(folder, PlainReader(folder))
