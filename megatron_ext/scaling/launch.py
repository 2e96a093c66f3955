"""Run a plan: here with bounded concurrency, as a SLURM array, or as a list of commands.

A run's folder tells its state: metrics.jsonl with the last step's validation (finished), exit_code
(what its command returned), `latest` (a checkpoint to go on from). Starting again continues what
was interrupted and leaves alone what is finished, so every way may be repeated and mixed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from megatron_ext.scaling.ladder import Plan, Run

State = Literal["waiting", "started", "stopped", "finished", "diverged", "failed"]
DEFAULT_COMMAND = ("python", "pretrain_diffusion.py")
EXIT_RESUME, EXIT_DIVERGED, EXIT_HUNG = 85, 86, 87
"""As in megatron_ext.training.guards."""


def read_metrics(folder: str | Path) -> list[dict]:
    """A run's records; a last line that was cut off while being written is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    records = [json.loads(line) for line in lines[:-1] if line]
    if lines[-1]:
        try:
            records.append(json.loads(lines[-1]))
        except json.JSONDecodeError:
            pass
    return records


def last_step(records: Sequence[dict]) -> int:
    return max((record["step"] for record in records), default=0)


def _exit_code(folder: Path) -> int | None:
    """What the run left in exit.json, or its command returned; torchrun's is 1 for everything."""
    if not (folder / "exit_code").is_file():
        return None
    code = int((folder / "exit_code").read_text())
    if (folder / "exit.json").is_file():
        return int(json.loads((folder / "exit.json").read_text())["code"])
    return code


def state_of(run: Run) -> State:
    """What the folder of a run says about it."""
    folder = Path(run.folder)
    records = read_metrics(folder)
    if any(r["step"] == run.steps and "valid/elbo" in r for r in records):
        return "finished"
    code = _exit_code(folder)
    if code is None:
        return "started" if records or (folder / "latest").is_file() else "waiting"
    if code == EXIT_DIVERGED:
        return "diverged"
    # Code 0 before the last step: the plan has become longer since.
    return "stopped" if code in (0, EXIT_RESUME, EXIT_HUNG, 143, 130) else "failed"


def command_of(run: Run, plan: Plan, command: Sequence[str] = DEFAULT_COMMAND) -> str:
    """The shell line that starts or continues a run and keeps its log and exit code.

    A branch loads its parent's checkpoint the first time and its own later.
    """
    config = Path(plan.output) / "configs" / f"{run.name}.yaml"
    words = [*command, "--config", str(config)]
    line = shlex.join(words)
    folder = shlex.quote(run.folder)
    if run.parent is not None:
        again = shlex.join([*words, "--load", run.folder, "--ckpt-step", "None"])
        line = f"if [ -f {folder}/latest ]; then {again}; else {line}; fi"
    return (
        f"mkdir -p {folder} && rm -f {folder}/exit_code; "
        f"{{ {line}; }} >> {folder}/log.txt 2>&1; echo $? > {folder}/exit_code"
    )


def in_order(plan: Plan) -> list[Run]:
    """Runs with parents before their branches, the longest first among each."""
    return sorted(plan.runs, key=lambda run: (run.parent is not None, -run.total_flops))


def due(plan: Plan, *, retry_failed: bool = False) -> list[Run]:
    """Runs that a launch has to start."""
    done = {"finished"} if retry_failed else {"finished", "diverged", "failed"}
    return [run for run in in_order(plan) if state_of(run) not in done]


def commands(
    plan: Plan, command: Sequence[str] = DEFAULT_COMMAND, *, retry_failed: bool = False
) -> list[str]:
    """Shell lines of all runs that are due; a branch comes after its parent."""
    return [command_of(run, plan, command) for run in due(plan, retry_failed=retry_failed)]


def launch_local(
    plan: Plan,
    jobs: int = 1,
    command: Sequence[str] = DEFAULT_COMMAND,
    *,
    retry_failed: bool = False,
    report: Callable[[str], None] = print,
) -> bool:
    """Run what is due, `jobs` at a time; True where everything is finished afterwards.

    A branch waits for its parent and is left out where the parent did not finish. SIGTERM
    and SIGINT reach the runs as SIGTERM, at which they save and stop. The cores are shared out
    unless OMP_NUM_THREADS is set: threads that wait for a core slow each other down.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}: give 1 or more.")
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    waiting, active = due(plan, retry_failed=retry_failed), {}
    by_name = {run.name: run for run in plan.runs}
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        del number, frame
        stopping = True
        for process in active.values():
            os.killpg(process.pid, signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while active or (waiting and not stopping):
            for run in [run for run in waiting if len(active) < jobs and not stopping]:
                parent = None if run.parent is None else by_name[run.parent]
                if parent is not None and state_of(parent) != "finished":
                    if parent not in waiting and parent.name not in active:
                        waiting.remove(run)
                        report(f"{run.name}: left out, {parent.name} is {state_of(parent)}")
                    continue
                if len(active) < jobs:
                    waiting.remove(run)
                    active[run.name] = subprocess.Popen(
                        ["bash", "-c", f"trap : TERM INT; {command_of(run, plan, command)}"],
                        start_new_session=True,
                        env=environment,
                    )
            time.sleep(0.2)
            for name in [name for name, process in active.items() if process.poll() is not None]:
                del active[name]
                report(f"{name}: {state_of(by_name[name])}")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return all(state_of(run) == "finished" for run in plan.runs)


SLURM_SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{jobs}
#SBATCH --output={output}/slurm-%A_%a.out
{directives}
# Lines of {lines}: one run each. Submit again to continue what was interrupted.
set -u
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {lines})
eval "$line"
"""


def write_slurm(
    plan: Plan,
    jobs: int,
    command: Sequence[str] = DEFAULT_COMMAND,
    directives: Sequence[str] = (),
    *,
    retry_failed: bool = False,
) -> list[Path]:
    """One array script for runs that are due, a second one for annealing branches, if any.

    Submit the second with --dependency=afterok:ID of the first; the paths are in that order.
    """
    folder, scripts = Path(plan.output), []
    all_due = due(plan, retry_failed=retry_failed)
    for kind, runs in {
        "runs": [run for run in all_due if run.parent is None],
        "branches": [run for run in all_due if run.parent is not None],
    }.items():
        if not runs:
            continue
        lines = folder / f"slurm-{kind}.txt"
        lines.write_text("".join(command_of(run, plan, command) + "\n" for run in runs))
        script = folder / f"slurm-{kind}.sh"
        script.write_text(
            SLURM_SCRIPT.format(
                name=f"{folder.name}-{kind}", last=len(runs) - 1, jobs=jobs, output=folder,
                lines=lines, directives="\n".join(f"#SBATCH {word}" for word in directives),
            )
        )  # fmt: skip
        scripts.append(script)
    return scripts


def status_table(plan: Plan) -> str:
    """A line per run: state, progress, last bound; then how many are in which state."""
    lines = [f"{'run':<40} {'state':<9} {'step':>13}  {'bound':>8}"]
    counts: dict[str, int] = {}
    for run in plan.runs:
        state, records = state_of(run), read_metrics(run.folder)
        counts[state] = counts.get(state, 0) + 1
        bounds = [record["valid/elbo"] for record in records if "valid/elbo" in record]
        bound = f"{bounds[-1]:8.4f}" if bounds else "       -"
        progress = f"{last_step(records)}/{run.steps}"
        lines.append(f"{run.name:<40} {state:<9} {progress:>13}  {bound}")
    lines.append(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    return "\n".join(lines)
