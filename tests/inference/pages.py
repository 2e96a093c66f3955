"""A trace's page on disk, and its elements."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from megatron_ext.inference.visualize import read_trace, render_page
from tests.inference.denoised_traces import write_trace


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
