"""A folder in the published Hugging Face format as a training run at step 0."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

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
from megatron_ext.checkpoint.hf_config import PUBLISHED_IDS, diffusion_config, model_config
from megatron_ext.checkpoint.hf_folder import PublishedWeights, read_json, tokenizer_files
from megatron_ext.checkpoint.hf_names import (
    from_published,
    parameter_shapes,
    published_shapes,
    to_published,
)
from megatron_ext.checkpoint.identity import weights_identity
from megatron_ext.checkpoint.stored import StoredParameters, write_checkpoint
from megatron_ext.cli import dump_config
from megatron_ext.config import Config, require
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.diffusion.schedule import MixingSchedule


def import_folder(
    folder: Path,
    save: Path,
    *,
    mask_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> Converted:
    """Write a run folder at step 0 with the weights, the model and the noise of a published one.

    Special ids come from the arguments, else from the folder's tokenizer; a folder without one has
    the published ids. Raises `ValueError` naming flag, file or key, and writes nothing then.
    """
    refuse_occupied(save, "save")
    require((folder / "config.json").is_file(), "hf", str(folder), "it has no config.json.")
    fields = read_json(folder / "config.json")
    model = model_config(fields)
    assert model.vocab_size is not None
    weights = PublishedWeights(folder)
    found = {key: (tensor.shape, tensor.dtype) for key, tensor in weights.tensors.items()}
    dtype = common_dtype(
        {key: tensor.dtype for key, tensor in weights.tensors.items()}, str(folder)
    )
    require_layout(
        found, with_dtypes(published_shapes(model, model.vocab_size), dtype), str(folder)
    )
    files = tokenizer_files(folder)
    tokenizer = load_tokenizer(
        folder, mask_token_id=mask_token_id, pad_token_id=pad_token_id
    ) if files else None  # fmt: skip
    ids = _special_ids(tokenizer, mask_token_id, pad_token_id)
    config = _imported_config(
        Config(model=model, diffusion=diffusion_config(fields)).with_sections(
            precision={"bf16": dtype == torch.bfloat16}
        ),
        str(save.resolve() / "tokenizer") if files else None, ids, tokenizer,
    )  # fmt: skip
    with staged(save) as temporary:
        count = _write_imported(temporary, config, weights, dtype, ids["mask"])
        if files:
            (temporary / "tokenizer").mkdir()
            for file in files:
                shutil.copyfile(file, temporary / "tokenizer" / file.name)
        dump_config(config, temporary / "config.yaml")
    return Converted(save, count, dtype_name(dtype))


def _special_ids(
    tokenizer: Tokenizer | None, mask: int | None, pad: int | None
) -> dict[str, int | None]:
    """Ids of bos, eos, pad and mask; the mask's is known, or its flag is asked for."""
    if tokenizer is None:
        given = {"mask": mask, "pad": pad}
        return {**PUBLISHED_IDS, **{name: id for name, id in given.items() if id is not None}}
    found = {name: getattr(tokenizer, f"{name}_id") for name in PUBLISHED_IDS}
    return {**found, "mask": tokenizer.special_id("mask")}


def _imported_config(
    config: Config, tokenizer_path: str | None, ids: dict[str, int | None], tokenizer: Any
) -> Config:
    """The configuration of an imported run."""
    size = config.model.vocab_size
    assert size is not None
    require(
        tokenizer is None or tokenizer.vocab_size <= size, "hf", tokenizer_path,
        f"config.json has vocab_size {size}, its tokenizer more ids.",
    )  # fmt: skip
    for name in ("mask", "pad"):
        id = ids[name]
        require(
            id is None or 0 <= id < size, f"{name}_token_id", id, f"the vocabulary has {size} ids."
        )
    return config.with_sections(
        data={
            "tokenizer_model": tokenizer_path,
            "mask_token_id": ids["mask"],
            "pad_token_id": ids["pad"],
        },
        noise={} if ids["pad"] is not None else {"max_empty_fraction": 0.0},
    )


def _write_imported(
    root: Path, config: Config, weights: PublishedWeights, dtype: torch.dtype, mask_id: int | None
) -> int:
    """The checkpoint of step 0 below `root`, compared with its source; returns its parameters."""
    model = config.model
    assert model.vocab_size is not None and mask_id is not None
    heads, vocab_size = model.num_attention_heads, model.vocab_size
    parameters = with_dtypes(parameter_shapes(model, vocab_size), dtype)
    # megatron-core stores tied tables under both names.
    layout = parameters | {HEAD: parameters[EMBEDDING]}
    is_tied = not model.untie_embeddings_and_output_weights
    sources: dict[str, bytes] = {}

    def read(name: str) -> Tensor:
        whole = from_published(EMBEDDING if is_tied and name == HEAD else name, weights, heads)
        for key, part in to_published(name, whole, heads).items():
            sources[key] = digest(part)
        bar.update()
        return whole

    folder = manifest.begin(root, 0)
    schedule = MixingSchedule(
        vocab_size, mask_id, config.diffusion.shift, config.diffusion.mixing_scale,
        config.diffusion.min_log_snr, config.diffusion.max_log_snr,
    )  # fmt: skip
    common = {
        "position": {"step": 0, "consumed_samples": 0, "consumed_tokens": 0},
        "weights_identity": weights_identity(config, schedule),
        "run_identity": None,
    }
    with tqdm(total=len(layout), desc="import", unit="tensor", disable=None) as bar:
        write_checkpoint(folder, layout, model.num_layers, read, common)
    stored = StoredParameters(folder)
    for name in progress(layout, "read back"):
        whole = stored.read(name, layout[name][0])
        for key, part in to_published(name, whole, heads).items():
            if digest(part) != sources[key]:
                raise RuntimeError(f"{key} was not stored bit for bit in {folder}")
    names = [str(path.relative_to(folder)) for path in manifest.payload_files(folder)]
    manifest.publish(root, 0, manifest.describe_files(folder, names))
    return sum(torch.Size(shape).numel() for shape, _ in parameters.values())
