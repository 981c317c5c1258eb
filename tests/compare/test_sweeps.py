"""The runs of a comparison at once, here or as jobs of a cluster: the numbers do not change."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mim.compare.launchers
from mim.compare.runner import plan, read_compare_config, run_noted
from mim.core.lock import in_use, sole_use
from mim.training import checkpoint

Mim = Callable[..., Any]

# A run goes on once another one is in training too, so that one after the other never ends well.
TOGETHER = """
import os, time
from pathlib import Path
import mim.training.pretrain

keys, place, met = mim.training.pretrain.image_keys, Path({place!r}), False

def meet(*args, **kwargs):
    global met
    (place / str(os.getpid())).touch()
    end = time.monotonic() + 60
    while not met:
        met = len(list(place.iterdir())) > 1
        if time.monotonic() > end:
            raise ArithmeticError("alone")
        time.sleep(0.01)
    return keys(*args, **kwargs)

mim.training.pretrain.image_keys = meet
"""


@pytest.fixture
def config(tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]]) -> Path:
    path = tmp_path / "compare.yaml"
    content = {
        "axes": {"model.regime.name": ["drop", "token"]},
        "evaluations": {},
        "base": tiny_tree({"train.max_steps": 3}),
    }
    path.write_text(yaml.safe_dump(content))
    return path


def encoders(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    runs = [path.parent for path in folder.glob("*/result.json")]
    assert all(checkpoint.read_result(run)["status"] == "finished" for run in runs)
    return {run.name: checkpoint.encoder_weights(run) for run in runs}


def assert_same(one: Path, two: Path) -> None:
    first, second = encoders(one), encoders(two)
    assert first.keys() == second.keys() == {"regime=drop", "regime=token"}
    for run, weights in first.items():
        assert all(torch.equal(value, second[run][name]) for name, value in weights.items())


def test_two_at_once(tmp_path: Path, mim: Mim, config: Path) -> None:
    alone, at_once, place = tmp_path / "alone", tmp_path / "at_once", tmp_path / "place"
    place.mkdir()
    plugin = tmp_path / "together.py"
    plugin.write_text(TOGETHER.format(place=str(place)))
    assert mim("compare", "--config", config, "--output", alone).code == 0
    together = ("--base.plugins", f"[{plugin}]", "--jobs", 2)
    outcome = mim("compare", "--config", config, "--output", at_once, *together)
    assert outcome.code == 0, outcome.err
    assert len(list(place.iterdir())) == 2
    assert_same(alone, at_once)
    again = mim("compare", "--config", config, "--output", at_once, "--jobs", 2)
    assert again.code == 0 and again.err.count(": done") == 2


@pytest.mark.slow  # each job imports the libraries
def test_jobs_of_a_cluster(tmp_path: Path, mim: Mim, config: Path) -> None:
    """submitit's local executor runs them as its SLURM one would."""
    pytest.importorskip("submitit")
    here, there = tmp_path / "here", tmp_path / "there"
    assert mim("compare", "--config", config, "--output", here).code == 0
    args = ("compare", "--config", config, "--output", there, "--jobs", 2)
    cluster = ("--launcher", "submitit", "--slurm", "cluster=local", "timeout_min=5")
    outcome = mim(*args, *cluster)
    assert outcome.code == 0, outcome.err
    assert_same(here, there)
    assert list((there / "submitit").glob("*_submitted.pkl"))
    before = sorted((there / "submitit").iterdir())
    again = mim(*args, *cluster)
    assert again.code == 0 and again.err.count(": done") == 2
    assert sorted((there / "submitit").iterdir()) == before, "nothing was submitted again"


# Writing a checkpoint takes longer than submitit's local executor leaves a job that it cancels.
SLOWLY_SAVED = """
import time
import torch

save = torch.save

def slowly(*args, **kwargs):
    time.sleep(2.5)
    save(*args, **kwargs)

torch.save = slowly
"""


@pytest.mark.slow  # each job imports the libraries
@pytest.mark.parametrize("launcher", ["local", "submitit"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_comparison_waits_for_its_runs(
    launcher: str, number: int, tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]]
) -> None:
    """The signal reaches this process alone; each run saves, leaves, and is told of."""
    pytest.importorskip("submitit")
    plugin, folder = tmp_path / "slowly.py", tmp_path / "cmp"
    plugin.write_text(SLOWLY_SAVED)
    endless = {"train.max_steps": 10**6, "train.epochs": 10**6, "train.checkpoint_every": 1e5}
    changes = {**endless, "train.validate_every": 0, "train.picture_every": 0}
    changes |= {"train.log_every": 1, "plugins": [str(plugin)]}
    config = tmp_path / "compare.yaml"
    axes = {"model.regime.name": ["drop", "token"]}
    content = {"axes": axes, "evaluations": {}, "base": tiny_tree(changes)}
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "mim", "compare", "--config", config, "--output", folder]
    command += ["--jobs", "2", "--show", "plain", "--launcher", launcher]
    if launcher == "submitit":
        command += ["--slurm", "cluster=local", "timeout_min=5"]
    comparison = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)
    runs = [folder / f"regime={name}" for name in ("drop", "token")]
    until(lambda: all(trains(run) for run in runs), comparison)
    comparison.send_signal(number)
    began = time.monotonic()
    _, told = comparison.communicate(timeout=60)
    assert time.monotonic() - began < 40  # two saves of 2.5 s on two cores
    assert comparison.returncode == 128 + number, told
    assert "Traceback" not in told
    for run in runs:
        (saved,) = checkpoint.checkpoints(run)
        assert f"{run.name}: stopped; goes on from {saved.stem}\n" in told
        assert not in_use(run), "it has left"
    assert told.endswith("mim: interrupted; call it again to go on\n")


def trains(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and len(metrics.read_text().splitlines()) > 2


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


class Stuck:
    """A job that does not leave."""

    job_id = "7"
    cancelled = 0

    def done(self, force_check: bool = False) -> bool:
        return False

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_job_that_does_not_leave_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    for name in ("_LEAVE", "_CANCEL", "_SECONDS"):
        monkeypatch.setattr(mim.compare.launchers, name, 0.05)
    jobs = mim.compare.launchers.SubmittedJobs(len, tmp_path, {"cluster": "local"})
    jobs._local, job = False, Stuck()
    jobs.running["7"] = job, ("a run",)
    assert jobs.stop() == [(("a run",), None)]
    assert job.cancelled == 2


def hold(folder: str) -> None:
    with sole_use(Path(folder)):
        Path(folder, "held").touch()
        time.sleep(60)


def test_a_job_leaves_a_run_of_another_job_alone(
    tmp_path: Path, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when a comparison is killed, and called again while its jobs are still in the queue."""
    found = read_compare_config(["--config", str(config), "--output", str(tmp_path / "cmp")])
    item = plan(found)[0]
    run = Path(item.config.output)
    run.mkdir(parents=True)
    process = multiprocessing.Process(target=hold, args=(str(run),))
    process.start()
    while not (run / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert run_noted(replace(item), {}) == 1
    assert f"is in use by process {process.pid}" in capfd.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == [".lock", "held"]
    process.kill()
    process.join()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--jobs", 0), "--jobs: 0 must be at least 1"),
        (("--launcher", "slurm"), "--launcher: 'slurm' is not one of local, submitit"),
        (("--slurm", "gpus_per_node=1"), "is for --launcher submitit"),
        (("--launcher", "submitit", "--slurm", "cluster=local", "gpus=1"), "submitit refuses"),
    ],
)
def test_mistakes(
    args: tuple[object, ...], told: str, tmp_path: Path, mim: Mim, config: Path
) -> None:
    refused = mim("compare", "--config", config, "--output", tmp_path / "cmp", *args)
    assert refused.code == 2 and told in refused.err
