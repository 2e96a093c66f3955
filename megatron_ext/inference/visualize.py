"""A trace of denoising as one HTML page that needs nothing but itself.

The page is `denoising.html` with the trace as JSON in its one hole. A text in a trace can hold
anything, so no character that HTML gives a meaning survives outside a JSON escape, the page's
script puts text into the document as text only, and a content security policy forbids it to fetch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.inference.trace import FORMAT

NOISES = ("masked", "uniform", "hybrid")
_HOLE = "@TRACE@"
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def read_trace(path: Path) -> dict[str, Any]:
    """The trace in a file; `ValueError` names the file and what is wrong with it."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        check_trace(trace)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a trace, not even text in UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a trace, not even JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not a trace, its JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a trace: {error}") from error
    return trace


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number; the model's output was not finite")


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def check_trace(trace: Any) -> None:
    """Raise `ValueError` where the page's script would stumble."""
    _require(isinstance(trace, dict) and "format" in trace, 'it has no "format"')
    found = trace["format"]
    _require(found == FORMAT, f'"format" is {found!r}, and this version reads {FORMAT!r}')
    _require(isinstance(trace.get("model"), str), '"model" is no text')
    _require(trace.get("noise") in NOISES, f'"noise" is not one of {", ".join(NOISES)}')
    _require(_is_id(trace.get("mask_token_id")), '"mask_token_id" is no id')
    texts, sequences = trace.get("texts"), trace.get("sequences")
    _require(
        isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values()),
        '"texts" does not map ids to texts',
    )
    _require(isinstance(sequences, list) and len(sequences) > 0, 'it has no "sequences"')
    known = {int(id) for id in texts if id.isdecimal()}
    for number, sequence in enumerate(sequences, 1):
        for fault in _faults(sequence, known):
            raise ValueError(f"sequence {number}: {fault}")


def _faults(sequence: Any, known: set[int]) -> Iterator[str]:
    if not isinstance(sequence, dict) or not _are_ids(sequence.get("prompt")):
        yield 'its "prompt" is no list of ids'
        return
    end = len(sequence["prompt"])
    unknown = {id for id in sequence["prompt"] if id >= 0} - known
    if unknown:
        yield f'"texts" has no text for id {min(unknown)} of its prompt'
    blocks = sequence.get("blocks")
    if not isinstance(blocks, list) or not blocks:
        yield "it has no blocks"
        return
    for number, block in enumerate(blocks, 1):
        if not isinstance(block, dict) or not isinstance(block.get("steps"), list):
            yield f'block {number} has no "steps"'
            return
        first = block.get("first")
        if not _is_id(first) or not 0 <= first <= end:
            yield f'"first" of block {number} is {first!r}, and the text before it ends at {end}'
            return
        if not block["steps"]:
            yield f"block {number} has no steps"
            return
        for index, step in enumerate(block["steps"], 1):
            fault = _fault_of_step(step, block["steps"][0], known)
            if fault:
                yield f"step {index} of block {number} {fault}"
                return
        end = max(end, first + len(block["steps"][0]["ids"]))


def _fault_of_step(step: Any, first_step: Any, known: set[int]) -> str | None:
    if not isinstance(step, dict) or not _are_ids(step.get("ids")):
        return 'has no list of "ids"'
    if not _is_number(step.get("log_snr")):
        return 'has no number as "log_snr"'
    if len(step["ids"]) != len(first_step["ids"]):
        return "has another number of ids than the first"
    unknown = set(step["ids"]) - known
    if unknown:
        return f'holds id {min(unknown)}, and "texts" has no text for it'
    confidence = step.get("confidence")
    if not isinstance(confidence, list) or len(confidence) != len(step["ids"]):
        return 'has not one "confidence" for each id'
    if not all(_is_number(x) and 0 <= x <= 1 for x in confidence):
        return 'has a "confidence" that is no number between 0 and 1'
    return None


def _is_id(value: Any) -> bool:
    return type(value) is int


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_id, values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def render_page(trace: dict[str, Any]) -> str:
    """The whole page."""
    template = resources.files(__package__).joinpath("denoising.html").read_text(encoding="utf-8")
    data = json.dumps(trace, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    before, after = template.split(_HOLE)
    return before + data + after


def write_page(page: str, path: Path) -> None:
    """Write the page whole or not at all; `ValueError` where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: {error.strerror or error}") from error
