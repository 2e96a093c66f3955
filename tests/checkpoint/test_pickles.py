"""A checkpoint cannot run code: every pickle in it is tried with one that would."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.pickles import METADATA, plain_values_only, read_metadata
from megatron_ext.checkpoint.stored import COMMON, StoredParameters, read_common
from megatron_ext.parallel.groups import shutdown_parallel
from megatron_ext.training.loop import Trainer
from tests.checkpoint.segments import train_segment, with_folders
from tests.test_imports import ROOT, SOURCES
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_rank")
CONFIG = tiny_config(model={"num_layers": 1})


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.witness,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    train_segment(with_folders(CONFIG, save=root), 1)
    shutdown_parallel()
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """With a manifest that will fit whatever is put in: the attacker writes it, too."""
    return shutil.copytree(saved, tmp_path / "copy")


def write(folder: Path, name: str, contents: bytes) -> None:
    (folder / name).write_bytes(contents)
    path = folder / manifest.MANIFEST
    tree = json.loads(path.read_text())
    digest = hashlib.sha256(contents).hexdigest()
    tree["files"][name] = {"bytes": len(contents), "sha256": digest}
    path.write_text(json.dumps(tree))


def saved_by_torch(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def load(root: Path) -> None:
    Trainer.build(with_folders(CONFIG, load=root)).load()


def in_metadata(folder: Path, witness: Path) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.planner_data = Evil(witness)
    write(folder, METADATA, pickle.dumps(metadata))


def in_common(folder: Path, witness: Path) -> None:
    if not (folder / COMMON).is_file():
        pytest.skip("this megatron-core keeps no common.pt")
    write(folder, COMMON, saved_by_torch({**read_common(folder), "extra": Evil(witness)}))


def in_a_shard(folder: Path, witness: Path) -> None:
    """In place of a layer's extra state, an object that megatron-core saves with its layers."""
    metadata = read_metadata(folder)
    index, place = next(
        (index, place)
        for index, place in metadata.storage_data.items()
        if index.fqn.endswith("_extra_state/shard_0_1")
    )
    evil = saved_by_torch(Evil(witness))
    shard = folder / place.relative_path
    start = shard.stat().st_size
    write(folder, place.relative_path, shard.read_bytes() + evil)
    place.offset, place.length = start, len(evil)
    write(folder, METADATA, pickle.dumps(metadata))


@pytest.mark.parametrize("put", [in_metadata, in_common, in_a_shard])
def test_a_malicious_pickle_is_refused_and_does_not_run(
    put: Callable[[Path, Path], None], copy: Path, tmp_path: Path
) -> None:
    witness = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(witness)))
    assert witness.exists(), "this pickle would do nothing anywhere"
    witness.unlink()
    load(copy)
    shutdown_parallel()
    put(copy / "iter_0000001", witness)
    with pytest.raises(ValueError, match="--load: .* refused|--load is .* damaged"):
        load(copy)
    assert not witness.exists()


def test_export_refuses_malicious_metadata_by_name(copy: Path, tmp_path: Path) -> None:
    folder = copy / "iter_0000001"
    in_metadata(folder, tmp_path / "ran")
    with pytest.raises(ValueError, match=r"--load: .*\.metadata is refused: it names pathlib"):
        StoredParameters(folder)
    (folder / METADATA).write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match=r"\.metadata is refused: it is damaged"):
        StoredParameters(folder)
    assert not (tmp_path / "ran").exists()


class AttributePickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class Attribute:
    """Unpickles as an attribute of a class that is no enumeration."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return getattr, (torch.Size, "__subclasses__")


def test_metadata_of_early_python_3_11_is_read_and_no_other_attribute(copy: Path) -> None:
    folder = copy / "iter_0000001"
    metadata = read_metadata(folder)
    stream = io.BytesIO()
    AttributePickler(stream).dump(metadata)
    assert b"getattr" in stream.getvalue()
    write(folder, METADATA, stream.getvalue())
    assert read_metadata(folder) == metadata
    load(copy)
    metadata.planner_data = Attribute()
    write(folder, METADATA, pickle.dumps(metadata))
    with pytest.raises(ValueError, match="is refused: it names '__subclasses__' of"):
        read_metadata(folder)


def test_plain_values_only_holds_for_those_who_ask_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = tmp_path / "ran"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    contents = saved_by_torch(Evil(witness))
    with plain_values_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(contents), weights_only=False)
    assert not witness.exists()
    torch.load(io.BytesIO(contents), weights_only=False)
    assert witness.exists()


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


PRODUCT = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_no_pickle_no_remote_code(path: Path) -> None:
    """Of what users start; the example that loads its own export names the flag itself."""
    for call in calls(path):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        name, line = name_of(call), f"{path}:{call.lineno}"
        assert keywords.get("shell", "False") == "False", line
        assert name not in ("os.system", "os.popen", "eval", "exec", "pickle.load"), line
        assert not name.startswith(("pickle.loads", "marshal.", "dill.", "joblib.load")), line
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", line
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", "False") == "False", line
        if path.parent.name != "quickstart":
            assert keywords.get("trust_remote_code", "False") == "False", line
