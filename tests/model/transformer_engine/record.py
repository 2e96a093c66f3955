"""Write down what a released Transformer Engine offers, read from its wheel without running it.

    pip download --no-deps transformer-engine==2.20.2
    python -m tests.model.transformer_engine.record transformer_engine-2.20.2-py3-none-any.whl

writes `2.20.2.json` beside this file: of every module of Transformer Engine that megatron-core
names, the names that megatron-core's sources mention, each with what defines it; of a class or
function its parameters, of an enumeration its members. `scaling` holds scales that the release's
own code for delayed scaling computes from a few series of magnitudes.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = "transformer_engine"
METHODS = ("forward", "reset_parameters", "get_extra_state", "set_extra_state")
SCALING = ("_update_amax_history", "_default_get_amax_and_update_history", "_default_sf_compute")


def engine_sources() -> Iterator[str]:
    """megatron-core's modules that mention Transformer Engine."""
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations
    for location in spec.submodule_search_locations:
        for path in sorted((Path(location) / "core").rglob("*.py")):
            text = path.read_text()
            if ROOT in text:
                yield text


class Wheel:
    """Sources of a wheel by module name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trees: dict[str, ast.Module] = {}
        self.bindings: dict[str, dict[str, ast.AST]] = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith(f"{ROOT}/") and name.endswith(".py") and "/jax/" not in name:
                    module = name[:-3].replace("/", ".").removesuffix(".__init__")
                    self.trees[module] = ast.parse(archive.read(name).decode())
        self.packages = {m for m in self.trees if any(o.startswith(f"{m}.") for o in self.trees)}

    def bound(self, module: str) -> dict[str, ast.AST]:
        """Names that a module binds at its top level, branches of `if` and `try` included."""
        if module not in self.bindings:
            found = dict(_bindings(self.trees[module].body))
            star = found.pop("*", None)
            if isinstance(star, ast.ImportFrom):
                source = self.absolute(module, star)
                for name in self.bound(source) if source in self.trees else ():
                    found.setdefault(name, ast.ImportFrom(source, [ast.alias(name)], 0))
            self.bindings[module] = found
        return self.bindings[module]

    def resolve(self, module: str, name: str) -> tuple[str, str] | None:
        """(module, name) of the definition; `None` where it comes from elsewhere."""
        node = self.bound(module).get(name)
        if node is None:
            child = f"{module}.{name}"
            return (child, "") if child in self.trees else None
        if isinstance(node, ast.Import):
            target = next(a.name for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            return (target, "") if target in self.trees else None
        if isinstance(node, ast.ImportFrom):
            source = self.absolute(module, node)
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            if f"{source}.{original}" in self.trees:
                return f"{source}.{original}", ""
            return self.resolve(source, original) if source in self.trees else None
        return module, name

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        parts = module.split(".")
        drop = node.level - (1 if module in self.packages else 0)
        parts = parts[: len(parts) - drop]
        return ".".join([*parts, *([node.module] if node.module else [])])


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                yield node.name, node
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    bound = alias.asname or alias.name
                    yield (bound.split(".")[0] if isinstance(node, ast.Import) else bound), node
            case ast.Assign():
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        yield target.id, node
            case ast.If():
                yield from _bindings(node.body + node.orelse)
            case ast.Try():
                yield from _bindings(node.body + node.orelse)


def signature(function: ast.FunctionDef, *, bound: bool) -> str:
    """The parameters as source, every default as `...`, `self` left out."""
    arguments = copy.deepcopy(function.args)
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    for each in filter(None, (arguments.vararg, arguments.kwarg)):
        each.annotation = None
    absent = ast.Constant(...)
    arguments.defaults = [absent for _ in arguments.defaults]
    arguments.kw_defaults = [d and absent for d in arguments.kw_defaults]
    if bound:
        del (arguments.posonlyargs or arguments.args)[0]
    return ast.unparse(arguments)


def enters(wheel: Wheel, module: str, node: ast.AST) -> bool:
    """Whether calling it gives a context manager."""
    if isinstance(node, ast.ClassDef):
        return any(getattr(n, "name", None) == "__enter__" for n in node.body)
    if not isinstance(node, ast.FunctionDef):
        return False
    if "contextmanager" in [ast.unparse(d) for d in node.decorator_list]:
        return True
    returned = ast.unparse(node.returns).strip("'") if node.returns else ""
    other = wheel.bound(module).get(returned)
    return other is not None and other is not node and enters(wheel, module, other)


def describe(wheel: Wheel, module: str, name: str) -> dict[str, Any]:
    """What is known of a definition."""
    node = wheel.bound(module)[name]
    decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
    if isinstance(node, ast.FunctionDef):
        kind = "context" if enters(wheel, module, node) else "function"
        returned = {len(n.value.elts) for n in ast.walk(node) if _is_tuple_return(n)}
        return {
            "kind": kind,
            "parameters": signature(node, bound=False),
            "returns": min(returned, default=1),
        }
    if not isinstance(node, ast.ClassDef):
        return {"kind": "value"}
    bases = []
    for base in node.bases:
        text = ast.unparse(base)
        found = wheel.resolve(module, text) if isinstance(base, ast.Name) else None
        bases.append(".".join(found) if found else text)
    facts: dict[str, Any] = {"kind": "class", "bases": bases}
    if bases == ["Enum"]:
        targets = [n.targets[0] for n in node.body if isinstance(n, ast.Assign)]
        return {"kind": "enum", "members": [t.id for t in targets if isinstance(t, ast.Name)]}
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    if any(d.startswith("dataclass") for d in decorators):
        # pydantic's dataclasses drop unknown keywords; the standard library's refuse them.
        source = wheel.bound(module)["dataclass"]
        assert isinstance(source, ast.ImportFrom)
        facts["ignores_unknown"] = source.module == "pydantic.dataclasses"
        facts["parameters"] = ", ".join(
            n.target.id + ("" if n.value is None else "=...")
            for n in node.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        )
    elif "__init__" in methods:
        facts["parameters"] = signature(methods["__init__"], bound=True)
        facts["registers"] = _registered(methods["__init__"])
        facts["keeps"] = _kept(methods["__init__"])
    facts["methods"] = {n: signature(methods[n], bound=True) for n in METHODS if n in methods}
    return facts


def _is_tuple_return(node: ast.AST) -> bool:
    return isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)


def _registered(function: ast.FunctionDef) -> list[str]:
    """Names under which a constructor registers parameters, where it spells them out."""
    names: list[str] = []
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(attr="register_parameter"), args=[first, *_]):
                names += [first.value] if isinstance(first, ast.Constant) else []
            case ast.Assign(
                targets=[ast.Attribute(attr="weight_names" | "bias_names")],
                value=ast.List(elts=[ast.Constant(value=name)]),
            ):
                names.append(name)
    return names


def _kept(function: ast.FunctionDef) -> list[str]:
    """Arguments that a constructor keeps as attributes of the same name."""
    return [
        name
        for node in function.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
        and ast.unparse(node.targets[0]) == f"self.{(name := node.value.id)}"
    ]  # fmt: skip


def scaling(wheel: Wheel) -> list[dict[str, Any]]:
    """Scales by the release's own functions (two tensors each) for the emulation to repeat."""
    module = f"{ROOT}.pytorch.quantization"
    nodes = [n for n in wheel.trees[module].body if getattr(n, "name", None) in SCALING]
    for node in nodes:
        assert isinstance(node, ast.FunctionDef)
        node.decorator_list = []
    scope: dict[str, Any] = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module(nodes, []), str(wheel.path), "exec"), scope)
    generator = torch.Generator().manual_seed(0)
    cases = []
    for length, algorithm, margin in ((1, "most_recent", 0), (3, "max", 0), (4, "max", 2)):
        series = torch.randn(9, 2, generator=generator).exp() * 10
        series[4, 0] = 0.0
        series[5, 1] = float("inf")
        series[6] = 1e-44
        history, scale = torch.zeros(length, 2), torch.ones(2)
        scales = []
        for amax in series:
            history[0] = amax
            history, chosen = scope[SCALING[1]](history, algorithm)
            scale = scope[SCALING[2]](chosen, scale, 448.0, margin)
            scales.append(scale.tolist())
        cases.append(
            {"length": length, "algorithm": algorithm, "margin": margin,
             "amax": series.tolist(), "scale": scales, "history": history.tolist()}
        )  # fmt: skip
    return cases


def record(path: Path) -> dict[str, Any]:
    wheel = Wheel(path)
    sources = list(engine_sources())
    words = set(re.findall(r"\w+", " ".join(sources)))
    named = set(re.findall(rf"{ROOT}(?:\.\w+)*", " ".join(sources)))
    named |= {f"{ROOT}{m}" for m in re.findall(r"\bte((?:\.\w+)+)", " ".join(sources))}
    modules = {m for m in wheel.trees if any(f"{n}.".startswith(f"{m}.") for n in named)}
    names: dict[str, dict[str, str]] = {}
    queue: list[tuple[str, str]] = []
    for module in sorted(modules):
        names[module] = {}
        for name in sorted(wheel.bound(module).keys() & words):
            found = wheel.resolve(module, name)
            names[module][name] = "" if found is None else ".".join(filter(None, found))
            queue += [found] if found and found[1] else []
    definitions: dict[str, Any] = {}
    while queue:
        module, name = queue.pop()
        key = f"{module}.{name}"
        if key in definitions:
            continue
        definitions[key] = describe(wheel, module, name)
        for base in definitions[key].get("bases", []):
            owner, _, base_name = base.rpartition(".")
            if owner in wheel.trees:
                queue.append((owner, base_name))
    return {
        "package": "transformer-engine",
        "version": path.name.split("-")[1],
        "source": f"{path.name}, PyPI",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "modules": names,
        "definitions": dict(sorted(definitions.items())),
        "scaling": scaling(wheel),
    }


def main() -> None:
    for argument in sys.argv[1:]:
        found = record(Path(argument))
        target = HERE / f"{found['version']}.json"
        target.write_text(json.dumps(found, indent=1, sort_keys=False) + "\n")
        print(target, len(found["modules"]), len(found["definitions"]))


if __name__ == "__main__":
    main()
