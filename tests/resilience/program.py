"""The training program as real ranks, with a fault in one of them.

`run_program` starts `pretrain_diffusion.main` in processes that a fork server makes in milliseconds
because it has imported everything. A fault is put in from outside through what Python and torch
offer for the purpose: a hook after an optimizer's step, a hook on a module's output, an audit hook
on file system calls. Nothing of the code under test is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_INTERVAL, BATCH = 8, 2, 8
FLAGS = [
    "--vocab-size", "2048", "--mask-token-id", "3", "--pad-token-id", "2", "--num-layers", "1",
    "--hidden-size", "64", "--num-attention-heads", "2", "--seq-length", "16",
    "--head-init-std", "0.02", "--lr", "0.1", "--micro-batch-size", "2",
    "--global-batch-size", str(BATCH), "--train-iters", str(STEPS), "--log-interval", "1",
    "--save-interval", str(SAVE_INTERVAL), "--num-workers", "0", "--seed", "5", "--skip-eval",
]  # fmt: skip
"""A run of eight steps; checkpoints of 4 MB."""
MOCK = ["--mock-data"]
PATIENCE = 240
"""Seconds for a machine that does much else."""

Fault = Callable[..., None]


@dataclass
class Ended:
    """What a run left behind."""

    codes: list[int | None]
    output: list[str]
    """Standard output and error of each rank."""


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.training.tiny", "tests.checkpoint.killed_saves", "tests.resilience.program"]
    )
    return context


def pretrain() -> int:
    import pretrain_diffusion

    return pretrain_diffusion.main()


def replay() -> int:
    from tools import replay_step

    return replay_step.main()


def train_by_hand() -> int:
    """Load a checkpoint and train on named batches; prints losses and norms (argv: run, step,
    first batch, batch after the last)."""
    from megatron_ext.cli import load_config
    from megatron_ext.parallel.groups import shutdown_parallel
    from megatron_ext.training.loop import Trainer

    run, (step, first, last) = sys.argv[1], map(int, sys.argv[2:])
    config = load_config(Path(run) / "config.yaml").with_sections(
        checkpoint={"load": run, "save": None, "save_interval": 0, "ckpt_step": step},
        resilience={"loss_spike_action": "off"},
    )
    trainer = Trainer.build(config)
    trainer.load()
    results = [trainer.train_step(trainer.source.step(number)) for number in range(first, last)]
    print(json.dumps([[r.sums.loss.item() / r.sums.count.item(), r.grad_norm] for r in results]))
    shutdown_parallel()
    return 0


def _rank(
    entry: Callable[[], int],
    rank: int,
    world_size: int,
    folder: str,
    flags: list[str],
    fault: Fault | None,
    *args: Any,
) -> None:
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setpgid(0, 0)
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    if fault is not None:
        fault(rank, *args)
    sys.argv = ["program", *flags]
    code = entry()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(
    folder: Path,
    flags: list[str],
    fault: Fault | None = None,
    *args: Any,
    world_size: int = 2,
    entry: Callable[[], int] = pretrain,
) -> Ended:
    """Run all ranks to their ends; `fault(rank, *args)` is called on each before it starts."""
    folder.mkdir(parents=True)
    context = fork_server()
    ranks = [
        context.Process(target=_rank, args=(entry, r, world_size, str(folder), flags, fault, *args))
        for r in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + PATIENCE
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
        assert rank.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
    output = [(folder / f"{r}.log").read_text() for r in range(world_size)]
    return Ended([rank.exitcode for rank in ranks], output)


def after_step(number: int, do: Callable[[], None]) -> None:
    """Call `do` once in step `number`, between the update and what follows it."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken = 0

    def hook(*args: Any) -> None:
        del args
        nonlocal taken
        taken += 1
        if taken == number:
            do()

    register_optimizer_step_post_hook(hook)


def hang(rank: int, struck: int, holds_the_interpreter: bool) -> None:
    """The rank sleeps in its third step, with or without the interpreter's lock."""
    sleep = ctypes.PyDLL(None).sleep if holds_the_interpreter else time.sleep
    if rank == struck:
        after_step(3, lambda: sleep(3600))


def die_in_a_step(rank: int, struck: int) -> None:
    if rank == struck:
        after_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))


def signalled(rank: int, struck: int, number: int) -> None:
    if rank == struck:
        after_step(3, lambda: os.kill(os.getpid(), number))


def die_in_a_save(rank: int, struck: int, step: int) -> None:
    """SIGKILL when all shards are written and checked, before the folder gets its name."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[0]).endswith(f"iter_{step:07d}.partial"):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == struck:
        sys.addaudithook(hook)


def fill_disk(rank: int, folder: str, room_in_step: dict[int, int]) -> None:
    """In each named step, leave so many bytes of the file system free; -1 frees all again."""
    if rank != 0:
        return
    ballast = Path(folder) / "ballast"

    def leave(room: int) -> None:
        ballast.unlink(missing_ok=True)
        if room >= 0:
            status = os.statvfs(folder)
            with ballast.open("wb") as file:
                file.write(bytes(status.f_bavail * status.f_frsize - room))

    for step, room in room_in_step.items():
        after_step(step, lambda room=room: leave(room))


def on_a_disk_of_its_own(rank: int, struck: int, folder: str) -> None:
    """The rank sees another file system where the others see `folder`, as a node does that does
    not share it."""
    if rank != struck:
        return
    from megatron_ext.training import folders

    libc, new_mounts, private = ctypes.CDLL(None, use_errno=True), 0x20000, 0x44000
    assert libc.unshare(new_mounts) == 0 and libc.mount(b"none", b"/", None, private, None) == 0
    assert libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=1m") == 0
    folders._SECONDS_UNTIL_VISIBLE = 1.0


def spike(rank: int, struck: int, forward: int, factor: float) -> None:
    """The loss weights of one forward pass of one rank are so many times as large, once."""
    from torch.nn.modules.module import (
        register_module_forward_hook,
        register_module_forward_pre_hook,
    )

    from megatron_ext.diffusion.schedule import MixingSchedule
    from megatron_ext.model.diffusion_model import OutputHead

    class Heavy(MixingSchedule):
        def loss_weight(self, *tokens: Any) -> Any:
            return factor * super().loss_weight(*tokens)

    passes, usual = 0, None

    def before(module: Any, inputs: Any) -> None:
        del inputs
        nonlocal passes, usual
        if isinstance(module, OutputHead):
            passes, usual = passes + 1, module.schedule
            if passes == forward:
                module.schedule = Heavy(**vars(usual))

    def after(module: Any, inputs: Any, output: Any) -> None:
        del inputs, output
        if isinstance(module, OutputHead):
            module.schedule = usual

    if rank == struck:
        register_module_forward_pre_hook(before)
        register_module_forward_hook(after)


def losses(save: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; of a step that was taken twice, the later ones."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: (record["train/loss"], record["train/grad_norm"])
        for record in records
        if "train/grad_norm" in record
    }


def events(save: Path) -> list[dict[str, Any]]:
    path = save / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def exit_of(save: Path) -> dict[str, Any]:
    return json.loads((save / "exit.json").read_text())


def folders(save: Path) -> list[str]:
    return ["--save", str(save), "--load", str(save)]
