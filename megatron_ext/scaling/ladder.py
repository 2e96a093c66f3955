"""From a study to its runs: one configuration each, nothing trained twice, and what it costs.

C of a budget is FLOPs per token (by the study's convention) times tokens; head and embedding do
not count in it, as in the paper. Cost does count the head. A run goes to the largest horizon that
its size needs; smaller horizons are read off its validations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ext.cli import dump_config
from megatron_ext.config import Config
from megatron_ext.presets import transformer_parameters
from megatron_ext.scaling.flops import model_flops_per_token, paper_flops_per_token
from megatron_ext.scaling.study import Sections, Study

SECTION_TYPES = {name: field.default_factory for name, field in Config.__dataclass_fields__.items()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a plan."""

    name: str
    size: str
    noise: str
    batch_size: int
    """Sequences."""
    learning_rate: float
    seed: int
    steps: int
    eval_interval: int
    tokens: int
    parameters: int
    """Without embedding and head."""
    flops_per_token: float
    """6P + 12LdN."""
    total_flops: float
    """Of training to the end, head included where the vocabulary is known; a branch's own steps."""
    folder: str
    """The run's --save."""
    parent: str | None = None
    """Run whose checkpoint an annealing branch starts from."""
    parent_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of a study."""

    output: str
    convention: str
    budgets_flops: tuple[float, ...]
    horizons_tokens: tuple[float, ...]
    runs: tuple[Run, ...]

    @property
    def total_flops(self) -> float:
        return sum(run.total_flops for run in self.runs)

    def write(self) -> Path:
        path = Path(self.output) / "plan.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def read_plan(folder: str | Path) -> Plan:
    """The plan that `plan` wrote into a study's output folder."""
    path = Path(folder) / "plan.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}; run `plan` first.")
    tree = json.loads(path.read_text())
    tree["runs"] = tuple(Run(**run) for run in tree["runs"])
    for name in ("budgets_flops", "horizons_tokens"):
        tree[name] = tuple(tree[name])
    return Plan(**tree)


def merged(*layers: Sections) -> Sections:
    """Sections whose fields come from the last layer that names them."""
    result: Sections = {}
    for layer in layers:
        for section, values in layer.items():
            result[section] = {**result.get(section, {}), **values}
    return result


def build_config(sections: Sections) -> Config:
    """A configuration of plain sections; lists become tuples."""
    unknown = set(sections) - set(SECTION_TYPES)
    if unknown:
        raise ValueError(f"study file: unknown section {sorted(unknown)[0]!r} of a noise.")
    built = {}
    for name, kind in SECTION_TYPES.items():
        values = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in sections.get(name, {}).items()
        }
        try:
            built[name] = kind(**values)
        except TypeError as error:
            raise ValueError(f"study file: section {name}: {error}") from error
    return Config(**built)


@dataclass(frozen=True)
class _Cell:
    """A run whose length is not known yet."""

    size: str
    noise: str
    config: Config
    flops_per_token: float
    """By the study's convention."""

    @property
    def step_tokens(self) -> int:
        return self.config.training.global_batch_size * self.config.model.seq_length


def _cells(study: Study) -> Iterator[_Cell]:
    """Every combination of size, noise, batch size, learning rate and seed."""
    constant = {"optimizer": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 0}}
    fixed = {} if study.keep_schedule else constant
    for size, shape in study.sizes.items():
        for noise, sections in study.noises.items():
            base = build_config(merged(study.recipe, {"model": shape}, sections, fixed))
            for batch in study.batch_sizes or (base.training.global_batch_size,):
                micro = math.gcd(batch, base.training.micro_batch_size)
                for rate in study.learning_rates_of(batch) or (base.optimizer.lr,):
                    for seed in study.seeds_of(size):
                        config = base.with_sections(
                            optimizer={"lr": rate},
                            training={
                                "global_batch_size": batch, "micro_batch_size": micro,
                                "seed": seed,
                            },
                        )  # fmt: skip
                        yield _Cell(size, noise, config, _per_token(config, study.convention))


def _identity(config: Config) -> str:
    """What makes two un-annealed runs the same, whatever their length, folder and reports."""
    tree = config.as_dict()
    for name in ("checkpoint", "logging"):
        tree.pop(name)
    for name in ("train_iters", "eval_interval", "eval_iters", "eval_draws"):
        tree["training"].pop(name)
    return json.dumps(tree, sort_keys=True)


def _per_token(config: Config, convention: str) -> float:
    if convention == "6p":
        return 6.0 * transformer_parameters(config.model)
    return paper_flops_per_token(config.model)


def _tokens(study: Study, cell: _Cell, budgets: tuple[float, ...]) -> float:
    """The largest horizon of a cell, 0 where no budget suits its size."""
    if study.horizons_tokens:
        return max(study.horizons_tokens)
    horizons = (budget / cell.flops_per_token for budget in budgets)
    suitable = [d for d in horizons if study.min_tokens <= d <= study.max_tokens]
    return max(suitable, default=0.0)


def _cost(cell: _Cell, steps: int, vocab_size: int | None) -> float:
    """FLOPs of `steps` optimizer steps, with the head where the vocabulary is known."""
    known = cell.config.model.vocab_size or vocab_size or 0
    return steps * cell.step_tokens * model_flops_per_token(cell.config.model, known)


def _runs_of(
    study: Study, cell: _Cell, tokens: float, vocab_size: int | None
) -> Iterator[tuple[Run, Config]]:
    """The run of a cell and its annealing branches."""
    steps = math.ceil(tokens / cell.step_tokens)
    interval = max(-(-steps // study.points_per_run), 1)
    steps = -(-steps // interval) * interval
    config, rate = cell.config, cell.config.optimizer.lr
    batch, seed = config.training.global_batch_size, config.training.seed
    name = f"{cell.size}-{cell.noise}-b{batch}-lr{rate:g}-s{seed}"
    folder = str(Path(study.output) / "runs" / name)
    branches = _branch_steps(study, cell, steps, interval)
    run = Run(
        name=name, size=cell.size, noise=cell.noise, batch_size=batch, learning_rate=rate,
        seed=seed, steps=steps, eval_interval=interval, tokens=steps * cell.step_tokens,
        parameters=transformer_parameters(config.model),
        flops_per_token=paper_flops_per_token(config.model),
        total_flops=_cost(cell, steps, vocab_size), folder=folder,
    )  # fmt: skip
    save_interval = math.gcd(*(start for start, _ in branches)) if branches else 0
    yield (
        run,
        config.with_sections(
            training={"train_iters": steps, "eval_interval": interval},
            checkpoint={"save": folder, "load": folder, "save_interval": save_interval},
        ),
    )
    for start, end in branches:
        child = f"{name}-anneal{end}"
        yield replace(
            run, name=child, steps=end, eval_interval=0, tokens=end * cell.step_tokens,
            total_flops=_cost(cell, end - start, vocab_size), parent=name, parent_step=start,
            folder=str(Path(study.output) / "runs" / child),
        ), config.with_sections(
            training={"train_iters": end, "eval_interval": 0},
            optimizer={"lr_wsd_decay_iters": float(end - start)},
            checkpoint={
                "save": str(Path(study.output) / "runs" / child), "load": folder,
                "ckpt_step": start,
            },
        )  # fmt: skip


def _branch_steps(study: Study, cell: _Cell, steps: int, interval: int) -> list[tuple[int, int]]:
    """(first, last) step of a cell's branches, at multiples of the validation interval."""
    anneal = study.anneal
    if anneal is None or (anneal.sizes and cell.size not in anneal.sizes):
        return []
    pairs = set()
    for share in anneal.horizons:
        end = max(round(share * steps / interval), 1) * interval
        start = round((1 - anneal.fraction) * end / interval) * interval
        if 0 < start < end:
            pairs.add((start, end))
    return sorted(pairs)


def _budgets_within(study: Study, cells: list[_Cell], vocab_size: int | None) -> tuple[float, ...]:
    """Budgets a ratio apart whose runs cost `total_flops` together."""
    assert study.total_flops is not None

    def ladder(top: float) -> tuple[float, ...]:
        return tuple(
            top / study.budget_ratio**i for i in reversed(range(max(int(study.num_budgets), 1)))
        )

    def cost(top: float) -> float:
        return sum(
            run.total_flops
            for cell in cells
            if (tokens := _tokens(study, cell, ladder(top))) > 0
            for run, _ in _runs_of(study, cell, tokens, vocab_size)
        )

    low, high = 0.0, study.total_flops
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= study.total_flops else (low, middle)
    if low == 0 or cost(low) == 0:
        raise ValueError(
            f"study file: total_flops is {study.total_flops:g}: not enough for one run of every "
            "size; raise it, lower min_tokens, or name smaller sizes."
        )
    return ladder(low)


def make_plan(study: Study, vocab_size: int | None = None) -> tuple[Plan, dict[str, Config]]:
    """The plan and the configuration of each run by name. `vocab_size`: of the tokenizer.

    Raises `ValueError` where the runs exceed `total_flops`, or a budget suits fewer than three
    sizes, so that no minimum over sizes could be found at it.
    """
    cells = list(_cells(study))
    budgets = study.budgets_flops
    if not budgets and not study.horizons_tokens:
        budgets = _budgets_within(study, cells, vocab_size)
    runs: dict[str, Run] = {}
    configs: dict[str, Config] = {}
    known: dict[str, str] = {}
    for cell in cells:
        tokens = _tokens(study, cell, budgets)
        for run, config in _runs_of(study, cell, tokens, vocab_size) if tokens else ():
            if run.parent is None:
                twin = known.setdefault(_identity(config), run.name)
                if twin != run.name:
                    raise ValueError(f"study file: {run.name} and {twin} are the same run.")
            runs[run.name], configs[run.name] = run, config
    plan = Plan(
        output=study.output, convention=study.convention, budgets_flops=tuple(sorted(budgets)),
        horizons_tokens=tuple(sorted(study.horizons_tokens)), runs=tuple(runs.values()),
    )  # fmt: skip
    _refuse_thin_budgets(study, cells, plan)
    if study.total_flops is not None and plan.total_flops > study.total_flops * 1.0001:
        raise ValueError(
            f"study file: the runs cost {plan.total_flops:.3g} FLOPs, total_flops is "
            f"{study.total_flops:.3g}: name smaller budgets or horizons, or fewer runs."
        )
    return plan, configs


def coverage(study: Study, plan: Plan) -> dict[float, list[str]]:
    """Sizes by budget."""
    return _coverage(study, list(_cells(study)), plan)


def _coverage(study: Study, cells: list[_Cell], plan: Plan) -> dict[float, list[str]]:
    per_token = {cell.size: cell.flops_per_token for cell in cells}
    return {
        budget: [
            size for size, flops in per_token.items()
            if study.min_tokens <= budget / flops <= study.max_tokens
        ]
        for budget in plan.budgets_flops
    }  # fmt: skip


def _refuse_thin_budgets(study: Study, cells: list[_Cell], plan: Plan) -> None:
    for budget, sizes in _coverage(study, cells, plan).items():
        if len(sizes) < 3:
            raise ValueError(
                f"study file: budget {budget:.3g} FLOPs gives {len(sizes)} of "
                f"{len(study.sizes)} sizes between min_tokens ({study.min_tokens:g}) and "
                f"max_tokens ({study.max_tokens:g}) tokens; a minimum over sizes needs three. "
                "Change the budget, the sizes or the limits."
            )


def _continues(new: Run, old: Run, config: Config) -> bool:
    """Whether the planned run is the old one, or goes on from where that ends."""
    length = {
        name: getattr(new, name) for name in ("steps", "eval_interval", "tokens", "total_flops")
    }
    schedule = config.optimizer
    has_no_end = (schedule.lr_decay_style, schedule.lr_wsd_decay_iters) == ("WSD", 0)
    is_longer = has_no_end and new.steps >= old.steps
    return new == old or (is_longer and new == replace(old, **length))


def write_plan(plan: Plan, configs: dict[str, Config]) -> Path:
    """Write plan.json and configs/NAME.yaml; refuses to replace another study's runs.

    Started runs of constant learning rate may become longer: larger budgets continue them.
    """
    folder = Path(plan.output)
    old = read_plan(folder) if (folder / "plan.json").is_file() else None
    if old is not None:
        new = {run.name: run for run in plan.runs}
        changed = [
            run.name
            for run in old.runs
            if run.name not in new or not _continues(new[run.name], run, configs[run.name])
        ]
        started = [name for name in changed if (folder / "runs" / name).exists()]
        if started:
            raise ValueError(
                f"{folder} holds runs that this plan does not have or has differently "
                f"({', '.join(started[:3])}); choose another output, or remove their folders."
            )
    for name, config in configs.items():
        dump_config(config, folder / "configs" / f"{name}.yaml")
    return plan.write()


def describe(plan: Plan, study: Study, flops_per_second: float | None = None) -> str:
    """A table of the plan's runs by size, coverage and cost."""
    lines = [f"{len(plan.runs)} runs, {plan.total_flops:.3g} FLOPs with the head"]
    if flops_per_second is not None:
        hours = plan.total_flops / flops_per_second / 3600
        lines[0] += f", {hours:.3g} hours at {flops_per_second:.3g} FLOP/s"
    lines.append(f"{'size':>12} {'P':>10} {'6P+12LdN':>10} {'runs':>5} {'tokens':>10} {'share':>6}")
    for size in study.sizes:
        own = [run for run in plan.runs if run.size == size]
        if own:
            share = sum(run.total_flops for run in own) / plan.total_flops
            lines.append(
                f"{size:>12} {own[0].parameters:>10.4g} {own[0].flops_per_token:>10.4g} "
                f"{len(own):>5} {max(run.tokens for run in own):>10.4g} {share:>6.1%}"
            )
    for budget, sizes in coverage(study, plan).items():
        lines.append(f"budget {budget:.3g} FLOPs: {', '.join(sizes)}")
    return "\n".join(lines)
