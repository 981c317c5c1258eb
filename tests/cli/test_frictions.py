"""What a newcomer types first, and the line that answers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim.core.errors import UserError
from mim.interop import files


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model.regime.name", "mae"), "model.regime.name: 'mae' is called 'drop' here"),
        (("--model.regime.name", "SimMIM"), "is called 'token' here"),
        (("--mask.ratio", "75"), "did you mean 0.75?"),
        (("--data.subset.fraction", "10"), "did you mean 0.1?"),
        (("--model.backbone", "resnet50"), "like every CNN, has no patches to hide"),
        (("--train.device", "gpu"), "is no device; choose auto, cpu, cuda, cuda:1 or mps"),
        (("--train.device", "cuda:77"), "is not there"),
        (("--data.subset.per", "2"), "did you mean --data.subset.per_class"),
    ],
)
def test_a_mistake_is_answered(
    mim: Callable[..., Any], tiny: Callable[..., Path], words: tuple[str, ...], said: str
) -> None:
    outcome = mim("pretrain", "--config", tiny(), *words)
    assert outcome.code == 2 and said in outcome.line


def test_a_config_is_not_taken_for_a_folder(
    mim: Callable[..., Any], tiny: Callable[..., Path]
) -> None:
    outcome = mim("pretrain", tiny())
    assert outcome.code == 2 and "a config file is given by --config" in outcome.line


def test_a_name_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    (tmp_path / "model.safetensors").write_bytes(b"")

    def fetch(repo: str, **options: Any) -> str:
        asked.append(repo)
        if "missing" in repo:
            raise OSError("404 Client Error")
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", fetch)
    for name in ("vit_base_patch16_224.mae", "facebook/vit-mae-base"):
        assert files.find_weights(name) == tmp_path / "model.safetensors"
    assert asked == ["timm/vit_base_patch16_224.mae", "facebook/vit-mae-base"]
    with pytest.raises(UserError, match=r"cannot be had from the hub \(404"):
        files.find_weights("somebody/missing")
    for name in ("no_such_model", "weights.pth", "some/weights.pth"):
        with pytest.raises(UserError, match="neither a file, nor a timm name"):
            files.find_weights(name)
    assert len(asked) == 3
