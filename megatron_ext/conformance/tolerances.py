"""How far a result may be from the recorded one; the only place that says so.

The numbers are those stated with the recorded files. Where these state two, the tight one assumes
that `1 - sigmoid(x)` rounds as it did in the recording: near log-SNR +-9 the last bit of a float32
sigmoid is 5e-4 of it. The CPU's sigmoid does that; other devices are held to the other number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """|result - recorded| <= absolute + relative |recorded| + of_rms rms(recorded)."""

    absolute: float = 0.0
    relative: float = 0.0
    of_rms: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"{value:.3g}{unit}"
            for value, unit in (
                (self.of_rms, " x rms"), (self.relative, " relative"), (self.absolute, ""),
            )
            if value
        ]  # fmt: skip
        return " + ".join(parts) or "exact"


EXACT = Tolerance()

ALPHA = Tolerance(absolute=1e-7)
"""Also for what is alpha plus a term below its rounding, and for times."""
PI = Tolerance(absolute=1e-8)
LOSS_WEIGHT = Tolerance(absolute=1e-6)
LOG_SNR = Tolerance(absolute=2e-6)
"""Two roundings at log-SNR 9."""
ELBO = Tolerance(absolute=0.05, relative=2e-3)
TRUTH = Tolerance(absolute=1e-9, relative=1e-9)
"""float64 results against the float64 truth."""
AGGREGATE = Tolerance(relative=1e-5)

LAPROP = {"f32": Tolerance(absolute=1e-6), "bf16": Tolerance(absolute=1.3e-2)}
"""Parameters along a trajectory."""
LAPROP_AVERAGES = Tolerance(absolute=1e-6, relative=5e-6)
"""The recording's float32 coefficients 1 - beta^t are off by 2e-6 of themselves."""
LEARNING_RATE = Tolerance(absolute=1e-9, relative=1e-6)

HIDDEN = Tolerance(absolute=1e-4)
"""Hidden states and logits in float32."""
HIDDEN_BF16 = Tolerance(of_rms=5e-2)
"""The same in bfloat16, of the rms difference: single logits of two correct models differ by 0.2
rms."""

STEP_LOSS = Tolerance(relative=2e-5)
STEP_PART = Tolerance(absolute=2e-5, relative=2e-5)
"""Divergences per token of a step: as the loss, and not below what a single token may err."""
STEP_PROBABILITY = Tolerance(absolute=1e-5)
"""Probabilities of a sampling step."""
STEP_GAIN = Tolerance(relative=1e-4, absolute=1e-9)
GENERATION_GAIN = Tolerance(relative=1e-3, absolute=1e-7)
"""Scores of an adaptive step, from recorded and from computed logits."""
GRID = Tolerance(absolute=1e-4)
"""Noise levels of sampling steps."""
STEP_GRADIENT = Tolerance(of_rms=5e-4)
FINAL_WEIGHT = Tolerance(absolute=2e-4)


def elbo_weight(device: torch.device) -> Tolerance:
    return Tolerance(relative=1e-5 if device.type == "cpu" else 5e-3)


def loss(device: torch.device) -> Tolerance:
    """Per-token loss and both of its parts."""
    if device.type == "cpu":
        return Tolerance(absolute=2e-5)
    return Tolerance(absolute=5e-4, relative=1e-3)


def loss_gradient(device: torch.device) -> Tolerance:
    return Tolerance(absolute=1e-5 if device.type == "cpu" else 1e-4)
