"""Checkpoints on disks that are slow, full or read-only, and written beside the training."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

import mim.training.pretrain as loop
from mim.training import checkpoint

Mim = Callable[..., Any]
Tiny = Callable[..., Path]

# One checkpoint a step, all kept.
EVERY = {"train.checkpoint_every": 0.04, "train.keep_checkpoints": 9, "train.log_every": 1}
BESIDE = ("--train.async_save", "true")
DISK = "1m"


def content(path: Path) -> dict[str, Any]:
    state = checkpoint.read_checkpoint(path)
    del state["state"]["elapsed"], state["state"]["train_seconds"]
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}


def assert_same_checkpoints(one: Path, two: Path) -> None:
    ours, theirs = checkpoint.checkpoints(one), checkpoint.checkpoints(two)
    assert [path.name for path in ours] == [path.name for path in theirs]
    for left, right in zip(ours, theirs, strict=True):
        first, second = content(left), content(right)
        assert first.keys() == second.keys()
        for name, value in first.items():
            other = second[name]
            same = (
                torch.equal(value, other) if torch.is_tensor(value) else repr(value) == repr(other)
            )
            assert same, (left.name, name)


@pytest.fixture
def slow_save(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float]]:
    """Each write of a checkpoint takes 0.4 s before it looks at the state; (thread, from, to)."""
    real, seen = torch.save, []

    def slow(*args: Any, **kwargs: Any) -> None:
        began = time.monotonic()
        time.sleep(0.4)
        real(*args, **kwargs)
        seen.append((threading.current_thread().name, began, time.monotonic()))

    monkeypatch.setattr(torch, "save", slow)
    return seen


def test_beside_the_training_the_same_is_written(
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    args = ("pretrain", "--config", tiny({**EVERY, "train.ema_decay": 0.5}), "--output")
    plain, beside = tmp_path / "plain", tmp_path / "beside"
    assert mim(*args, plain).code == 0
    seen = request.getfixturevalue("slow_save")
    steps: list[float] = []
    keys = loop.image_keys

    def noted(*given: Any, **named: Any) -> Any:
        time.sleep(0.1)  # the thread that writes has begun by now
        steps.append(time.monotonic())
        return keys(*given, **named)

    monkeypatch.setattr(loop, "image_keys", noted)
    assert mim(*args, beside, *BESIDE).code == 0
    assert len(seen) == 6 and {name for name, _, _ in seen} == {"mim-saver"}
    assert_same_checkpoints(plain, beside)
    # Steps were taken while a checkpoint was being written, and two were never written at once.
    assert sum(began < step < ended for step in steps for _, began, ended in seen) >= 3
    assert all(end <= begin for (_, _, end), (_, begin, _) in itertools.pairwise(seen))


def test_a_write_beside_the_training_that_fails_stops_the_run(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.save, []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    run = tmp_path / "run"
    args = ("pretrain", "--config", tiny(EVERY), "--output", run, *BESIDE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        stopped = mim(*args)
    assert stopped.code == 1
    told = stopped.err.strip().splitlines()[-1]
    assert "checkpoint of step 2 cannot be saved" in told and "No space left on device" in told
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_00000001.pt"]
    assert not (run / "result.json").exists() and not list(run.rglob("*.tmp"))
    assert mim(*args, "--resume", "auto").code == 0


def test_a_signal_waits_for_what_is_being_written(
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    slow_save: list[tuple[str, float, float]],
) -> None:
    run, keys, calls = tmp_path / "run", loop.image_keys, []

    def noted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return keys(*given, **named)

    monkeypatch.setattr(loop, "image_keys", noted)
    config = tiny({**EVERY, "train.checkpoint_every": 1.0})
    assert mim("pretrain", "--config", config, "--output", run, *BESIDE).code == 143
    assert len(slow_save) == 1 and not [t for t in threading.enumerate() if t.name == "mim-saver"]
    state, passed_over = checkpoint.newest_checkpoint(run)
    assert state is not None and state["step"] == 3 and not passed_over


@pytest.mark.parametrize("beside", [False, True])
def test_a_slow_disk_loses_nothing(
    beside: bool, tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each flush and each renaming take 50 ms."""
    args = ("pretrain", "--config", tiny(EVERY), "--output")
    plain, slow = tmp_path / "plain", tmp_path / "slow"
    assert mim(*args, plain).code == 0
    for owner, name in ((os, "fsync"), (pathlib.Path, "replace")):
        real = getattr(owner, name)

        def late(*given: Any, real: Any = real) -> Any:
            time.sleep(0.05)
            return real(*given)

        monkeypatch.setattr(owner, name, late)
    assert mim(*args, slow, *(BESIDE if beside else ())).code == 0
    assert_same_checkpoints(plain, slow)


@pytest.mark.parametrize("beside", [False, True])
def test_a_write_of_a_second_keeps_the_last_good_one(
    beside: bool, tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint goes to the disk in pieces; who reads meanwhile, as after a kill, goes on."""
    config = tiny({**EVERY, "train.keep_checkpoints": 1, "train.max_steps": 3})
    args = ("pretrain", "--config", config, *(BESIDE if beside else ()), "--output")
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert mim(*args, plain).code == 0
    real, seen = torch.save, []

    def slowly(state: Any, path: Path) -> None:
        whole = io.BytesIO()
        real(state, whole)
        with Path(path).open("wb") as file:
            for piece in np.array_split(np.frombuffer(whole.getvalue(), np.uint8), 5):
                file.write(piece)
                file.flush()
                newest, passed_over = checkpoint.newest_checkpoint(run)
                seen.append((None if newest is None else newest["step"], len(passed_over)))
                time.sleep(0.2)

    monkeypatch.setattr(torch, "save", slowly)
    began = time.monotonic()
    assert mim(*args, run).code == 0
    assert 3 < time.monotonic() - began < 60
    assert seen == [(step, 0) for step in (None, 1, 2) for _ in range(5)]
    assert_same_checkpoints(plain, run)


@pytest.mark.parametrize("fault", ["full", "read-only"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_takes_no_more(
    fault: str,
    beside: bool,
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the fourth step on nothing can be written; then it can again."""
    config = tiny({**EVERY, "train.keep_checkpoints": 1})
    args = ("pretrain", "--config", config, *(BESIDE if beside else ()), "--output")
    plain, run, filler = tmp_path / "plain", small_disk / "run", small_disk / "filler"
    assert mim(*args, plain).code == 0
    keys, calls, place = loop.image_keys, [], str(run / "checkpoints")

    def noted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            for thread in threading.enumerate():
                if thread.name == "mim-saver":
                    thread.join()  # it frees the place of an old checkpoint yet
            if fault == "full":
                filler.write_bytes(b"\1" * max(0, shutil.disk_usage(small_disk).free))
            else:
                for how in (["--bind", place], ["-o", "remount,bind,ro"]):
                    subprocess.run(["mount", *how, place], check=True)
        return keys(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "image_keys", noted)
        stopped = mim(*args, run)
    assert stopped.code == 1, stopped.err
    told = stopped.err.strip().splitlines()[-1]
    reason = "No space left on device" if fault == "full" else "Read-only file system"
    assert re.search("cannot be (saved|written)", told) and reason in told, told
    assert re.search("the last good (one|checkpoint) is kept", told)
    assert "Traceback" not in stopped.err
    state, passed_over = checkpoint.newest_checkpoint(run)
    assert state is not None and state["step"] == 3 and not passed_over
    if fault == "full":
        filler.unlink()
    else:
        subprocess.run(["umount", place], check=True)
    assert mim(*args, run, "--resume", "auto").code == 0
    assert_same_checkpoints(plain, run)
    assert (run / "metrics.jsonl").read_text().count('"loss"') == 6
