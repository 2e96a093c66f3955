"""The subcommands of tools/scaling_laws.py; each returns the exit code.

A study's output folder holds plan.json, configs/, runs/, then runs.csv, fits.json and figures/.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
import yaml

Folder = Annotated[Path, tyro.conf.Positional]
Convention = Literal["paper", "6p"]


def launch(
    folder: Folder, mode: Literal["local", "slurm", "commands", "status"] = "local", jobs: int = 1,
    command: str = "python pretrain_diffusion.py", retry_failed: bool = False,
    sbatch: tuple[str, ...] = (),
) -> int:  # fmt: skip
    """Start what a plan still has to run; repeat it to continue after an interruption.

    Exit code 1 where a local launch leaves a run unfinished.

    Args:
        folder: The study's output folder.
        mode: Here; SLURM array scripts; commands to run elsewhere; or only the table of states.
        jobs: Runs at a time.
        command: What starts a run, such as "torchrun --nproc-per-node 8 pretrain_diffusion.py".
        retry_failed: Start failed and diverged runs again, too.
        sbatch: Options of the array, such as --sbatch gres=gpu:8 time=4:00:00 (without dashes).
    """
    from megatron_ext.scaling import launch as launching
    from megatron_ext.scaling.ladder import read_plan

    plan, words = read_plan(folder), shlex.split(command)
    if mode == "commands":
        print("\n".join(launching.commands(plan, words, retry_failed=retry_failed)))
        return 0
    if mode == "slurm":
        options = [f"--{word}" for word in sbatch]
        for script in launching.write_slurm(plan, jobs, words, options, retry_failed=retry_failed):
            print(f"sbatch {script}")
        return 0
    complete = True
    if mode == "local":
        complete = launching.launch_local(plan, jobs, words, retry_failed=retry_failed)
    print(launching.status_table(plan))
    return 0 if complete else 1


def collect(folder: Folder, table: Path | None = None) -> int:
    """The runs' validations as one tidy table, with checks.

    Args:
        folder: The study's output folder.
        table: File to write, .csv or .parquet; FOLDER/runs.csv when absent.
    """
    from megatron_ext.scaling.collect import collect as collect_runs
    from megatron_ext.scaling.collect import write_table
    from megatron_ext.scaling.ladder import read_plan

    rows, checks = collect_runs(read_plan(folder))
    path = table or folder / "runs.csv"
    write_table(rows, path)
    print("\n".join(checks.lines()))
    print(f"{path}: {len(rows)} rows of {rows['run'].nunique()} runs")
    return 0


def fit(
    folder: Folder, table: Path | None = None, min_tokens: float = 0.0,
    budgets: tuple[float, ...] = (), num_draws: int = 1000, seed: int = 0,
) -> int:  # fmt: skip
    """Fit every law the table identifies, say why for the others; writes FOLDER/fits.json.

    Args:
        folder: The study's output folder.
        table: FOLDER/runs.csv when absent.
        min_tokens: Leave out horizons below this, such as those of the warm-up.
        budgets: FLOPs (6P + 12LdN) of the iso-FLOP curves; the plan's, or found from the table.
        num_draws: Resamples of the bootstrap.
        seed: Of the bootstrap.
    """
    from megatron_ext.scaling.collect import read_table
    from megatron_ext.scaling.fit import fit_all, summary, write_fits

    chosen = budgets or planned_budgets(folder)
    by_convention = {"paper": np.array(sorted(chosen))} if chosen else {}
    rows = read_table(table or folder / "runs.csv")
    fits = fit_all(rows, by_convention, min_tokens, num_draws, seed)
    write_fits(fits, folder / "fits.json")
    print("\n".join(summary(fits)))
    print(f"{folder / 'fits.json'}: written")
    return 0


def planned_budgets(folder: Path) -> tuple[float, ...]:
    """Budgets of the folder's plan in the paper's convention, if it has such."""
    path = folder / "plan.json"
    plan = json.loads(path.read_text()) if path.is_file() else {}
    return tuple(plan.get("budgets_flops", ())) if plan.get("convention") == "paper" else ()


def plot(folder: Folder, table: Path | None = None, output: Path | None = None) -> int:
    """Figures (SVG and PNG) and report.html of a fit.

    Args:
        folder: The study's output folder, with fits.json.
        table: FOLDER/runs.csv when absent.
        output: Folder to write; FOLDER/figures when absent.
    """
    from megatron_ext.scaling.collect import read_table
    from megatron_ext.scaling.fit import read_fits
    from megatron_ext.scaling.plots import write_figures

    rows = read_table(table or folder / "runs.csv")
    page = write_figures(rows, read_fits(folder / "fits.json"), output or folder / "figures")
    print(f"{page}: written")
    return 0


def predict(
    noise: str, flops: float | None = None, tokens: float | None = None, fits: Path | None = None,
    convention: Convention = "paper", seq_length: int = 2048, recipe: Path | None = None,
) -> int:  # fmt: skip
    """The compute-optimal run of so many FLOPs, or whose optimum has so many tokens.

    Args:
        noise: masked, low-uniform, balanced, high-uniform or uniform for the paper's laws; a name
            of the study for one's own.
        flops: Compute C of the run, without embedding and head.
        tokens: Tokens at hand, instead of compute.
        fits: fits.json of one's own study; the paper's published laws when absent.
        convention: FLOPs per token are 6P + 12LdN (paper) or 6P.
        seq_length: Positions of the recipe's sequences.
        recipe: YAML file to write with the run that follows.
    """
    from megatron_ext.scaling import predict as predicting
    from megatron_ext.scaling.fit import read_fits

    laws = (
        predicting.published_laws(noise, convention) if fits is None
        else predicting.fitted_laws(read_fits(fits), noise, convention)
    )  # fmt: skip
    prediction = predicting.predict(laws, flops, tokens)
    print(predicting.describe(prediction, seq_length))
    if recipe is not None:
        sections = predicting.recipe(prediction, seq_length)
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(sections, sort_keys=False))
        print(f"{recipe}: written")
    return 0
