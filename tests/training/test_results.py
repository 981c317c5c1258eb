"""``result.json``: many writers lose nothing, and a torn file is one line about its run."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim.core.errors import UserError
from mim.training.results import read_result, update_result

Mim = Callable[..., Any]


def count(folder: str, who: int, times: int) -> None:
    def add(result: dict[str, Any]) -> dict[str, Any]:
        return {**result, f"by_{who}": result.get(f"by_{who}", 0) + 1}

    for _ in range(times):
        update_result(Path(folder), add)


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=count, args=(str(tmp_path), who, 40)) for who in (0, 1)]
    others += [threading.Thread(target=count, args=(str(tmp_path), who, 40)) for who in (2, 3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert read_result(tmp_path) == {f"by_{who}": 40 for who in range(4)}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    update_result(tmp_path, lambda result: {"steps": 1})
    with pytest.raises(ZeroDivisionError):
        update_result(tmp_path, lambda result: {"steps": 1 / 0})
    assert read_result(tmp_path) == {"steps": 1}


ODD = {
    "torn": '{"format": 1, "stat',
    "empty": "",
    "binary": "\x00\x01",
    "a list": "[]",
    "deep": "[" * 100_000,
    "no mapping": '{"status": "finished", "evaluations": [1]}',
    "no numbers": '{"status": "finished", "steps": 1, "evaluations": {"knn": 1}}',
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_result_is_one_line_of_the_listing(odd: str, tmp_path: Path, mim: Mim) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        update_result(tmp_path / name, lambda result: {"status": "finished", "steps": 3})
    (tmp_path / "a" / "result.json").write_text(ODD[odd])
    outcome = mim("runs", tmp_path)
    assert outcome.code == 0 and not outcome.err
    first, second = outcome.out.splitlines()[1:]
    assert first.startswith("a\tunreadable\t")
    assert "result.json cannot be read" in first or "its files are not what a run writes" in first
    assert second.startswith("b\tfinished\t")
    (found, _) = json.loads(mim("runs", tmp_path, "--json", "-").out)
    assert found["status"] == "unreadable"
    (tmp_path / "b" / "c").mkdir()
    (tmp_path / "b" / "c" / "result.json").write_text(f'{{"steps": 1{"0" * 400}}}')
    assert mim("diff", tmp_path / "b", tmp_path / "b" / "c").code == 0
    refused = mim("diff", tmp_path / "a", tmp_path / "b")
    assert refused.code == 2 and str(tmp_path / "a") in refused.line
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path / "a")


def test_what_is_torn_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        update_result(tmp_path, lambda result: {})
    assert (tmp_path / "result.json").read_text() == "{"


def test_an_evaluation_of_a_run_that_goes_on_is_not_its_end(
    tmp_path: Path, mim: Mim, tiny: Callable[..., Path]
) -> None:
    run = tmp_path / "run"
    args = ("pretrain", "--config", tiny(), "--output", run)
    assert mim(*args).code == 0
    ended = read_result(run)
    (run / "result.json").unlink()  # as if it were in the middle
    quick = ("--set", "k=[5]", "few_shot=[]", "temperature=[0.1]")
    assert mim("evaluate", "knn", run, *quick).code == 0
    assert read_result(run)["status"] == "unfinished"
    (found,) = json.loads(mim("runs", run, "--json", "-").out)
    assert found["status"] == "running" and found["measures"]["knn.accuracy"] > 0
    assert mim(*args, "--resume", "auto").code == 0
    after = read_result(run)
    assert after["status"] == "finished" and after.keys() == ended.keys()
