"""Six components of a stranger's, one file each: in one comparison, killed and called again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_digits

from mim.cli.main import main
from mim.compare.launchers import server_context
from mim.core.errors import UserError
from mim.evaluate import build_evaluation
from mim.training import checkpoint
from mim.training.settings import load_config

FILES = sorted((Path(__file__).parent / "own_components").glob("*.py"))
CHOICE = {
    "data.source": "arrays",
    "mask.name": "wave",
    "model.regime.name": "mean",
    "model.target.name": "gray",
    "model.decoder.name": "normed",
    "plugins": [str(file) for file in FILES],
}
# What is wrong, and what the line says: as for a setting of mim's own.
WRONG = [
    ("mask.wave.period", 0, "0 must be at least 1"),
    ("mask.wave.noise", -1, "-1.0 must be at least 0"),
    ("model.regime.mean.strength", 2, "2.0 must be above 0 and at most 1"),
    ("model.target.gray.contrast", "much", "'much' must be a number"),
    ("model.decoder.normed.dropout", 1, "1.0 must be at least 0 and below 1"),
    ("data.arrays.images", 3, "3 must be a text"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    yield


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    digits = load_digits()
    path = tmp_path / "digits.npz"
    np.savez(path, images=(digits.images * 15).astype(np.uint8)[:600], labels=digits.target[:600])
    return path


def test_each_is_one_short_file() -> None:
    assert len(FILES) == 6
    assert all(len(file.read_text().splitlines()) <= 40 for file in FILES)


@pytest.mark.parametrize(("key", "value", "said"), WRONG, ids=[case[0] for case in WRONG])
def test_a_wrong_value_gets_the_line_of_a_built_in(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, {**CHOICE, "data.image_size": 8, "data.channels": 1, key: value})
    assert str(error.value) == f"{key}: {said}"


def test_so_does_an_evaluation_and_an_unknown_key() -> None:
    load_config(None, {"plugins": CHOICE["plugins"]})
    with pytest.raises(UserError) as error:
        build_evaluation("nearest_mean", {"power": 0})
    assert str(error.value) == "evaluations.nearest_mean.power: 0.0 must be above 0"
    with pytest.raises(UserError, match=r"--mask\.wave\.perod \(did you mean --mask\.wave\.period"):
        load_config(None, {"plugins": CHOICE["plugins"], "mask.wave.perod": 3})


def test_they_make_a_comparison(
    tmp_path: Path, arrays: Path, tiny_tree: Callable[..., Any], mim: Callable[..., Any]
) -> None:
    folder, file = tmp_path / "cmp", tmp_path / "compare.yaml"
    base = tiny_tree({**CHOICE, "data.path": str(arrays), "train.checkpoint_every": 0.25})
    tree = {
        "output": str(folder),
        "axes": {"mask.wave.period": [2, 4], "seed": [0, 1]},
        "evaluations": {"nearest_mean": {"few_shot": [], "power": 1.5}},
        "base": base,
    }
    file.write_text(yaml.safe_dump(tree))
    command = ["compare", "--config", str(file), "--show", "quiet"]
    process = server_context().Process(target=main, args=(command,))
    process.start()
    first = folder / "period=2,seed=0"
    end = time.monotonic() + 120
    while not checkpoint.checkpoints(first):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.join()
    time.sleep(1)  # its run saves and stops
    outcome = mim(*command)
    assert outcome.code == 0, outcome.err
    runs = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}
    trained = {name: run for name, run in runs.items() if name.startswith("period=")}
    assert len(trained) == 4 and all(run["status"] == "finished" for run in runs.values())
    for name, run in trained.items():
        assert run["config"]["mask"]["wave"]["period"] == int(name[7])
        assert run["evaluation_settings"]["nearest_mean"]["power"] == 1.5
        assert run["evaluations"]["nearest_mean"]["accuracy"] > 0.2
        written = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert written["plugins"] == [f"plugins/{path.name}" for path in FILES]
        assert written["model"]["regime"]["mean"] == {"strength": 1.0}
    losses = {run["train_loss"] for run in trained.values()}
    assert len(losses) == 4
    report = (folder / "report.md").read_text()
    assert "wave period: 2, 4" in report and "nearest\\_mean, accuracy" in report
    rows = (folder / "results.csv").read_text()
    assert "mask.wave.period" in rows and "nearest_mean.accuracy" in rows
