"""The benches' harness: order of turns, memory, allocators, matrix products, the page's tables."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.measure import (
    Column,
    MatrixProduct,
    Report,
    Table,
    Timing,
    alternate,
    call_in_child,
    describe_machine,
    format_machine,
    linear_products,
    multiply,
    multiply_elements,
    multiply_flops,
    peak_memory,
    render,
)
from tests.measure.children import MEBIBYTE

CHILDREN = "tests.measure.children"


def test_ways_take_turns_and_every_second_turn_runs_backwards() -> None:
    calls: list[str] = []
    times = alternate(
        {name: lambda name=name: calls.append(name) for name in "ab"}, repetitions=3, warmup=1
    )
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"a": 3, "b": 3}


def test_what_runs_around_a_way_is_not_timed() -> None:
    calls: list[str] = []

    def pause(name: str) -> None:
        calls.append(name)
        time.sleep(0.05)

    times = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repetitions=1,
        warmup=0,
        before={"a": lambda: pause("before a")},
        after={"b": lambda: pause("after b")},
    )
    assert calls == ["before a", "a", "b", "after b"]
    assert max(times["a"].seconds + times["b"].seconds) < 0.05


def test_a_time_limit_ends_the_turns_but_not_before_the_first() -> None:
    times = alternate({"sleep": lambda: time.sleep(0.01)}, repetitions=1000, max_seconds=0.02)
    assert 1 <= len(times["sleep"].seconds) <= 3
    assert min(times["sleep"].seconds) >= 0.01
    assert len(alternate({"nothing": lambda: None}, max_seconds=0.0)["nothing"].seconds) == 1


def test_a_ratio_is_taken_within_turns() -> None:
    """A machine that is ten times slower in the last turn changes neither ratio nor median much."""
    mine, other = Timing((1.0, 1.0, 10.0)), Timing((2.0, 4.0, 20.0))
    assert mine.relative_to(other) == 0.5
    assert mine.summary("x_") == {
        "x_median_s": 1.0, "x_min_s": 1.0, "x_lower_quartile_s": 1.0, "x_upper_quartile_s": 5.5,
        "x_repetitions": 3,
    }  # fmt: skip


def test_peak_memory_is_that_of_the_call_alone() -> None:
    earlier = torch.ones(128 * MEBIBYTE // 4)
    del earlier

    def call() -> torch.Tensor:
        both = [torch.ones(32 * MEBIBYTE // 4) for _ in range(2)]
        return both[0][:1].clone()

    assert 60 * MEBIBYTE < peak_memory(call) < 80 * MEBIBYTE
    assert peak_memory(lambda: None) < 8 * MEBIBYTE


def test_the_kept_allocator_keeps_what_the_default_one_gives_back() -> None:
    case = {"num_bytes": 128 * MEBIBYTE}
    default, kept = (
        call_in_child(f"{CHILDREN}:resident_after_free", case, allocator=allocator)
        for allocator in ("default", "kept")
    )
    assert default < 16 * MEBIBYTE
    assert kept > 120 * MEBIBYTE


@pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs only")
def test_a_training_program_keeps_freed_memory_unless_the_environment_chooses() -> None:
    target, case = f"{CHILDREN}:resident_after_free_kept", {"num_bytes": 128 * MEBIBYTE}
    did_choose, resident = call_in_child(target, case)
    assert did_choose and resident > 120 * MEBIBYTE
    did_choose, resident = call_in_child(target, case, allocator="kept")
    assert not did_choose


def test_a_child_is_another_process_and_its_failure_is_an_error() -> None:
    process, doubled = call_in_child(f"{CHILDREN}:process_and_double", {"number": 21})
    assert process != os.getpid() and doubled == 42
    with pytest.raises(subprocess.CalledProcessError):
        call_in_child(f"{CHILDREN}:fail", {})


def test_products_of_a_linear_layer_are_those_of_its_forward_and_backward() -> None:
    num_tokens, width_in, width_out = 6, 5, 7
    layer = torch.nn.Linear(width_in, width_out, bias=False)
    x = torch.randn(num_tokens, width_in, requires_grad=True)
    with FlopCounterMode(display=False) as layer_flops:
        layer(x).sum().backward()
    products = linear_products(num_tokens, width_in, width_out, times=2)
    with FlopCounterMode(display=False) as product_flops:
        multiply(products, torch.float32)()
    assert multiply_flops(products) == product_flops.get_total_flops()
    assert multiply_flops(products) == 2 * layer_flops.get_total_flops()
    shapes = [(p.m, p.n) for p in products]
    assert shapes == [(num_tokens, width_out), tuple(x.shape), tuple(layer.weight.shape)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_operands_have_the_products_shape_however_they_are_stored(left: bool, right: bool) -> None:
    product = MatrixProduct(2, 3, 4, left, right)
    a, b = product.operands(*(torch.randn(shape) for shape in product.stored_shapes))
    assert (a @ b).shape == (2, 3)
    assert a.is_contiguous() is not left and b.is_contiguous() is not right


def test_the_products_of_a_linear_layer_share_what_they_read() -> None:
    """Input, weight and gradient of the output are read, and one of each is written."""
    num_tokens, width_in, width_out = 6, 5, 7
    each = num_tokens * width_in + width_in * width_out + num_tokens * width_out
    assert multiply_elements(linear_products(num_tokens, width_in, width_out)) == 2 * each


def _report(name: str, ratio: float | None) -> Report:
    columns = [
        Column("way", "way"),
        Column("seconds", "ms", ".1f", 1000),
        Column("ratio", "ratio", ".2f"),
    ]
    rows = [{"way": "ours", "seconds": 0.0123, "ratio": ratio, "unseen": 1}]
    return Report(name, {"quick": True}, [Table("Title", columns, rows)])


def test_tables_go_from_the_file_into_their_section_and_nothing_else_changes(
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.md"
    sections = "Before.\n<!-- bench:{} -->\nold\n<!-- end -->\nBetween.\n"
    page.write_text(sections.format("one") + sections.format("two"))
    report = _report("two", None)
    report.finish(tmp_path / "two.json")
    assert Report.read(tmp_path / "two.json") == report
    assert render(page, [tmp_path / "two.json"]) == ["one"]
    machine = format_machine(describe_machine())
    table = "| way | ms | ratio |\n| :-- | --: | --: |\n| ours | 12.3 | - |"
    body = f"*{machine}*\n\n**Title**\n\n{table}\n"
    expected = sections.format("one") + sections.format("two").replace("old\n", body)
    assert page.read_text() == expected
    render(page, [tmp_path / "two.json"])
    assert page.read_text() == expected


def test_a_result_without_a_section_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:one -->\n<!-- end -->\n")
    _report("two", 1.0).finish(tmp_path / "two.json")
    with pytest.raises(ValueError, match="no section for bench 'two'"):
        render(page, [tmp_path / "two.json"])


def test_the_plain_table_is_aligned() -> None:
    (table,) = _report("one", 1.5).tables
    assert table.plain().splitlines() == ["Title", "way     ms  ratio", "ours  12.3   1.50"]
