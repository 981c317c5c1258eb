"""``mim predict`` and ``mim embed``."""

from __future__ import annotations

import argparse

from mim.cli.options import Verb, add_device, at_least_one, say
from mim.core.errors import UserError

_PARTS = (
    "Images are read in parts of 512, each written as it ends: called again, it goes on. On\n"
    "several processes: accelerate launch -m mim ... Unreadable images are left out and named."
)


def _shared(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("images", metavar="IMAGES", help="a folder, at any depth, or one image")
    parser.add_argument("--output", required=True, metavar="FILE", help=output)
    parser.add_argument("--batch_size", type=at_least_one, default=64, help="images at once")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
    add_device(parser)


def _predict_options(parser: argparse.ArgumentParser) -> None:
    _shared(parser, "a .csv (finetune), a folder (segment), or a .json (detect)")
    parser.add_argument("--task", help="finetune, segment or detect, where RUN has several heads")
    parser.add_argument("--top", type=at_least_one, default=1, help="classes named for each image")


def _embed_options(parser: argparse.ArgumentParser) -> None:
    _shared(parser, "a .npy, with the files' names in a .txt beside it, or a .parquet")
    parser.add_argument("--per", default="image", help="image or patch: what gets a vector")
    parser.add_argument("--pool", default="mean", help="what stands for an image: mean, cls, both")
    parser.add_argument("--image_size", type=_size, help="SIDE or HEIGHTxWIDTH; by default RUN's")


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [at_least_one(part) for part in text.split("x")]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--image_size: {error}") from error
    if len(sides) > 2:
        raise UserError(f"--image_size: {text!r} is neither SIDE nor HEIGHTxWIDTH")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _run(options: argparse.Namespace) -> int:
    from mim import api

    given = {k: v for k, v in vars(options).items() if k not in ("command", "call")}
    say(f"{getattr(api, options.command.split()[1])(**given)}")
    return 0


PREDICT = Verb(
    "predict",
    "Write what a fine-tuned run predicts for a folder of images.",
    _predict_options,
    _run,
    "Write what a run predicts that mim evaluate finetune, segment or detect has given a head:\n"
    "classes and probabilities (.csv), label maps (a folder of PNG and classes.json), or boxes in\n"
    f"COCO's form (.json).\n\n{_PARTS}",
)
EMBED = Verb(
    "embed",
    "Write the features of a folder of images.",
    _embed_options,
    _run,
    f"Write the features of a folder of images, labelled or not.\n\n{_PARTS}",
)
