"""The Hugging Face model against the recorded outputs of the published one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_imports

from megatron_ext.hf import GiddConfig, GiddForDiffusionLM, modeling_gidd
from tests.hf.golden import arrays, recorded_model

HF_CONFIGS = Path(__file__).resolve().parents[1] / "golden/hf_configs"
MASKS = ("full", "prompt", "keypad", "random")


@pytest.mark.parametrize("performer", ["eager", "flex"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_hidden_states_and_logits_are_the_recorded_ones(name: str, performer: str) -> None:
    recorded = arrays(f"model_{name}_io")
    model = recorded_model(name, attn_performer=performer)
    ids = torch.from_numpy(recorded["input_ids"])
    for kind in MASKS if performer == "eager" else ("prompt",):
        mask = torch.from_numpy(recorded[f"mask_{kind}"])
        with torch.no_grad():
            output = model(ids, mask, output_hidden_states=True)
        hidden = torch.stack(output.hidden_states[1:])
        for got, key in (
            (output.logits, f"{kind}_logits"),
            (output.hidden_states[0], f"{kind}_embed"),
            (hidden, f"{kind}_layer_out"),
            (model.model.norm(hidden[-1]), f"{kind}_final_norm"),
        ):
            torch.testing.assert_close(got, torch.from_numpy(recorded[key]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["full", "prompt"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_attention_probabilities_are_the_recorded_ones(name: str, kind: str) -> None:
    recorded = arrays(f"model_{name}_io")
    model = recorded_model(name)
    ids, mask = (torch.from_numpy(recorded[key]) for key in ("input_ids", f"mask_{kind}"))
    with torch.no_grad():
        output = model(ids, mask, output_attentions=True)
    probs = torch.stack(output.attentions)
    assert probs.shape[-1] == ids.shape[1] + model.config.attention_bias
    torch.testing.assert_close(
        probs, torch.from_numpy(recorded[f"{kind}_attn_probs"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        output.logits, torch.from_numpy(recorded[f"{kind}_logits"]), atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match="output_attentions: attn_performer is 'flex'"):
        recorded_model(name, attn_performer="flex")(ids, mask, output_attentions=True)


@pytest.mark.parametrize("name", ["A", "B"])
def test_positions_and_bfloat16_follow_the_recorded_model(name: str) -> None:
    recorded = arrays(f"model_{name}_io")
    model = recorded_model(name)
    ids, mask = (torch.from_numpy(recorded[key]) for key in ("input_ids", "mask_prompt"))
    shifted = torch.from_numpy(recorded["position_ids_shift5"])
    with torch.no_grad():
        logits = model(ids, mask, shifted).logits
        jax = model(ids, mask).logits
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.data = parameter.data.bfloat16()
        low = model(ids, mask).logits
    torch.testing.assert_close(
        logits, torch.from_numpy(recorded["shift5_logits"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        jax, torch.from_numpy(recorded["jax_prompt_logits"]), atol=1e-4, rtol=0
    )
    expected = torch.from_numpy(recorded["bf16_prompt_logits"])
    assert low.dtype == torch.bfloat16
    rms = (low.float() - expected).square().mean().sqrt()
    assert rms <= 5e-2 * expected.square().mean().sqrt()


def test_sdpa_is_exact_without_a_soft_cap_and_refused_with_one() -> None:
    recorded = arrays("model_A_io")
    ids, mask = (torch.from_numpy(recorded[key]) for key in ("input_ids", "mask_prompt"))
    with torch.no_grad():
        eager = recorded_model("A", attn_soft_cap=None)(ids, mask).logits
        fused = recorded_model("A", attn_soft_cap=None, attn_performer="sdpa")(ids, mask).logits
    torch.testing.assert_close(fused, eager, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="attn_soft_cap"):
        recorded_model("A", attn_performer="sdpa")(ids, mask)


def test_gradients_reach_every_parameter() -> None:
    recorded = arrays("model_A_io")
    model = recorded_model("A")
    model(torch.from_numpy(recorded["input_ids"])).logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def states_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_saved_folder_loads_with_remote_code_and_returns_the_same_bits(tmp_path: Path) -> None:
    model = recorded_model("A", noise_type=1000.0)
    model.generation_config.eos_token_id = 95
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    names = {path.name for path in tmp_path.iterdir()}
    code = {path.name for path in Path(modeling_gidd.__file__).parent.glob("*_gidd.py")}
    assert code | {"model.safetensors.index.json"} <= names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_gidd.GiddForDiffusionLM"
    assert config["auto_map"]["AutoConfig"] == "configuration_gidd.GiddConfig"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(loaded) is not GiddForDiffusionLM and type(loaded).__name__ == "GiddForDiffusionLM"
    assert loaded.generation_config.eos_token_id == 95
    before, after = states_of(model), states_of(loaded)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    ids = torch.from_numpy(arrays("model_A_io")["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    options = {"max_length": 6, "steps": 4, "block_length": 4, "seed": 2}
    assert torch.equal(
        model.generate(ids[:, :5], **options), loaded.generate(ids[:, :5], **options)
    )
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).noise_type == 1000.0


def test_norm_gains_stay_in_float32_when_a_folder_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    recorded_model("A").save_pretrained(tmp_path)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    argument = "dtype" if version >= (4, 56) else "torch_dtype"
    loaded = GiddForDiffusionLM.from_pretrained(tmp_path, **{argument: torch.bfloat16})
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name


@pytest.mark.parametrize("path", sorted(HF_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_released_configurations_give_the_released_keys_shapes_and_fields(path: Path) -> None:
    recorded = json.loads(path.read_text())
    published = dict(recorded["config_json_use_diff"])
    ours = GiddConfig(**published).to_diff_dict()
    differing = {
        key
        for key, value in published.items()
        if key not in ("transformers_version", "dtype", "rope_scaling")
        and key in ours
        and ours[key] != value
    }
    assert differing == set()
    with torch.device("meta"):
        model = GiddForDiffusionLM(GiddConfig(**published))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, (shape, _) in recorded["state_dict"].items():
        assert shapes[name] == shape, name
    layers = published["num_hidden_layers"]
    assert len(shapes) == 14 * layers + 3


def test_defaults_are_the_published_ones() -> None:
    config = GiddConfig()
    expected = {
        "vocab_size": 131072, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "head_dim": 64, "is_causal": False,
        "attn_soft_cap": 30.0, "max_position_embeddings": 1024, "resid_scale": 4.0,
        "rms_norm_eps": 1e-6, "use_qk_norm": True, "init_scale": 0.4, "emb_init_scale": 0.1,
        "head_init_scale": 0.0, "weight_scaling": "fan_in", "head_scaling": 1.0,
        "bos_token_id": 0, "eos_token_id": 1, "rope_theta": 10000.0, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "attn_performer": "eager",
        "noise_type": 0.0, "min_log_snr": -9.0, "max_log_snr": 9.0,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected


def test_configurations_are_made_written_and_read_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GiddConfig(rope_theta=5e5).save_pretrained(tmp_path)
        assert GiddConfig.from_pretrained(tmp_path).rope_theta == 5e5


def test_an_unsupported_mode_is_refused_by_name() -> None:
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(ValueError, match="weight_scaling"):
        GiddForDiffusionLM(GiddConfig(**small))
    with pytest.raises(ValueError, match="attn_performer"):
        GiddForDiffusionLM(GiddConfig(**small, weight_scaling=1.0, attn_performer="fast"))
    for scaling in ({"rope_type": "linear", "factor": 2.0}, {"rope_theta": 5e5}):
        with pytest.raises(ValueError, match=r"rope_scaling is \{.* and rope_theta 10000"):
            GiddForDiffusionLM(GiddConfig(**small, weight_scaling=1.0, rope_scaling=scaling))
    with pytest.raises(ValueError, match="labels"):
        model = GiddForDiffusionLM(GiddConfig(**small, weight_scaling=1.0))
        model(torch.zeros(1, 3, dtype=torch.int64), labels=torch.zeros(1, 3))


def test_the_model_file_names_every_file_it_needs() -> None:
    """transformers 4 copies the files that it imports, but not what those import."""
    folder = Path(modeling_gidd.__file__).parent
    needed = {path.stem for path in folder.glob("*_gidd.py")} - {"modeling_gidd"}
    assert set(get_relative_imports(folder / "modeling_gidd.py")) == needed
