"""``mim recipes``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mim.cli.options import Verb, say

if TYPE_CHECKING:
    from mim.core.config import Config

DETAILS = (
    "List the recipes: published methods, each as one file.\n\n"
    "mim pretrain --recipe NAME --data.path DIR trains one, mim evaluate finetune RUN\n"
    "--recipe NAME measures it as its paper does, and mim compare --recipe NAME takes it as\n"
    "the base. Settings that follow override the recipe's. The header of its file has the\n"
    "paper, the hardware and the results: mim recipes NAME."
)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print this recipe's file")
    parser.add_argument("--table", action="store_true", help="the parts of each, as in the docs")


def _run(options: argparse.Namespace) -> int:
    from mim.core.recipes import headline, recipe_file, recipe_files

    if options.name:
        say(recipe_file(options.name).read_text(encoding="utf-8").rstrip())
    elif options.table:
        for line in table():
            say(line)
    else:
        files = recipe_files()
        width = max(map(len, files))
        for name, path in files.items():
            say(f"{name:<{width}}  {headline(path)}")
    return 0


def table() -> list[str]:
    """The lines of a Markdown table of all recipes by their parts."""
    from mim.core.config import Config
    from mim.core.recipes import recipe_files
    from mim.model.targets import TARGETS
    from mim.training.settings import read_tree

    columns = ["recipe", "mask", "regime", "predictor", "target", "loss", "schedule"]
    rows = [columns, ["---"] * len(columns)]
    for name, path in recipe_files().items():
        config = read_tree(Config, [path])
        target = config.model.target
        own = TARGETS.get(target.name).own_loss
        loss = own if target.loss == "auto" else target.loss
        rows.append([f"`{name}`", *_parts(config, loss)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _parts(config: Config, loss: str) -> list[str]:
    mask, model, optim = config.mask, config.model, config.optim
    ratio = " to ".join(f"{ratio:g}" for ratio in dict.fromkeys(mask.ratio_range))
    length = f"{config.train.epochs} epochs of {config.data.batch_size}"
    rate = f"{optim.base_lr:g}, {optim.schedule.shape}"
    return [
        f"{mask.name}, {ratio}",
        model.regime.name,
        model.decoder.name,
        model.target.name,
        loss,
        f"{length}, rate {rate}",
    ]


ABOUT = "List the published methods that can be trained by name."
VERB = Verb("recipes", ABOUT, _options, _run, DETAILS)
