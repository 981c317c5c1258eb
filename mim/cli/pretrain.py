"""``mim pretrain``."""

from __future__ import annotations

import argparse
import functools
import os

from mim.cli.options import Verb, config_kind, no_options, say, take_folder

DETAILS = (
    "Pre-train one model: mim pretrain DIR --output RUN. Everything goes into the run folder. With "
    "DIR, what is not set follows from the images and the machine, and each choice is told; "
    "without, settings have their defaults. --model NAME, --weights FILE and --device NAME are "
    "short for --model.backbone, --model.weights and --train.device. A run that has ended is "
    "extended by --resume auto and a higher --train.epochs."
)


def _run(options: argparse.Namespace) -> int:
    from mim.api import complete, next_steps, pretrain_from
    from mim.core.config import Config
    from mim.training.settings import checked, read_args

    data, words = take_folder(options.settings)
    fill = functools.partial(complete, data)
    config = checked(
        read_args(Config, words, prog="mim pretrain", description=DETAILS, complete=fill)
    )
    result = pretrain_from(config, alone=True)
    if int(os.environ.get("RANK", "0")) == 0:
        say(
            f"{config.output}: {result['steps']} steps, loss {result['train_loss']:.4f}, held-out "
            f"{result['val_loss']:.4f}, {result['images_per_second']:,.0f} images/s"
        )
        for line in next_steps(config):
            say(line)
    return 0


VERB = Verb(
    "pretrain",
    "Pre-train one model under one regime.",
    no_options,
    _run,
    config=config_kind,
    helps=False,
)
