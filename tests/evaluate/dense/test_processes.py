"""Segmentation and detection on two processes compute what one does, also killed and gone on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SHARED = {
    "epochs": 2,
    "batch_size": 4,
    "lr": 3e-3,
    "width": 16,
    "drop_path": 0.5,
    "clip_grad": 1.0,
    "pictures": 1,
    # One image is held out, so that one of two processes has none to measure.
    "held_out": 0.01,
}
SEGMENT = {**SHARED, "classes": ["dark", "light"], "void": 9, "image_size": [16, 24]}
DETECT = {
    **SHARED,
    "image_size": [32, 48],
    "scales": [2, 1],
    "anchor": 3.0,
    "proposals": 50,
    "samples": 16,
    "scale": [0.9, 1.1],
}
CASES = {
    "batch norm": ("segment", {**SEGMENT, "head": "linear"}),
    "upernet": ("segment", SEGMENT),
    "a frozen encoder": ("segment", {**SEGMENT, "freeze": True}),
    "boxes and masks": ("detect", DETECT),
}
KILL = """
import os, signal
from mim.evaluate.dense.training import DenseTask

real, calls = DenseTask.loss, 0

def loss(self, learner, part):
    global calls
    calls += 1
    if calls == {step}:
        os.kill(os.getpid(), signal.{name})
    return real(self, learner, part)

DenseTask.loss = loss
"""


def curve(run: Path, task: str) -> list[dict[str, float]]:
    text = (run / "evaluations" / f"{task}.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


@pytest.mark.parametrize(
    "case, killed_in",
    [
        ("batch norm", 0),
        ("boxes and masks", 0),
        pytest.param("batch norm", 4, marks=pytest.mark.slow),
        pytest.param("boxes and masks", 6, marks=pytest.mark.slow),
        pytest.param("upernet", 4, marks=pytest.mark.slow),
        pytest.param("a frozen encoder", 4, marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one_and_go_on(
    case: str,
    killed_in: int,
    new_run: Callable[[str], Path],
    scenes: Path,
    squares: Path,
    mim: Callable[..., Any],
    ranks: Callable[..., Any],
) -> None:
    task, settings = CASES[case]
    path = scenes if task == "segment" else squares
    given = ["--set", *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    given += [f"path={path}", "--device", "cpu"]
    one, two = new_run("one"), new_run("two")
    done = mim("evaluate", task, one, *given)
    assert done.code == 0, done.err
    started = ranks(["evaluate", task, two, *given])
    assert started.wait() == [0, 0], started.texts()
    single, shared = curve(one, task), curve(two, task)
    assert len(single) == len(shared) == 4, "for each epoch a loss and what was held out"
    for row, other in zip(single, shared, strict=True):
        # What is held out is counted in whole pixels and objects, of which rounding may turn some.
        assert other == pytest.approx(row, abs=0.02 if "held_out" in row else 1e-5)
    results = [json.loads((run / "result.json").read_text())["evaluations"] for run in (one, two)]
    assert list(results[0][task]) == list(results[1][task])

    if not killed_in:
        return
    killed, stop = new_run("killed"), KILL.format(step=killed_in, name="SIGKILL")
    assert ranks(["evaluate", task, killed, *given], all=stop).wait() == [-signal.SIGKILL] * 2
    assert (killed / "evaluations" / f"{task}.pt").is_file()
    started = ranks(["evaluate", task, killed, *given])
    assert started.wait() == [0, 0], started.texts()
    assert curve(killed, task) == shared
    weights, again = (load_file(run / f"{task}.safetensors") for run in (two, killed))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not (killed / "evaluations" / f"{task}.pt").exists()


def test_parts_of_a_batch_are_the_batch(
    new_run: Callable[[str], Path], scenes: Path, mim: Callable[..., Any]
) -> None:
    """Void pixels differ between the parts, and all count alike."""
    runs = {parts: new_run(f"parts_{parts}") for parts in (1, 3)}
    for parts, run in runs.items():
        settings = {**SEGMENT, "epochs": 1, "width": 8, "accumulate": parts}
        given = (f"{key}={json.dumps(value)}" for key, value in settings.items())
        done = mim("evaluate", "segment", run, "--set", *given, f"path={scenes}")
        assert done.code == 0, done.err
    single, cut = (curve(run, "segment") for run in runs.values())
    assert cut[0] == pytest.approx(single[0], abs=1e-5)
