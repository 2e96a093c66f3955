"""YAML and command line into one frozen `Config`.

Defaults come from the dataclasses, then from `--model-preset`, then from `--config FILE`, then
from flags; later wins. The YAML file has the sections of `Config` with the names of its fields;
flags are the field names with dashes and no section. `dump_config` writes a file that starts the
same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from megatron_ext.config import Config
from megatron_ext.presets import MODEL_PRESETS


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _section_values(section: type, values: Any, where: str) -> dict[str, Any]:
    """A section's values as its fields want them; unknown names and wrong types are errors."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold names and values, not {values!r}")
    hints = typing.get_type_hints(section)
    typed = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{where}: unknown field {name!r}{_suggest(name, sorted(hints))}")
        typed[name] = _typed(value, hints[name])
        if not _fits(typed[name], hints[name]):
            expected = _readable(hints[name])
            raise ValueError(f"{where}: {name} is {value!r}, expected {expected}")
    return typed


def _typed(value: Any, hint: Any) -> Any:
    """YAML has no tuples and reads 1e-3 as text."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and not _fits(value, hint) and _fits(0.5, hint):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def read_yaml(path: str | Path) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """A recipe's model preset and its sections. Unknown names are errors with a suggestion."""
    if not Path(path).is_file():
        raise ValueError(f"--config is {str(path)!r}: there is no such file.")
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path}: expected sections, found {type(tree).__name__}.")
    preset = tree.pop("model_preset", None)
    sections = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    for name in tree:
        if name not in sections:
            raise ValueError(f"{path}: unknown section {name!r}{_suggest(name, list(sections))}")
    return preset, {
        name: _section_values(sections[name], values, f"{path}, section {name!r}")
        for name, values in tree.items()
    }


def _readable(hint: Any) -> str:
    return (hint.__name__ if isinstance(hint, type) else str(hint)).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _sections(path: str | Path | None, model_preset: str | None) -> dict[str, dict[str, Any]]:
    """What a recipe and a preset set, by section; values have the right types, no more."""
    sections: dict[str, dict[str, Any]] = {}
    if path is not None:
        preset_of_file, sections = read_yaml(path)
        model_preset = model_preset or preset_of_file
    if model_preset is not None:
        if model_preset not in MODEL_PRESETS:
            known = _suggest(model_preset, list(MODEL_PRESETS))
            raise ValueError(f"--model-preset is {model_preset!r}{known}")
        sections = {**sections}
        sections["model"] = {**MODEL_PRESETS[model_preset], **sections.get("model", {})}
    return sections


def load_config(path: str | Path | None = None, model_preset: str | None = None) -> Config:
    """The configuration that a recipe (and a preset) describes, without command-line flags."""
    sections = _sections(path, model_preset)
    return Config(
        **{
            field.name: field.default_factory(**sections.get(field.name, {}))  # type: ignore[misc,operator]
            for field in dataclasses.fields(Config)
        }
    )


def _without_checks(section: type) -> type:
    """The section with the same fields and help, but values that need not fit together.

    A recipe may be complete only together with flags, such as `save_interval` with --save.
    """
    return type(
        section.__name__,
        (section,),
        {"__post_init__": lambda self: None, "__doc__": section.__doc__},
    )


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line. Prints help and exits for --help.

    Raises `ValueError` for values that contradict each other; unknown flags and words that are no
    value of their flag end the program, with the nearest known flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--model-preset")
    known, rest = first.parse_known_args(argv)
    values = _sections(known.config, known.model_preset)
    checked = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    unchecked = {name: _without_checks(section) for name, section in checked.items()}  # type: ignore[arg-type]
    flags = dataclasses.make_dataclass("Config", unchecked.items())
    default = flags(**{name: kind(**values.get(name, {})) for name, kind in unchecked.items()})
    parsed = tyro.cli(
        Annotated[flags, tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands],  # type: ignore[arg-type,valid-type]
        args=rest,
        default=default,
        prog="pretrain_diffusion.py",
        description=(
            "Pretrain a discrete diffusion language model.\n\n"
            "--config FILE reads a YAML recipe and --model-preset NAME a published size "
            f"({', '.join(MODEL_PRESETS)}); flags override both."
        ),
    )
    return Config(
        **{name: section(**vars(getattr(parsed, name))) for name, section in checked.items()}  # type: ignore[misc,operator]
    )


def dump_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration atomically; `--config` of it starts the same run."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
    os.replace(temporary, path)
