"""Ctrl-C at a terminal: one line, exit code 130, no traceback and no half-written file."""

from __future__ import annotations

import importlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mim.cli.main
import mim.report.page
from mim.compare.runner import plan, read_compare_config, run_one
from mim.core.signals import Signals, between_imports, unheard

Tiny = Callable[..., Path]
Terminal = Callable[..., tuple[int, str]]
HERE = "@@here@@"
LINE = "mim: interrupted; call it again to go on"


def pause() -> None:
    """Say that the place is reached, and stay there until Ctrl-C comes."""
    os.write(1, HERE.encode())
    time.sleep(30)


def before(real: Any) -> Any:
    """Pauses instead of the call."""

    def paused(*args: Any, **kwargs: Any) -> Any:
        pause()
        return real(*args, **kwargs)

    return paused


def halfway(real: Any) -> Any:
    """Pauses in the middle of writing the file that is among the arguments."""

    def paused(*args: Any, **kwargs: Any) -> None:
        path = next(arg for arg in args if isinstance(arg, Path))
        with path.open("wb") as file:
            file.write(b"half of it")
        pause()

    return paused


@pytest.fixture
def terminal() -> Terminal:
    """Calls the command line in a process with a terminal, and types Ctrl-C at a place."""

    def call(args: list[object], place: str, how: Callable[[Any], Any]) -> tuple[int, str]:
        module, _, name = place.rpartition(":")
        owner: Any = importlib.import_module(module)
        *parents, last = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        pid, screen = pty.fork()
        if pid == 0:
            code = 99
            try:
                sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                setattr(owner, last, how(getattr(owner, last)))
                code = mim.cli.main.main([str(arg) for arg in args])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        text, typed, end = "", False, time.monotonic() + 60
        try:
            while time.monotonic() < end:
                if not select.select([screen], [], [], 0.1)[0]:
                    continue
                try:
                    read = os.read(screen, 4096)
                except OSError:  # Linux says so where nobody has the terminal any more
                    break
                text += read.decode()
                if HERE in text and not typed:
                    os.write(screen, b"\x03")
                    typed = True
        finally:
            if time.monotonic() >= end:
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            os.close(screen)
        assert typed, text
        told = text.split(HERE)[-1].replace("\r", "")
        return os.waitstatus_to_exitcode(status), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told)

    return call


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_stopped(outcome: tuple[int, str]) -> None:
    code, told = outcome
    assert code == 130, told
    (line,) = [line for line in told.removeprefix("^C").splitlines() if line.strip()]
    assert line == LINE


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_tree: Callable[..., dict[str, Any]]
) -> Path:
    """A comparison of one run."""
    place = tmp_path_factory.mktemp("measured")
    config, folder = place / "compare.yaml", place / "cmp"
    base = tiny_tree({"train.max_steps": 2})
    content = {"axes": {"seed": [0]}, "evaluations": {}, "base": base}
    config.write_text(yaml.safe_dump(content))
    args = ["--config", str(config), "--output", str(folder)]
    for item in plan(read_compare_config(args)):
        run_one(item, {})  # here, where the libraries are loaded
    assert mim.cli.main.main(["compare", *args, "--show", "quiet"]) == 0
    return folder


@pytest.mark.parametrize(
    ("args", "place", "how"),
    [
        (["evaluate", "knn", "RUN"], "mim.evaluate.features:image_tokens", before),
        (["evaluate", "linear", "RUN"], "mim.evaluate.probes.linear:Linear.run", before),
        (["evaluate", "knn", "RUN"], "pathlib:Path.write_text", halfway),
        (["report", "CMP"], "mim.report.figures:draw", before),
        (["report", "CMP"], "pathlib:Path.write_bytes", halfway),
        (["visualize", "masks", "RUN"], "mim.evaluate.visualize:draw_masks", before),
        (["visualize", "masks", "RUN"], "matplotlib.figure:Figure.savefig", halfway),
        (
            ["visualize", "reconstruct", "RUN"],
            "mim.evaluate.visualize:reconstruction_figure",
            before,
        ),
        (["export", "RUN", "--output", "RUN/a.safetensors"], "mim.interop:export_run", before),
        (["runs", "RUN"], "mim.report.runs:find_runs", before),
    ],
)
def test_a_verb_stops(
    args: list[str], place: str, how: Callable[[Any], Any], measured: Path, terminal: Terminal
) -> None:
    run = measured / "seed=0"
    places = {"RUN": str(run), "CMP": str(measured)}
    found = files(measured)
    full = [arg.replace("RUN", places["RUN"]).replace("CMP", places["CMP"]) for arg in args]
    assert_stopped(terminal(full, place, how))
    if place == "pathlib:Path.write_text":  # before the numbers the answers are there, whole
        (run / "predictions.npz").unlink(missing_ok=True)
    assert files(measured) == found


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """pytest itself may ignore SIGINT, where a script has started it in the background."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
except BaseException:
    pass
whole = True
"""


def test_an_import_cannot_swallow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mim_test_swallows.py").write_text(SWALLOWS)
    monkeypatch.syspath_prepend(tmp_path)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), between_imports():
        module = importlib.import_module("mim_test_swallows")
        assert module.whole
        time.sleep(30)
    assert time.monotonic() - began < 10
    assert sys.modules.pop("mim_test_swallows").whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_typed_again_does_not_wait_for_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import os, signal, time\nfor i in range(50):\n    time.sleep(0.05)\n"
    text += "    if i in (0, 10):\n        os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "mim_test_slow.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mim.core.signals._AGAIN", 0.3)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), between_imports():
        importlib.import_module("mim_test_slow")
    assert 0.5 < time.monotonic() - began < 2


class Last:
    """Python ignores what is raised while it goes."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_python_cannot_ignore_it(capfd: pytest.CaptureFixture[str]) -> None:
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), between_imports():
        Last()
        time.sleep(30)
    assert sys.unraisablehook is hook
    assert "Traceback" not in capfd.readouterr().err


def test_a_server_of_processes_does_not_hear_it() -> None:
    """It imports the libraries, and would tell of a Ctrl-C at length."""
    with unheard():  # as mim.core.signals.start_server does
        server = subprocess.Popen(["sleep", "30"])
    server.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(0.3)
    server.kill()
    assert server.wait() == -signal.SIGKILL
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_one_started_to_ignore_it_goes_on_doing_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind nohup, or by & in a script."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with between_imports():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, old)


def test_a_launcher_that_passes_it_on_does_not_make_it_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all processes, torchrun to its own once more."""
    with Signals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == signal.SIGINT
        monkeypatch.setattr("mim.core.signals._AGAIN", 0.0)
        with pytest.raises(KeyboardInterrupt):  # who types it again does not wait
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
