"""The Kubernetes example has the fields that Kubernetes knows, with values of their types."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

RECORD = json.loads((Path(__file__).parent / "schema.json").read_text())
EXAMPLE = Path(__file__).parents[2] / "examples/kubernetes/job.yaml"
TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
    "number": (int, float), "null": type(None),
}  # fmt: skip


def problems(value: Any, schema: Any, where: str) -> Iterator[str]:
    """What of a value a schema does not allow: the parts of JSON schema that the record uses."""
    if "$ref" in schema:
        schema = RECORD["definitions"][schema["$ref"]]
    if "oneOf" in schema:
        if not any(not list(problems(value, each, where)) for each in schema["oneOf"]):
            yield f"{where}: none of the allowed forms"
        return
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    is_number = isinstance(value, bool) and "boolean" not in kinds
    if is_number or not any(isinstance(value, TYPES[kind]) for kind in kinds):
        yield f"{where}: {value!r} is not {kinds}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not one of {schema['enum']}"
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from problems(item, schema.get("items", {}), f"{where}[{number}]")
    elif isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        yield from (
            f"{where}: no {name}" for name in schema.get("required", ()) if name not in value
        )
        for name, item in value.items():
            if name not in known and more is False:
                yield f"{where}: unknown field {name}"
            deeper = known.get(name, more if isinstance(more, dict) else {})
            yield from problems(item, deeper, f"{where}.{name}")


def found(document: dict[str, Any]) -> list[str]:
    return list(problems(document, {"$ref": RECORD["kinds"][document["kind"]]}, document["kind"]))


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(EXAMPLE.read_text()))


def test_the_example_follows_the_schema() -> None:
    assert RECORD["release"] == "v1.37.0-local-strict"
    assert [d["kind"] for d in documents()] == ["Service", "Job"]
    assert [found(document) for document in documents()] == [[], []]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("spec", "completion"), 2, "unknown field completion"),
        (("spec", "completions"), "2", "'2' is not"),
        (("spec", "template", "spec", "containers", 0, "env", 0, "value"), 8, "8 is not"),
        (("spec", "template", "spec", "containers", 0, "image"), ["a"], "is not"),
        (("apiVersion",), "batch/v2", "is not one of"),
    ],
)
def test_a_mistake_is_found(path: tuple[Any, ...], value: Any, problem: str) -> None:
    job = copy.deepcopy(documents()[1])
    part = job
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    assert any(problem in each for each in found(job))
