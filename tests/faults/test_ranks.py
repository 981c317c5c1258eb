"""One of several processes dies, hangs or fails: the others end in time and say which it was."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim.training import checkpoint

Tiny = Callable[..., Path]
Launch = Callable[..., Any]

TIMEOUT = 3.0
"""Seconds of train.timeout; a process is lost after that and a few seconds of asking."""
MARGIN = 8.0
FAULT = """
import importlib, os, signal, time

module, name = {module!r}, {name!r}
owner = importlib.import_module(module)
*parents, last = name.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real, calls = getattr(owner, last), 0

def faulty(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        open({mark!r}, "w").write(str(os.getpid()))
        {fault}
    return real(*args, **kwargs)

setattr(owner, last, faulty)
"""
STEP = ("mim.training.pretrain", "image_keys")
LOADER = ("mim.data.loader", "_TrainBatches.gather")
SAVING = ("mim.training.checkpoint", "save_checkpoint")
START = ("mim.training.pretrain", "_start_folder")
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
SLEEP = "time.sleep(1000)"
RAISE = "raise ArithmeticError('a cosmic ray')"
MISTAKE = (
    "raise importlib.import_module('mim.core.errors').UserError('data.path: not on this host')"
)
CONFIG = {"train.timeout": TIMEOUT, "train.checkpoint_every": 0.04, "train.log_every": 1}

# Which rank, where, what; what the others say of it; its exit code, and whether at once.
CASES = {
    "killed in a step": (1, STEP, KILL, r"rank 1 on .* no longer answers", -9, True),
    "the first killed in a step": (0, STEP, KILL, r"where rank 0 runs: .* is gone", -9, True),
    "the first stopped": (0, STEP, STOP, r"where rank 0 runs: .* is gone", 75, False),
    "stopped in a step": (1, STEP, STOP, r"rank 1 on .* no longer answers", 75, False),
    "hangs in the loader": (1, LOADER, SLEEP, r"rank 1 on .* hangs at .* \(faulty\)", 75, False),
    "hangs in saving": (0, SAVING, SLEEP, r"rank 0 on .* hangs at .*\(faulty\)", 75, False),
    "fails in a step": (1, STEP, RAISE, r"rank 1 failed: ArithmeticError: a cosmic ray", 1, True),
    "fails at the start": (0, START, MISTAKE, r"rank 0 failed: data.path: not", 2, True),
}


QUICK = {"killed in a step", "hangs in the loader", "fails at the start"}


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_the_others_end(
    case: str,
    tmp_path: Path,
    tiny: Tiny,
    ranks: Launch,
    outcomes: list[tuple[str, str, str]],
    ended_after: Callable[[str, float], None],
) -> None:
    rank, (module, name), fault, told, code, at_once = CASES[case]
    mark, run = tmp_path / "mark", tmp_path / "run"
    call = 1 if (module, name) in (START, SAVING) else 3
    plugin = FAULT.format(module=module, name=name, fault=fault, call=call, mark=str(mark))
    args = ["pretrain", "--config", tiny(CONFIG), "--output", run]
    started = ranks(args, of={rank: plugin})
    until(mark.exists)
    began, other = time.monotonic(), 1 - rank
    assert started.wait(TIMEOUT + MARGIN, [other]) == [75]
    seconds = time.monotonic() - began
    ended_after(case, seconds)
    assert seconds < MARGIN if at_once else seconds > TIMEOUT - 0.5
    text = started.texts()[other]
    assert re.search(f"mim: error: rank {other}: .*{told}", text), text
    assert "Traceback" not in text
    if fault == STOP:
        os.kill(int(mark.read_text()), signal.SIGCONT)
    assert started.wait(MARGIN + TIMEOUT, [rank]) == [code]
    own = started.texts()[rank]
    if fault == RAISE:
        assert "Traceback" in own and "mim: error: rank 1: ArithmeticError" in own
    elif fault == SLEEP:
        assert re.search(f"mim: error: rank {rank}: .*was at .*{mark.parent.name}", own), own
    outcomes.append(("lost process", f"{case}; the other ended after {seconds:.1f} s", "told"))
    if (module, name) == STEP:  # two steps were saved
        state, passed_over = checkpoint.newest_checkpoint(run)
        assert state is not None and state["step"] == 2 and not passed_over


TRAINING = "mim.evaluate.training"
LOOP = ("mim.training.trainer", "seed_of")
# Which evaluation, where, in which call, what; what the other says of rank 1, and its exit code.
EVALUATED = {
    "killed": (
        "finetune",
        ("mim.training.trainer", "seed_of"),
        3,
        KILL,
        r"rank 1 on .* no longer answers",
        -9,
    ),
    "hangs": (
        "linear_mae",
        (TRAINING, "normalize"),
        3,
        SLEEP,
        r"rank 1 on .* hangs at .*faulty",
        75,
    ),
    "hangs in features": (
        "knn",
        ("mim.evaluate.features", "image_tokens"),
        1,
        SLEEP,
        r"rank 1 on .* hangs at .*\(faulty\)",
        75,
    ),
    "fails": (
        "linear_mae",
        (TRAINING, "accuracies"),
        1,
        RAISE,
        r"rank 1 failed: ArithmeticError: a cosmic ray",
        1,
    ),
    "has no images": (
        "finetune",
        ("mim.evaluate", "open_source"),
        1,
        MISTAKE,
        r"rank 1 failed: data.path: not on this host",
        2,
    ),
}
QUICK_EVALUATED = {"killed", "hangs in features", "fails"}


@pytest.mark.parametrize(
    "case",
    [
        case if case in QUICK_EVALUATED else pytest.param(case, marks=pytest.mark.slow)
        for case in EVALUATED
    ],
)
def test_the_others_end_in_an_evaluation(
    case: str,
    tmp_path: Path,
    tiny: Tiny,
    ranks: Launch,
    outcomes: list[tuple[str, str, str]],
    ended_after: Callable[[str, float], None],
) -> None:
    evaluation, (module, name), call, fault, told, code = EVALUATED[case]
    mark, written = tmp_path / "mark", tmp_path / "numbers.json"
    plugin = FAULT.format(module=module, name=name, fault=fault, call=call, mark=str(mark))
    args = ["evaluate", evaluation, "untrained", "--config", tiny(), "--timeout", TIMEOUT]
    if evaluation != "knn":
        args += ["--set", "epochs=3"]
    started = ranks([*args, "--json", written], of={1: plugin})
    until(mark.exists)
    began = time.monotonic()
    assert started.wait(TIMEOUT + MARGIN, [0]) == [75]
    seconds = time.monotonic() - began
    ended_after(f"evaluate: {case}", seconds)
    assert seconds > TIMEOUT - 0.5 if fault == SLEEP else seconds < MARGIN
    text = started.texts()[0]
    assert re.search(f"mim: error: rank 0: .*{told}", text), text
    assert "Traceback" not in text
    assert started.wait(MARGIN + TIMEOUT, [1]) == [code]
    # What each computes alone, the first has: it waited for the other at the end.
    assert written.exists() == (evaluation == "knn")
    outcomes.append(("lost process", f"evaluate: {case}; ended after {seconds:.1f} s", "told"))


@pytest.mark.slow  # four checkpoints of two seconds
def test_a_slow_disk_is_no_lost_process(tmp_path: Path, tiny: Tiny, ranks: Launch) -> None:
    """One process writes while the other waits, for less than the time-out each time."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    plugin = FAULT.format(module="torch", name="save", fault="", call=-1, mark=str(mark))
    plugin = plugin.replace("calls += 1", "calls += 1; time.sleep(2)")
    config = tiny({**CONFIG, "train.max_steps": 4})
    started = ranks(["pretrain", "--config", config, "--output", run], of={0: plugin})
    assert started.wait(60) == [0, 0], started.texts()
    assert checkpoint.checkpoints(run)[-1].name == "step_00000004.pt"


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_never_comes(tmp_path: Path, tiny: Tiny, ranks: Launch) -> None:
    config = tiny({"train.timeout": 2.0})
    never = "import time; time.sleep(1000)"
    started = ranks(["pretrain", "--config", config, "--output", tmp_path / "run"], of={1: never})
    assert started.wait(20, [0]) == [75]
    (line,) = started.texts()[0].strip().splitlines()
    assert "rank 0: not all processes have come within train.timeout (2 s)" in line


@pytest.mark.slow  # as for pre-training
def test_one_that_never_comes_to_an_evaluation(tmp_path: Path, tiny: Tiny, ranks: Launch) -> None:
    args = ["evaluate", "knn", "untrained", "--config", tiny(), "--timeout", 2]
    started = ranks(args, of={1: "import time; time.sleep(1000)"})
    assert started.wait(20, [0]) == [75]
    (line,) = started.texts()[0].strip().splitlines()
    assert "rank 0: not all processes have come within --timeout (2 s)" in line
