"""``mim data``: inspect, stats, pack."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim.cli.options import (
    Verb,
    VerbGroup,
    add_config,
    add_file,
    add_json,
    at_least_one,
    config_kind,
    read_config,
    say,
    show,
    take_folder,
)
from mim.core.errors import UserError

if TYPE_CHECKING:
    from mim.core.config import Config


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    about = "number of images of each split to decode; by default all"
    parser.add_argument("--images", type=at_least_one, help=about)
    add_file(parser, "--output", "the sheet; by default inspect.png", "PNG")
    parser.set_defaults(output="inspect.png")
    add_json(parser, "write every number")


def _config_of(folder: str | None, words: list[str]) -> tuple[Config, str]:
    """The config of ``mim pretrain`` with these words, and why it has none for the folder."""
    from mim.api import complete
    from mim.core.config import Config
    from mim.training.settings import checked, read_args

    fill = functools.partial(complete, folder)
    try:
        return checked(read_args(Config, words, complete=fill)), ""
    except UserError as error:
        if folder is None:
            raise
        known = ["--data.path", folder, "--data.source", "auto"]
        return checked(read_args(Config, [*words, *known])), str(error)


def _run_inspect(options: argparse.Namespace) -> int:
    folder, words = take_folder(options.settings)
    words = [word for file in options.config or () for word in ("--config", file)] + words
    config, refusal = _config_of(folder, words)
    from dataclasses import asdict

    from mim.data.detection import FOLDERS, keep_outside
    from mim.training.inspection import inspect

    if config.data.source in FOLDERS:
        keep_outside("--output", Path(options.output), config.data.path)
    how: dict[str, Any] = {"images": options.images, "output": Path(options.output)}
    found = inspect(config, **how)
    if refusal and found.changes:  # settings are chosen by images that fit
        for name, value in found.changes.items():
            words += [f"--data.{name}", str(value)]
        config, refusal = _config_of(folder, words)
        found = inspect(config, **how)
    found.refusal = refusal or found.refusal
    found.command = shlex.join(["mim", "pretrain", *([folder] if folder else []), *words])

    def text() -> None:
        if not found.refusal:
            say(options.output)
        for line in found.lines():
            say(line)

    numbers: dict[str, Any] = {split: asdict(part) for split, part in found.splits.items()}
    for part in numbers.values():
        part["channels"] = sorted(part["channels"])
    others = {
        name: getattr(found, name)
        for name in ("seen", "problems", "duplicates", "refusal", "changes")
    }
    show(options, {**numbers, **others}, text)
    return 0


def _stats_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--images", type=at_least_one, help="number to read; by default all")
    add_file(parser, "--output", "also write them to this YAML file")


def _run_stats(options: argparse.Namespace) -> int:
    config = read_config(options, whole=False)
    import yaml

    from mim.core.files import write_text_atomic
    from mim.training.inspection import statistics

    mean, std = statistics(config.data, options.images)
    tree = {
        "channels": config.data.channels,
        "mean": [round(x, 4) for x in mean],
        "std": [round(x, 4) for x in std],
    }
    text = yaml.safe_dump({"data": tree}, default_flow_style=None, sort_keys=False)
    if options.output:
        write_text_atomic(Path(options.output), text)
    say(text.rstrip())
    return 0


def _pack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder (imagefolder), or a config file")
    parser.add_argument("output", metavar="OUT", help="the folder of the packed set")
    kinds = "pixels: decoded, memory-mapped; shards: the image files in tar files"
    parser.add_argument("--kind", default="pixels", help=kinds)
    parser.add_argument("--size", type=int, help="pixels: bring the shorter side down to it")
    square = "pixels: cut the longer side down to it too, about the centre"
    parser.add_argument("--square", action="store_true", help=square)
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")


def _run_pack(options: argparse.Namespace) -> int:
    from mim.core.config import DataConfig
    from mim.data.storage.pack import pack
    from mim.data.storage.packed import Recipe, read_manifest
    from mim.training.settings import load_config

    recipe = Recipe(kind=options.kind, size=options.size, square=options.square)
    config = DataConfig(source="imagefolder", path=options.source)
    if not Path(options.source).is_dir():
        config = load_config(options.source).data
    workers = (os.cpu_count() or 1) if options.workers is None else options.workers
    found = read_manifest(pack(config, options.output, recipe, workers).parent)
    for split, entry in found["splits"].items():
        size = sum(part["bytes"] for part in entry["parts"])
        bad = f", {len(entry['unreadable'])} of them unreadable" if entry["unreadable"] else ""
        say(f"{split}: {entry['images']} images{bad}, {size / 1e9:.2f} GB")
    say(f"--data.source packed --data.path {shlex.quote(options.output)}")
    return 0


INSPECT = Verb(
    "data inspect",
    "Count and draw what a config would train on.",
    _inspect_options,
    _run_inspect,
    "mim data inspect DIR: the doctor of a folder. Decode the images of both splits; print\n"
    "counts, sizes, modes, values, duplicates, and what cannot be read, with reasons; draw a\n"
    "sheet: an image, and its crop and mask in two epochs. The last line says whether mim\n"
    "pretrain would start. Settings may follow, such as --data.channels 1",
    config=config_kind,
)
STATS = Verb(
    "data stats",
    "Compute data.mean and data.std of the training images.",
    _stats_options,
    _run_stats,
    "Print data.mean and data.std of the training images, as YAML for a config. Settings may\n"
    "follow: --data.source imagefolder --data.path DIR",
    config=config_kind,
)
PACK = Verb(
    "data pack",
    "Write an image set as a few large files.",
    _pack_options,
    _run_pack,
    "Write an image set as a few large files, with labels, ids, class names and digests, for\n"
    "--data.source packed --data.path OUT. Called again after a kill it resumes; called\n"
    "again when it has ended it checks every byte.",
)
VERB = VerbGroup("data", "Look at data sets and prepare them.", [INSPECT, STATS, PACK])
