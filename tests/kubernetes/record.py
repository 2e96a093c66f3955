"""Cut what the example needs out of Kubernetes' schemas.

    pip install kubernetes-validate==1.37.0
    python -m tests.kubernetes.record .../kubernetes-json-schema/v1.37.0-local-strict

writes `schema.json` beside this file: Job and Service with everything they refer to, descriptions
left out. The strict schemas allow no unknown fields.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = {"Job": "io.k8s.api.batch.v1.Job", "Service": "io.k8s.api.core.v1.Service"}
KEPT = ("type", "properties", "required", "additionalProperties", "items", "enum", "oneOf")


def reduced(schema: Any, needed: list[str]) -> Any:
    """A schema without descriptions; names that it refers to are added to `needed`."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        needed.append(schema["$ref"].rpartition("/")[2])
        return {"$ref": needed[-1]}
    kept = {key: schema[key] for key in KEPT if key in schema}
    if "properties" in kept:
        kept["properties"] = {k: reduced(v, needed) for k, v in kept["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in kept:
            kept[key] = reduced(kept[key], needed)
    return kept


def main() -> None:
    folder = Path(sys.argv[1])
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    needed, found = list(KINDS.values()), {}
    while needed:
        name = needed.pop()
        if name not in found:
            found[name] = None
            found[name] = reduced(definitions[name], needed)
    text = json.dumps(
        {"release": folder.name, "kinds": KINDS, "definitions": found}, sort_keys=True
    )
    (Path(__file__).parent / "schema.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
