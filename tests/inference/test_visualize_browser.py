"""A real browser shows every step of a trace, plays it and tells a token's history."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.hf.steps_gidd import SamplingConfig
from tests.inference.denoised_traces import HOSTILE, MASK, TEXTS
from tests.inference.pages import Elements, page_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NOISES = ("masked", "uniform", "hybrid")
LEVEL_STARTS = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9)
VISIBLE = {
    "<|mask|>": "██", "\n": "↵\n", "\t": "⇥\t", "  ": "··", "": "⟨10⟩", "\x07": "\\u{7}",
    "\u202eevil": "\\u{202e}evil",
}  # fmt: skip


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
