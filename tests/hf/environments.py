"""Environments with other versions of transformers, on top of the one that runs this.

    python -m tests.hf.environments 4.53.3 4.57.6

builds one per version under build/ and runs the tests of the exported code in it. An environment
holds transformers and what it needs in other versions; all else, torch above all, is found where
the running interpreter has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/hf/test_model.py", "tests/hf/test_generation.py")
UNREACHABLE = (
    "NewConnectionError", "ConnectTimeoutError", "ConnectionResetError", "Max retries exceeded",
    "Temporary failure in name resolution", "Connection refused", "Network is unreachable",
    "ProxyError",
)  # fmt: skip
"""What pip says where no index answers."""


class IndexUnreachable(Exception):
    """pip could not ask a package index."""


def environment(version: str) -> Path:
    """The interpreter of an environment with this version of transformers, built at first use.

    Raises `IndexUnreachable` where pip finds no index, `RuntimeError` for any other failure.
    """
    python_version = "".join(map(str, sys.version_info[:2]))
    folder = ROOT / f"build/transformers-{version}-py{python_version}"
    python = folder / "bin/python"
    if _version_in(python) == version:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    (own,) = folder.glob("lib/python*/site-packages")
    # Searched after the environment's own packages.
    (own / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    # The pip of the running interpreter, found like everything else.
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--retries", "2"]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", f"transformers=={version}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = done.stdout + done.stderr
        if any(sign in said for sign in UNREACHABLE):
            raise IndexUnreachable(said[-500:])
        raise RuntimeError(f"pip could not install transformers {version}:\n{said[-3000:]}")
    assert _version_in(python) == version, f"{python} does not import transformers {version}"
    return python


def _version_in(python: Path) -> str | None:
    """The version of transformers that imports beside torch in an environment; None without."""
    if not python.is_file():
        return None
    code = "import torch, transformers; print(transformers.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def run_tests(version: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The tests of the exported code under one version."""
    python = environment(version)
    with tempfile.TemporaryDirectory() as cache:
        return subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, *options],
            cwd=ROOT, env={**os.environ, "HF_MODULES_CACHE": cache}, capture_output=True, text=True,
        )  # fmt: skip


def main(versions: list[str]) -> None:
    failed = []
    for version in versions:
        print(f"transformers {version}", flush=True)
        done = run_tests(version)
        print(done.stdout, done.stderr, sep="\n", flush=True)
        failed += [version] * (done.returncode != 0)
    sys.exit(f"failed with transformers {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
