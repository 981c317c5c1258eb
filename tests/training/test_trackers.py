"""What TensorBoard and wandb are given: names, tags, pictures, the report."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mim.core.config import Config, LogConfig
from mim.core.errors import UserError
from mim.core.settings import load_config
from mim.training.runtime.trackers import start_trackers, track_picture, track_report, tracker_names


def test_trackers_are_those_asked_for() -> None:
    assert tracker_names(Config()) == ["tensorboard"]
    assert tracker_names(replace(Config(), log=LogConfig(tensorboard=False))) == []
    both = LogConfig(wandb="offline")
    assert tracker_names(replace(Config(), log=both)) == ["tensorboard", "wandb"]


def test_runs_group_by_regime_and_carry_tags(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    changes = {"model.regime.name": "zero", "log.wandb": "offline", "log.project": "masks"}
    config = load_config(tiny({**changes, "output": str(tmp_path / "one"), "seed": 3}))
    calls: list[Any] = []
    accelerator: Any = SimpleNamespace(
        log_with=["wandb"],
        trackers=[],
        init_trackers=lambda *args, **options: calls.append((args, options)),
    )
    start_trackers(accelerator, config, step=7)
    ((project,), options), *_ = calls
    wandb = options["init_kwargs"]["wandb"]
    assert project == "masks"
    assert (wandb["name"], wandb["group"], wandb["job_type"]) == ("one", "zero-random", "pretrain")
    assert {"regime:zero", "mask:random", "ratio:0.75", "data:digits", "seed:3"} <= {*wandb["tags"]}
    assert all(len(tag) <= 64 for tag in wandb["tags"])
    assert options["config"]["model.regime.name"] == "zero"
    assert options["init_kwargs"]["tensorboard"] == {"purge_step": 8}
    accelerator.log_with = []
    start_trackers(accelerator, config, step=7)
    assert len(calls) == 1


def test_pictures_go_to_each_tracker(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "picture.png")
    seen: list[Any] = []
    writer = SimpleNamespace(add_image=lambda *args, **options: seen.append((args, options)))
    board: Any = SimpleNamespace(name="tensorboard", writer=writer)
    wandb: Any = SimpleNamespace(
        name="wandb", log_images=lambda values, step: seen.append((values, step))
    )
    track_picture([board, wandb], tmp_path / "picture.png", 5)
    (name, pixels, step), options = seen[0]
    assert (name, step, options) == ("reconstructions", 5, {"dataformats": "HWC"})
    assert pixels.shape == (6, 8, 3)
    assert list(seen[1][0]) == ["reconstructions"] and seen[1][1] == 5


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_the_report_is_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[Any] = []
    real = wandb.init

    def init(**options: Any) -> Any:
        run = real(**options)
        logged.append(options)
        monkeypatch.setattr(run, "log_artifact", lambda artifact: logged.append(artifact))
        return run

    monkeypatch.setattr(wandb, "init", init)
    page = tmp_path / "report.html"
    page.write_text("<p>hello</p>")
    config = replace(Config(), log=LogConfig(wandb=mode, project="masks"))
    table = (["Encoder", "n"], [["drop", "3"]])
    track_report(config, "Three: regimes/<b>", tmp_path, [page], table, "# The report")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"# The report" in events.read_bytes()
    if mode == "disabled":
        assert logged == [] and not list(tmp_path.rglob("*.wandb"))
        return
    options, *_, artifact = logged  # a table is an artifact too
    assert (options["mode"], options["job_type"]) == ("offline", "report")
    assert artifact.name.startswith("report-Three-regimes-b-") and artifact.type == "report"
    assert list(artifact.manifest.entries) == ["report.html"]
    (stored,) = tmp_path.rglob("*.table.json")
    assert '"drop"' in stored.read_text()


def test_wandb_without_a_key_is_one_line(
    tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.errors import UsageError

    def refuse(*args: Any, **options: Any) -> None:
        raise UsageError("No API key configured.\nUse `wandb login` to log in.")

    config = load_config(tiny({"log.wandb": "online", "output": str(tmp_path)}))
    accelerator: Any = SimpleNamespace(log_with=["wandb"], init_trackers=refuse)
    with pytest.raises(UserError, match=r"log\.wandb: 'online' cannot start: .* to offline\)"):
        start_trackers(accelerator, config, step=0)


def test_a_run_gives_its_trackers_the_documented_names(
    tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mim.training.pretrain import pretrain

    monkeypatch.setenv("WANDB_SILENT", "true")
    changes = {
        "log.wandb": "offline",
        "log.tensorboard": True,
        "train.log_every": 1,
        "train.validate_every": 1,
    }
    config = load_config(tiny({**changes, "output": str(tmp_path / "run")}))
    pretrain(config)
    # The settings of the run stand in a second file, in a folder beside it.
    folders = {events.parent for events in (tmp_path / "run").rglob("events.out.tfevents.*")}
    board = EventAccumulator(str(min(folders, key=lambda folder: len(folder.parts)))).Reload()
    page = (Path(__file__).parents[2] / "docs" / "howto" / "trackers.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page))
    assert set(board.Tags()["scalars"]) >= {"loss", "lr", "images_per_second", "val_loss"}
    assert set(board.Tags()["scalars"]) <= documented
    (stored,) = (tmp_path / "run").rglob("*.wandb")
    content = stored.read_bytes()
    for name in ("val_loss", "images_per_second", "regime:drop", "model.regime.name"):
        assert name.encode() in content, name
