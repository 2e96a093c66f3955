"""Run all benches and put their tables into the page about speed.

python -m megatron_ext.measure run [--quick] [--results FOLDER] [--page FILE]
python -m megatron_ext.measure render [--page FILE] RESULT.json ...
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from megatron_ext.measure.memory import answer_call
from megatron_ext.measure.report import Column, Report, Table, render

PACKAGE = Path(__file__).parents[1]


def find_benches() -> list[str]:
    """Modules of the package called bench or bench_*, in alphabetical order."""
    files = sorted(PACKAGE.rglob("bench*.py"))
    return [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in files
        if file.stem.split("_")[0] == "bench"
    ]


def run_bench(module: str, results: Path, *, quick: bool) -> Path:
    """Run one bench in a process of its own; returns its result file."""
    path = results / f"{module.removeprefix('megatron_ext.')}.json"
    command = [sys.executable, "-m", module, "--json", str(path)]
    subprocess.run(command + ["--quick"] * quick, check=True)
    return path


def run_all(modules: list[str], results: Path, *, quick: bool) -> list[Path]:
    """Run benches one after the other; their results, and one that says how long each took."""
    table = Table("Duration", [Column("module", "bench"), Column("seconds", "min", ".1f", 1 / 60)])
    paths = []
    for module in modules:
        begin = time.perf_counter()
        paths.append(run_bench(module, results, quick=quick))
        table.rows.append({"module": module, "seconds": time.perf_counter() - begin})
        print(flush=True)
    table.rows.append({"module": "all", "seconds": sum(row["seconds"] for row in table.rows)})
    paths.append(results / "durations.json")
    Report("durations", {"quick": quick}, [table]).finish(paths[-1])
    return paths


def show(page: Path, results: list[Path]) -> None:
    for name in render(page, results):
        print(f"{page}: {name} was not measured, its tables stay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser(
        "run", help="run all benches, then put their tables into the page"
    )
    running.add_argument("--quick", action="store_true", help="tiny sizes, to see that they run")
    running.add_argument("--results", type=Path, default=Path("build/bench"))
    rendering = commands.add_parser("render", help="put results into the page")
    rendering.add_argument("files", nargs="+", type=Path, metavar="RESULT.json")
    for command in (running, rendering):
        command.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    calling = commands.add_parser("call", help="run a function for the process that started this")
    calling.add_argument("target")
    calling.add_argument("arguments")
    calling.add_argument("result", type=Path)
    arguments = parser.parse_args()
    match arguments.command:
        case "run":
            found = run_all(find_benches(), arguments.results, quick=arguments.quick)
            show(arguments.page, found)
        case "render":
            show(arguments.page, arguments.files)
        case "call":
            answer_call(arguments.target, arguments.arguments, arguments.result)


if __name__ == "__main__":
    main()
