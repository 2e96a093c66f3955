"""Show how samples came about: a trace of tools/generate.py as one HTML page.

python tools/generate.py --load runs/quickstart --trace trace.json
python tools/visualize_denoising.py trace.json --output page.html
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.inference.visualize import read_trace, render_page, write_page  # noqa: E402


def run(trace: Annotated[Path, tyro.conf.Positional], output: Path) -> None:
    """Turn a trace into one HTML page that opens in any browser, without a network.

    Args:
        trace: what `tools/generate.py --trace` wrote.
        output: page to write.
    """
    if output.resolve() == trace.resolve():
        raise ValueError(f"--output {output} is the trace itself: give another name.")
    page = render_page(read_trace(trace))
    write_page(page, output)
    print(f"{output}: {len(page) / 2**10:.0f} KiB")


def main() -> None:
    try:
        tyro.cli(run)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
