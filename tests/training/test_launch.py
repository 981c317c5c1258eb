"""Launch files: what SLURM is asked for and told, and that each file is well formed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mim.training import checkpoint

Tiny = Callable[..., Path]
LAUNCH = Path(__file__).resolve().parents[2] / "scripts" / "launch"

# Stands for srun: a process a task, each with the rank that SLURM would tell it; the highest code.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=() code=0
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || { new=$?; [ $new -gt $code ] && code=$new; }; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$ASKED"; fi
"""
# SLURM's warning reaches every task; here in its third step.
WARN = """
import os, signal
import mim.training.pretrain

keys, calls = mim.training.pretrain.image_keys, 0

def warned(*args, **kwargs):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    return keys(*args, **kwargs)

if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    mim.training.pretrain.image_keys = warned
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs slurm.sbatch as a job of so many tasks; what scontrol was asked lies in ``asked``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = programs / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (programs / "python").symlink_to(sys.executable)
    own = Path(sys.executable).parent

    def run(tasks: int, *args: object, restarts: int = 0) -> Any:
        env = {
            **os.environ,
            "PATH": f"{own}{os.pathsep}{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(LAUNCH.parents[2]),
            "ASKED": str(tmp_path / "asked"),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NTASKS": str(tasks),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        command = ["bash", str(LAUNCH / "slurm.sbatch"), *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)

    return run


@pytest.mark.slow  # each process imports the libraries
def test_slurm_warns_requeues_and_goes_on(
    tmp_path: Path, tiny: Tiny, sbatch: Callable[..., Any]
) -> None:
    plugin, asked, run = tmp_path / "plugin.py", tmp_path / "asked", tmp_path / "run"
    plugin.write_text(WARN)
    args = ("--config", tiny({"train.log_every": 1}), "--output", run, "--plugins", f"[{plugin}]")
    job = sbatch(2, *args)
    assert job.returncode == 138, job.stderr
    assert asked.read_text() == f"requeue {os.getpid()}\n"
    assert checkpoint.checkpoints(run)[-1].name == "step_00000003.pt"
    job = sbatch(2, *args, restarts=1)
    assert job.returncode == 0, job.stderr
    assert checkpoint.read_result(run)["environment"]["processes"] == 2
    assert asked.read_text().count("requeue") == 1


def test_slurm_does_not_repeat_a_mistake(tmp_path: Path, sbatch: Callable[..., Any]) -> None:
    job = sbatch(1, "--config", tmp_path / "none.yaml")
    assert job.returncode == 2 and "none.yaml" in job.stderr
    assert not (tmp_path / "asked").exists()


def test_hosts_without_a_host(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# nobody\n\n")
    command = ["bash", str(LAUNCH / "hosts.sh"), str(tmp_path / "hosts")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "names no host" in done.stderr


def test_hosts_tells_each_process_its_place(tmp_path: Path) -> None:
    """The connection is one that shows what it would run; the worst code comes back."""
    hosts, connect = tmp_path / "hosts", tmp_path / "connect"
    hosts.write_text("alpha 2\n# a comment\nbeta\n")
    connect.write_text(
        '#!/usr/bin/env bash\necho "$1|$2" >> ' + f"{tmp_path}/told\n"
        '[ "$1" = beta ] && exit 143\nexit 75\n'
    )
    connect.chmod(connect.stat().st_mode | stat.S_IXUSR)
    command = ["bash", str(LAUNCH / "hosts.sh"), str(hosts), "--config", "a b.yaml"]
    env = {**os.environ, "MIM_SSH": str(connect)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 143, "75 only says that another was lost"
    told = sorted((tmp_path / "told").read_text().splitlines())
    assert [line.split("|")[0] for line in told] == ["alpha", "alpha", "beta"]
    places = [(0, 0, 2), (1, 1, 2), (2, 0, 1)]
    for line, (rank, local, here) in zip(told, places, strict=True):
        words = line.split()
        assert f"RANK={rank}" in words and f"LOCAL_RANK={local}" in words
        assert "WORLD_SIZE=3" in words and f"LOCAL_WORLD_SIZE={here}" in words
        assert "MASTER_ADDR=alpha" in words
        assert "python -m mim pretrain --resume auto --config a\\ b.yaml" in line


def test_the_kubernetes_job_is_whole() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert env["WORLD_SIZE"] == str(spec["completions"]) == str(spec["parallelism"])
    name = job["metadata"]["name"]
    assert env["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert str(service["spec"]["ports"][0]["port"]) == env["MASTER_PORT"]
    # A pod that saves after SIGTERM has the time of a step and a checkpoint.
    assert pod["terminationGracePeriodSeconds"] >= 60 and pod["restartPolicy"] == "Never"
    rules = spec["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules[:2]}
    assert codes == {"FailJob": [2], "Ignore": [75, 143]}


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh", "hosts.sh"])
def test_shell_files_are_well_formed(name: str) -> None:
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = subprocess.run([*checker, str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
