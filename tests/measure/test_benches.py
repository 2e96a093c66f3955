"""Every bench runs, and its tables have a place in the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.measure import Report, render
from megatron_ext.measure.__main__ import find_benches, run_all, run_bench

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_benches_are_found_by_their_name() -> None:
    assert "megatron_ext.inference.bench" in find_benches()


@pytest.mark.parametrize("module", find_benches())
def test_the_quick_case_fills_its_tables_and_its_section_of_the_page(
    module: str, tmp_path: Path
) -> None:
    result = run_bench(module, tmp_path, quick=True)
    report = Report.read(result)
    assert report.arguments["quick"] is True
    assert report.tables and all(table.rows for table in report.tables)
    for table in report.tables:
        for column in table.columns:
            assert any(row.get(column.key) is not None for row in table.rows), column
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    assert report.bench not in render(page, [result])
    assert report.tables[0].markdown() in page.read_text()


def test_a_run_of_all_says_how_long_each_took(tmp_path: Path) -> None:
    module = "megatron_ext.data.bench"
    results = run_all([module], tmp_path, quick=True)
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    render(page, results)
    (table,) = Report.read(results[-1]).tables
    assert [row["module"] for row in table.rows] == [module, "all"]
    assert table.rows[0]["seconds"] == table.rows[1]["seconds"] > 0.1
    assert table.markdown() in page.read_text()
    assert Report.read(results[0]).tables[0].markdown() in page.read_text()
