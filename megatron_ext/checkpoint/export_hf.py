"""A checkpoint of a training run as a folder that transformers loads without this project."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.convert import (
    EMBEDDING,
    HEAD,
    Converted,
    common_dtype,
    digest,
    dtype_name,
    progress,
    refuse_occupied,
    require_layout,
    staged,
    with_dtypes,
)
from megatron_ext.checkpoint.hf_config import PUBLISHED_IDS, generation_fields, published_fields
from megatron_ext.checkpoint.hf_folder import (
    PublishedWeights,
    ShardWriter,
    copy_code,
    parse_size,
    tokenizer_files,
)
from megatron_ext.checkpoint.hf_names import (
    from_published,
    is_norm_gain,
    parameter_shapes,
    published_shapes,
    to_published,
)
from megatron_ext.checkpoint.identity import require_same, weights_identity
from megatron_ext.checkpoint.model_card import model_card
from megatron_ext.checkpoint.stored import StoredParameters, read_common
from megatron_ext.checkpoint.training import find_checkpoint
from megatron_ext.cli import load_config
from megatron_ext.config import Config, require
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.diffusion.schedule import MixingSchedule


@dataclass(frozen=True)
class OpenedRun:
    """A run's configuration and one of its checkpoints."""

    config: Config
    folder: Path
    step: int
    consumed_tokens: int
    vocab_size: int
    mask_token_id: int


def open_run(load: Path, step: int | None = None) -> OpenedRun:
    """Find a run's checkpoint (the latest when `step` is absent) and check it for damage.

    Raises `ValueError` where there is none, or where config.yaml is that of another model.
    """
    require((load / "config.yaml").is_file(), "load", str(load), "it has no config.yaml of a run.")
    config = load_config(load / "config.yaml")
    folder = find_checkpoint(load, step)
    problems = manifest.damaged_files(folder, manifest.read_manifest(folder))
    if problems:
        raise ValueError(f"--load: checkpoint {folder} is damaged: {'; '.join(problems)}.")
    common = read_common(folder)
    identity, position = common["weights_identity"], common["position"]
    schedule = MixingSchedule(
        identity["vocab_size"], identity["mask_token_id"], config.diffusion.shift
    )
    require_same(identity, weights_identity(config, schedule), folder, "")
    size = config.model.vocab_size
    require(
        size in (None, schedule.vocab_size), "vocab_size", size,
        f"{folder} has {schedule.vocab_size}.",
    )  # fmt: skip
    return OpenedRun(
        config, folder, position["step"], position["consumed_tokens"],
        schedule.vocab_size, schedule.mask_token_id,
    )  # fmt: skip


def export_run(
    load: Path,
    folder: Path,
    *,
    step: int | None = None,
    dtype: Literal["as-trained", "bfloat16", "float32"] = "as-trained",
    max_shard_size: str = "5GB",
    tokenizer_model: str | None = None,
) -> Converted:
    """Write a checkpoint as a folder that transformers loads without this project.

    `dtype` is that of all but the norm gains. Raises `ValueError` naming flag, file or key, and
    writes nothing then.
    """
    refuse_occupied(folder, "hf")
    max_bytes = parse_size(max_shard_size)
    run = open_run(load, step)
    path = tokenizer_model or run.config.data.tokenizer_model
    data = run.config.data
    tokenizer = None
    if path is not None:
        tokenizer = load_tokenizer(
            path, mask_token_id=data.mask_token_id, pad_token_id=data.pad_token_id
        )
    ids = {name: getattr(tokenizer, f"{name}_id", id) for name, id in PUBLISHED_IDS.items()}
    if tokenizer is None and data.pad_token_id is not None:
        ids["pad"] = data.pad_token_id
    ids["mask"] = run.mask_token_id
    stored = StoredParameters(run.folder)
    parameters, trained = _checked_parameters(stored, run)
    target = trained if dtype == "as-trained" else getattr(torch, dtype)
    fields = published_fields(run.config, run.vocab_size, ids, dtype_name(target))
    with staged(folder) as temporary:
        count = _write_exported(temporary, stored, parameters, run, target, max_bytes)
        for name, contents in (("config", fields), ("generation_config", generation_fields(ids))):
            (temporary / f"{name}.json").write_text(json.dumps(contents, indent=2) + "\n")
        copy_code(temporary)
        if tokenizer is not None:
            _write_tokenizer(temporary, tokenizer)
        card = model_card(
            folder.resolve().name, run.config, fields, load / "metrics.jsonl", step=run.step,
            consumed_tokens=run.consumed_tokens, num_parameters=count,
            has_tokenizer=tokenizer is not None,
        )  # fmt: skip
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return Converted(folder, count, dtype_name(target))


def _checked_parameters(
    stored: StoredParameters, run: OpenedRun
) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
    """Shapes by name without padding rows, and the dtype the run was trained in."""
    where, model = str(run.folder), run.config.model
    wanted = parameter_shapes(model, run.vocab_size)
    found = {name: stored.facts(name) for name in stored.names()}
    if not model.untie_embeddings_and_output_weights:
        found.pop(HEAD, None)
    for name in (EMBEDDING, HEAD):
        if name in found and found[name][0][0] >= run.vocab_size:
            (_, *rest), dtype = found[name]
            found[name] = ((run.vocab_size, *rest), dtype)
    trained = common_dtype({name: facts[1] for name, facts in found.items()}, where)
    require_layout(found, with_dtypes(wanted, trained), where)
    return wanted, trained


def _write_exported(
    folder: Path,
    stored: StoredParameters,
    parameters: Mapping[str, tuple[int, ...]],
    run: OpenedRun,
    dtype: torch.dtype,
    max_bytes: int,
) -> int:
    """The safetensors of a folder, compared with their source; returns the parameters in them."""
    heads = run.config.model.num_attention_heads
    layout = with_dtypes(published_shapes(run.config.model, run.vocab_size), dtype)
    writer = ShardWriter(folder, layout, max_bytes)
    sources: dict[str, bytes] = {}
    for name in progress(parameters, "export"):
        whole = stored.read(name, parameters[name])
        if not is_norm_gain(name):
            whole = whole.to(dtype)
        sources[name] = digest(whole)
        for key, part in to_published(name, whole, heads).items():
            writer.write(key, part)
    assert not writer.missing, f"not written: {sorted(writer.missing)[:5]}"
    weights = PublishedWeights(folder)
    for name in progress(parameters, "read back"):
        if digest(from_published(name, weights, heads)) != sources[name]:
            raise RuntimeError(f"{name} was not written bit for bit to {folder}")
    return sum(torch.Size(shape).numel() for shape in parameters.values())


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's files under their usual names, with the configuration transformers needs."""
    source = Path(tokenizer.path)
    for file in tokenizer_files(source.parent):
        if file.suffix != ".model":
            shutil.copyfile(file, folder / file.name)
    name = source.name if source.suffix == ".model" else "tokenizer.json"
    shutil.copyfile(source, folder / name)
    config = folder / "tokenizer_config.json"
    if name == "tokenizer.json" and not config.is_file():
        ids = {word: getattr(tokenizer, f"{word}_id") for word in PUBLISHED_IDS}
        spelled = {
            f"{word}_token": tokenizer.backend.id_to_token(id)  # type: ignore[attr-defined]
            for word, id in ids.items()
            if id is not None
        }
        contents = {"tokenizer_class": "PreTrainedTokenizerFast", **spelled}
        config.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
