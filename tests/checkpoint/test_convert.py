"""Hugging Face folders into training runs and back: the same bits and numbers, or an error."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext.checkpoint.convert import Converted
from megatron_ext.checkpoint.export_hf import export_run
from megatron_ext.checkpoint.hf_config import (
    PUBLISHED_IDS,
    diffusion_config,
    model_config,
    published_fields,
)
from megatron_ext.checkpoint.hf_names import is_norm_gain, published_shapes
from megatron_ext.checkpoint.import_hf import import_folder
from megatron_ext.checkpoint.manifest import complete_steps
from megatron_ext.cli import load_config
from megatron_ext.config import Config
from megatron_ext.data.batches import BatchSource, RankPosition
from megatron_ext.data.mock import MockDataset
from megatron_ext.diffusion.visibility import attention_mask_from_visibility
from megatron_ext.hf import GiddConfig, GiddForDiffusionLM, modeling_gidd
from megatron_ext.inference.verify import verify_conversion
from megatron_ext.kernels.gidd_loss import gidd_loss
from tests.checkpoint.continued import LAYOUTS, continue_at_layouts
from tests.distributed import run_ranks
from tests.training.tiny import NUM_VALIDATION

ROOT = Path(__file__).resolve().parents[2]
HF_CONFIGS = ROOT / "tests" / "golden" / "hf_configs"
SPECIAL = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>", "mask": "<|mask|>"}
VOCABULARY = 61
"""Not a multiple of any tp, so that tables are padded."""
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 32, "attention_bias": True,
    "mlp_bias": True, "weight_scaling": 1.0, "head_scaling": 16.0,
}  # fmt: skip


def write_published(folder: Path, shard: str = "40KB", **changes: Any) -> Path:
    """A folder as transformers writes it: random weights everywhere, bfloat16, several shards."""
    model = GiddForDiffusionLM(GiddConfig(**SHAPE, **{"noise_type": -2.0, **changes}))
    numbers = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=numbers) * 0.2
        parameter.data = values if is_norm_gain(name) else values.bfloat16()
    model.save_pretrained(folder, max_shard_size=shard)
    words = {f"w{i}": i + 4 for i in range(VOCABULARY - 4)}
    vocabulary = {token: i for i, token in enumerate(SPECIAL.values())} | words
    tokenizer = Backend(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    contents = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(contents))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("imported") / "run"
    import_folder(published, run)
    return run


@pytest.fixture(scope="module")
def exported(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_run(imported, folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bits(mine: Path, theirs: Path) -> None:
    ours, wanted = tensors_of(mine), tensors_of(theirs)
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_importing_and_exporting_returns_the_same_bits(published: Path, exported: Path) -> None:
    assert_same_bits(exported, published)
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    sizes = [sum(x.nbytes for x in load_file(exported / name).values()) for name in files]
    assert max(sizes) <= 40_000 and sum(sizes) == index["metadata"]["total_size"]
    tokenizer = [(folder / "tokenizer.json").read_bytes() for folder in (exported, published)]
    assert tokenizer[0] == tokenizer[1]


def test_an_exported_folder_loads_without_this_project(published: Path, exported: Path) -> None:
    code = sorted(exported.glob("*.py"))
    assert [path.name for path in code] == sorted(
        path.name for path in Path(modeling_gidd.__file__).parent.glob("*_gidd.py")
    )
    for path in code:
        assert not path.is_symlink()
        assert "megatron" not in "".join(
            line for line in path.read_text().splitlines() if "import" in line
        )
    theirs = GiddForDiffusionLM.from_pretrained(published)
    ours = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert type(ours) is not GiddForDiffusionLM
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    options = {"max_length": 6, "steps": 4, "block_length": 4, "seed": 2}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    assert (exported / "generation_config.json").is_file()
    for name in ("bos", "eos", "pad"):
        id = getattr(ours.generation_config, f"{name}_token_id")
        assert id == getattr(tokenizer, f"{name}_token_id") is not None
    assert tokenizer.mask_token_id == 3 and tokenizer.convert_tokens_to_ids("w7") == 11


@pytest.fixture(scope="module")
def at_layouts(imported: Path) -> dict[int, tuple[float, Config]]:
    """What four ranks made of the imported run, and next to it a run with their checkpoints."""
    outcomes = run_ranks(4, continue_at_layouts, imported)
    (imported.parent / "saved" / "config.yaml").write_text((imported / "config.yaml").read_text())
    return outcomes[0]


@torch.no_grad()
def monte_carlo_bound(folder: Path, config: Config) -> float:
    """The Hugging Face model's bound in float32 on the noise of `validation_bound`."""
    model = GiddForDiffusionLM.from_pretrained(folder).float().eval()
    schedule = model.mixing_schedule()
    dataset = MockDataset(VOCABULARY, config.model.seq_length, seed=77)
    source = BatchSource(dataset, schedule, config, RankPosition(0, 1, 0, 1), None)
    total = count = 0.0
    for draw in range(config.training.eval_draws):
        batch = source.validation(range(NUM_VALIDATION), draw, config.training.eval_draws)
        mask = attention_mask_from_visibility(batch.visibility, causal=False, causal_prompt=False)
        logits = model(batch.input_ids, mask).logits
        losses = gidd_loss(
            logits, batch.input_ids, batch.x0, batch.log_snr, schedule, impl="reference"
        )
        total += losses.elbo[batch.loss_mask].double().sum().item()
        count += batch.loss_mask.sum().item()
    return total / count


def test_the_bound_of_an_imported_model_is_the_hugging_face_models_at_every_layout(
    published: Path, at_layouts: dict[int, tuple[float, Config]]
) -> None:
    for step, (bound, config) in at_layouts.items():
        wanted = monte_carlo_bound(published, config)
        tolerance = 1e-2 if LAYOUTS[step][1] else 2e-6
        assert bound == pytest.approx(wanted, rel=tolerance), LAYOUTS[step]


@pytest.mark.usefixtures("at_layouts")
@pytest.mark.parametrize("step", LAYOUTS)
def test_weights_saved_at_any_layout_export_to_the_same_bits(
    step: int, published: Path, imported: Path, tmp_path: Path
) -> None:
    dtype = "as-trained" if LAYOUTS[step][1] else "bfloat16"
    done = export_run(
        imported.parent / "saved", tmp_path / "model", step=step, dtype=dtype,  # type: ignore[arg-type]
        max_shard_size="60KB",
    )  # fmt: skip
    assert_same_bits(done.folder, published)
    assert f"| step | {step:,} of" in (done.folder / "README.md").read_text()


@pytest.mark.usefixtures("at_layouts")
def test_a_float32_run_exports_its_own_number_format(
    published: Path, imported: Path, tmp_path: Path
) -> None:
    folder = export_run(imported.parent / "saved", tmp_path / "model", step=1).folder
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    for key, tensor in tensors_of(published).items():
        assert torch.equal(tensors_of(folder)[key], tensor.float()), key


def test_tied_embeddings_are_stored_once_and_train_as_one(tmp_path: Path) -> None:
    source = write_published(tmp_path / "model", shard="1GB", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(source)
    import_folder(source, tmp_path / "run")
    exported = export_run(tmp_path / "run", tmp_path / "exported").folder
    assert_same_bits(exported, source)
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is True
    agrees = verify_conversion(
        tmp_path / "run", exported, step=None, seq_length=16, new_tokens=4, seed=0
    )
    assert all(check.agrees for check in agrees), agrees


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "convert_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(tool: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    return tool.main()


def test_the_command_converts_and_verifies(
    tool: Any,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, folder = tmp_path / "run", tmp_path / "model"
    assert call(tool, monkeypatch, "import", "--hf", published, "--save", run) == 0
    assert call(tool, monkeypatch, "export", "--load", run, "--hf", folder) == 0
    assert_same_bits(folder, published)
    verify = ("verify", "--load", run, "--hf", folder, "--seq-length", 24, "--new-tokens", 8)
    assert call(tool, monkeypatch, *verify) == 0
    assert capsys.readouterr().out.count("  agrees") == 4
    assert call(tool, monkeypatch, "import", "--hf", published, "--save", run) == 2
    assert "--save" in capsys.readouterr().err


def change_weight(folder: Path, key: str, change: Callable[[Tensor], Tensor]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if key in tensors:
            tensors[key] = change(tensors[key]).contiguous()
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(key)


def change_field(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DIFFERENCES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "one_matrix": (
        lambda folder: change_weight(
            folder, "model.layers.2.self_attn.v_proj.weight", lambda x: x * 1.02
        ),
        {"logits", "loss per token", "bound per token"},
    ),
    "noise": (
        lambda folder: change_field(folder, noise_type=-1.9),
        {"loss per token", "bound per token"},
    ),
    "multiplier": (lambda folder: change_field(folder, resid_scale=4.1), {"logits"}),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_verify_finds_what_differs(name: str, imported: Path, copy: Path) -> None:
    change, expected = DIFFERENCES[name]
    change(copy)
    checks = verify_conversion(imported, copy, step=None, seq_length=24, new_tokens=4, seed=0)
    differing = {check.name for check in checks if not check.agrees}
    assert expected <= differing
    assert name != "noise" or "logits" not in differing


def without_key(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = index["weight_map"].pop("model.layers.1.mlp.up_proj.bias")
    path.write_text(json.dumps(index))
    tensors = load_file(folder / name)
    del tensors["model.layers.1.mlp.up_proj.bias"]
    save_file(tensors, folder / name, metadata={"format": "pt"})


def with_key(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "extra.safetensors"
    path.write_text(json.dumps(index))
    save_file({"model.extra": torch.zeros(2)}, folder / "extra.safetensors")


def truncated(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    path.write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def unnamed_mask(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<absent>"}))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_config": (lambda folder: (folder / "config.json").unlink(), "--hf .* no config.json"),
    "not_json": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json cannot be read",
    ),
    "other_model": (
        lambda folder: change_field(folder, model_type="llama"), "model_type is 'llama'"
    ),
    "causal": (lambda folder: change_field(folder, is_causal=True), "is_causal is True"),
    "rotary": (
        lambda folder: change_field(folder, rope_parameters={"rope_type": "yarn"}),
        "rope_parameters",
    ),
    "rotary_base": (
        lambda folder: change_field(folder, rope_parameters={"rope_theta": 5e5}),
        r"rope_parameters is {'rope_theta': 500000.0} and rope_theta 10000",
    ),
    "noise": (lambda folder: change_field(folder, noise_type="masked"), "a noise"),
    "vocabulary": (
        lambda folder: change_field(folder, vocab_size=60),
        r"embed_tokens\.weight has shape \(61, 32\), the model \(60, 32\)",
    ),
    "missing_key": (without_key, r"1 missing tensors \(model\.layers\.1\.mlp\.up_proj\.bias\)"),
    "unknown_key": (with_key, r"1 unknown tensors \(model\.extra\)"),
    "shape": (
        lambda folder: change_weight(folder, "model.layers.0.self_attn.v_bias", lambda x: x.t()),
        r"layers\.0\.self_attn\.v_bias has shape \(8, 4\), the model \(4, 8\)",
    ),
    "gain_dtype": (
        lambda folder: change_weight(folder, "model.norm.weight", lambda x: x.bfloat16()),
        r"model\.norm\.weight is bfloat16 instead of float32",
    ),
    "mixed_dtype": (
        lambda folder: change_weight(folder, "lm_head.weight", lambda x: x.float()),
        "is float32|lm_head.weight",
    ),
    "half": (
        lambda folder: [
            change_weight(folder, key, lambda x: x.half())
            for key, x in tensors_of(folder).items()
            if not is_norm_gain(key)
        ],
        "is float16; weights must be bfloat16 or float32",
    ),
    "truncated": (truncated, r"model-00002-of-\d+\.safetensors is not a complete safetensors"),
    "absent_shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(),
        r"model-00001-of-\d+\.safetensors is not a complete",
    ),
    "outside": (outside, "'../other.safetensors' is not a file of this folder"),
    "pickled": (pickled, "only safetensors are read"),
    "unnamed_mask": (unnamed_mask, "--mask-token-id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_is_not_a_model_is_refused_and_nothing_is_written(
    name: str, copy: Path, tmp_path: Path
) -> None:
    damage, message = BAD_FOLDERS[name]
    damage(copy)
    with pytest.raises(ValueError, match=message):
        import_folder(copy, tmp_path / "out" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def set_run(run: Path, **sections: dict[str, Any]) -> None:
    from megatron_ext.cli import dump_config

    path = run / "config.yaml"
    dump_config(load_config(path).with_sections(**sections), path)


def flip(run: Path) -> None:
    path = run / "iter_0000000" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD_RUNS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_config": (lambda run: (run / "config.yaml").unlink(), "--load .* no config.yaml"),
    "no_checkpoint": (lambda run: shutil.rmtree(run / "iter_0000000"), "--load .* latest is 0"),
    "damaged": (flip, "is damaged: __0_0.distcp does not match"),
    "another_model": (
        lambda run: set_run(run, model={"num_layers": 2}), "--num-layers is 2: .* has 4"
    ),
    "activation": (lambda run: set_run(run, model={"activation": "gelu"}), "--activation is"),
    "scale": (lambda run: set_run(run, diffusion={"mixing_scale": 0.5}), "--mixing-scale is 0.5"),
    "causal_prompt": (
        lambda run: set_run(run, diffusion={"causal_prompt_attn": True}), "--causal-prompt-attn"
    ),
    "autoregressive": (
        lambda run: set_run(run, diffusion={"objective": "ar", "mixing_shift": 0.0}),
        "--objective is 'ar'",
    ),
    "no_tokenizer": (
        lambda run: set_run(run, data={"tokenizer_model": "/absent"}), "--tokenizer-model /absent"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_run_that_the_format_cannot_hold_is_refused_and_nothing_is_written(
    name: str, imported: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(imported, tmp_path / "run")
    damage, message = BAD_RUNS[name]
    damage(run)
    with pytest.raises(ValueError, match=message):
        export_run(run, tmp_path / "out" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_flags_without_a_meaning_and_occupied_folders_are_refused(
    published: Path, imported: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    for target in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(ValueError, match="--save is .*not empty"):
            import_folder(published, target)
        with pytest.raises(ValueError, match="--hf is .*not empty"):
            export_run(imported, target)
    for size in ("0GB", "five", "5", "-1GB"):
        with pytest.raises(ValueError, match="--max-shard-size"):
            export_run(imported, tmp_path / "out", max_shard_size=size)
    with pytest.raises(ValueError, match="--ckpt-step is 7"):
        export_run(imported, tmp_path / "out", step=7)
    with pytest.raises(ValueError, match="--mask-token-id is 61"):
        import_folder(published, tmp_path / "out", mask_token_id=61)
    with pytest.raises(ValueError, match="--new-tokens is 31"):
        verify_conversion(imported, published, step=None, seq_length=8, new_tokens=31, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "file").read_text() == "keep"


def test_an_error_halfway_leaves_nothing(
    published: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while weights are written."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_ext.checkpoint.stored.save_config", full)
    with pytest.raises(OSError, match="No space"):
        import_folder(published, tmp_path / "run")
    monkeypatch.setattr("megatron_ext.checkpoint.export_hf.copy_code", full)
    with pytest.raises(OSError, match="No space"):
        export_run(imported, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_target_and_a_folder_without_a_tokenizer_work(copy: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    run = tmp_path / "run"
    run.mkdir()
    done = import_folder(copy, run)
    assert done == Converted(run, done.num_parameters, "bfloat16") and complete_steps(run) == [0]
    config = load_config(run / "config.yaml")
    assert (config.data.mask_token_id, config.data.pad_token_id) == (3, 2)
    assert config.data.tokenizer_model is None
    assert config.diffusion.objective == "hybrid" and config.diffusion.mixing_shift == -2.0
    other = tmp_path / "other"
    import_folder(copy, other, mask_token_id=60, pad_token_id=59)
    exported = export_run(other, tmp_path / "exported").folder
    fields = json.loads((exported / "config.json").read_text())
    assert (fields["mask_token_id"], fields["pad_token_id"]) == (60, 59)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert model.mixing_schedule().mask_token_id == 60


@pytest.mark.parametrize("path", sorted(HF_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_released_configurations_survive_the_way_there_and_back(path: Path) -> None:
    recorded = json.loads(path.read_text())
    fields = recorded["config_json_use_diff"]
    model = model_config(fields)
    config = Config(model=model, diffusion=diffusion_config(fields))
    returned = published_fields(config, model.vocab_size or 0, PUBLISHED_IDS, "bfloat16")
    of_training = {"emb_init_scale", "transformers_version"}
    assert returned.keys() == fields.keys() - {"transformers_version"}
    for name in fields.keys() - of_training:
        assert returned[name] == fields[name], name
    ours = published_shapes(replace(model, num_layers=1), model.vocab_size or 0)
    dtypes = {True: "torch.float32", False: "torch.bfloat16"}
    wanted = {key: (tuple(shape), dtype) for key, (shape, dtype) in recorded["state_dict"].items()}
    assert {key: (shape, dtypes[is_norm_gain(key)]) for key, shape in ours.items()} == wanted


def test_the_model_card_says_how_the_model_was_trained_and_what_it_reached(
    imported: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(imported, tmp_path / "run")
    records = [
        {"step": 0, "valid/elbo": 4.25, "valid/elbo_standard_error": 0.5, "valid/elbo_x": None},
        {"step": 5, "valid/elbo": 1.0},
    ]
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 0, "val']))
    card = (export_run(run, tmp_path / "my-model").folder / "README.md").read_text()
    assert "# my-model" in card and "hybrid, mixing shift -2" in card
    assert "4.2500 ± 0.5000 nats/token at step 0" in card
    assert "1.0000" not in card, "a later step's figures are not this checkpoint's"


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.conversion_memory", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    small, large = json.loads(result.stdout.splitlines()[-1])
    assert large["bytes"] > 1.9 * small["bytes"] > 100e6
    for way in ("import", "export"):
        assert large[way] < large["bytes"] / 4, result.stdout
        assert large[way] < small[way] + small["bytes"] / 4, result.stdout
