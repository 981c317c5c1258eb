"""The recipes: found by name, trained at reduced size, resumed, compared, as the docs show them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mim.cli.recipes import table
from mim.core.config import Config
from mim.core.errors import UserError
from mim.core.recipes import evaluations_of, headline, recipe_file, recipe_files
from mim.core.settings import read_mapping
from mim.evaluate import build_evaluation
from mim.model import build_model
from mim.training import checkpoint
from mim.training.optim import build_optimizer
from mim.training.settings import load_config, read_args

Mim = Callable[..., Any]
ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml"))
ALL, KEEPING, TOKEN = ["drop", "zero", "token"], ["zero", "token"], ["token"]

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {
    "data.source": "photos",
    "data.image_size": 32,
    "data.batch_size": 16,
    "data.workers": 0,
    "data.subset.list": None,
    "train.precision": "fp32",
    "train.max_steps": 20,
    "train.checkpoint_every": 0.04,  # of an epoch: some steps
    "train.keep_checkpoints": 20,
    "train.log_every": 5,
    "train.picture_every": 0,
    "log.tensorboard": False,
}
"""A recipe on 32 x 32 photographs, 8 x 8 patches."""
SIZES: dict[str, dict[str, Any]] = {
    name: {f"model.decoder.{name}.{key}": value for key, value in sizes.items()}
    for name, sizes in {
        "transformer": {"width": 32, "depth": 1, "heads": 2},
        "cross_attention": {"width": 32, "depth": 2, "heads": 2},
        "rotary": {"width": 32, "depth": 2, "heads": 2},
        "convolutional": {"width": 32, "depth": 2, "groups": 4},
        "block_predictor": {"width": 32, "depth": 1, "heads": 2},
        "linear": {},
    }.items()
}


@pytest.fixture
def reduced(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """What makes a recipe small: dotted settings."""

    def settings(name: str) -> dict[str, Any]:
        tree = read_mapping(recipe_file(name))
        model, target = tree["model"], tree["model"]["target"]["name"]
        args = {**model.get("backbone_args", {}), **VIT}
        found = {**SMALL, **SIZES[model["decoder"]["name"]]}
        if "swin" in model["backbone"]:
            args = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
            args["window_size"] = 4
        if "aligned" in tree["mask"]:
            found["mask.aligned.unit"] = 8
        if "capi" in model["backbone"]:
            args["num_reg_tokens"] = 4
            found["model.target.clusters.clusters"] = 12
        if "target_blocks" in tree["mask"]:
            found["mask.target_blocks.min_keep"] = 2
        if "repeats" in tree["mask"]:
            found["mask.repeats"] = 2
        if target == "hog":
            found["model.target.hog.cell"] = 4
        if target == "ema_features":
            found["model.target.ema_features.top"] = 1
        if target == "codes":
            file = tmp_path / "codebook.safetensors"
            codes = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
            save_file({"codebook": codes}, str(file))
            found["model.target.codes.codebook"] = str(file)
        return {**found, "model.backbone_args": args}

    return settings


def regimes_of(name: str) -> list[str]:
    """Those that have a meaning for a recipe."""
    tree = read_mapping(recipe_file(name))
    if "swin" in tree["model"]["backbone"]:
        return TOKEN
    return KEEPING if tree["model"]["decoder"]["name"] == "linear" else ALL


def flags(settings: dict[str, Any], prefix: str = "") -> list[str]:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return [f"--{prefix}{key}={text}" for key, text in texts.items()]


def test_every_recipe_has_its_header() -> None:
    assert list(recipe_files()) == NAMES
    for name in NAMES:
        text = recipe_file(name).read_text()
        header = text[: text.index("\noutput:")]
        assert all(line.startswith("#") for line in header.splitlines()), name
        for part in ("paper", "command", "time", "published", "measured"):
            assert re.search(rf"^# {part}:", header, re.MULTILINE), (name, part)
        assert re.search(r"# time: +[\d.]+ GFLOP an image", header), name
        assert 20 < len(headline(recipe_file(name))) < 130, name
        for evaluation, settings in evaluations_of(read_mapping(recipe_file(name))).items():
            build_evaluation(evaluation, settings)


def test_the_verb_lists_and_shows_them(mim: Mim) -> None:
    listed = mim("recipes")
    assert [line.split()[0] for line in listed.out.splitlines()] == NAMES
    assert mim("recipes", "mae-vit-b").out.strip() == recipe_file("mae-vit-b").read_text().strip()
    outcome = mim("recipes", "mae-vit-x")
    assert outcome.code == 2 and "recipe: 'mae-vit-x' is not one of" in outcome.line


def test_the_docs_table_is_up_to_date() -> None:
    """``mim recipes --table`` writes it."""
    page = (ROOT / "docs" / "howto" / "recipes.md").read_text()
    written, rows = table(), [line for line in page.splitlines() if line.startswith("|")]
    assert rows[: len(written)] == written


def test_a_recipe_overridden_is_a_run_and_a_comparison(mim: Mim) -> None:
    run = read_args(Config, ["--recipe", "mae-vit-b", "--train.epochs", "100"])
    assert run.train.epochs == 100 and run.output == "runs/mae-vit-b"
    from mim.compare import read_compare_config

    config = read_compare_config(["--recipe", "mae-vit-b", "--base.data.path", "DIR"])
    assert config.base.mask.rounding == "floor_visible" and config.base.data.path == "DIR"
    assert config.evaluations["finetune"]["held_out"] == 0 and config.output == "runs/compare"
    outcome = mim("evaluate", "finetune", "nothing", "--recipe", "mae-vit-x")
    assert outcome.code == 2 and "mae-vit-x" in outcome.line


@pytest.mark.parametrize(
    "name, free",
    [
        ("beit-vit-b", ["cls_token"]),
        ("data2vec-vit-b", ["cls_token"]),
        ("simmim-vit-b", ["cls_token"]),
        ("simmim-swin-b", ["mask_token", "relative_position_bias_table"]),
        ("maskfeat-vit-b", []),
        ("mae-vit-b", []),
    ],
)
def test_what_does_not_decay_is_the_original_s_choice(
    name: str, free: list[str], reduced: Any
) -> None:
    """Besides vectors; and a norm stands between the last block and the decoder."""
    config = load_config(recipe_file(name), reduced(name))
    model = build_model(config)
    kept: list[Any] = [
        parameter
        for group in build_optimizer(config.optim, model, 1.0).param_groups
        if group["weight_decay"] == 0
        for parameter in group["params"]
        if parameter.ndim > 1
    ]
    names = {key.split(".")[-1] for key, p in model.named_parameters() if any(p is k for k in kept)}
    for regime in regimes_of(name):  # what a pattern names must be there in each
        other = load_config(recipe_file(name), {**reduced(name), "model.regime.name": regime})
        build_optimizer(other.optim, build_model(other), 1.0)
    assert sorted(names) == free
    assert isinstance(model.backbone.norm, torch.nn.LayerNorm)


def trains_and_resumes(name: str, settings: dict[str, Any], mim: Mim, folder: Path) -> None:
    whole, stopped = folder / "whole", folder / "stopped"
    args = ("pretrain", "--recipe", name, *flags(settings))
    assert mim(*args, "--output", whole).code == 0
    shutil.copytree(whole, stopped)
    *earlier, _ = checkpoint.checkpoints(stopped)
    for last in (stopped / "checkpoints").glob("step_00000020*"):
        last.unlink()  # as if it had been killed before its end
    (stopped / "result.json").unlink()
    assert mim(*args, "--output", stopped, "--resume", "auto").code == 0
    states = [checkpoint.newest_checkpoint(run)[0] for run in (whole, stopped)]
    assert states[0] is not None and states[1] is not None
    assert states[0]["step"] == states[1]["step"] == 20
    for part in ("model", "optimizer"):
        one, other = (torch.utils._pytree.tree_leaves(state[part]) for state in states)
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    begun = checkpoint.read_checkpoint(whole / "checkpoints" / earlier[-1].name)["model"]
    assert any(not torch.equal(begun[key], states[0]["model"][key]) for key in begun)


def test_two_recipes_train_and_resume(mim: Mim, reduced: Any, tmp_path: Path) -> None:
    for name in ("mae-vit-b", "capi-vit-l"):
        trains_and_resumes(name, reduced(name), mim, tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_resumes(name: str, mim: Mim, reduced: Any, tmp_path: Path) -> None:
    trains_and_resumes(name, reduced(name), mim, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_is_compared_under_all_its_regimes(
    name: str, mim: Mim, reduced: Any, tmp_path: Path
) -> None:
    settings, meant = reduced(name), regimes_of(name)
    for regime in {*ALL} - {*meant}:
        with pytest.raises(UserError):
            load_config(recipe_file(name), {**settings, "model.regime.name": regime})
    settings |= {"train.max_steps": 4, "train.checkpoint_every": 1}
    axes = {"model.regime.name": meant, "seed": [0]}
    given = [*flags(settings, "base."), "--axes", json.dumps(axes)]
    evaluations = ["--evaluations", json.dumps({"knn": {"pool": "mean"}})]
    output = tmp_path / "compare"
    outcome = mim("compare", "--recipe", name, *given, *evaluations, "--output", output)
    assert outcome.code == 0, outcome.err
    runs = [run for run in output.iterdir() if run.name.startswith("regime=")]
    assert len(runs) == len(meant)
    for run in runs:
        result = checkpoint.read_result(run)
        assert result["status"] == "finished" and 0 <= result["evaluations"]["knn"]["accuracy"] <= 1
