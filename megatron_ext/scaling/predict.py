"""From compute or tokens to a model size, tokens, batch, learning rate and recipe, with intervals.

Laws come from a fit of one's own (fits.json) or from the paper. A quantity whose law was refused is
reported as unknown, never filled in from elsewhere. Predictions beyond the laws' data are marked
with how far beyond they are; intervals there assume that the power law goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from megatron_ext.config import ModelConfig
from megatron_ext.presets import MODEL_PRESETS, transformer_parameters
from megatron_ext.scaling import published
from megatron_ext.scaling.flops import paper_flops_per_token
from megatron_ext.scaling.powerlaw import PowerLaw


@dataclass(frozen=True)
class Value:
    """A predicted number."""

    value: float
    interval: tuple[float, float]
    """95 %, of the law."""
    beyond: float
    """Factor by which the law's argument lies outside its data; 1 inside."""


@dataclass(frozen=True, kw_only=True)
class Laws:
    """What a prediction rests on; None where there is no such law."""

    source: str
    noise: str
    convention: Literal["paper", "6p"]
    compute: dict[str, PowerLaw]
    """L, D, M, P against C."""
    batch_tokens: PowerLaw | None = None
    learning_rate: PowerLaw | None = None
    anneal_ratio: float | None = None


@dataclass
class Prediction:
    """The compute-optimal run."""

    laws: Laws
    flops: float
    values: dict[str, Value]
    """flops_per_token, parameters, tokens, loss, batch_tokens, learning_rate."""
    unknown: list[str] = field(default_factory=list)


def published_laws(noise: str, convention: Literal["paper", "6p"] = "paper") -> Laws:
    """The paper's, through its fitted minima."""
    return Laws(
        source="arXiv 2512.10858, fitted minima", noise=noise, convention=convention,
        compute=published.compute_laws(noise, convention),
        batch_tokens=published.batch_law(noise),
        learning_rate=published.learning_rate_law(noise),
        anneal_ratio=published.anneal_ratio(),
    )  # fmt: skip


def fitted_laws(
    fits: dict[str, Any], noise: str, convention: Literal["paper", "6p"] = "paper"
) -> Laws:
    """Of one's own fit; `ValueError` with the fit's reasons where it has no frontier."""
    if noise not in fits["noises"]:
        raise ValueError(f"--noise is {noise!r}: the fit has {', '.join(fits['noises'])}.")
    entry = fits["noises"][noise]
    frontier = entry["frontier"][convention]
    if not frontier["laws"]:
        raise ValueError(
            f"the fit of {noise} ({convention}) has no frontier to predict from: "
            + "; ".join(frontier["refusals"])
        )
    sweep = {name: PowerLaw.from_dict(law) for name, law in entry["sweep"]["laws"].items()}
    return Laws(
        source="fit", noise=noise, convention=convention,
        compute={name: PowerLaw.from_dict(law) for name, law in frontier["laws"].items()},
        batch_tokens=sweep.get("batch_tokens"), learning_rate=sweep.get("learning_rate"),
        anneal_ratio=fits["anneal"].get(noise, {}).get("ratio"),
    )  # fmt: skip


def _value(law: PowerLaw, x: float) -> Value:
    low, high = law.x_range
    return Value(law.at(x), law.interval(x), max(low / x, x / high, 1.0))


def predict(laws: Laws, flops: float | None = None, tokens: float | None = None) -> Prediction:
    """The compute-optimal run of so many FLOPs, or whose optimum has so many tokens."""
    if (flops is None) == (tokens is None):
        raise ValueError("give one of --flops and --tokens.")
    for name, value in (("--flops", flops), ("--tokens", tokens)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value!r}: give a number above zero.")
    compute = laws.compute["D"].inverse(tokens) if flops is None else flops  # type: ignore[arg-type]
    values = {
        "flops_per_token": _value(laws.compute["M"], compute),
        "parameters": _value(laws.compute["P"], compute),
        "tokens": _value(laws.compute["D"], compute),
        "loss": _value(laws.compute["L"], compute),
    }
    result = Prediction(laws, compute, values)
    if laws.batch_tokens is None:
        result.unknown.append("batch size: the fit has no law of it")
    else:
        values["batch_tokens"] = _value(laws.batch_tokens, values["tokens"].value)
    if laws.learning_rate is None:
        result.unknown.append("learning rate: the fit has no law of it")
    elif "batch_tokens" in values:
        values["learning_rate"] = _value(laws.learning_rate, values["batch_tokens"].value)
    else:
        result.unknown.append("learning rate: its law needs the batch size")
    if laws.anneal_ratio is None:
        result.unknown.append("what cooling down gains")
    return result


@cache
def _aspects() -> list[tuple[float, float]]:
    """(log parameters, width over layers) of the paper's shapes."""
    return sorted(
        (math.log(transformer_parameters(ModelConfig(**shape))),
         shape["hidden_size"] / shape["num_layers"])
        for shape in MODEL_PRESETS.values()
    )  # fmt: skip


def aspect_of(parameters: float) -> float:
    """Width over layers at a size: between those of the paper's shapes, in log parameters."""
    points = _aspects()
    x = math.log(parameters)
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-9)
    return points[-1][1]


def _shape(layers: int, width: int, head_width: int, seq_length: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=width, num_attention_heads=width // head_width,
        seq_length=seq_length,
    )  # fmt: skip


def _size(shape: ModelConfig, by_flops: bool) -> float:
    return paper_flops_per_token(shape) if by_flops else float(transformer_parameters(shape))


def shape_for(prediction: Prediction, seq_length: int) -> ModelConfig:
    """The shape nearest in FLOPs per token (paper) or parameters (6p), at the paper's aspect."""
    by_flops = prediction.laws.convention == "paper"
    target = prediction.values["flops_per_token" if by_flops else "parameters"].value
    best: tuple[float, ModelConfig] | None = None
    widths = [*range(16, 512, 16), *range(512, 2048, 64), *range(2048, 16385, 128)]
    for width in widths:
        head = 16 if width < 512 else 64 if width < 1536 else 128
        if width % head:
            continue
        middle = round(target / _size(_shape(1, width, head, seq_length), by_flops))
        for layers in range(max(middle - 1, 1), middle + 2):
            shape = _shape(layers, width, head, seq_length)
            aspect = width / layers / aspect_of(transformer_parameters(shape))
            misfit = abs(math.log(_size(shape, by_flops) / target)) + 0.3 * abs(math.log(aspect))
            if best is None or misfit < best[0]:
                best = misfit, shape
    assert best is not None
    return best[1]


def recipe(prediction: Prediction, seq_length: int, cooldown: float = 0.2) -> dict[str, Any]:
    """Sections of the run that follows; batch and learning rate only where they are known."""
    shape = shape_for(prediction, seq_length)
    values, noise = prediction.values, prediction.laws.noise
    tree: dict[str, Any] = {
        "model": {
            "num_layers": shape.num_layers, "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads, "seq_length": seq_length,
        },
        "diffusion": _diffusion(noise),
        "optimizer": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": cooldown},
        "training": {},
    }  # fmt: skip
    if "batch_tokens" in values:
        batch = _round_batch(values["batch_tokens"].value / seq_length)
        tree["training"]["global_batch_size"] = batch
        tree["training"]["train_iters"] = math.ceil(values["tokens"].value / (batch * seq_length))
        # The paper's rule; docs/scaling.md.
        tree["optimizer"]["adam_beta2"] = 0.98 if batch >= 256 else 0.99
    if "learning_rate" in values:
        tree["optimizer"]["lr"] = float(f"{values['learning_rate'].value:.3g}")
    return tree


def _diffusion(noise: str) -> dict[str, Any]:
    shift = published.published()["mixing_shift"].get(noise)
    if noise in ("masked", "uniform", "ar"):
        return {"objective": noise}
    if shift is None:
        return {}
    return {"objective": "hybrid", "mixing_shift": float(shift)}


def _round_batch(sequences: float) -> int:
    """A multiple of an eighth of its power of two: 13 -> 13, 150 -> 144, 1536 -> 1536."""
    step = max(2 ** (int(math.log2(max(sequences, 1))) - 3), 1)
    return max(round(sequences / step) * step, 1)


LABELS = {
    "flops_per_token": "FLOPs per token", "parameters": "parameters, no embedding or head",
    "tokens": "tokens", "loss": "loss, un-annealed [nats/token]",
    "batch_tokens": "batch [tokens]", "learning_rate": "base learning rate",
}  # fmt: skip


def describe(prediction: Prediction, seq_length: int) -> str:
    """Text for the console."""
    laws = prediction.laws
    lines = [
        f"{laws.noise} noise, laws from {laws.source}; C = {prediction.flops:.4g} FLOPs "
        f"({'6P + 12LdN' if laws.convention == 'paper' else '6P'} per token)"
    ]
    for name, value in prediction.values.items():
        low, high = value.interval
        far = f"  {value.beyond:.3g} x beyond the data" if value.beyond > 1.01 else ""
        lines.append(f"  {LABELS[name]:<34} {value.value:>11.4g}  [{low:.4g}, {high:.4g}]{far}")
    if laws.anneal_ratio is not None:
        loss = prediction.values["loss"].value / laws.anneal_ratio
        lines.append(
            f"  {'loss after cooling down':<34} {loss:>11.4g}  (ratio {laws.anneal_ratio:.4f})"
        )
    lines += [f"  unknown: {reason}" for reason in prediction.unknown]
    shape = shape_for(prediction, seq_length)
    lines.append(
        f"  nearest shape at {seq_length} positions: {shape.num_layers} layers of "
        f"{shape.hidden_size}, {shape.num_attention_heads} heads, "
        f"{transformer_parameters(shape):,} parameters"
    )
    return "\n".join(lines)
