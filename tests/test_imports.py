"""Who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_ext"
LEVELS = [
    {"config", "presets", "cli", "measure", "doctor"},
    {"diffusion", "kernels", "scaling"},
    {"parallel"},
    {"data", "model", "optim", "checkpoint"},
    {"inference", "training"},
    {"conformance", "planning"},
]
"""Parts of `megatron_ext`; each imports from its own level and those above it."""
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
STANDALONE = {"hf"}
"""Parts that import nothing of ours and are imported by name only."""
WITHOUT_MEGATRON = (
    "config",
    "presets",
    "cli",
    "diffusion",
    "kernels",
    "hf",
    "scaling",
    "measure",
    "doctor",
)
SOURCES = sorted(
    path
    for folder in (PACKAGE, ROOT / "tools", ROOT / "tests", ROOT / "examples")
    for path in folder.rglob("*.py")
) + [ROOT / "pretrain_diffusion.py"]


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, functions and type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level > 0:
                # Beside the importing file, as transformers wants it of exported code.
                assert node.level == 1, f"{path}: relative import from another folder"
                continue
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parts() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            yield part_of(path), path


def imported_parts(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "megatron_ext" and len(name) > 1}


def test_every_part_has_its_place() -> None:
    assert {part for part, _ in parts()} <= LEVEL_OF.keys() | STANDALONE


@pytest.mark.parametrize("part", sorted([*LEVEL_OF, *STANDALONE]))
def test_imports_go_one_way(part: str) -> None:
    for own, path in parts():
        if own != part:
            continue
        for other in imported_parts(path) - {part}:
            assert part not in STANDALONE, f"{path} imports megatron_ext.{other}"
            if other not in STANDALONE:
                assert LEVEL_OF[other] <= LEVEL_OF[part], f"{path} imports megatron_ext.{other}"


def test_parts_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for part, path in parts():
        graph.setdefault(part, set()).update(imported_parts(path) - {part})
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("part", WITHOUT_MEGATRON)
def test_mathematics_kernels_and_exported_code_import_no_megatron(part: str) -> None:
    for own, path in parts():
        if own == part:
            assert not [name for name in imports(path) if name.split(".")[0] == "megatron"], path


def test_exported_code_needs_torch_and_what_transformers_brings_only() -> None:
    known = {"torch", "transformers", "numpy", "tqdm"} | sys.stdlib_module_names
    for part, path in parts():
        if part == "hf" and path.name != "__init__.py":
            assert {name.split(".")[0] for name in imports(path)} <= known, path


def test_megatron_training_is_imported_nowhere() -> None:
    for path in SOURCES:
        bad = [name for name in imports(path) if f"{name}.".startswith("megatron.training.")]
        assert not bad, path


def _root_name(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patches(path: Path) -> Iterator[str]:
    """Assignments to attributes of what other packages define, and `setattr` on them."""
    tree = ast.parse(path.read_text())
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _root_name(node.func) == "setattr" and node.args:
            if _root_name(node.args[0]) in foreign:
                yield f"line {node.lineno}"
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and _root_name(target) in foreign:
                yield f"line {node.lineno}"


def test_only_the_cpu_module_patches_other_packages() -> None:
    allowed = PACKAGE / "parallel" / "cpu.py"
    assert list(patches(allowed))
    for path in SOURCES:
        if path != allowed and "tests" not in path.parts:
            assert not list(patches(path)), f"{path}: {list(patches(path))}"
