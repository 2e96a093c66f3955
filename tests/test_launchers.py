"""Launch scripts start what they say, arguments untouched, and react to exit codes as they say.

SLURM's script runs against stand-ins of `srun` and `scontrol` that write down what they were given
and run a stand-in of Python on every task; `tests/test_slurm.py` runs it on a real SLURM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for pattern in ("examples/**/*.sh", "examples/**/*.sbatch", ".ci/run")
    for path in ROOT.glob(pattern)
)
NASTY = ["--data-path", "a b", "$(touch injected)", "`touch injected`", "; touch injected", "*"]

SRUN = """
import json, os, subprocess, sys
words, options = sys.argv[1:], []
while words[0].startswith("--"):
    options.append(words.pop(0))
with open(os.environ["SEEN"], "a") as file:
    print(json.dumps(["srun", options, words]), file=file)
code = 0
if "--overlap" in options:
    for node in os.environ["NODES"].split():
        code |= subprocess.run(words, env={**os.environ, "SLURMD_NODENAME": node}).returncode
else:
    for task in range(int(os.environ["SLURM_NTASKS"])):
        local = task % (int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_NNODES"]))
        env = {**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(local)}
        code = max(code, subprocess.run(words, env=env).returncode)
sys.exit(code)
"""
SCONTROL = """
import json, os, sys
with open(os.environ["SEEN"], "a") as file:
    print(json.dumps(["scontrol", sys.argv[1:]]), file=file)
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(os.environ["NODES"].split()))
"""
PYTHON = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
with open(os.environ["SEEN"], "a") as file:
    print(json.dumps(["python", [os.environ.get(n) for n in names], sys.argv[1:]]), file=file)
sys.exit(int(os.environ["CODE"]))
"""
CHECK = """
import os, sys
sys.exit(os.environ["SLURMD_NODENAME"] in os.environ["BROKEN"].split())
"""


def write_program(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)


class Cluster:
    """Stand-ins for two nodes of two tasks in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen_file = folder, folder / "seen"
        for name, source in (("srun", SRUN), ("scontrol", SCONTROL), ("check", CHECK)):
            write_program(folder / "bin" / name, source)
        for name in ("venv/bin/python", "bin/python"):
            write_program(folder / name, PYTHON)
        self.run_folder = folder / "run"

    def train(self, *arguments: str, code: int = 0, **environment: str) -> Any:
        env = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SEEN": str(self.seen_file), "CODE": str(code), "NODES": "n1 n2", "BROKEN": "",
            "RUN": str(self.run_folder), "VENV": str(self.folder / "venv"), "HEALTH_CHECK": "check",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": "4", "SLURM_NNODES": "2", **environment,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", ROOT / "examples/slurm/train.sbatch", *arguments],
            env=env, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        seen = [json.loads(line) for line in self.seen_file.read_text().splitlines()]
        return done, seen


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def actions(seen: list[Any]) -> list[list[str]]:
    """What `scontrol` was asked to do."""
    return [words for name, words, *_ in seen if name == "scontrol" and words[0] != "show"]


@pytest.mark.skipif(
    shutil.which("shellcheck") is None
    and not (Path(sys.executable).parent / "shellcheck").is_file(),
    reason="shellcheck is not installed",
)
def test_shell_scripts_pass_shellcheck() -> None:
    program = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    assert len(SCRIPTS) >= 7
    done = subprocess.run([program, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_task_gets_its_rank_and_the_arguments_as_they_are(cluster: Cluster) -> None:
    done, seen = cluster.train("--config", "a.yaml", *NASTY)
    assert done.returncode == 0, done.stderr
    run = str(cluster.run_folder)
    (step,) = [x for x in seen if x[0] == "srun"]
    assert step[1] == ["--kill-on-bad-exit=0", "--wait=120"]
    tasks = [x for x in seen if x[0] == "python"]
    port = str(20000 + 4711)
    assert [x[1] for x in tasks] == [
        [str(rank), str(rank % 2), "4", "2", "n1", port] for rank in range(4)
    ]
    expected = [
        str(ROOT / "pretrain_diffusion.py"), "--config", "a.yaml", *NASTY,
        "--save", run, "--load", run,
    ]  # fmt: skip
    assert all(x[2] == expected for x in tasks)
    assert not (cluster.folder / "injected").exists()
    assert actions(seen) == []


def test_a_container_is_given_to_srun(cluster: Cluster) -> None:
    _, seen = cluster.train(CONTAINER="registry.example.com#a:1", VENV="")
    (step,) = [x for x in seen if x[0] == "srun"]
    assert step[1] == [
        "--kill-on-bad-exit=0",
        "--wait=120",
        "--container-image=registry.example.com#a:1",
        f"--container-mounts={ROOT}:{ROOT},{cluster.run_folder}:{cluster.run_folder}",
        f"--container-workdir={ROOT}",
    ]


@pytest.mark.parametrize("code", [2, 86, 88])
def test_what_would_fail_again_is_not_started_again(code: int, cluster: Cluster) -> None:
    done, seen = cluster.train(code=code)
    assert done.returncode == code
    assert actions(seen) == []


def test_a_run_that_saved_and_stopped_goes_back_into_the_queue(cluster: Cluster) -> None:
    done, seen = cluster.train(code=85)
    assert done.returncode == 0
    assert actions(seen) == [["requeue", "4711"]]


@pytest.mark.parametrize("code", [1, 87, 137])
def test_a_crash_leaves_out_the_nodes_that_fail_the_check(code: int, cluster: Cluster) -> None:
    done, seen = cluster.train(code=code, BROKEN="n2")
    assert done.returncode == 0, done.stderr
    assert actions(seen) == [
        ["requeuehold", "4711"],
        ["update", "JobId=4711", "ExcNodeList=n2"],
        ["release", "4711"],
    ]
    check = [x for x in seen if x[0] == "srun"][1]
    assert check[1] == ["--overlap", "--ntasks=2", "--ntasks-per-node=1"]
    _, seen = cluster.train(code=code, BROKEN="n1", SLURM_RESTART_COUNT="1")
    assert actions(seen)[-2] == ["update", "JobId=4711", "ExcNodeList=n1,n2"]
    assert (cluster.run_folder / "bad_nodes").read_text() == "n2\nn1\n"


def test_a_crash_on_healthy_nodes_changes_no_node_list(cluster: Cluster) -> None:
    _, seen = cluster.train(code=1)
    assert actions(seen) == [["requeuehold", "4711"], ["release", "4711"]]


@pytest.mark.parametrize("code", [1, 85])
def test_restarts_have_an_end(code: int, cluster: Cluster) -> None:
    done, seen = cluster.train(code=code, SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert done.returncode == code
    assert actions(seen) == []
    assert "MAX_RESTARTS is 3" in done.stdout


def test_a_run_needs_a_folder(cluster: Cluster) -> None:
    cluster.seen_file.touch()
    done, seen = cluster.train(RUN="")
    assert done.returncode != 0 and "RUN: is the folder of the run" in done.stderr
    assert seen == []


@pytest.mark.parametrize(
    ("script", "environment", "options"),
    [
        (
            "single_node.sh", {"GPUS": "4"},
            ["--standalone", "--nproc-per-node", "4", "--max-restarts", "3"],
        ),
        (
            "multi_node.sh",
            {"NODES": "2", "HEAD": "n1:29400", "RESTARTS": "0", "GRACE_SECONDS": "840"},
            ["--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", "n1:29400", "--rdzv-id", "run", "--max-restarts", "0",
             "--shutdown-timeout", "840"],
        ),
    ],
)  # fmt: skip
def test_torchrun_is_started_with_the_arguments_as_they_are(
    script: str, environment: dict[str, str], options: list[str], tmp_path: Path
) -> None:
    write_program(tmp_path / "python", PYTHON)
    env = {
        **os.environ, **environment, "RUN": "/shared/a run", "PYTHON": str(tmp_path / "python"),
        "SEEN": str(tmp_path / "seen"), "CODE": "7",
    }  # fmt: skip
    env["RUN"] = str(tmp_path / "run")
    done = subprocess.run(
        ["bash", ROOT / "examples/launch" / script, *NASTY],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    _, _, words = json.loads((tmp_path / "seen").read_text())
    program = ["-m", "torch.distributed.run", *options, str(ROOT / "pretrain_diffusion.py")]
    assert words == [*program, *NASTY, "--save", env["RUN"], "--load", env["RUN"]]
    assert not (tmp_path / "injected").exists()


def test_torchrun_knows_the_options() -> None:
    from torch.distributed.run import get_args_parser

    known = get_args_parser()._option_string_actions
    for script in (ROOT / "examples/launch").glob("*.sh"):
        text = script.read_text().partition("torch.distributed.run")[2].partition('"$repo')[0]
        options = re.findall(r"--[a-z-]+", text)
        assert len(options) >= 3 and set(options) <= known.keys(), script


def test_preprocessing_goes_to_slurm_with_the_arguments_as_they_are(tmp_path: Path) -> None:
    write_program(tmp_path / "venv/bin/python", PYTHON)
    env = {
        **os.environ,
        "VENV": str(tmp_path / "venv"),
        "SEEN": str(tmp_path / "seen"),
        "CODE": "0",
    }
    subprocess.run(
        ["bash", ROOT / "examples/slurm/preprocess.sh", "cpu", "64", *NASTY],
        env=env, cwd=tmp_path, check=True, timeout=60,
    )  # fmt: skip
    _, _, words = json.loads((tmp_path / "seen").read_text())
    assert words == [
        str(ROOT / "tools/preprocess_data.py"), "--executor", "slurm", "--slurm-partition", "cpu",
        "--workers", "64", *NASTY,
    ]  # fmt: skip


def pins(path: Path) -> dict[str, set[str]]:
    """Requirements by name."""
    found: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            found.setdefault(re.split(r"[<>=;\[ ]", line)[0].lower(), set()).add(line)
    return found


def test_gpu_requirements_are_the_others_without_what_must_be_built_together() -> None:
    ours, gpu = pins(ROOT / "requirements.txt"), pins(ROOT / "requirements-gpu.txt")
    built_together = {"torch", "triton", "transformer-engine", "flash-attn", "apex"}
    assert not gpu.keys() & built_together
    for name, lines in gpu.items():
        if any("==" in line for line in lines):
            assert lines == ours[name], name
    project = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2]
    needed = re.findall(r'^ +"([A-Za-z-]+)', project.partition("\n]")[0], re.MULTILINE)
    assert {name.lower() for name in needed} <= gpu.keys() | {"torch"}


def test_the_kubernetes_example_fits_together() -> None:
    """Beside the schema: names that refer to each other, and grace for a save."""
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes/job.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {x["name"]: x["value"] for x in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(env["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == env["GPUS"]
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert env["HEAD"] == f"{name}-0.{pod['subdomain']}:{port}"
    assert int(env["GRACE_SECONDS"]) < pod["terminationGracePeriodSeconds"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    script = Path(container["command"][1]).relative_to(container["workingDir"])
    assert (ROOT / script).is_file()
