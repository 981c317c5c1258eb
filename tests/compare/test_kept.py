"""What a comparison that is called again keeps, measures again, or refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import mim.compare.runner
from mim.training.results import read_result, update_result

Mim = Callable[..., Any]
KNN = {"k": [5], "few_shot": [], "temperature": [0.1]}
LINEAR = {"strengths": [0.01], "few_shot": []}


class Here:
    """Computes the runs in this process, where the libraries are loaded."""

    def __init__(self, work: Callable[[Any], int], count: int) -> None:
        self.work, self.running = work, list[tuple[Any, int]]()

    def start(self, item: Any) -> None:
        self.running.append((item, self.work(item)))

    def wait(self) -> list[tuple[Any, int]]:
        ended, self.running = self.running, []
        return ended


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mim.compare.runner, "LocalJobs", Here)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests are about the report, which takes longer than the runs."""
    monkeypatch.setattr("mim.api._report", lambda *args: None)


def draw_images(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for label, kind in enumerate(("cat", "dog")):
            for index in range(8):
                path = folder / split / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(100 * label, 100 * label + 100, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(path)


@pytest.fixture
def write(tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """Writes a comparison of one run over images of its own."""
    draw_images(tmp_path / "data", 0)

    def write(base: dict[str, Any] | None = None, **content: Any) -> Path:
        changes = {
            "data.source": "imagefolder",
            "data.path": str(tmp_path / "data"),
            "data.batch_size": 8,
            "data.augment": "none",
            "train.max_steps": 2,
        }
        path = tmp_path / "compare.yaml"
        tree = {
            "output": str(tmp_path / "cmp"),
            "axes": {"seed": [0]},
            "evaluations": {"knn": KNN},
            "base": tiny_tree({**changes, **(base or {})}),
        }
        path.write_text(yaml.safe_dump({**tree, **content}, sort_keys=False))
        return path

    return write


def states(outcome: Any) -> dict[str, str]:
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("[")]
    return dict(line.partition("] ")[2].split(": ") for line in lines)


@pytest.mark.usefixtures("no_report")
def test_an_evaluation_repeated_by_hand_is_measured_again(
    tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    config, run = write(evaluations={"knn": KNN, "linear": LINEAR}), tmp_path / "cmp" / "seed=0"
    begun = states(mim("compare", "--config", config))
    assert begun.pop("seed=0") == "train" and set(begun.values()) == {"evaluate"}
    first = read_result(run)
    assert set(states(mim("compare", "--config", config)).values()) == {"done"}
    by_hand = ("--set", "k=[3]", "few_shot=[]", "temperature=[0.1]")
    assert mim("evaluate", "knn", run, *by_hand).code == 0
    assert read_result(run)["protocols"]["knn"] != first["protocols"]["knn"]
    outcome = mim("compare", "--config", config)
    assert states(outcome) == {"seed=0": "evaluate", "untrained,seed=0": "done", "pixels": "done"}
    assert "seed=0: knn is measured again: other settings\n" in outcome.err
    assert "linear" not in outcome.err
    again = read_result(run)
    same = ("evaluations", "evaluation_settings", "protocols", "train_loss", "axes")
    assert {key: again[key] for key in same} == {key: first[key] for key in same}
    # By hand with the same settings it is the same measurement.
    by_hand = ("--set", "k=[5]", "few_shot=[]", "temperature=[0.1]")
    assert mim("evaluate", "knn", run, *by_hand).code == 0
    assert set(states(mim("compare", "--config", config)).values()) == {"done"}
    # One measured in another precision is not.
    assert mim("evaluate", "knn", run, *by_hand, "--precision", "bf16").code == 0
    assert states(mim("compare", "--config", config))["seed=0"] == "evaluate"


@pytest.mark.usefixtures("no_report")
def test_numbers_in_a_column_have_one_protocol(
    tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    assert mim("compare", "--config", write({"data.fingerprint": None})).code == 0
    found = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("cmp/*/result.json")}
    protocols = [result["protocols"]["knn"] for result in found.values()]
    assert len(found) == 3
    assert len({protocol["protocol"] for protocol in protocols}) == 1
    assert len({protocol["encoder"] for protocol in protocols}) == 3


@pytest.mark.usefixtures("no_report")
def test_other_weights_are_measured_again(
    tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    """In a run's own folder, and in a reference that now stands for another one."""
    run, given = tmp_path / "cmp" / "seed=0", tmp_path / "lent" / "a"
    assert mim("compare", "--config", write()).code == 0
    others = write(evaluations={}, axes={"seed": [1, 2]}, output=str(tmp_path / "others"))
    assert mim("compare", "--config", others).code == 0
    first, second = (tmp_path / "others" / f"seed={seed}" for seed in (1, 2))
    shutil.copytree(first, given)
    config = write(references=[str(given)])
    assert states(mim("compare", "--config", config))["given,a"] == "evaluate"
    assert set(states(mim("compare", "--config", config)).values()) == {"done"}
    numbers = read_result(tmp_path / "cmp" / "given,a")

    elsewhere = tmp_path / "moved" / "a"
    elsewhere.parent.mkdir()
    shutil.copytree(given, elsewhere)
    config = write(references=[str(elsewhere)])
    assert set(states(mim("compare", "--config", config)).values()) == {"done"}, "only moved"
    shutil.rmtree(elsewhere)
    shutil.copytree(second, elsewhere)
    outcome = mim("compare", "--config", config)
    assert "given,a: knn is measured again: other weights\n" in outcome.err
    assert states(outcome)["given,a"] == "evaluate"
    after = read_result(tmp_path / "cmp" / "given,a")
    assert after["given"] == str(elsewhere) and after["protocols"] != numbers["protocols"]

    shutil.copy(first / "encoder.safetensors", run)
    outcome = mim("compare", "--config", config)
    assert "seed=0: knn is measured again: other weights\n" in outcome.err
    assert states(outcome)["seed=0"] == "evaluate"


@pytest.mark.usefixtures("no_report")
def test_a_training_on_other_files_is_refused_and_references_are_measured_again(
    tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    mask = tmp_path / "mask.npy"
    np.save(mask, np.eye(4, dtype=bool))
    masked = {"mask.name": "file", "mask.file.path": str(mask)}
    config = write(masked)
    assert mim("compare", "--config", config).code == 0
    np.save(mask, ~np.eye(4, dtype=bool))
    outcome = mim("compare", "--config", config)
    assert outcome.code == 2 and "the content of mask.file.path has changed" in outcome.line
    np.save(mask, np.eye(4, dtype=bool))
    assert set(states(mim("compare", "--config", config)).values()) == {"done"}

    # The same names and labels, moved: the same images. With other pixels they are others.
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(tmp_path / "data", moved)
    draw_images(other, 1)
    again = mim("compare", "--config", write({**masked, "data.path": str(moved)}))
    assert set(states(again).values()) == {"done"}
    elsewhere = write({**masked, "data.path": str(other)})
    outcome = mim("compare", "--config", elsewhere)
    assert outcome.code == 2 and "holds a run over other" in outcome.line
    shutil.rmtree(tmp_path / "cmp" / "seed=0")
    outcome = mim("compare", "--config", elsewhere)
    assert outcome.code == 0, outcome.err
    assert "pixels: knn is measured again: other images\n" in outcome.err


@pytest.mark.usefixtures("no_report")
def test_evaluations_that_ended_before_one_fails_are_kept(
    tmp_path: Path, mim: Mim, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = write(evaluations={"knn": KNN, "linear": LINEAR}), tmp_path / "cmp" / "seed=0"
    with monkeypatch.context() as broken:
        broken.setattr("mim.evaluate.probes.linear.Linear.run", fail)
        assert mim("compare", "--config", config).code == 1
    failed = read_result(run)
    assert failed["status"] == "failed" and list(failed["evaluations"]) == ["knn"]
    update_result(run, lambda result: {**result, "evaluations": {"knn": {"accuracy": -1.0}}})
    outcome = mim("compare", "--config", config)
    assert states(outcome)["seed=0"] == "evaluate", "its training is kept too"
    mended = read_result(run)
    assert mended["status"] == "finished" and "error" not in mended
    assert mended["evaluations"]["knn"] == {"accuracy": -1.0}, "not measured again"
    assert mended["evaluations"]["linear"]["accuracy"] > 0


def fail(*args: Any) -> None:
    raise RuntimeError("it fails")


@pytest.mark.usefixtures("no_report")
def test_results_of_an_older_version_are_kept(
    tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    config, run = write(), tmp_path / "cmp" / "seed=0"
    assert mim("compare", "--config", config).code == 0

    def as_before(result: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in result.items() if key != "protocols"}
        return {**kept, "evaluated_with": json.dumps({"knn": KNN}, sort_keys=True)}

    update_result(run, as_before)
    plan = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    for item in plan["planned"]:
        del item["inputs"]
    (tmp_path / "cmp" / "comparison.json").write_text(json.dumps(plan))
    assert states(mim("compare", "--config", config))["seed=0"] == "done"
    config = write(evaluations={"knn": {**KNN, "k": [3]}})
    assert states(mim("compare", "--config", config))["seed=0"] == "evaluate"


@pytest.mark.usefixtures("no_report")
def test_several_processes_are_refused(
    mim: Mim, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    outcome = mim("compare", "--config", write())
    assert outcome.code == 2 and "without torchrun or accelerate launch" in outcome.line
    assert not (tmp_path / "cmp").exists()


@pytest.mark.usefixtures("no_report")
def test_a_full_disk_is_a_line_for_each_run(
    tmp_path: Path, mim: Mim, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mim.compare.runner.update_result", full)
    outcome = mim("compare", "--config", write())
    assert outcome.code == 1 and "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if "it cannot be noted" in line]
    assert [line.partition(":")[0] for line in lines] == ["seed=0", "untrained,seed=0", "pixels"]


def test_from_python_under_the_names_of_before(tmp_path: Path, write: Callable[..., Path]) -> None:
    from mim.compare import CompareConfig, Launch, compare, read_compare_config
    from mim.compare.runner import compare as other

    config = read_compare_config(["--config", str(write())])
    assert isinstance(config, CompareConfig) and Launch().jobs == 1 and compare is other
    report = compare(config, show="quiet")
    assert report == tmp_path / "cmp" / "report.html" and report.is_file()


@pytest.mark.usefixtures("no_report")
def test_long_names_of_any_script_fit_a_file_system(write: Callable[..., Path]) -> None:
    from mim.compare import read_compare_config
    from mim.compare.plan import plan

    axes = {"log.project": ["画" * 100 + end for end in "ab"]}
    planned = plan(read_compare_config(["--config", str(write(axes=axes))]))
    names = [item.folder for item in planned]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) < 140 for name in names)
