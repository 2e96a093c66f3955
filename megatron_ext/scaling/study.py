"""The description of a scaling study, read from one YAML file.

    recipe: pretrain.yaml              # what every run shares, relative to this file
    output: runs/study                 # relative to where the commands run
    sizes:                             # name -> fields of the model section, or a preset's name
      small: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
      large: gidd-25m
    noises:                            # name -> sections of the configuration
      masked: {diffusion: {objective: masked}}
      ar: {diffusion: {objective: ar}, optimizer: {lr: 0.1}}
    batch_sizes: [16]                  # sequences; the recipe's when absent
    learning_rates: [0.3]              # or {16: [0.1, 0.3]} by batch size; the recipe's when absent
    seeds: [0]                         # or {small: [0, 1], large: [0]} by size
    budgets_flops: [1e12, 2e12, 4e12]  # iso-FLOP; or total_flops with num_budgets, budget_ratio
    horizons_tokens: [1e6, 2e6]        # grid; instead of budgets

Every run is one constant-rate (un-annealed) run to its largest horizon; smaller horizons are
harvested from its validations on the way, as the paper does. `anneal` adds short runs that branch
from a checkpoint of such a run and cool down.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_ext.cli import read_yaml
from megatron_ext.presets import MODEL_PRESETS

Sections = dict[str, dict[str, Any]]
Convention = Literal["paper", "6p"]


def _refuse(where: str, value: object, advice: str) -> ValueError:
    return ValueError(f"study file: {where} is {value!r}: {advice}")


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """Cooldown branches of un-annealed runs."""

    fraction: float = 0.2
    """Share of a branch's horizon over which the learning rate falls to zero."""
    horizons: tuple[float, ...] = (1.0,)
    """Where branches end, as shares of the run's largest horizon."""
    sizes: tuple[str, ...] = ()
    """Sizes that get branches; all when empty."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise _refuse("anneal.fraction", self.fraction, "give a share between 0 and 1.")
        if not self.horizons or not all(0 < share <= 1 for share in self.horizons):
            raise _refuse("anneal.horizons", self.horizons, "give shares in (0, 1].")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A ladder of runs before it is worked out; see the module's text."""

    recipe: Sections
    output: str
    sizes: dict[str, dict[str, Any]]
    noises: dict[str, Sections]
    batch_sizes: tuple[int, ...] = ()
    learning_rates: dict[int | None, tuple[float, ...]] = field(default_factory=dict)
    """By batch size; key None for all."""
    seeds: dict[str | None, tuple[int, ...]] = field(default_factory=lambda: {None: (0,)})
    """By size; key None for all."""
    budgets_flops: tuple[float, ...] = ()
    total_flops: float | None = None
    """Of all runs together, head included; budgets follow from it, or must stay below it."""
    num_budgets: int = 5
    budget_ratio: float = 2.0
    horizons_tokens: tuple[float, ...] = ()
    convention: Convention = "paper"
    """How C of a budget counts: 6P + 12LdN per token (paper), or 6P (6p)."""
    min_tokens: float = 0.0
    """Budgets that give a size fewer tokens leave it out."""
    max_tokens: float = float("inf")
    """Budgets that give a size more tokens leave it out."""
    points_per_run: int = 24
    """Validations of a run; budgets between them are interpolated."""
    anneal: Anneal | None = None
    keep_schedule: bool = False
    """Learning-rate schedules as recipe and noises say, for one horizon; else constant."""

    def __post_init__(self) -> None:
        if not self.sizes or not self.noises:
            raise ValueError("study file: it needs at least one entry each in sizes and noises.")
        given = [bool(self.budgets_flops), bool(self.horizons_tokens)]
        if sum(given) > 1 or (sum(given) == 0 and self.total_flops is None):
            raise ValueError(
                "study file: give one of budgets_flops, horizons_tokens, or total_flops alone."
            )
        if self.keep_schedule and (len(self.horizons_tokens) != 1 or self.anneal):
            raise _refuse(
                "keep_schedule", True,
                "a schedule belongs to one horizon; give one in horizons_tokens, and no anneal.",
            )  # fmt: skip
        if self.budget_ratio <= 1:
            raise _refuse("budget_ratio", self.budget_ratio, "give a number above 1.")
        if self.convention not in ("paper", "6p"):
            raise _refuse("convention", self.convention, "give paper or 6p.")
        if self.points_per_run < 2:
            raise _refuse("points_per_run", self.points_per_run, "give 2 or more.")
        for name in (set(self.seeds) - {None}) - set(self.sizes):
            raise _refuse("seeds", name, f"known sizes: {', '.join(self.sizes)}.")
        for name in set(self.anneal.sizes if self.anneal else ()) - set(self.sizes):
            raise _refuse("anneal.sizes", name, f"known sizes: {', '.join(self.sizes)}.")

    def seeds_of(self, size: str) -> tuple[int, ...]:
        return self.seeds.get(size, self.seeds.get(None, (0,)))

    def learning_rates_of(self, batch_size: int) -> tuple[float, ...]:
        """Rates of the sweep, empty where the recipe's holds."""
        return self.learning_rates.get(batch_size, self.learning_rates.get(None, ()))


def _numbers(where: str, value: Any, kind: type) -> tuple:
    values = value if isinstance(value, list) else [value]
    try:
        # YAML reads 1e12 as text.
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise _refuse(where, value, "expected numbers.") from error
    if not all(number >= 0 for number in numbers) or (kind is int and any(n % 1 for n in numbers)):
        raise _refuse(where, value, f"expected non-negative numbers ({kind.__name__}).")
    return tuple(kind(number) for number in numbers)


def _by_key(where: str, value: Any, kind: type) -> dict:
    """A list for all, or a mapping from size or batch size to lists."""
    if isinstance(value, dict):
        return {key: _numbers(f"{where}.{key}", item, kind) for key, item in value.items()}
    return {None: _numbers(where, value, kind)}


def _size(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        if value not in MODEL_PRESETS:
            raise _refuse(f"sizes.{name}", value, f"known presets: {', '.join(MODEL_PRESETS)}.")
        return dict(MODEL_PRESETS[value])
    if not isinstance(value, dict):
        raise _refuse(f"sizes.{name}", value, "give fields of the model section or a preset.")
    return value


_READERS: dict[str, Any] = {
    "batch_sizes": lambda v: _numbers("batch_sizes", v, int),
    "learning_rates": lambda v: _by_key("learning_rates", v, float),
    "seeds": lambda v: _by_key("seeds", v, int),
    "budgets_flops": lambda v: _numbers("budgets_flops", v, float),
    "horizons_tokens": lambda v: _numbers("horizons_tokens", v, float),
    "sizes": lambda v: {name: _size(name, item) for name, item in v.items()},
    **{
        name: (lambda v, name=name, kind=kind: _numbers(name, v, kind)[0])
        for name, kind in {
            "total_flops": float, "budget_ratio": float, "min_tokens": float, "max_tokens": float,
            "num_budgets": int, "points_per_run": int,
        }.items()
    },
}  # fmt: skip


def _anneal(value: Any) -> Anneal:
    known = {f.name for f in fields(Anneal)}
    if not isinstance(value, dict) or not set(value) <= known:
        raise _refuse("anneal", value, f"known names: {', '.join(sorted(known))}.")
    typed = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    return Anneal(**typed)


def read_study(path: str | Path) -> Study:
    """A study file as `Study`; unknown names and wrong types are `ValueError`s that say so."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"study file: there is no {path}.")
    tree = yaml.safe_load(path.read_text())
    if not isinstance(tree, dict):
        raise ValueError(f"study file: {path} must hold names and values.")
    known = [f.name for f in fields(Study)]
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."
            raise ValueError(f"study file: {path}: unknown name {name!r}; {hint}")
        if name == "recipe":
            preset, sections = read_yaml(path.parent / value)
            if preset is not None:
                raise _refuse("recipe", value, "leave model_preset out; sizes are named here.")
            values[name] = sections
        elif name == "anneal":
            values[name] = _anneal(value)
        else:
            values[name] = _READERS[name](value) if name in _READERS else value
    for name in ("recipe", "output", "sizes", "noises"):
        if name not in values:
            raise ValueError(f"study file: {path}: {name!r} is missing.")
    return Study(**values)
