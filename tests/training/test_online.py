"""The probe beside the training: it learns, and the run does not notice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mim as package
from mim.data import eval_loader, normalize, open_source
from mim.training import checkpoint, pretrain
from mim.training.online import OnlineProbe

Mim = Callable[..., Any]
Tiny = Callable[..., Path]

# Dropout draws from torch's generator in each step: a probe that drew too would shift it.
CHANGES = {
    "model.backbone_args": {
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "proj_drop_rate": 0.3,
    },
    "data.batch_size": 256,
    "train.log_every": 1,
    "train.validate_every": 0.5,
    "train.checkpoint_every": 0.1,
    "train.max_steps": 12,
}
ON = {"online_probe": {"enabled": True, "lr": 0.05}}


def rows(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        row.pop("images_per_second", None)
    return found


def test_the_run_is_the_same_without(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    runs = []
    for name, more in (("without", {}), ("with", ON)):
        config = tiny({**CHANGES, **more}, name)
        runs.append(tmp_path / name)
        assert mim("pretrain", "--config", config, "--output", runs[-1]).code == 0
    plain, probed = (checkpoint.model_state(run) for run in runs)
    assert all(torch.equal(value, probed[key]) for key, value in plain.items())
    own = ("online_loss", "online_accuracy", "online_val_accuracy")
    kept = [{k: v for k, v in row.items() if k not in own} for row in rows(runs[1])]
    assert [row for row in kept if len(row) > 2] == rows(runs[0])

    learned = [row for row in rows(runs[1]) if "online_loss" in row]
    assert learned[0]["online_loss"] == pytest.approx(torch.tensor(10.0).log().item())
    assert learned[-1]["online_loss"] < 2.2
    result = checkpoint.read_result(runs[1])["evaluations"]["linear_online"]
    # Again from the files: features of the final encoder under the saved layer.
    model, val = package.load(runs[1]), open_source(checkpoint.read_config(runs[1]).data, "val")
    newest = checkpoint.read_checkpoint(checkpoint.checkpoints(runs[1])[-1])
    saved = newest["hooks"]["online"]["head"]
    (batch,) = eval_loader(val, checkpoint.read_config(runs[1]).data, batch_size=len(val))
    features = package.encode(model, normalize(batch.images, val.mean, val.std))
    x = (features - saved["0.mean"]) / (saved["0.var"] + 1e-6).sqrt()
    guess = (x @ saved["1.weight"].T + saved["1.bias"]).argmax(1)
    assert result["accuracy"] == float((guess == batch.labels).double().mean()) > 0
    assert "evaluations" not in checkpoint.read_result(runs[0])


def test_it_goes_on_after_a_stop(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny({**CHANGES, **ON, "train.log_every": 5})
    one, two = tmp_path / "one", tmp_path / "two"
    assert mim("pretrain", "--config", config, "--output", one).code == 0
    real, calls = OnlineProbe.after_step, []

    def step(self: OnlineProbe, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineProbe, "after_step", step)
        assert mim("pretrain", "--config", config, "--output", two).code == 143
    assert mim("pretrain", "--config", config, "--output", two, "--resume", "auto").code == 0
    assert rows(two) == rows(one)
    assert checkpoint.read_result(two)["evaluations"] == checkpoint.read_result(one)["evaluations"]


def test_labels_are_needed(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pretrain.open_source

    def unlabelled(*args: Any) -> Any:
        source = real(*args)
        source.labels = None
        return source

    monkeypatch.setattr(pretrain, "open_source", unlabelled)
    done = mim("pretrain", "--config", tiny(ON), "--output", tmp_path / "run")
    assert done.code == 2
    assert "online_probe.enabled: True needs labels" in done.line
