"""The exported code with the oldest and other supported versions of transformers.

The suite itself runs with the newest, which requirements.txt pins; where another is installed, the
pinned one is tested here too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement

from tests.hf.environments import IndexUnreachable, run_tests

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "4.53.3"


def pinned() -> str:
    """The version that requirements.txt has for this Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line.startswith("transformers==")]
    (chosen,) = (x for x in wanted if x.marker is None or x.marker.evaluate())
    return str(chosen.specifier).removeprefix("==")


def test_the_package_admits_no_older_version() -> None:
    oldest = OLDEST.rpartition(".")[0]
    assert f'"transformers>={oldest}",' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "version", sorted({OLDEST, "4.57.6", pinned()} - {transformers.__version__})
)
def test_the_exported_code_works_with_other_versions(version: str) -> None:
    try:
        # FlexAttention is torch's: compiling it once, in this environment, is enough.
        done = run_tests(version, "-k", "not flex")
    except IndexUnreachable as error:
        pytest.skip(f"pip reaches no package index: {error}")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    assert "skipped" not in done.stdout
