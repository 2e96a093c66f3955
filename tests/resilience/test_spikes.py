"""A loss spike is recognised, reported by sample and noise level, and left out as asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.cli import load_config
from megatron_ext.config import Config, ResilienceConfig
from megatron_ext.data.batches import BatchSource, RankPosition
from megatron_ext.data.mock import MockDataset
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.training.spikes import LossSpikes
from tests.resilience import program
from tests.resilience.program import BATCH, FLAGS, MOCK, events, folders, losses, run_program

SPIKED, WINDOW, STEPS = 11, 8, 13
FACTOR = 40.0


def settings(**changes: Any) -> ResilienceConfig:
    return ResilienceConfig(loss_spike_action="skip", loss_spike_window=8, **changes)


def test_a_spike_is_so_many_deviations_above_the_mean_of_a_full_window() -> None:
    numbers = np.random.default_rng(0).normal(5.0, 0.1, 50).tolist()
    spikes = LossSpikes(settings(loss_spike_threshold=4.0))
    for count, loss in enumerate(numbers):
        if count < 8:
            assert spikes.judge(1e9) is None
        spikes.remember(loss)
    mean, deviation = np.mean(numbers[-8:]), np.std(numbers[-8:], ddof=1)
    assert spikes.judge(mean + 3.99 * deviation) is None
    assert spikes.judge(mean - 100 * deviation) is None
    spike = spikes.judge(mean + 4.01 * deviation)
    assert spike is not None and (spike.mean, spike.deviation) == pytest.approx((mean, deviation))
    again = LossSpikes(settings(loss_spike_threshold=4.0), list(spikes.losses))
    assert again.judge(mean + 4.01 * deviation) == spike


def test_nothing_is_judged_where_nobody_asked() -> None:
    spikes = LossSpikes(ResilienceConfig(loss_spike_window=8))
    for _ in range(20):
        spikes.remember(1.0)
    assert spikes.judge(1e9) is None and not spikes.losses


def spiked_run(root: Path, action: str) -> Path:
    """Thirteen steps on two ranks; half of the eleventh batch counts 40 times as much."""
    run = root / action / "run"
    flags = [
        *FLAGS, *MOCK, *folders(run), "--train-iters", str(STEPS), "--save-interval", "4",
        "--loss-spike-action", action, "--loss-spike-window", str(WINDOW),
        "--lr-decay-style", "constant", "--lr", "0.01",
    ]  # fmt: skip
    # Two micro-batches per step: the first one of the step that spikes, on rank 1.
    ended = run_program(
        root / action / "logs", flags, program.spike, 1, 2 * (SPIKED - 1) + 1, FACTOR
    )
    assert ended.codes == [0, 0], ended.output
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spikes")


def batch_source(config: Config) -> BatchSource:
    size, mask, pad = 2048, 3, 2
    schedule = MixingSchedule(size, mask, config.diffusion.shift)
    data = MockDataset(size, config.model.seq_length, config.training.seed)
    return BatchSource(data, schedule, config, RankPosition(0, 1, 0, 1), pad)


def test_the_report_names_samples_and_noise_levels(root: Path) -> None:
    run = spiked_run(root, "report")
    (event,) = [event for event in events(run) if event["event"] == "spike"]
    assert (event["step"], event["action"]) == (SPIKED, "applied")
    first = (SPIKED - 1) * BATCH
    reported = {sequence["sample"]: sequence for sequence in event["sequences"]}
    assert sorted(reported) == list(range(first, first + BATCH))
    # Micro-batches of two: rank 1 has samples 2 and 3 of the batch in its first.
    worst = [sequence["sample"] - first for sequence in event["sequences"][:2]]
    assert sorted(worst) == [2, 3]
    source = batch_source(load_config(run / "config.yaml"))
    for sample, sequence in reported.items():
        noised = source._training_sequence(sample)
        levels = noised.log_snr[noised.noise_mask].astype(np.float64)
        assert sequence["noised"] == len(levels)
        if len(levels):
            expected = (levels.min(), levels.mean(), levels.max())
            assert sequence["log_snr"] == pytest.approx(expected)
    total = sum(s["loss"] * s["noised"] for s in reported.values() if s["noised"])
    tokens = sum(s["noised"] for s in reported.values())
    assert event["loss"] == pytest.approx(total / tokens) == pytest.approx(losses(run)[SPIKED][0])


def test_a_skipped_spike_leaves_no_trace_in_the_weights(root: Path) -> None:
    """Its step changes nothing, as a step with NaN in the same place does."""
    skipped = losses(spiked_run(root, "skip"))
    flags = [
        *FLAGS, *MOCK, *folders(root / "nan" / "run"), "--train-iters", str(STEPS),
        "--lr-decay-style", "constant", "--lr", "0.01",
    ]  # fmt: skip
    ended = run_program(
        root / "nan" / "logs", flags, program.spike, 1, 2 * (SPIKED - 1) + 1, math.nan
    )
    assert ended.codes == [0, 0], ended.output
    bad = losses(root / "nan" / "run")
    (event,) = [e for e in events(root / "nan" / "run") if e["event"] == "bad_step"]
    first = (SPIKED - 1) * BATCH
    assert [s["sample"] - first for s in event["sequences"] if math.isnan(s["loss"])] == [2, 3]
    assert {k: v for k, v in skipped.items() if k != SPIKED} == {
        k: v for k, v in bad.items() if k != SPIKED
    }


def test_after_a_rollback_the_run_is_one_that_never_saw_those_batches(root: Path) -> None:
    """From the checkpoint of step 8 the steps go on with the batches after the spike."""
    run = spiked_run(root, "rollback")
    (event,) = [event for event in events(run) if event["event"] == "rollback"]
    assert (event["spiked_step"], event["step"]) == (SPIKED, 8)
    assert (event["first_sample"], event["last_sample"]) == (8 * BATCH, SPIKED * BATCH - 1)
    rolled = losses(run)
    assert sorted(rolled) == list(range(1, STEPS + 1))
    # The same without the program's loop: load step 8, then feed batches 11, 12, ...
    flags = [str(run), "8", str(SPIKED), str(SPIKED + STEPS - 8)]
    ended = run_program(root / "by_hand", flags, entry=program.train_by_hand)
    assert ended.codes == [0, 0], ended.output
    expected = [tuple(pair) for pair in json.loads(ended.output[0].splitlines()[-1])]
    assert [rolled[step] for step in range(9, STEPS + 1)] == expected
