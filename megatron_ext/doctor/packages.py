"""Packages: which are there, in which version, what they enable, and the well-known wrong ones."""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from megatron_ext.doctor.finding import Finding

Check = Callable[[], list[Finding]]

REQUIRED = {
    # distribution: (oldest version, first version that is too new)
    "torch": ((2, 6), None),
    "megatron-core": ((0, 16, 1), (0, 20)),
    "numpy": ((1, 26), None),
    "tyro": ((1, 0), None),
    "PyYAML": ((6,), None),
    "safetensors": ((0, 5), None),
    "tqdm": (None, None),
    "tensorboard": (None, None),
    "psutil": (None, None),
    "einops": (None, None),
    "datatrove": ((0, 5), None),
    "tokenizers": ((0, 20), None),
    "transformers": ((4, 53), None),
    "sentencepiece": ((0, 2), None),
    "pyarrow": ((15,), None),
    "scipy": ((1, 10), None),
    "pandas": ((2,), None),
    "matplotlib": ((3, 7), None),
}
"""As in pyproject.toml."""
_WITHOUT = {"psutil": "megatron-core's checkpoints hang without it"}
OPTIONAL = {
    # distribution: (modules that make it whole, what it enables)
    "triton": (("triton",), "Triton kernels of the loss; megatron-core 0.17 and later import it"),
    "flash-attn": (("flash_attn",), "--attention-impl flash"),
    "transformer-engine": (
        ("transformer_engine", "transformer_engine_torch"), "FP8 and fused layers",
    ),
    "nvidia-resiliency-ext": (("nvidia_resiliency_ext",), "--enable-ft-package"),
    "wandb": (("wandb",), "--wandb-project"),
    "lm-eval": (("lm_eval",), "tools/evaluate_tasks.py"),
}  # fmt: skip
_CONFLICTS = {"transformer-engine": "import of megatron.core fails: its torch library is missing"}


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0), 2.3.0rc1 is (2, 3, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_python() -> list[Finding]:
    found = sys.version_info[:3]
    text = ".".join(map(str, found))
    if not (3, 10) <= found < (3, 13):
        return [Finding("problem", "python", f"{text} is not supported", "use 3.10 to 3.12")]
    return [Finding("ok", "python", text)]


def check_required() -> list[Finding]:
    findings = []
    for name, (oldest, too_new) in REQUIRED.items():
        found = installed(name)
        if found is None:
            why = f"; {_WITHOUT[name]}" if name in _WITHOUT else ""
            findings.append(Finding("problem", name, f"not installed{why}", f"pip install {name}"))
            continue
        number = numbers(found)
        is_old = oldest is not None and number < oldest
        is_new = too_new is not None and number >= too_new
        if is_old or is_new:
            wanted = f"{'.'.join(map(str, oldest or ()))} or newer" if is_old else (
                f"older than {'.'.join(map(str, too_new or ()))}"
            )  # fmt: skip
            findings.append(
                Finding("problem", name, f"{found} is not supported", f"install {wanted}")
            )
        else:
            findings.append(Finding("ok", name, found))
    return findings


def check_optional() -> list[Finding]:
    findings = []
    for name, (modules, enables) in OPTIONAL.items():
        found, absent = installed(name), [x for x in modules if find_spec(x) is None]
        if found is None and len(absent) == len(modules):
            findings.append(Finding("note", name, f"not installed; it enables: {enables}"))
        elif absent:
            why = _CONFLICTS.get(name, f"there is no module {absent[0]}")
            findings.append(
                Finding(
                    "problem", name, f"{found or 'unknown version'} is half installed: {why}",
                    f"install all of it (pip install --no-build-isolation {name}[pytorch]) or "
                    "none" if name == "transformer-engine" else f"reinstall {name}",
                )
            )  # fmt: skip
        else:
            findings.append(Finding("ok", name, f"{found}, enables: {enables}"))
    return findings


def check_apex() -> list[Finding]:
    """PyPI's package of that name is a web toolkit; NVIDIA's is built from source."""
    spec = find_spec("apex")
    if spec is None:
        return [Finding("note", "apex", "not installed; nothing here needs it")]
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if any((place / "multi_tensor_apply").is_dir() for place in places):
        return [Finding("ok", "apex", "NVIDIA's")]
    where = places[0] if places else spec.origin
    return [
        Finding(
            "problem", "apex", f"{where} is not NVIDIA's apex but an unrelated package of that "
            "name from PyPI, which megatron-core takes for it",
            "pip uninstall apex; NVIDIA's comes with the NGC image or from its source",
        )
    ]  # fmt: skip


def imported(name: str) -> tuple[ModuleType | None, str]:
    """The module, or why it does not import."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        # A broken installation raises anything: OSError, RuntimeError, AttributeError.
        return None, f"{type(error).__name__}: {error}"


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def check_torch() -> list[Finding]:
    """Does torch see the GPUs that are there?"""
    if installed("torch") is None:
        return []
    torch, why = imported("torch")
    if torch is None:
        return [Finding("problem", "torch", f"does not import: {why}", "reinstall torch")]
    driver, built = driver_cuda_version(), torch.version.cuda
    return [cuda_finding(driver, built, torch.cuda.is_available())]


def cuda_finding(driver: tuple[int, int] | None, built: str | None, is_available: bool) -> Finding:
    """What the driver's CUDA version, torch's and its own verdict say together."""
    if is_available:
        return Finding("ok", "cuda", f"torch is built for CUDA {built}, the driver runs {driver}")
    if driver is None:
        return Finding("note", "cuda", "no NVIDIA driver: training runs on the CPU, over gloo")
    newest = ".".join(map(str, driver))
    if built is None:
        return Finding(
            "problem", "cuda", f"there is a driver for CUDA {newest}, but torch is a CPU build",
            "install a CUDA build of torch",
        )  # fmt: skip
    if numbers(built)[:1] > driver[:1]:
        return Finding(
            "problem", "cuda", f"torch is built for CUDA {built}, the driver runs up to {newest}",
            f"update the driver, or install a torch built for CUDA {driver[0]}",
        )  # fmt: skip
    return Finding(
        "problem", "cuda", f"torch (CUDA {built}) sees no device although there is a driver",
        "look at CUDA_VISIBLE_DEVICES, nvidia-smi, and whether the container was given GPUs",
    )  # fmt: skip


def check_megatron() -> list[Finding]:
    if installed("megatron-core") is None or installed("torch") is None:
        return []
    module, why = imported("megatron.core")
    if module is None:
        return [
            Finding(
                "problem", "megatron.core", f"does not import: {why}",
                "see the problems above; a half-installed transformer-engine is the usual cause",
            )
        ]  # fmt: skip
    return [Finding("ok", "megatron.core", "imports")]


PACKAGE_CHECKS: tuple[Check, ...] = (
    check_python, check_required, check_torch, check_megatron, check_apex, check_optional,
)  # fmt: skip
