"""`generate` against the recorded deterministic generations, token by token."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.hf import GiddForDiffusionLM
from megatron_ext.hf.sampling_gidd import Step
from megatron_ext.hf.steps_gidd import (
    SamplingConfig,
    ancestral_step,
    confidence_gain,
    filtered_probs,
    log_snr_grid,
    uniforms,
)
from tests.hf.golden import arrays, generations, recorded_model


def settings(entry: dict) -> dict:
    return {
        "max_length": entry["max_length"],
        "block_length": entry["block_length"],
        "steps": entry["steps"],
        "temperature": entry["temperature"],
        "sampling_method": entry["method"],
        "noise_schedule": entry["sched"],
        "tokens_per_step": entry["tps"],
        "mask_token_id": 3,
    }


def with_prior(entry: dict, recorded: dict, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    model = recorded_model(entry["model"], noise_type=entry["noise_type"])
    prior = torch.from_numpy(recorded[entry["key"] + "x_prior"])
    monkeypatch.setattr(model, "_sample_prior", lambda *args: prior)
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("entry", generations(), ids=lambda entry: entry["key"])
def test_every_step_of_a_recorded_generation_is_reproduced(
    entry: dict, use_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, key = arrays("generation"), entry["key"]
    model = with_prior(entry, recorded, monkeypatch)
    prompt = torch.from_numpy(recorded[key + "prompt"])
    steps: list[Step] = []
    output = model.generate(
        prompt, eos_token_id=entry["eos_token_id"], observer=steps.append, use_cache=use_cache,
        **settings(entry),
    )  # fmt: skip
    assert torch.equal(output, torch.from_numpy(recorded[key + "output"]))
    assert torch.equal(
        torch.stack([step.ids for step in steps]), torch.from_numpy(recorded[key + "z_s"])
    )
    gains = torch.stack([step.gain for step in steps if step.gain is not None])
    torch.testing.assert_close(
        gains, torch.from_numpy(recorded[key + "p_delta"]), rtol=1e-3, atol=1e-7
    )


def test_generation_pads_from_the_first_eos_and_min_length_suppresses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded, entry = arrays("generation"), generations()[0]
    model = with_prior(entry, recorded, monkeypatch)
    prompt = torch.from_numpy(recorded["g0_prompt"])
    eos = int(recorded["eos_case_eos"])
    options = settings(entry) | {"eos_token_id": eos}
    ended = model.generate(prompt, **options)
    assert torch.equal(ended, torch.from_numpy(recorded["eos_case_output"]))
    whole = model.generate(prompt, min_length=entry["max_length"], **options)
    assert torch.equal(whole, torch.from_numpy(recorded["minlen_case_output"]))


def test_noise_levels_are_the_recorded_grids() -> None:
    recorded = arrays("generation")
    schedule = MixingSchedule(97, 3, 0.0)
    names = [name for name in recorded if name.startswith("hf_grid_")]
    assert len(names) == 6
    for name in names:
        _, _, kind, steps = name.split("_")
        np.testing.assert_allclose(
            log_snr_grid(schedule, int(steps), kind), recorded[name], atol=1e-4
        )
    by_function = log_snr_grid(schedule, 8, lambda t: 1 - t)
    np.testing.assert_allclose(by_function, recorded["hf_grid_linear_8"], atol=1e-4)


def test_filters_are_the_recorded_ones() -> None:
    recorded = arrays("sampling_steps")
    logits = torch.from_numpy(recorded["logits"])
    names = [name for name in recorded if name.startswith("args_")]
    assert len(names) == 5
    for name in names:
        temperature, top_p, top_k = recorded[name].tolist()
        config = SamplingConfig(
            temperature=temperature,
            top_p=None if top_p < 0 else top_p,
            top_k=None if top_k < 0 else int(top_k),
        )
        expected = torch.from_numpy(recorded[name.replace("args", "probs")])
        torch.testing.assert_close(filtered_probs(logits, config), expected, atol=1e-5, rtol=0)


def test_the_posterior_is_the_recorded_one() -> None:
    recorded = arrays("sampling_steps")
    names = [name for name in recorded if name.startswith("a") and name.endswith("_p_hf")]
    assert len(names) == 10
    for name in names:
        key = name.removesuffix("p_hf")
        schedule = MixingSchedule(97, 3, float(recorded[key + "shift"]))
        logits = torch.from_numpy(recorded[key + "logits"]).clone()
        logits[..., 3] = -torch.inf
        ids = torch.from_numpy(recorded[key + "z"])
        levels = (
            torch.full(ids.shape, float(recorded[key + x])) for x in ("log_snr_t", "log_snr_s")
        )
        got = schedule.posterior(torch.softmax(logits, -1), ids, *levels)
        for kind in ("p_hf", "p_jax"):
            torch.testing.assert_close(
                got, torch.from_numpy(recorded[key + kind]), atol=1e-5, rtol=0
            )


def test_ancestral_draws_follow_the_recorded_probabilities() -> None:
    """The step draws from the posterior as a mixture, without ever holding it."""
    recorded, copies = arrays("sampling_steps"), 4000
    names = [name for name in recorded if name.startswith("a") and name.endswith("_p_hf")]
    p_values = []
    for number, name in enumerate(names):
        key = name.removesuffix("p_hf")
        schedule = MixingSchedule(97, 3, float(recorded[key + "shift"]))
        logits = torch.from_numpy(recorded[key + "logits"])[0].clone()
        logits[..., 3] = -torch.inf
        ids = torch.from_numpy(recorded[key + "z"])[0].long()
        new = ancestral_step(
            logits.repeat(copies, 1), ids.repeat(copies), schedule,
            (float(recorded[key + "log_snr_t"]), float(recorded[key + "log_snr_s"])),
            uniforms(number, 0, 0, (copies * len(ids), 3)), SamplingConfig(),
        ).view(copies, -1)  # fmt: skip
        for position, probs in enumerate(recorded[name][0].astype(np.float64)):
            expected = copies * probs / probs.sum()
            found = np.bincount(new[:, position].numpy(), minlength=97)
            assert not found[probs == 0].any()
            often = expected > 5
            cells = np.array([*expected[often], max(expected[~often].sum(), 1e-9)])
            counts = np.array([*found[often], found[~often].sum()])
            kept = cells > 5
            assert counts[~kept].sum() <= 20
            statistic = ((counts - cells) ** 2 / cells)[kept].sum()
            p_values.append(chi2.sf(statistic, max(kept.sum() - 1, 1)))
    assert len(p_values) == 60 and min(p_values) > 1e-4


def test_generate_takes_the_published_arguments_in_their_order() -> None:
    published = {
        "inputs": None, "max_length": 2048, "min_length": 0, "temperature": 1.0,
        "block_length": 128, "steps": 128, "top_p": None, "top_k": None, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "mask_token_id": None,
        "sampling_method": "ancestral", "noise_schedule": "cosine", "tokens_per_step": 1,
        "show_progress": False,
    }  # fmt: skip
    found = inspect.signature(GiddForDiffusionLM.generate).parameters.values()
    positional = {x.name: x.default for x in found if x.kind is x.POSITIONAL_OR_KEYWORD}
    del positional["self"]
    assert list(positional.items()) == list(published.items())


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model = recorded_model("A", noise_type=0.0)
    options = {"max_length": 4, "steps": 3, "block_length": 2, "seed": 1}
    quiet = model.generate(**options)
    assert capsys.readouterr().err == ""
    assert torch.equal(model.generate(show_progress=True, **options), quiet)
    assert "6/6" in capsys.readouterr().err


def test_adaptive_choices_under_the_reference_samplers_weights_are_the_recorded_ones() -> None:
    """The other reference sampler weights by the noise at the lowest log-SNR, not normalised."""
    recorded = arrays("sampling_steps")
    for index in range(3):
        key = f"ja{index}_"
        schedule = MixingSchedule(97, 3, float(recorded[key + "shift"]))
        ids, noised = (torch.from_numpy(recorded[key + x]) for x in ("z", "noise_mask"))
        logits = torch.from_numpy(recorded[key + "logits"]).clone()
        logits[..., 3] = -torch.inf
        gain = confidence_gain(logits, ids, schedule.pi_at(torch.tensor(-9.0), ids))
        expected = torch.from_numpy(recorded[key + "prob_delta"])
        torch.testing.assert_close(gain, expected, rtol=1e-4, atol=1e-9)
        chosen = (gain * noised).topk(int(recorded[key + "top_k"])).indices
        new = ids.scatter(1, chosen, logits.argmax(-1).gather(1, chosen))
        assert torch.equal(new, torch.from_numpy(recorded[key + "next"]).long())


def test_batching_prompts_of_different_lengths_does_not_change_a_row() -> None:
    model = recorded_model("A", noise_type=0.0)
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    longest = max(map(len, rows))
    inputs = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"max_length": 8, "block_length": 4, "steps": 6, "seed": 4, "eos_token_id": 96}
    for mode in ({"mode": "canvas"}, {"mode": "window", "look_ahead": 2}):
        for method in ("ancestral", "adaptive"):
            call = options | mode | {"sampling_method": method}
            together = model.generate(inputs, attention_mask=mask, **call)
            first = model.generate(torch.tensor(rows[:1]), **call)
            assert torch.equal(together[:1], first)
            uncached = model.generate(inputs, attention_mask=mask, use_cache=False, **call)
            assert torch.equal(together, uncached)
            with_other_rows = model.generate(
                torch.tensor([[0, 0, 0, 20, 21], *inputs[1:].tolist()]),
                attention_mask=torch.tensor([[0, 0, 0, 1, 1], *mask[1:].tolist()]),
                **call,
            )
            assert torch.equal(with_other_rows[1:], together[1:])


def test_a_whole_context_can_be_generated_and_the_last_block_is_cut() -> None:
    model = recorded_model("A", noise_type=-1000.0)
    prompt = torch.tensor([[5, 6, 7]])
    output = model.generate(prompt, block_length=20, steps=2, eos_token_id=96, seed=0)
    assert output.shape == (1, model.config.max_position_embeddings)
    assert torch.equal(output[:, :3], prompt)


def test_special_ids_are_the_configurations_where_they_are_not_given() -> None:
    own = {"bos_token_id": 90, "eos_token_id": 91, "pad_token_id": 92, "mask_token_id": 93}
    model = recorded_model("A", noise_type=-1000.0, **own)
    options = {"max_length": 8, "steps": 4, "block_length": 4, "seed": 3}
    configured = model.generate(**options)
    assert torch.equal(configured, model.generate(**options, **own))
    assert configured[0, 0] == 90
    model.generation_config.bos_token_id = 89
    assert model.generate(**options)[0, 0] == 89
    assert torch.equal(configured, model.generate(**options, **own))
    model.generation_config.eos_token_id = [91, 94]
    with pytest.raises(ValueError, match=r"eos_token_id .* is \[91, 94\]"):
        model.generate(**options)
    published = recorded_model("A", noise_type=-1000.0).generate(**options)
    given = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "mask_token_id": 3}
    assert torch.equal(published, model.generate(**options, **given))
    assert not torch.equal(configured, published)
