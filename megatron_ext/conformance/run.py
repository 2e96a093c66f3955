"""All checks for which a folder has files, in one order, on every rank together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from megatron_ext.conformance.golden import Golden, GoldenError, Unsupported
from megatron_ext.conformance.loss_checks import check_aggregation, check_loss, check_loss_large
from megatron_ext.conformance.model_checks import check_model
from megatron_ext.conformance.optimizer_checks import (
    check_labels,
    check_laprop,
    check_learning_rates,
)
from megatron_ext.conformance.report import Report
from megatron_ext.conformance.sampling_checks import (
    INDEX,
    check_generation,
    check_sampling_steps,
)
from megatron_ext.conformance.schedule_checks import check_noise_masks, check_schedule
from megatron_ext.conformance.session import Session
from megatron_ext.conformance.training_checks import FINAL, GRADIENTS, check_training
from megatron_ext.parallel.groups import device_of_rank, initialize_parallel


@dataclass(frozen=True)
class Kind:
    """Files of one format and their check."""

    label: str
    """How the files are called where there are none."""
    pattern: str
    """File names; the first group, if any, is what the check receives instead of the name."""
    check: Callable[[str, Session], None]


KINDS = (
    Kind("schedule.npz", r"schedule\.npz", check_schedule),
    Kind("loss_{k}.npz", r"loss_\d+\.npz", check_loss),
    Kind("loss_V{v}.npz", r"loss_V\d+\.npz", check_loss_large),
    Kind("loss_aggregation.npz", r"loss_aggregation\.npz", check_aggregation),
    Kind("noise_masks.npz", r"noise_masks\.npz", check_noise_masks),
    Kind("laprop.npz", r"laprop\.npz", check_laprop),
    Kind("wsd_schedule.json", r"wsd_schedule\.json", check_learning_rates),
    Kind("param_labels.json", r"param_labels\.json", check_labels),
    Kind("model_{m}.*", r"(model_.+?)(?:\.safetensors|_config\.json|_io\.npz)", check_model),
    Kind("e2e_train.npz", r"e2e_train\.npz", check_training),
    Kind("sampling_steps.npz", r"sampling_steps\.npz", check_sampling_steps),
    Kind("generation.npz", r"generation\.npz", check_generation),
)


def open_folder(folder: Path) -> Golden:
    """The folder; raises `ValueError` where it is none or holds no file that is checked here."""
    if not folder.is_dir():
        raise ValueError(f"--golden is {str(folder)!r}: there is no such folder.")
    golden = Golden(folder)
    if not any(golden.matching(kind.pattern) for kind in KINDS):
        known = ", ".join(kind.label for kind in KINDS)
        raise ValueError(f"--golden is {str(folder)!r}: it holds none of {known}.")
    return golden


def session_config(
    parallel: ParallelConfig, precision: PrecisionConfig, micro_batch_size: int
) -> Config:
    """A configuration of this layout; its model is the smallest that fits any."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    return Config(
        model=ModelConfig(
            num_layers=parallel.num_stages,
            hidden_size=2 * tp,
            num_attention_heads=tp,
            seq_length=tp * cp,
        ),
        parallel=parallel,
        precision=precision,
        training=TrainingConfig(micro_batch_size=micro_batch_size),
    )


def start_session(golden: Golden, config: Config) -> Session:
    """Process groups of the layout; raises `ValueError` where it does not fit the ranks."""
    groups = initialize_parallel(config.parallel, config.training.seed)
    return Session(golden, config, groups, device_of_rank(), Report())


def run(session: Session) -> tuple[str, int]:
    """Make every check; returns the text to print and the exit code, the same on every rank."""
    for kind in KINDS:
        names = list(_names(kind, session.golden))
        for name in names:
            _run_check(kind.check, name, session)
        if not names:
            session.report.skip(kind.label, "no such file")
    _list_other_files(session)
    return session.report.finish(f"{session.golden.folder}: {session.layout()}")


def _names(kind: Kind, golden: Golden) -> Iterator[str]:
    found = (match[1] if match.re.groups else match[0] for match in golden.matching(kind.pattern))
    yield from dict.fromkeys(found)


def _run_check(check: Callable[[str, Session], None], name: str, session: Session) -> None:
    """A file that cannot be used is a failure of its own; every rank reads the same file."""
    if session.config.precision.compile_layers:
        # Every check has models of its own, and what is compiled has a limit of variants.
        torch._dynamo.reset()
    try:
        check(name, session)
    except Unsupported as reason:
        session.report.skip(name, str(reason))
    except GoldenError as error:
        session.report.fail(name, str(error))


def _list_other_files(session: Session) -> None:
    known = {match.string for kind in KINDS for match in session.golden.matching(kind.pattern)}
    for name in session.golden.names:
        if name not in known | {GRADIENTS, FINAL, INDEX}:
            session.report.skip(name, "unknown to this suite")
