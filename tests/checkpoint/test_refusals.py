"""What cannot be loaded is refused by name: damage, absence, another model, another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.training import CheckpointWriter, Position
from megatron_ext.config import Config
from megatron_ext.parallel.groups import shutdown_parallel
from megatron_ext.training.loop import Trainer
from tests.checkpoint.segments import train_segment, with_folders
from tests.training.tiny import split, tiny_config

pytestmark = pytest.mark.usefixtures("single_rank")


def small_config(**sections: dict[str, Any]) -> Config:
    merged = {**sections, "model": {"num_layers": 2, **sections.get("model", {})}}
    return tiny_config(**merged)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of step 1."""
    root = tmp_path_factory.mktemp("saved")
    train_segment(with_folders(small_config(), save=root), 1)
    shutdown_parallel()
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def load(root: Path, config: Config, **checkpoint: Any) -> Trainer:
    trainer = Trainer.build(with_folders(config, load=root, **checkpoint))
    trainer.load()
    return trainer


def shard(root: Path) -> Path:
    return max(root.glob("iter_0000001/*.distcp"), key=lambda path: path.stat().st_size)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "does not match its checksum"),
        (truncate, "bytes instead of"),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_a_damaged_shard_is_named(damage: Callable[[Path], Any], words: str, copy: Path) -> None:
    path = shard(copy)
    damage(path)
    with pytest.raises(ValueError, match=rf"--load.*{path.name} .*{words}"):
        load(copy, small_config())


def test_a_damaged_common_file_is_named(copy: Path) -> None:
    """Newer versions of megatron-core keep no common.pt."""
    names = [name for name in ("common.pt", ".metadata") if (copy / "iter_0000001" / name).exists()]
    flip_a_byte(copy / "iter_0000001" / names[0])
    with pytest.raises(ValueError, match=rf"{names[0]} does not match its checksum"):
        load(copy, small_config())


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--load.*no complete checkpoint"):
        load(tmp_path, small_config())


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"--ckpt-step is 7: .* complete steps: 1\."):
        load(saved, small_config(), ckpt_step=7)


ANOTHER_MODEL: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "layers": ({"model": {"num_layers": 4}}, "--num-layers is 4: .* has 2"),
    "width": ({"model": {"hidden_size": 64}}, "--hidden-size is 64: .* has 32"),
    "heads": ({"model": {"num_attention_heads": 2}}, "--num-attention-heads is 2: .* has 4"),
    "ffn": ({"model": {"ffn_hidden_size": 64}}, "--ffn-hidden-size is 64: .* has 128"),
    "vocabulary": ({"model": {"vocab_size": 60}}, "--vocab-size is 60: .* has 61"),
    "mask": ({"data": {"mask_token_id": 1}}, "--mask-token-id is 1: .* has 3"),
    "activation": ({"model": {"activation": "gelu"}}, "--activation is 'gelu'"),
    "tied": (
        {"model": {"untie_embeddings_and_output_weights": False}},
        "--untie-embeddings-and-output-weights is False",
    ),
    "no_bias": ({"model": {"kv_bias_token": False}}, "--kv-bias-token is False"),
}
ANOTHER_RUN: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "softcap": ({"model": {"attention_softcap": None}}, "--attention-softcap is None: .*--fine"),
    "length": ({"model": {"seq_length": 16}}, "--seq-length is 16: .* has 32.*--finetune"),
    "optimizer": ({"optimizer": {"optimizer": "adamw"}}, "--optimizer is 'adamw': .* 'laprop'"),
    "plain": (split(use_distributed_optimizer=False), "--use-distributed-optimizer is False"),
    "bf16": ({"precision": {"bf16": True}}, "--bf16 is True: .* has False"),
}


@pytest.mark.parametrize("name", [*ANOTHER_MODEL, *ANOTHER_RUN])
def test_a_checkpoint_of_another_model_or_run_is_refused(name: str, saved: Path) -> None:
    sections, message = (ANOTHER_MODEL | ANOTHER_RUN)[name]
    with pytest.raises(ValueError, match=message):
        load(saved, small_config(**sections))


def test_another_global_batch_size_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="--global-batch-size is 4: .* consumed 8 samples"):
        load(saved, small_config(training={"global_batch_size": 4}))


@pytest.mark.parametrize("name", ANOTHER_RUN)
def test_finetuning_takes_the_weights_into_another_run(name: str, saved: Path) -> None:
    before = load(saved, small_config())
    weights = [p.detach().clone() for p in before.model[0].parameters()]
    trainer = load(saved, small_config(**ANOTHER_RUN[name][0]), finetune=True)
    assert trainer.position == Position(0, 0, 0)
    for mine, theirs in zip(trainer.model[0].parameters(), weights, strict=True):
        assert torch.equal(mine, theirs.to(mine.dtype))
    # The first update must start from these weights, not from the optimizer's copy of others.
    trainer.train_step(trainer.source.step(0))
    for mine, theirs in zip(trainer.model[0].parameters(), weights, strict=True):
        assert torch.allclose(mine.float(), theirs.float(), atol=0.02)


@pytest.mark.parametrize("name", ["vocabulary", "activation"])
def test_finetuning_refuses_another_model(name: str, saved: Path) -> None:
    sections, message = ANOTHER_MODEL[name]
    with pytest.raises(ValueError, match=message):
        load(saved, small_config(**sections), finetune=True)


def test_weights_alone_can_be_finetuned_but_not_continued(tmp_path: Path) -> None:
    trainer = Trainer.build(small_config())
    CheckpointWriter(tmp_path).save(trainer.model, None, Position(0, 0, 0))
    with pytest.raises(ValueError, match="holds weights only; give --finetune"):
        load(tmp_path, small_config())
    load(tmp_path, small_config(), finetune=True)


def test_retention_keeps_the_newest_and_latest_names_it(tmp_path: Path) -> None:
    trainer = Trainer.build(small_config())
    writer = CheckpointWriter(tmp_path, keep_last=2)
    for step in range(1, 5):
        writer.save(trainer.model, trainer.optimizer, Position(step, 8 * step, 0))
        kept = manifest.complete_steps(tmp_path)
        assert kept == list(range(max(1, step - 1), step + 1))
        assert manifest.latest_step(tmp_path) == step
    assert len(list(tmp_path.glob("iter_*"))) == 2


def test_retention_never_deletes_what_latest_names(tmp_path: Path) -> None:
    trainer = Trainer.build(small_config())
    for step in (1, 2, 3):
        CheckpointWriter(tmp_path).save(trainer.model, trainer.optimizer, Position(step, 0, 0))
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save(trainer.model, trainer.optimizer, Position(2, 0, 0))
    assert manifest.latest_step(tmp_path) == 2
    assert 2 in manifest.complete_steps(tmp_path)


def test_an_asynchronous_save_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    trainer = Trainer.build(small_config())
    trainer.train_step(trainer.source.step(0))
    trainer.train_step(trainer.source.step(1))
    weights = [p.detach().clone() for p in trainer.model[0].parameters()]
    writer = CheckpointWriter(tmp_path, async_save=True)
    writer.save(trainer.model, trainer.optimizer, trainer.position)
    # Training goes on while the background process writes; nothing is visible before its end.
    assert manifest.latest_step(tmp_path) is None
    assert manifest.partial_folder(tmp_path, 2).is_dir()
    trainer.train_step(trainer.source.step(2))
    writer.finish()
    assert manifest.latest_step(tmp_path) == 2
    assert not manifest.partial_folder(tmp_path, 2).exists()
    loaded = load(tmp_path, small_config())
    assert loaded.position.step == 2
    for mine, saved, current in zip(
        loaded.model[0].parameters(), weights, trainer.model[0].parameters(), strict=True
    ):
        assert torch.equal(mine, saved)
        assert not torch.equal(mine, current)
