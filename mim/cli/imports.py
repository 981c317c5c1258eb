"""``mim import``."""

from __future__ import annotations

import argparse

from mim.cli.options import Verb, config_kind, say


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="safetensors, torch file, or HF folder")
    parser.add_argument("--output", required=True, metavar="RUN", help="the run folder to make")
    parser.add_argument("--backbone", help="timm's name of the encoder; by default by its sizes")
    parser.add_argument("--from", dest="style", help="key style: timm, hf, simmim or mim")
    parser.add_argument(
        "--part", choices=("model", "encoder"), default="model", help="encoder: without decoder"
    )
    parser.add_argument("--key", help="name under which a torch file holds the weights")
    parser.add_argument("--config", metavar="FILE", help="settings above what the file says")


def _run(options: argparse.Namespace) -> int:
    from mim.interop import dotted_arguments, import_run

    imported = import_run(
        options.file,
        options.output,
        dotted_arguments(options.settings),
        backbone=options.backbone,
        style=options.style,
        part=options.part,
        key=options.key,
        config=options.config,
    )
    for line in imported.account.lines():
        say(line)
    say(f"{options.output}: {imported.config.model.backbone}")
    return 0


VERB = Verb(
    "import",
    "Make a run folder from weights of MAE, timm, DeiT, DINOv2, SimMIM, Hugging Face.",
    _options,
    _run,
    "Make a run folder, which every verb takes, from a file of weights. Its layout is seen\n"
    "from its keys; each key is loaded, adapted, or named as left out. Settings such as\n"
    "--data.source imagefolder --data.path DIR --data.image_size 96 stand above what the file\n"
    "says. No code in a file is ever run.",
    config=config_kind,
)
