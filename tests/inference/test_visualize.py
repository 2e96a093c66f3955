"""The page of a trace: what it holds, and what it must not do."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.inference.visualize import read_trace, render_page
from tests.inference.denoised_traces import HOSTILE, write_trace
from tests.inference.pages import Elements, page_of

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "visualize_denoising.py"
NOISES = ("masked", "uniform", "hybrid")


@pytest.mark.parametrize("noise", NOISES)
def test_page_holds_the_whole_trace_and_little_else(tmp_path: Path, noise: str) -> None:
    trace, page = page_of(tmp_path, noise)
    data = Elements(page.read_text(encoding="utf-8")).text("trace")
    assert json.loads(data) == trace == json.loads((tmp_path / f"{noise}.json").read_text())
    assert page.stat().st_size - len(data) < 100_000


def test_page_has_nothing_to_fetch(tmp_path: Path) -> None:
    _, path = page_of(tmp_path, "hybrid")
    page = path.read_text(encoding="utf-8")
    elements = Elements(page).found
    assert sum(name == "script" for name, _, _ in elements) == 2
    for name, attributes, _ in elements:
        assert name not in ("link", "iframe", "img", "object", "base")
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes), name
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|\bimport\b|sendBeacon", page)
    assert set(re.findall(r"\w*://[^\"'\s]*", page)) == {"http://www.w3.org/2000/svg"}
    policy = [a["content"] for _, a, _ in elements if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_hostile_text_leaves_no_markup_in_the_page(tmp_path: Path) -> None:
    trace, path = page_of(tmp_path, "uniform")
    assert HOSTILE in trace["texts"].values() and "<!--" in trace["texts"].values()
    trace["model"] = f"{HOSTILE} @TRACE@"
    page = render_page(trace)
    assert json.loads(Elements(page).text("trace")) == trace
    data = page.split('id="trace">', 1)[1].split("</script>", 1)[0]
    assert not set("<>&") & set(data) and data.isascii()


def _srgb_to_linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    """Björn Ottosson's OKLab."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    mixed = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return mixed @ np.cbrt(cones @ linear)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear light.
DEFICIENCIES = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def _contrast(one: str, other: str) -> float:
    weights = [0.2126, 0.7152, 0.0722]
    low, high = sorted(float(_srgb_to_linear(c) @ weights) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_are_even_readable_and_ordered_for_every_eye(tmp_path: Path, mode: int) -> None:
    _, path = page_of(tmp_path, "hybrid")
    css = path.read_text(encoding="utf-8").split(":root")[1 + mode]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", css))
    scale = [colours[f"c{level}"] for level in range(10)]
    points = np.array([_oklab(_srgb_to_linear(colour)) for colour in scale])
    distances = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert distances.max() / distances.min() < 1.15
    for matrix in DEFICIENCIES.values():
        seen = [_oklab((np.array(matrix) @ _srgb_to_linear(c)).clip(0, 1))[0] for c in scale]
        steps = np.diff(seen) * (1 if mode else -1)
        assert (steps > 0.01).all()
    assert min(_contrast(colours["ink"], colour) for colour in scale) >= 4.5
    assert min(_contrast(colours["dim"], colours[name]) for name in ("c0", "paper", "panel")) >= 4.5


def _without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def remove(trace: Any) -> None:
        for key in path[:-1]:
            trace = trace[key]
        del trace[path[-1]]

    return remove


def _with(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def put(trace: Any) -> None:
        for key in path[:-1]:
            trace = trace[key]
        trace[path[-1]] = value

    return put


BLOCK = ("sequences", 1, "blocks", 1)
FAULTS = {
    "format": (_without("format"), 'it has no "format"'),
    "version": (_with("gidd-trace 9", "format"), "'gidd-trace 9'"),
    "model": (_without("model"), '"model"'),
    "noise": (_with("pink", "noise"), '"noise"'),
    "mask": (_with("3", "mask_token_id"), '"mask_token_id"'),
    "texts": (_with({"1": 2}, "texts"), '"texts"'),
    "text missing": (_without("texts", "1"), '"texts" has no text for id 1'),
    "sequences": (_with([], "sequences"), '"sequences"'),
    "prompt": (_with([True], "sequences", 0, "prompt"), "sequence 1"),
    "blocks": (_with([], "sequences", 0, "blocks"), "no blocks"),
    "first": (_with(999, *BLOCK, "first"), '"first" of block 2 is 999'),
    "no steps": (_with([], *BLOCK, "steps"), "block 2 has no steps"),
    "ids": (_with(["1"], *BLOCK, "steps", 2, "ids"), "step 3 of block 2"),
    "fewer ids": (_without(*BLOCK, "steps", 2, "ids", 0), "another number of ids"),
    "log_snr": (_with("low", *BLOCK, "steps", 2, "log_snr"), '"log_snr"'),
    "confidence": (_with(1.5, *BLOCK, "steps", 2, "confidence", 0), "between 0 and 1"),
    "nan": (_with(float("nan"), *BLOCK, "steps", 2, "confidence", 0), "NaN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_trace_is_refused_by_what_is_wrong(tmp_path: Path, name: str) -> None:
    path = write_trace(tmp_path / "broken.json", "hybrid")
    trace = json.loads(path.read_text())
    break_it, expected = FAULTS[name]
    break_it(trace)
    path.write_text(json.dumps(trace))
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        read_trace(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\xff\xfe\x00", b"[1]", b"[" * 100_000, b'{"prompt": "x"}', None]
)
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


def _run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_tool_writes_the_page_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = write_trace(tmp_path / "trace.json", "masked")
    page = tmp_path / "new" / "page.html"
    _run_tool(monkeypatch, trace, "--output", page)
    assert page.read_text(encoding="utf-8") == render_page(read_trace(trace))
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    for output, named in ((trace, trace), (tmp_path / "new", tmp_path / "new")):
        with pytest.raises(SystemExit, match=f"^error: .*{re.escape(str(named))}"):
            _run_tool(monkeypatch, trace, "--output", output)
    read_trace(trace)

    trace.write_text("{}")
    for output in (tmp_path / "other.html", page):
        before = output.read_text(encoding="utf-8") if output.exists() else None
        with pytest.raises(SystemExit, match=f"^error: {re.escape(str(trace))}: not a trace"):
            _run_tool(monkeypatch, trace, "--output", output)
        assert (output.read_text(encoding="utf-8") if output.exists() else None) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "trace.json"]


def test_tool_ends_with_code_1_and_one_line(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "absent.json"), "--output", str(tmp_path / "page.html")]
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"error: {arguments[0]}: No such file or directory\n"
    assert not list(tmp_path.iterdir())
