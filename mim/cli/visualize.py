"""``mim visualize``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mim.cli.options import (
    Verb,
    add_file,
    add_json,
    add_list,
    at_least_one,
    prepare_file,
    say,
    show,
)
from mim.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mim.core.config import Config

# Which options each picture has.
_PICTURES = {
    "masks": ("images", "generators", "ratios", "json"),
    "reconstruct": ("images", "indices", "generators", "ratios"),
    "attention": ("images", "indices"),
    "algebra": (),
}


def _options(parser: argparse.ArgumentParser) -> None:
    explained = "what to draw; algebra: the attention masks, as matrices"
    parser.add_argument("what", choices=tuple(_PICTURES), help=explained)
    either = "a run folder, or for masks and algebra a config file"
    parser.add_argument("run", metavar="RUN", help=either)
    many = "how many images (masks: at each ratio)"
    parser.add_argument("--images", type=at_least_one, help=many)
    add_list(parser, "--indices", "which held-out images instead: 3,17,40", int)
    add_list(parser, "--generators", "mask generators (masks: by default all)")
    add_list(parser, "--ratios", "mask ratios: 0.5,0.75,0.9", float)
    add_json(parser, "masks: write the statistics")
    add_file(parser, "--output", "PNG; by default in the run folder or beside the config")


def _run(options: argparse.Namespace) -> int:
    for name in ("images", "indices", "generators", "ratios", "json"):
        if getattr(options, name) is not None and name not in _PICTURES[options.what]:
            able = ", ".join(what for what, names in _PICTURES.items() if name in names)
            reason = f"has no meaning for visualize {options.what}, but for {able}"
            raise UserError(f"--{name}: {reason}")
    from mim.evaluate import visualize
    from mim.training.checkpoint import read_config
    from mim.training.settings import load_config

    path = Path(options.run)
    config = load_config(path) if path.is_file() else read_config(path)
    if options.what not in ("masks", "algebra") and not path.is_dir():
        raise UserError(f"visualize {options.what}: {str(path)!r} is not a run folder")
    folder = path.parent if path.is_file() else path
    output = Path(options.output or folder / f"{options.what}.png")
    prepare_file(output, "--output")
    if options.what == "masks":
        figure = _masks(config, path, options)
    elif options.what == "reconstruct":
        chosen = (options.indices, options.generators, options.ratios)
        figure = visualize.reconstruction_figure(path, options.images or 4, *chosen)
    elif options.what == "attention":
        figure = visualize.attention_figure(path, options.images or 4, options.indices)
    else:
        figure = visualize.algebra_figure(config)
    visualize.save_figure(figure, output)
    if options.json != "-":
        say(output)
    return 0


def _masks(config: Config, path: Path, options: argparse.Namespace) -> Figure:
    from mim.evaluate.visualize import RATIOS, draw_masks, mask_figure
    from mim.training.loading import load

    model = load(path) if path.is_dir() else None
    drawn = draw_masks(config, options.generators, options.ratios or RATIOS, model=model)
    refused = [item for item in drawn if item.refusal]
    if len(refused) == len(drawn):
        raise UserError(f"visualize masks: no generator fits; {refused[0].refusal}")

    def text() -> None:
        for item in refused:
            say(f"{item.generator} {item.ratio:g}: {item.refusal}")

    show(options, {"masks": [item.as_row() for item in drawn]}, text)
    return mask_figure(config, images=options.images or 2, drawn=drawn)


VERB = Verb(
    "visualize",
    "Draw masks over real images, reconstructions, or attention.",
    _options,
    _run,
    "Draw pictures (PNG).",
)
