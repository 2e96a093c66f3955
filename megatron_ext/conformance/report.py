"""Verdicts of all ranks, one table, one exit code.

A row is a check. It gathers measurements of its parts (a case, a layer, a tensor) from every rank;
the worst decides, relative to its tolerance. A row names the parts it must have, so a check that
measured nothing fails instead of passing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike

from megatron_ext.conformance.tolerances import Tolerance

EXIT_PASSED, EXIT_FAILED, EXIT_NOTHING_CHECKED = 0, 1, 2


@dataclass(frozen=True)
class Measurement:
    """The worst element of one comparison."""

    part: str
    used: float
    """Error over what is allowed: above 1 fails; infinite where nothing may differ."""
    error: float
    """In the unit of the tolerance: of the rms, relative, or absolute where it mixes them."""
    tolerance: Tolerance


def as_float64(values: ArrayLike | torch.Tensor) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def measure(
    part: str,
    result: ArrayLike | torch.Tensor,
    recorded: ArrayLike | torch.Tensor,
    tolerance: Tolerance,
) -> Measurement:
    """Compare element by element.

    Another shape, and a number that is not finite on one side only, are infinitely wrong.
    """
    got, want = as_float64(result), as_float64(recorded)
    if got.shape != want.shape:
        return Measurement(
            f"{part}: shape {got.shape} for {want.shape}", math.inf, math.inf, tolerance
        )
    if want.size == 0:
        return Measurement(part, 0.0, 0.0, tolerance)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(got == want, 0.0, np.abs(got - want))
        error = np.where(np.isnan(got) & np.isnan(want), 0.0, error)
        error = np.where(np.isnan(error), np.inf, error)
        rms = math.sqrt(np.mean(np.square(want)))
        allowed = tolerance.absolute + tolerance.relative * np.abs(want) + tolerance.of_rms * rms
        used = np.where(error == 0.0, 0.0, error / allowed)
    used = np.where(np.isnan(used), np.inf, used)
    at = int(np.argmax(used))
    unit = 1.0
    if not tolerance.absolute and tolerance.of_rms:
        unit = rms
    elif not tolerance.absolute and tolerance.relative:
        unit = abs(float(want.flat[at]))
    worst = float(error.flat[at])
    return Measurement(part, float(used.flat[at]), worst / unit if unit else worst, tolerance)


def measure_rms(
    part: str, result: torch.Tensor, recorded: ArrayLike, tolerance: Tolerance, rms: float
) -> Measurement:
    """Compare the rms of the difference with `tolerance.of_rms * rms`, for rounding noise whose
    largest element says little."""
    got, want = as_float64(result), as_float64(recorded)
    if got.shape != want.shape:
        return measure(part, got, want, tolerance)
    error = math.sqrt(np.mean(np.square(got - want))) if want.size else 0.0
    error = math.inf if math.isnan(error) else error
    return Measurement(part, error / (tolerance.of_rms * rms), error / rms, tolerance)


@dataclass
class _Row:
    measurements: list[Measurement] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)
    """Parts that some rank must have measured."""
    failure: str | None = None
    """Why the check could not be made although it should."""

    def merge(self, other: _Row) -> None:
        self.measurements += other.measurements
        self.parts |= other.parts
        self.failure = self.failure or other.failure

    def verdict(self) -> tuple[str, str, bool]:
        """(worst error and where, its tolerance, passed)."""
        missing = self.parts - {m.part.split(": shape")[0] for m in self.measurements}
        if self.failure is not None:
            return self.failure, "", False
        if missing or not self.measurements:
            return f"not measured: {', '.join(sorted(missing)) or 'anything'}", "", False
        worst = max(self.measurements, key=lambda m: (m.used, m.error))
        where = f"{worst.error:.1e}  {worst.part}" if worst.error else "0"
        return where, str(worst.tolerance), worst.used <= 1


class Report:
    """Rows in the order of the checks, the same on every rank; `finish` brings ranks together."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._skipped: dict[str, str] = {}

    def check(
        self, name: str, measurements: Iterable[Measurement], parts: Iterable[str] = ()
    ) -> None:
        """Add what this rank measured for check `name`; `parts` must be measured by some rank."""
        self._rows.setdefault(name, _Row()).merge(_Row(list(measurements), set(parts)))

    def fail(self, name: str, reason: str) -> None:
        self._rows.setdefault(name, _Row()).merge(_Row(failure=reason))

    def skip(self, name: str, reason: str) -> None:
        """List something that is not checked, and why."""
        self._skipped[name] = reason

    def finish(self, title: str) -> tuple[str, int]:
        """The text to print and the exit code, the same on every rank."""
        of_ranks: list[dict[str, _Row]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(of_ranks, self._rows)
        rows: dict[str, _Row] = {}
        for of_rank in of_ranks:
            for name, row in of_rank.items():
                rows.setdefault(name, _Row()).merge(row)
        verdicts = {name: row.verdict() for name, row in rows.items()}
        failed = [name for name, verdict in verdicts.items() if not verdict[2]]
        lines = [title, "", *_table(verdicts), ""]
        lines += [f"skipped: {name}: {reason}" for name, reason in self._skipped.items()]
        counts = (
            f"{len(rows) - len(failed)} passed, {len(failed)} failed, {len(self._skipped)} skipped"
        )
        if not rows:
            return "\n".join([*lines, f"conformance: NOTHING CHECKED ({counts})"]), (
                EXIT_NOTHING_CHECKED
            )
        if failed:
            lines.append(f"conformance: FAILED ({counts}): {', '.join(failed)}")
            return "\n".join(lines), EXIT_FAILED
        return "\n".join([*lines, f"conformance: PASSED ({counts})"]), EXIT_PASSED


def _table(verdicts: dict[str, tuple[str, str, bool]]) -> list[str]:
    cells = [("check", "worst error", "tolerance", "verdict")]
    cells += [
        (name, error, tolerance, "ok" if passed else "FAIL")
        for name, (error, tolerance, passed) in verdicts.items()
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    text = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=False)) for row in cells]
    lines = [f"{line}  {row[3]}" for line, row in zip(text, cells, strict=True)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
