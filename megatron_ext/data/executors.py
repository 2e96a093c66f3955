"""Runs the tasks of a preprocessing job through datatrove: on local processes, SLURM or Ray.

datatrove starts the processes, keeps account of finished tasks and resubmits; a task is one call of
`preprocess.run_task`. Its readers and its Megatron writer are not used: they pass over malformed
records with a warning, cut work by whole files only, and open output files under their final names.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

import megatron_ext
from megatron_ext.data.preprocess import Job, PreprocessConfig, is_finished, merge, plan, run_task


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Where the tasks run."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """Processes on this machine; a SLURM job array (the command returns after submitting it and
    the merge that follows it); or Ray tasks (on the cluster RAY_ADDRESS names, else local)."""
    workers: int | None = None
    """Tasks at the same time; all cores of this machine, or as many as the cluster gives."""
    mem_per_cpu_gb: int = 2
    """Memory a SLURM or Ray task asks for."""
    slurm_partition: str | None = None
    """Partition; required for --executor slurm."""
    slurm_time: str = "24:00:00"
    """Time limit of a SLURM task."""
    slurm_args: tuple[str, ...] = ()
    """More arguments of sbatch as name=value, such as account=mine."""
    slurm_env_command: str | None = None
    """Shell command that prepares a task; activates this virtual environment when absent."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers is {self.workers}: give 1 or more.")
        if self.executor == "slurm" and not self.slurm_partition:
            raise ValueError("--executor slurm needs --slurm-partition.")
        for argument in self.slurm_args:
            if "=" not in argument:
                raise ValueError(f"--slurm-args {argument}: give name=value.")


class TokenizeStep(PipelineStep):
    """datatrove's view of a task: number `rank` of the job in `folder`."""

    type, name = "tokenize", "to .bin/.idx"

    def __init__(self, folder: Path, single_threaded: bool) -> None:
        super().__init__()
        self.folder = str(folder)
        self.single_threaded = single_threaded

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        if self.single_threaded:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        run_task(Path(self.folder), rank)


class MergeStep(PipelineStep):
    """The merge as a SLURM job of its own, after the array."""

    type, name = "merge", "to .bin/.idx"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        merge(Path(self.folder))


class _QuietLocalExecutor(LocalPipelineExecutor):
    """Without datatrove's log of every task; errors reach the caller as exceptions."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.disable("datatrove")
        return super()._run_for_rank(rank, local_rank, node_rank)


def preprocess(config: PreprocessConfig, executor: ExecutorConfig) -> dict[str, Any] | None:
    """Do or continue a job: the manifest, or None where it was done before or is submitted."""
    job = plan(config)
    folder = config.folder.resolve()
    if job is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    _forget_unfinished(folder, len(job.tasks))
    if executor.executor == "slurm":
        _submit(folder, len(job.tasks), executor)
        return None
    with _progress(job, folder):
        tasks = _executor(folder, len(job.tasks), executor)
        tasks.run()
    manifest = merge(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _forget_unfinished(folder: Path, num_tasks: int) -> None:
    """datatrove's mark of a task whose files are gone would have the task skipped for ever."""
    for task in range(num_tasks):
        if not is_finished(folder, task):
            (folder / f"log/completions/{task:05d}").unlink(missing_ok=True)


def _executor(folder: Path, num_tasks: int, config: ExecutorConfig) -> PipelineExecutor:
    if config.executor == "ray":
        _start_ray()
        return RayPipelineExecutor(
            [TokenizeStep(folder, single_threaded=True)],
            tasks=num_tasks,
            workers=config.workers or -1,
            logging_dir=str(folder / "log"),
            mem_per_cpu_gb=config.mem_per_cpu_gb,
        )
    workers = min(config.workers or len(os.sched_getaffinity(0)), num_tasks)
    return _QuietLocalExecutor(
        [TokenizeStep(folder, single_threaded=workers > 1)],
        tasks=num_tasks,
        workers=workers,
        logging_dir=str(folder / "log"),
    )


def _python_path() -> str:
    """PYTHONPATH under which a process on another machine finds this package."""
    root = str(Path(megatron_ext.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def _start_ray() -> None:
    import ray

    if not ray.is_initialized():
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": _python_path()}})


def _submit(folder: Path, num_tasks: int, config: ExecutorConfig) -> None:
    """Submit the array and, depending on its success, the merge."""
    activate = Path(sys.prefix) / "bin/activate"
    command = config.slurm_env_command or (
        f"source {shlex.quote(str(activate))}" if activate.is_file() else ":"
    )
    command += f"\nexport PYTHONPATH={shlex.quote(_python_path())}"
    common = {
        "time": config.slurm_time,
        "partition": config.slurm_partition,
        "mem_per_cpu_gb": config.mem_per_cpu_gb,
        "qos": None,
        "env_command": command,
        "sbatch_args": dict(argument.split("=", 1) for argument in config.slurm_args),
    }
    tasks = SlurmPipelineExecutor(
        [TokenizeStep(folder, single_threaded=True)],
        tasks=num_tasks,
        workers=config.workers or -1,
        job_name="tokenize",
        logging_dir=str(folder / "log"),
        **common,
    )
    SlurmPipelineExecutor(
        [MergeStep(folder)],
        tasks=1,
        job_name="tokenize-merge",
        logging_dir=str(folder / "merge-log"),
        depends=tasks,
        **common,
    ).run()


@contextmanager
def _progress(job: Job, folder: Path) -> Iterator[None]:
    """A bar over the input's bytes on a terminal, fed by finished tasks; silences datatrove."""
    weights = {task: sum(p.weight for p in pieces) for task, pieces in enumerate(job.tasks)}
    stopped = threading.Event()
    total = sum(weights.values())

    def watch() -> None:
        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
            while not bar.disable and not stopped.wait(0.5):
                for task in [task for task in weights if is_finished(folder, task)]:
                    bar.update(weights.pop(task))
            if not bar.disable:
                bar.update(sum(w for task, w in weights.items() if is_finished(folder, task)))

    thread = threading.Thread(target=watch)
    logger.disable("datatrove")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        logger.enable("datatrove")
