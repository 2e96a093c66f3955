"""Compare variants over seeds: curves with bands, final differences with intervals.

python tools/compare_runs.py runs/ablations --baseline baseline
python tools/compare_runs.py --run a=runs/a-s0 --run a=runs/a-s1 --run b=runs/b-s0 --run b=runs/b-s1
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def groups_of(study: Path | None, run: tuple[str, ...]) -> dict[str, list[str]]:
    """Folders by variant: a study's noises (finished runs), or NAME=FOLDER pairs."""
    from megatron_ext.scaling.ladder import read_plan
    from megatron_ext.scaling.launch import state_of

    groups: dict[str, list[str]] = {}
    if study is not None:
        for item in read_plan(study).runs:
            if item.parent is None and state_of(item) == "finished":
                groups.setdefault(item.noise, []).append(item.folder)
    for pair in run:
        name, _, folder = pair.partition("=")
        if not folder:
            raise ValueError(f"--run is {pair!r}: write NAME=FOLDER.")
        groups.setdefault(name, []).append(folder)
    if len(groups) < 2:
        raise ValueError(f"there are {len(groups)} variants with finished runs; give two or more.")
    return groups


def compare(
    study: Annotated[Path | None, tyro.conf.Positional] = None,
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = (), baseline: str | None = None,
    metric: str = "valid/elbo", output: Path = Path("runs/comparison"),
) -> int:  # fmt: skip
    """Curves with bands over seeds, final differences to the baseline with 95 % intervals.

    Args:
        study: Output folder of a study with one size; its noises are the variants.
        run: NAME=FOLDER, a run's --save folder under a variant's name; repeat it.
        baseline: The variant to compare with; the first when absent.
        metric: A tag of metrics.jsonl.
        output: Folder for curves.svg, curves.png, report.html.
    """
    from megatron_ext.scaling.comparison import read_variants, write_report

    variants = read_variants(groups_of(study, run), metric)
    print(write_report(variants, baseline or next(iter(variants)), metric, output))
    print(f"{output / 'report.html'}: written")
    return 0


def main() -> int:
    try:
        return tyro.cli(compare, description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
