"""``mim debug``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mim.cli.options import Verb, VerbGroup, add_device, add_file, add_json, say, show


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, help="counted from 1, as in metrics.jsonl")
    add_device(parser)
    add_file(parser, "--output", "PNG; by default RUN/debug_STEP.png")
    add_json(parser, "write all figures")


def _run(options: argparse.Namespace) -> int:
    from mim.core.terminal import show_table
    from mim.evaluate.visualize import batch_figure, save_figure
    from mim.training.debug import debug_batch

    found = debug_batch(options.run, options.step, options.device)
    output = Path(options.output or Path(options.run) / f"debug_{found.step}.png")
    save_figure(batch_figure(found.original, found.masked, found.titles), output)

    def text() -> None:
        heads = ("what", "name", "shape", "not finite", "least", "greatest")
        show_table(heads, found.rows())
        for line in (*found.lines(), output):
            say(line)

    show(options, found.as_json(), text)
    return 0


BATCH = Verb(
    "debug batch",
    "Compute a step again, and say which tensor is not finite, and where first.",
    _options,
    _run,
    "Compute a training step again, in the weights before it: every tensor's values that are\n"
    "not finite, its least and its greatest, and a picture of images and masks. Without\n"
    "--step it is the newest step whose loss or gradient was not finite.",
)
VERB = VerbGroup("debug", "Look into a step of a run that was not finite.", [BATCH])
