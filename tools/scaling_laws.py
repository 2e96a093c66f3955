"""Plan, run and fit a scaling study, and predict from its laws or the published ones.

python tools/scaling_laws.py plan examples/scaling/tiny.yaml
python tools/scaling_laws.py launch runs/scaling-tiny --jobs 2
python tools/scaling_laws.py collect runs/scaling-tiny
python tools/scaling_laws.py fit runs/scaling-tiny
python tools/scaling_laws.py plot runs/scaling-tiny
python tools/scaling_laws.py predict --noise uniform --flops 1e21
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


Folder = Annotated[Path, tyro.conf.Positional]


def plan(study: Folder, flops_per_second: float | None = None) -> int:
    """Work out a study's runs: plan.json and one configuration per run in its output folder.

    Args:
        study: YAML file; megatron_ext/scaling/study.py and docs/scaling.md say what it may hold.
        flops_per_second: What the machine reaches in training, for an estimate of the hours.
    """
    from megatron_ext.data.tokenizer import load_tokenizer
    from megatron_ext.scaling.ladder import describe, make_plan, write_plan
    from megatron_ext.scaling.study import read_study

    description = read_study(study)
    tokenizer = description.recipe.get("data", {}).get("tokenizer_model")
    vocab_size = None if tokenizer is None else load_tokenizer(tokenizer).vocab_size
    made, configs = make_plan(description, vocab_size)
    path = write_plan(made, configs)
    print(describe(made, description, flops_per_second))
    print(f"{path}: written")
    return 0


def launch(
    folder: Folder, mode: Literal["local", "slurm", "commands", "status"] = "local", jobs: int = 1,
    command: str = "python pretrain_diffusion.py", retry_failed: bool = False,
    sbatch: tuple[str, ...] = (),
) -> int:  # fmt: skip
    """Start what a plan still has to run; repeat it to continue after an interruption.

    Exit code 1 where a local launch leaves a run unfinished.

    Args:
        folder: The study's output folder.
        mode: Here; a SLURM array script; commands to run elsewhere; or only the table of states.
        jobs: Runs at a time.
        command: What starts a run, such as "torchrun --nproc-per-node 8 pretrain_diffusion.py".
        retry_failed: Start failed and diverged runs again, too.
        sbatch: Options of the array, such as --sbatch gres=gpu:8 time=4:00:00 (without dashes).
    """
    from megatron_ext.scaling import launch as launching
    from megatron_ext.scaling.ladder import read_plan

    made, words = read_plan(folder), command.split()
    if mode == "commands":
        print("\n".join(launching.commands(made, words)))
        return 0
    if mode == "slurm":
        options = [f"--{word}" for word in sbatch]
        for script in launching.write_slurm(made, jobs, words, options):
            print(f"sbatch {script}")
        return 0
    complete = True
    if mode == "local":
        complete = launching.launch_local(made, jobs, words, retry_failed=retry_failed)
    print(launching.status_table(made))
    return 0 if complete else 1


if __name__ == "__main__":
    try:
        sys.exit(
            tyro.extras.subcommand_cli_from_dict({"plan": plan, "launch": launch})
        )
    except ValueError as error:
        sys.exit(f"scaling_laws.py: {error}")
