"""What a new user gets wrong: one line that says what was meant, before any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim.core.config import DataConfig
from mim.core.errors import UserError, choice_error
from mim.data import open_source

Mim = Callable[..., Any]
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "compare" / "demo.yaml"
PHOTOS = ROOT / "configs" / "pretrain" / "photos.yaml"


@pytest.mark.parametrize(
    "args, said",
    [
        (["compare", "--data.path", "x"], "did you mean --base.data.path?"),
        (["compare", DEMO], f"a config file is given by --config {DEMO}"),
        (["compare", "--config", PHOTOS], "is of one run; a comparison has data, model, optim"),
        (["pretrain", "--config", DEMO], "is of a comparison (base, axes): give it to mim compare"),
        (["pretrain", "--ratio", "0.6"], "did you mean --mask.ratio?"),
        (["pretrain", "--mask.ration=0.6"], "did you mean --mask.ratio"),
        (["pretrain", "--train.epochs", "five"], "train.epochs: 'five' must be a whole number"),
        (["pretrain", "--data.flip", "perhaps"], "data.flip: 'perhaps' must be true or false"),
        (["pretrain", "--mask.ratio", "abc"], "mask.ratio: 'abc' must be a number or a list"),
        (["pretrain", "--train.max_steps", "q"], "'q' must be a whole number or null"),
        (["pretrain", "--model.regime", "zero"], "given by itself, as --model.regime.NAME VALUE"),
        (["compare", "--axes.mask.ratio", "[0.5]"], """write --axes '{"mask.ratio": [0.5,"""),
        (["compare", "--axes", '{"regime": ["drop"]}'], "'model.regime.name'"),
    ],
)
def test_the_line_says_what_was_meant(
    mim: Mim, args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = mim(*args)
    assert outcome.code == 2 and said in outcome.line
    assert len(outcome.line) < 400 and "<class" not in outcome.line
    assert not list(tmp_path.iterdir())


def test_a_misspelt_key_in_a_file_names_its_neighbour(mim: Mim, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("base: {mask: {ratioo: 0.5}}\n")
    outcome = mim("compare", "--config", file)
    assert outcome.code == 2 and "'base.mask.ratioo' is not one of" in outcome.line
    assert "did you mean 'base.mask.ratio'?" in outcome.line


@pytest.mark.parametrize("source", ["photos", "digits"])
def test_a_path_that_nobody_reads_is_refused(source: str, tmp_path: Path) -> None:
    config = DataConfig(source=source, path=str(tmp_path))
    with pytest.raises(UserError, match=f"is not read by data.source={source}.*imagefolder"):
        open_source(config, "train")
    # A run that was trained so before this was refused still opens.
    assert len(open_source(DataConfig(source, path="x", fingerprint="kept"), "train"))


def test_a_folder_of_comparisons_names_them(mim: Mim, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(json.dumps({"format": 1}))
    outcome = mim("report", tmp_path)
    assert outcome.code == 2
    assert outcome.line.endswith(f"; {tmp_path / 'one'}, {tmp_path / 'two'} are")


def test_long_lists_of_names_are_not_printed() -> None:
    names = [f"block.setting_{place}" for place in range(200)] + ["model.regime.name"]
    text = str(choice_error("axes", "regime", names))
    assert text == "axes: 'regime' is none of the 201 names; did you mean 'model.regime.name'?"
    assert str(choice_error("axes", "qqq", names)).endswith("is none of the 201 names")
