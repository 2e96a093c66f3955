"""Results of a bench: printed tables, a JSON file, and their place in docs/performance.md.

A file is {bench, machine, arguments, tables: [{title, columns, rows}]}; rows hold raw values
(seconds, bytes) under the columns' keys and may hold more than is shown. The page has, for every
bench, a pair of lines `<!-- bench:NAME -->` and `<!-- end -->` between which its tables are put.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.measure.machine import describe_machine, format_machine

_SECTION = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Column:
    """A value `row[key] * scale` in Python's format `format`; `-` where it is absent or None."""

    key: str
    title: str
    format: str = ""
    scale: float | None = None

    def text(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        return format(value if self.scale is None else value * self.scale, self.format)


@dataclass(frozen=True)
class Table:
    """Rows of one kind."""

    title: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> str:
        """For a terminal: text to the left, numbers to the right."""
        cells, is_text = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if left else cell.rjust(width)
                for cell, width, left in zip(row, widths, is_text, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *lines])

    def markdown(self) -> str:
        cells, is_text = self._cells()
        rule = [":--" if left else "--:" for left in is_text]
        lines = [f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]]]
        return "\n".join([f"**{self.title}**", "", *lines])

    def _cells(self) -> tuple[list[list[str]], list[bool]]:
        body = [[column.text(row) for column in self.columns] for row in self.rows]
        values = [[row.get(column.key) for row in self.rows] for column in self.columns]
        is_text = [any(isinstance(x, str) for x in column) for column in values]
        return [[column.title for column in self.columns], *body], is_text


@dataclass(frozen=True)
class Report:
    """Everything a bench found."""

    bench: str
    arguments: dict[str, Any]
    tables: list[Table]
    machine: dict[str, Any] = field(default_factory=describe_machine)

    def finish(self, path: Path | None) -> None:
        """Print, and write the JSON file where one is wanted."""
        print(f"{self.bench}: {format_machine(self.machine)}")
        for table in self.tables:
            print(f"\n{table.plain()}", flush=True)
        if path is not None:
            self.write(path)

    def write(self, path: Path) -> None:
        """The JSON file; a long bench may write it again after every case."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        stored = json.loads(path.read_text())
        tables = [
            Table(x["title"], [Column(**column) for column in x["columns"]], x["rows"])
            for x in stored["tables"]
        ]
        return cls(stored["bench"], stored["arguments"], tables, stored["machine"])

    def markdown(self) -> str:
        tables = "\n\n".join(table.markdown() for table in self.tables)
        return f"*{format_machine(self.machine)}*\n\n{tables}\n"


def bench_parser(documentation: str) -> argparse.ArgumentParser:
    """The command line of a bench: its docstring's first line, `--quick` and `--json FILE`."""
    parser = argparse.ArgumentParser(description=documentation.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def render(page: Path, results: Sequence[Path]) -> list[str]:
    """Put the tables of `results` into `page`; returns the benches whose section is left as it is.

    Raises `ValueError` for a result without a section.
    """
    reports = {report.bench: report for report in map(Report.read, results)}
    text = page.read_text(encoding="utf-8")
    known = [name for _, name, _ in _SECTION.findall(text)]
    for name in reports:
        if name not in known:
            raise ValueError(
                f"{page} has no section for bench {name!r}: add <!-- bench:{name} --> and "
                "<!-- end -->."
            )

    def section(match: re.Match[str]) -> str:
        head, name, tail = match.groups()
        return f"{head}{reports[name].markdown()}{tail}" if name in reports else match[0]

    page.write_text(_SECTION.sub(section, text), encoding="utf-8")
    return [name for name in known if name not in reports]
