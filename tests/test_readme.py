"""Every command of the README runs, in its order, in a fresh copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST_COMMAND = "make test"


def commands_of(page: Path) -> list[str]:
    """Lines of the page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would hand to a new user, with this environment in place of a new one."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "tests/golden", folder / "tests/golden")
    (folder / ".venv").symlink_to(sys.prefix)
    # make would install again into an environment that is older than the requirements.
    os.utime(folder / "requirements.txt", (0, 0))
    return folder


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    assert TEST_COMMAND in commands_of(ROOT / "README.md")
    assert TEST_COMMAND in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.slow
def test_every_command_of_the_readme_runs(copy: Path) -> None:
    commands = commands_of(ROOT / "README.md")
    assert len(commands) > 10
    environment = {**os.environ, "STEPS": "8", "OMP_NUM_THREADS": "1"}
    script = "set -euo pipefail\n"
    for command in commands:
        if command != TEST_COMMAND:
            script += f"echo {'=' * 8} $LINENO; {command}\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=copy, env=environment, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for expected in ("bits/byte", "--- sample 1 of runs/quickstart at step 8 ---", "--hidden-size"):
        assert expected in done.stdout
    assert (copy / "runs/quickstart/iter_0000008/manifest.json").is_file()
    assert (copy / "data/mine/text.bin").is_file()
