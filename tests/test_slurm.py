"""The SLURM script on a real SLURM: one node whose daemons live as long as this module.

Needs root and Debian's `slurm-wlm`; without them `tests/test_launchers.py` has stand-ins. There is
no authentication (`auth/none`), no container and no GPU: GPUs are counted, not used.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_launchers import write_program

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("slurmctld") is None or shutil.which("slurmd") is None or os.geteuid() != 0,
    reason="needs slurm-wlm and root",
)

SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=broken NodeAddr=127.0.0.2 CPUs=64 Gres=gpu:8 State=DOWN
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:8
PartitionName=gpu Nodes={host},broken Default=YES State=UP
"""

PROGRAM = """
import os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--save") + 1])
rank, restart = os.environ["RANK"], os.environ.get("SLURM_RESTART_COUNT", "0")
plan = os.environ["PLAN"].split()[int(restart)]
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
(run / f"{restart}.{rank}").write_text(
    " ".join(os.environ[n] for n in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
)
while plan == "wait" and not got:
    time.sleep(0.05)
time.sleep(rank == os.environ.get("SLOW_RANK"))
sys.exit(85 if got else int(plan))
"""


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def eventually(what: str, seconds: float, check) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.1)


class Slurm:
    """Commands of a SLURM of one node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool"):
            (folder / name).mkdir()
        settings = SETTINGS.format(
            host=self.host, folder=folder, controller=free_port(), node=free_port()
        )
        (folder / "slurm.conf").write_text(settings)
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
        eventually("an idle node", 30, lambda: "idle" in self("sinfo", "-h", "-n", self.host))

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(20)

    def __call__(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            words, env={**self.env, **environment}, cwd=ROOT, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        return done.stdout + done.stderr

    def state(self, job: str) -> dict[str, str]:
        words = self("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def submit(self, run: Path, *arguments: str, **environment: str) -> str:
        output = self(
            "sbatch", "--parsable", "--ntasks-per-node=2", "--nodes=1", "--cpus-per-task=1",
            f"--output={run}.out", "examples/slurm/train.sbatch", *arguments,
            RUN=str(run), **environment,
        )  # fmt: skip
        assert output.strip().isdigit(), output
        return output.strip()

    def wait(self, job: str, *states: str, restarts: int = 0, seconds: float = 60) -> None:
        """Wait for a state; a job that waits for its next start is started at once."""

        def is_there() -> bool:
            state = self.state(job)
            if state.get("Reason") == "BeginTime":
                self("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state["JobState"] in states and int(state["Restarts"]) == restarts

        eventually(f"job {job} in {states} after {restarts} restarts", seconds, is_there)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def venv(tmp_path: Path) -> str:
    """A virtual environment whose Python plays a run: what it does by `PLAN`, a word per start."""
    write_program(tmp_path / "venv/bin/python", PROGRAM)
    return str(tmp_path / "venv")


def starts(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("[0-9]*.[0-9]*"))


def test_a_warned_run_is_queued_again_and_ends(slurm: Slurm, venv: str, tmp_path: Path) -> None:
    """SLURM's signal before the walltime reaches every rank; `scancel` sends the same one."""
    run = tmp_path / "run"
    job = slurm.submit(run, VENV=venv, PLAN="wait 0")
    assert "Gres=gpu:8" in slurm("sinfo", "-h", "-N", "-o", "Gres=%G")
    eventually("two ranks", 60, lambda: starts(run) == ["0.0", "0.1"])
    slurm("scancel", "--signal=USR1", job)
    slurm.wait(job, "COMPLETED", restarts=1)
    assert starts(run) == ["0.0", "0.1", "1.0", "1.1"]
    assert [(run / f"1.{rank}").read_text() for rank in (0, 1)] == ["2 0 2", "2 1 2"]
    assert slurm.state(job)["ExitCode"] == "0:0"


def test_a_crash_leaves_out_the_node_that_fails_its_check(
    slurm: Slurm, venv: str, tmp_path: Path
) -> None:
    """The one node stands for the other, because a job without nodes could not be seen to go on."""
    run = tmp_path / "run"
    write_program(tmp_path / "check", "import sys\nsys.exit(0)")
    run.mkdir()
    (run / "bad_nodes").write_text("broken\n")
    job = slurm.submit(run, VENV=venv, PLAN="1 0", HEALTH_CHECK=str(tmp_path / "check"))
    slurm.wait(job, "COMPLETED", restarts=1)
    assert slurm.state(job)["ExcNodeList"] == "broken"
    assert starts(run) == ["0.0", "0.1", "1.0", "1.1"]


def test_a_refused_run_stays_ended(slurm: Slurm, venv: str, tmp_path: Path) -> None:
    """One rank ends a little before the other; the code is theirs, not that of a kill."""
    job = slurm.submit(tmp_path / "run", VENV=venv, PLAN="2", SLOW_RANK="1")
    slurm.wait(job, "FAILED")
    assert slurm.state(job)["ExitCode"] == "2:0"


def test_training_goes_on_after_a_warning(slurm: Slurm, tmp_path: Path) -> None:
    """The real program on two tensor-parallel ranks: stopped in the middle, and then to the end."""
    run = tmp_path / "run"
    job = slurm.submit(
        run, "--mock-data", "--vocab-size", "64", "--mask-token-id", "3", "--pad-token-id", "2",
        "--num-layers", "2", "--hidden-size", "32", "--seq-length", "32", "--skip-eval",
        "--tensor-model-parallel-size", "2", "--micro-batch-size", "4", "--global-batch-size", "4",
        "--train-iters", "40", "--exit-interval", "30", "--log-interval", "1",
        VENV=sys.prefix, OMP_NUM_THREADS="1",
    )  # fmt: skip
    slurm.wait(job, "COMPLETED", restarts=1, seconds=240)
    output = Path(f"{run}.out").read_text()
    assert "step 30/40" in output and "stopping at step 30" in output
    assert output.index("start 1") < output.index("step 31/40") < output.index("step 40/40")
    assert output.count("step 31/40") == 1
