"""The test suite with the newest megatron-core, in an environment of its own.

    python -m tests.latest                       the whole suite
    python -m tests.latest tests/training -k bf16

needs a Python 3.12 (megatron-core 0.17 and later do): `python3.12` on the path, pyenv's or uv's, or
the one that $PYTHON312 names. The environment, several GB with a CUDA build of PyTorch, is made at
first use under build/ and made again when the requirements change.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/latest-py3.12"
NEWEST = "megatron-core>=0.19,<0.20"


def candidates() -> Iterator[str]:
    """Places where a Python 3.12 may be."""
    if "PYTHON312" in os.environ:
        yield os.environ["PYTHON312"]
        return
    yield from filter(None, [shutil.which("python3.12")])
    homes = (Path.home() / ".pyenv/versions", Path.home() / ".local/share/uv/python")
    for home in homes:
        yield from map(str, sorted(home.glob("*3.12*/bin/python3.12"), reverse=True))


def interpreter() -> str | None:
    """The first candidate that runs and is a 3.12 (a shim of pyenv may be neither)."""
    code = "import sys; print(*sys.version_info[:2])"
    for candidate in candidates():
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.split() == ["3", "12"]:
            return candidate
    return None


def requirements() -> str:
    """requirements.txt with the newest megatron-core."""
    text = (ROOT / "requirements.txt").read_text()
    text, count = re.subn(r"^megatron-core==.*$", NEWEST, text, flags=re.MULTILINE)
    assert count == 1, "requirements.txt pins no megatron-core"
    return text


def environment() -> Path:
    """The interpreter of the environment, made where it is missing or out of date."""
    python, wanted = FOLDER / "bin/python", FOLDER / "requirements.txt"
    if wanted.is_file() and wanted.read_text() == requirements():
        return python
    base = interpreter()
    if base is None:
        sys.exit("there is no Python 3.12; install one, or name it in $PYTHON312")
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(FOLDER)], check=True)
    wanted.with_suffix(".new").write_text(requirements())
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(wanted.with_suffix(".new"))], check=True)
    wanted.with_suffix(".new").rename(wanted)
    return python


def main(arguments: list[str]) -> int:
    python = environment()
    # The Makefile's mark, for the test that runs the README's commands.
    (FOLDER / ".installed").touch()
    names = "import megatron.core, torch; print(megatron.core.__version__, torch.__version__)"
    said = subprocess.run([python, "-W", "ignore", "-c", names], capture_output=True, text=True)
    print("megatron-core, torch:", said.stdout.strip(), flush=True)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    command += arguments
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
