"""``mim pretrain``."""

from __future__ import annotations

import argparse
import os

from mim.cli.options import Verb, config_kind, no_options, say

DETAILS = "Pre-train one model. Everything goes into the run folder (--output)."


def _run(options: argparse.Namespace) -> int:
    from mim.core.config import Config
    from mim.training.settings import checked, read_args

    config = checked(read_args(Config, options.settings, prog="mim pretrain", description=DETAILS))
    from mim.training.pretrain import pretrain

    result = pretrain(config)
    if int(os.environ.get("RANK", "0")) == 0:
        say(
            f"{config.output}: {result['steps']} steps, loss {result['train_loss']:.4f}, held-out "
            f"{result['val_loss']:.4f}, {result['images_per_second']:,.0f} images/s"
        )
    return 0


VERB = Verb(
    "pretrain",
    "Pre-train one model under one regime.",
    no_options,
    _run,
    config=config_kind,
    helps=False,
)
