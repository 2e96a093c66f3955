"""A package `transformer_engine` whose names and signatures are a release's, and nothing else.

Everything comes from the record: a module has the recorded names, a call with other arguments than
the recorded parameters is a `TypeError`, any other attribute an `AttributeError`. What a call was
given is kept in `CALLS`. Nothing computes. Linear layers and norms hold parameters of the recorded
names, a linear layer's cut as its documentation says: `column` along the output, `row` along the
input. A function of two results, which megatron-core calls to build a model, gives a context and
nothing.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
VERSIONS = sorted(path.stem for path in HERE.glob("*.json"))
CALLS: list[tuple[str, dict[str, Any]]] = []


def signature(parameters: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {parameters}: None"))


class _Package:
    """The stand-in of one recorded release."""

    def __init__(self, version: str) -> None:
        self.record = json.loads((HERE / f"{version}.json").read_text())
        self.definitions: dict[str, Any] = {}

    def install(self) -> None:
        """Make `import transformer_engine` find it, in this process."""
        modules = {name: types.ModuleType(name, "recorded") for name in self.record["modules"]}
        for name, module in modules.items():
            module.__path__ = []  # type: ignore[attr-defined]
            for attribute, target in self.record["modules"][name].items():
                if target in modules:
                    setattr(module, attribute, modules[target])
                elif target in self.record["definitions"]:
                    setattr(module, attribute, self.definition(target))
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        modules["transformer_engine"].__version__ = self.record["version"]  # type: ignore[attr-defined]
        sys.modules.update(modules)

    def definition(self, key: str) -> Any:
        if key not in self.definitions:
            facts, name = self.record["definitions"][key], key.rpartition(".")[2]
            match facts["kind"]:
                case "enum":
                    self.definitions[key] = enum.Enum(name, facts["members"])
                case "class":
                    self.definitions[key] = self.class_of(key, name, facts)
                case "value":
                    self.definitions[key] = f"value of {key}"
                case _:
                    self.definitions[key] = _function(key, facts)
        return self.definitions[key]

    def class_of(self, key: str, name: str, facts: dict[str, Any]) -> type:
        known = {"torch.nn.Module": torch.nn.Module, "ABC": abc.ABC, "torch.Tensor": torch.Tensor}
        bases = [
            self.definition(base) if base in self.record["definitions"] else known.get(base)
            for base in facts["bases"]
        ]
        body: dict[str, Any] = {}
        if "parameters" in facts:
            body["__init__"] = self.constructor(key, facts)
        return type(name, tuple(base for base in bases if base is not None), body)

    def constructor(self, key: str, facts: dict[str, Any]) -> Any:
        accepted = signature(facts["parameters"])
        passes_on = any(p.kind is p.VAR_KEYWORD for p in accepted.parameters.values())
        base = self.record["definitions"].get((facts.get("bases") or [""])[0], {})

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if facts.get("ignores_unknown"):
                kwargs = {k: v for k, v in kwargs.items() if k in accepted.parameters}
            bound = accepted.bind(*args, **kwargs).arguments
            if passes_on and "kwargs" in bound:
                for name in bound["kwargs"]:
                    if name not in signature(base["parameters"]).parameters:
                        raise TypeError(f"{key} passes {name} on to {facts['bases'][0]}")
            CALLS.append((key, dict(bound)))
            if isinstance(self, torch.nn.Module):
                torch.nn.Module.__init__(self)
                for name in facts["keeps"]:
                    setattr(self, name, bound.get(name))
                _register(self, key, bound)

        return __init__


def _function(key: str, facts: dict[str, Any]) -> Any:
    accepted = signature(facts["parameters"])

    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS.append((key, dict(accepted.bind(*args, **kwargs).arguments)))
        if facts["kind"] == "context":
            return contextlib.nullcontext()
        if facts["returns"] == 2:
            return contextlib.nullcontext(), None
        raise NotImplementedError(f"{key} computes, and this is its signature only")

    call.__signature__ = accepted  # type: ignore[attr-defined]
    return call


def _register(module: torch.nn.Module, key: str, bound: dict[str, Any]) -> None:
    if key.endswith("module.linear.Linear"):
        inputs, outputs, tp = bound["in_features"], bound["out_features"], bound["tp_size"]
        is_column = bound["parallel_mode"] == "column"
        inputs, outputs = (inputs, outputs // tp) if is_column else (inputs // tp, outputs)
        dtype = bound["params_dtype"]
        module.weight = torch.nn.Parameter(torch.zeros(outputs, inputs, dtype=dtype))
        if bound["bias"]:
            module.bias = torch.nn.Parameter(torch.zeros(outputs, dtype=dtype))
    elif key.endswith("module.rmsnorm.RMSNorm"):
        width = bound.get("normalized_shape", bound.get("hidden_size"))
        dtype = bound.get("params_dtype", bound.get("kwargs", {}).get("dtype"))
        module.weight = torch.nn.Parameter(torch.zeros(width, dtype=dtype))


def install(version: str) -> dict[str, Any]:
    """Install the stand-in of a recorded release and return the record."""
    package = _Package(version)
    package.install()
    return package.record
