"""Each mistake is made for real (files on the path, limits, variables) and must be named."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.doctor import machine, packages
from megatron_ext.doctor.finding import Finding

ROOT = Path(__file__).resolve().parents[1]


def named(findings: list[Finding], subject: str) -> Finding:
    (found,) = [finding for finding in findings if finding.subject == subject]
    return found


def package(folder: Path, name: str, *modules: str, version: str = "1.0") -> None:
    """A distribution with empty modules, as pip leaves it."""
    for module in modules:
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").write_text("")
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def run(*python: str, **environment: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, *python, "-m", "megatron_ext.doctor", "--json"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    # What a CUDA build of torch says on a machine without a GPU.
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert not said, said
    return done.returncode, json.loads(done.stdout)


def test_without_any_package_every_one_is_named_and_nothing_breaks() -> None:
    code, findings = run("-S")
    assert code == 1
    missing = {f["subject"] for f in findings if f["text"].startswith("not installed")}
    assert set(packages.REQUIRED) <= missing
    (psutil,) = [f for f in findings if f["subject"] == "psutil"]
    assert psutil["level"] == "problem" and "hang" in psutil["text"] and psutil["remedy"]


def test_this_environment_has_no_problem_and_says_what_it_lacks() -> None:
    code, findings = run()
    assert code == 0, [f for f in findings if f["level"] == "problem"]
    subjects = {f["subject"]: f for f in findings}
    assert subjects["megatron.core"]["level"] == "ok"
    assert set(packages.OPTIONAL) <= subjects.keys()


def test_requirements_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    wanted = {}
    for name, rest in re.findall(r'"([\w-]+)([^"]*)"', listed):
        bounds = {sign: packages.numbers(number) for sign, number in
                  re.findall(r"(>=|<)([\d.]+)", rest)}  # fmt: skip
        wanted[name] = (bounds.get(">="), bounds.get("<"))
    assert wanted == packages.REQUIRED


def test_the_wrong_apex_is_told_from_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "apex", "apex", "apex/lib", version="0.9.10.dev0")
    found = named(packages.check_apex(), "apex")
    assert found.level == "problem" and "PyPI" in found.text and "uninstall apex" in found.remedy
    (tmp_path / "apex/multi_tensor_apply").mkdir()
    assert named(packages.check_apex(), "apex").level == "ok"


def test_half_of_transformer_engine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "transformer-engine", "transformer_engine", version="2.20")
    found = named(packages.check_optional(), "transformer-engine")
    assert found.level == "problem" and "2.20 is half installed" in found.text
    package(tmp_path, "transformer-engine-torch", "transformer_engine_torch", version="2.20")
    found = named(packages.check_optional(), "transformer-engine")
    assert found == Finding("ok", "transformer-engine", "2.20, enables: FP8 and fused layers")


def test_versions_out_of_range_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "megatron-core", version="0.15.3")
    package(tmp_path, "einops", version="0.8.2rc1")
    findings = packages.check_required()
    found = named(findings, "megatron-core")
    assert found.level == "problem" and found.remedy == "install 0.16.1 or newer"
    assert named(findings, "einops").level == "ok"


@pytest.mark.parametrize(
    ("driver", "built", "is_available", "level", "words"),
    [
        ((13, 0), "13.0", True, "ok", "built for CUDA 13.0"),
        (None, None, False, "note", "no NVIDIA driver"),
        ((13, 0), None, False, "problem", "CPU build"),
        ((12, 4), "13.0", False, "problem", "the driver runs up to 12.4"),
        ((13, 0), "13.0", False, "problem", "sees no device"),
    ],
)
def test_torch_and_driver_are_compared(
    driver: tuple[int, int] | None, built: str | None, is_available: bool, level: str, words: str
) -> None:
    found = packages.cuda_finding(driver, built, is_available)
    assert found.level == level and words in found.text
    assert bool(found.remedy) == (level == "problem")


def test_low_limits_and_harmful_variables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        found = named(machine.check_limits(), "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.level == "warning" and "at most 1024" in found.text and "ulimit -n" in found.remedy
    found = named(machine.check_shared_memory(str(tmp_path / "absent")), str(tmp_path / "absent"))
    assert found.level == "warning"
    for name, (values, level, _, remedy) in machine._HARMFUL.items():
        monkeypatch.setenv(name, values[0])
        found = named(machine.check_variables(), name)
        assert (found.level, found.remedy) == (level, remedy)
        monkeypatch.delenv(name)
        assert name not in {finding.subject for finding in machine.check_variables()}
