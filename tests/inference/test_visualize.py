"""The page of a trace: what it holds, what it must not do, and a real browser showing it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.hf.generation_gidd import SamplingConfig
from megatron_ext.inference.visualize import read_trace, render_page
from tests.inference.denoised_traces import HOSTILE, MASK, TEXTS, write_trace

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "visualize_denoising.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NOISES = ("masked", "uniform", "hybrid")
LEVEL_STARTS = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9)
VISIBLE = {
    "<|mask|>": "██", "\n": "↵\n", "\t": "⇥\t", "  ": "··", "": "⟨10⟩", "\x07": "\\u{7}",
    "\u202eevil": "\\u{202e}evil",
}  # fmt: skip


class Elements(HTMLParser):
    """Every element as (name, attributes, text directly in it); keeps the order."""

    VOID = ("meta", "input", "img", "link", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self._open.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self.found[self._open.pop()][0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[self._open[-1]][2].append(data)

    def text(self, id: str) -> str:
        return next("".join(text) for _, attrs, text in self.found if attrs.get("id") == id)


def page_of(folder: Path, noise: str, **options: Any) -> tuple[dict[str, Any], Path]:
    trace = read_trace(write_trace(folder / f"{noise}.json", noise, **options))
    page = folder / f"{noise}.html"
    page.write_text(render_page(trace), encoding="utf-8")
    return trace, page


# Without a browser.


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


# In a browser.


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Elements]:
    """Opens a page, optionally with a script more, and returns the document it became."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    profile = tmp_path_factory.mktemp("profile")

    def open_page(page: Path, fragment: str = "", script: str = "") -> Elements:
        if script:
            text = page.read_text(encoding="utf-8")
            page = page.with_suffix(".driven.html")
            page.write_text(
                text.replace("</body>", f"<pre id=report></pre><script>{script}</script></body>")
            )
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--virtual-time-budget=20000", "--dump-dom", f"{page.as_uri()}#{fragment}",
        ]  # fmt: skip
        output = page.with_suffix(".dom")
        # A file and a group of its own, so that a crashed browser's children cannot hold us up.
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.DEVNULL, start_new_session=True
            )
        try:
            assert process.wait(timeout=120) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Elements(output.read_text(encoding="utf-8"))

    return open_page


DRIVER = """
const token = (span) => [span.textContent, span.className];
const tokensOnScreen = () => [...document.querySelectorAll("#text .token")].map(token);
const press = (key, target = document.body) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const stepOnScreen = () => Number(document.getElementById("step").value);
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const report = (value) => {
  document.getElementById("report").textContent = JSON.stringify(value);
};
"""


def expected_tokens(trace: dict[str, Any], number: int, step: int) -> list[list[str]]:
    """Text and classes of every token after a step (from 0, over all blocks)."""
    sequence = trace["sequences"][number]
    tokens = [[_visible(trace, id), "token prompt"] for id in sequence["prompt"]]
    before = 0
    for block in sequence["blocks"]:
        steps = block["steps"]
        index = step - before
        before += len(steps)
        if index < 0:
            tokens += [["", "token pending"] for _ in steps[0]["ids"]]
            continue
        shown = steps[min(index, len(steps) - 1)]
        previous = steps[index - 1] if 0 < index < len(steps) else shown
        for id, confidence, old in zip(
            shown["ids"], shown["confidence"], previous["ids"], strict=True
        ):
            level = sum(confidence >= start for start in LEVEL_STARTS) - 1
            name = "mask" if id == trace["mask_token_id"] else f"c{level}"
            tokens.append([_visible(trace, id), f"token {name}{' changed' * (id != old)}"])
    return tokens


def _visible(trace: dict[str, Any], id: int) -> str:
    text = trace["texts"][str(id)]
    return VISIBLE.get(text, text)


def tokens_of(document: Elements) -> list[list[str]]:
    return [
        ["".join(text), attrs["class"] or ""]
        for name, attrs, text in document.found
        if name == "span" and "data-position" in attrs
    ]


def _facts(trace: dict[str, Any], number: int, step: int) -> str:
    blocks = trace["sequences"][number]["blocks"]
    per_block = len(blocks[0]["steps"])
    block, index = divmod(step, per_block)
    tokens = expected_tokens(trace, number, step)
    level = f"{blocks[block]['steps'][index]['log_snr']:.2f}".replace("-", "−")
    facts = [
        f"block {block + 1} of {len(blocks)}",
        f"step of the block {index + 1} of {per_block}",
        f"log-SNR {'0.00' if level == '−0.00' else level}",
        f"changed {sum('changed' in classes for _, classes in tokens)}",
    ]
    if trace["noise"] != "uniform":
        facts.append(f"masked {sum('mask' in classes for _, classes in tokens)}")
    return " ".join(facts)


@pytest.mark.parametrize("noise", NOISES)
def test_browser_shows_every_step_of_the_trace(
    tmp_path: Path, dump: Callable[..., Elements], noise: str
) -> None:
    """By the keyboard through all steps of both sequences, whose prompts differ in length."""
    trace, page = page_of(tmp_path, noise)
    script = """
      const seen = [];
      for (const seq of [1, 2]) {
        location.hash = `#seq=${seq}`;
        readFragment();
        for (let number = 1; number <= 12; number++) {
          const status = document.getElementById("status").textContent.trim();
          seen.push([tokensOnScreen(), status.replace(/\\s+/g, " "), stepOnScreen()]);
          press("ArrowRight");
        }
      }
      report({ seen, title: document.title, images: document.images.length });
    """
    found = json.loads(dump(page, "", DRIVER + script).text("report"))
    for (number, step), (tokens, status, shown_step) in zip(
        itertools.product(range(2), range(12)), found["seen"], strict=True
    ):
        assert tokens == expected_tokens(trace, number, step), (number, step)
        assert status == _facts(trace, number, step)
        assert shown_step == step + 1
    assert found["title"] == f"Denoising: table, {noise}" and found["images"] == 0
    everything = {text for tokens, _, _ in found["seen"] for text, _ in tokens}
    assert {HOSTILE, "↵\n", "██"} - everything == ({"██"} if noise == "uniform" else set())


def test_fragment_opens_a_step_of_a_sequence(tmp_path: Path, dump: Callable[..., Elements]) -> None:
    trace, page = page_of(tmp_path, "hybrid")
    for fragment, number, step in [
        ("", 0, 0), ("step=4", 0, 3), ("step=9&seq=2", 1, 8), ("step=99&seq=99", 1, 11),
        ("step=-3&seq=x", 0, 0),
    ]:  # fmt: skip
        assert tokens_of(dump(page, fragment)) == expected_tokens(trace, number, step), fragment


def test_keys_and_buttons_move_play_and_pause(
    tmp_path: Path, dump: Callable[..., Elements]
) -> None:
    trace, page = page_of(tmp_path, "masked")
    script = """
      (async () => {
        const steps = {};
        const play = document.getElementById("play");
        const note = (name) => { steps[name] = [stepOnScreen(), play.textContent]; };
        press("ArrowRight"); press("ArrowRight"); press("ArrowLeft"); note("right right left");
        press("End"); note("end");
        press("ArrowRight"); note("right at the end");
        press("Home"); press("ArrowLeft"); note("left at the beginning");
        document.getElementById("next").click(); note("next");
        document.getElementById("previous").click(); note("previous");
        const slider = document.getElementById("step");
        slider.value = 7; slider.dispatchEvent(new Event("input")); note("slider");
        press("ArrowRight", slider); note("right on the slider");
        press("Home"); press(" "); note("play");
        await wait(450); note("after 0.45 s at 8 a second");
        press(" "); await wait(1000); note("paused");
        press(" "); await wait(200); press("ArrowLeft"); await wait(1000);
        note("left while playing");
        document.getElementById("speed").value = "32";
        play.click(); await wait(1000); note("played to the end");
        press(" "); note("again from the beginning");
        await wait(1000); note("and to the end");
        press(" ", document.getElementById("next")); note("space belongs to a focused button");
        press("Home", document.getElementById("speed")); note("keys belong to a focused list");
        const choice = document.getElementById("sequence");
        choice.value = "1"; choice.dispatchEvent(new Event("change"));
        report({ steps, second: tokensOnScreen(), isChoiceHidden: choice.hidden });
      })();
    """
    found = json.loads(dump(page, "", DRIVER + script).text("report"))
    assert found["steps"] == {
        "right right left": [2, "Play"],
        "end": [12, "Play"],
        "right at the end": [12, "Play"],
        "left at the beginning": [1, "Play"],
        "next": [2, "Play"],
        "previous": [1, "Play"],
        "slider": [7, "Play"],
        "right on the slider": [8, "Play"],
        "play": [1, "Pause"],
        "after 0.45 s at 8 a second": [4, "Pause"],
        "paused": [4, "Play"],
        "left while playing": [4, "Play"],
        "played to the end": [12, "Play"],
        "again from the beginning": [1, "Pause"],
        "and to the end": [12, "Play"],
        "space belongs to a focused button": [12, "Play"],
        "keys belong to a focused list": [12, "Play"],
    }
    assert found["second"] == expected_tokens(trace, 1, 11) and not found["isChoiceHidden"]


def test_history_lists_the_changes_of_a_token(
    tmp_path: Path, dump: Callable[..., Elements]
) -> None:
    trace, page = page_of(tmp_path, "uniform", prompts=[[1, 2]])
    script = """
      const panel = document.getElementById("history");
      const rows = () => [...panel.querySelectorAll("tbody tr")].map(
        (row) => [...row.cells].map((cell) => cell.textContent).concat(row.className));
      const spans = document.querySelectorAll("#text .token");
      const histories = {};
      press("End");
      for (const position of [0, 2, 9, 20, 25]) {
        spans[position].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        histories[position] = rows();
      }
      spans[5].click();
      press("ArrowDown", document.activeElement);
      const walked = [document.activeElement.dataset.position, rows()];
      press("ArrowUp", document.activeElement); press("ArrowUp", document.activeElement);
      walked.push(document.activeElement.dataset.position);
      const inTabOrder = document.querySelectorAll("#text [tabindex='0']").length;
      press("Escape", document.activeElement);
      walked.push(document.activeElement.id);
      panel.querySelector("tbody button").click();
      report({ histories, walked, inTabOrder, step: stepOnScreen(),
               isChoiceHidden: document.getElementById("sequence").hidden });
    """
    found = json.loads(dump(page, "", DRIVER + script).text("report"))

    def expected(position: int) -> list[list[str]]:
        block, offset = divmod(position - 2, 12)
        steps = trace["sequences"][0]["blocks"][block]["steps"]
        states = [(step["ids"][offset], step["confidence"][offset]) for step in steps]
        rows = [
            [str(6 * block + i + 1), _visible(trace, id), f"{confidence:.4f}", ""]
            for i, (id, confidence) in enumerate(states)
            if i == 0 or states[i - 1][0] != id
        ]
        rows[-1][-1] = "now"
        return rows

    assert found["histories"].pop("0") == [], "a prompt does not change"
    assert found["histories"] == {str(p): expected(p) for p in (2, 9, 20, 25)}
    assert max(map(len, found["histories"].values())) > 2
    assert found["walked"] == ["6", expected(6), "4", "step"]
    assert found["inTabOrder"] == 1
    assert found["step"] == 1 and found["isChoiceHidden"]


def test_a_step_touches_only_tokens_that_change(
    tmp_path: Path, dump: Callable[..., Elements]
) -> None:
    """1024 tokens: what a step costs the browser is what happened in it."""
    config = SamplingConfig(steps=24, block_length=1024, max_length=1024, seed=3)
    trace, page = page_of(tmp_path, "masked", prompts=[[1]], vocab_size=40, config=config)
    script = """
      const touched = [];
      const observer = new MutationObserver(() => {});
      observer.observe(document.getElementById("text"),
                       { subtree: true, childList: true, attributes: true, characterData: true });
      for (let number = 1; number < 24; number++) {
        press("ArrowRight");
        touched.push([...new Set(observer.takeRecords().map(
          (record) => Number(record.target.closest(".token").dataset.position)))]);
      }
      report(touched);
    """
    found = json.loads(dump(page, "", DRIVER + script).text("report"))
    states = [expected_tokens(trace, 0, step) for step in range(24)]
    for (before, after), touched in zip(itertools.pairwise(states), found, strict=True):
        assert sorted(touched) == [i for i in range(1025) if before[i] != after[i]]
    assert sum(map(len, found)) < 24 * 1025 / 4


def test_special_tokens_of_the_traces_are_what_the_tests_think() -> None:
    assert TEXTS[MASK] == "<|mask|>" and TEXTS[10] == "" and set(VISIBLE) < set(TEXTS)
