"""``mim bench``: step, grow, data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mim.cli.options import (
    Verb,
    VerbGroup,
    add_config,
    add_file,
    add_json,
    add_list,
    config_kind,
    read_config,
    say,
    show,
)
from mim.core.errors import UserError, setting_error

REGIMES = ["drop", "zero", "token"]


def _add_shared(parser: argparse.ArgumentParser, rounds: int, of: str) -> None:
    """What all of them take."""
    add_config(parser, required=True)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds over {of}")
    add_json(parser, "write every figure")
    add_file(parser, "--append", "add the table to this Markdown file")


def _add_steps(parser: argparse.ArgumentParser, steps: int) -> None:
    """What those take that time training steps."""
    add_list(parser, "--regimes", f"by default {','.join(REGIMES)}")
    parser.add_argument("--steps", type=int, default=steps, help="steps of each in a round")


def _give(options: argparse.Namespace, figures: Mapping[str, Any], table: str) -> None:
    """Show the figures and the table where the options ask for them."""
    from mim.compare.cost import append_table

    if getattr(options, "append", None):
        append_table(Path(options.append), options.command, table)
    show(options, figures, lambda: say(table))


def _step_options(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, 5, "all regimes")
    _add_steps(parser, 2)
    peers = "hf, hf-eager, lightly, vit-pytorch, mae; NAME-compiled compiles"
    add_list(parser, "--peer", f"time these beside: {peers}")
    parser.add_argument("--mae-path", metavar="DIR", help="a checkout of facebookresearch/mae")
    varied = """named settings to time beside: '{"dense": {"model.regime.name": "zero", ...}}'"""
    parser.add_argument("--variants", metavar="JSON", default="{}", help=varied)
    # Nothing is timed beside the steps now; scripts of before may still say so.
    parser.add_argument("--no-products", action="store_true", help=argparse.SUPPRESS)


def _run_step(options: argparse.Namespace) -> int:
    from mim.compare.cost import bench_step, format_table

    figures = bench_step(
        read_config(options),
        REGIMES if options.regimes is None else options.regimes,
        options.rounds,
        options.steps,
        peers=options.peer or [],
        mae_path=None if options.mae_path is None else Path(options.mae_path),
        variants={
            name: read_config(options, *settings)
            for name, settings in _variants(options.variants).items()
        },
    )
    _give(options, figures, format_table(figures))
    return 0


def _variants(text: str) -> dict[str, list[str]]:
    """JSON of names and dotted settings -> the settings as arguments."""
    form = "must be a JSON mapping of names to mappings of dotted settings"
    try:
        variants = json.loads(text)
    except ValueError as error:
        raise setting_error("--variants", text, f"{form} ({error})") from error
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise setting_error("--variants", text, form)
    return {
        name: [f"--{key}={_argument(value)}" for key, value in settings.items()]
        for name, settings in variants.items()
    }


def _argument(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _grow_options(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, 3, "all steps")
    _add_steps(parser, 1)
    over = "the setting and its values: data.batch_size=16,32,64, or a JSON list behind the ="
    parser.add_argument("--over", required=True, metavar="KEY=VALUES", help=over)
    add_file(parser, "--figure", "draw time and memory", "PNG")


def _run_grow(options: argparse.Namespace) -> int:
    key, values = _setting_and_values(options.over)
    from mim.compare.cost import bench_growth, format_growth, growth_figure
    from mim.evaluate.visualize import save_figure
    from mim.report.charts import REGIME_COLOURS

    configs = {value: read_config(options, f"--{key}={value}") for value in values}
    regimes = REGIMES if options.regimes is None else options.regimes
    figures = bench_growth(key, configs, regimes, options.rounds, options.steps)
    if options.figure:
        save_figure(growth_figure(figures, REGIME_COLOURS), Path(options.figure))
    _give(options, figures, format_growth(figures))
    return 0


def _setting_and_values(text: str) -> tuple[str, list[str]]:
    """KEY=V1,V2 or KEY=[V1, V2] -> the key, and each value as an argument."""
    key, equals, rest = text.partition("=")
    if not (key and equals and rest):
        raise UserError(f"--over: {text!r} has not the form KEY=V1,V2,...")
    if not rest.startswith("["):
        return key, [value.strip() for value in rest.split(",")]
    try:
        values = json.loads(rest)
    except ValueError as error:
        raise UserError(f"--over: {rest!r} is not a JSON list ({error})") from error
    return key, [_argument(value) for value in values]


def _data_options(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, 5, "both pipelines")
    parser.add_argument("--images", type=int, default=512, help="images of a round")
    plain = "class folders of the plain pipeline; by default the config's image folder"
    parser.add_argument("--plain", metavar="DIR", help=plain)


def _run_data(options: argparse.Namespace) -> int:
    from mim.compare.cost.loader import bench_data, format_data_table

    config = read_config(options, prog="mim bench data")
    figures = bench_data(config, options.rounds, options.images, options.plain)
    _give(options, figures, format_data_table(figures))
    return 0


STEP = Verb(
    "bench step",
    "Time whole training steps of a config under each regime, beside other codebases.",
    _step_options,
    _run_step,
    "Time training steps: forward, backward, optimizer; medians.\n"
    "Settings such as --train.precision bf16 stand above the config.",
    config=config_kind,
)
GROW = Verb(
    "bench grow",
    "Time and weigh training steps over the values of one setting: a table and a figure.",
    _grow_options,
    _run_grow,
    "Time of a training step and its memory at the peak, over the values of any setting, for\n"
    "each regime; all interleaved, medians. Memory is what torch's tensors take: weights,\n"
    "moments and images, and what one step adds. Other settings stand above the config.",
    config=config_kind,
)
DATA = Verb(
    "bench data",
    "Time the loader of a config beside the same pipeline from torchvision, interleaved.",
    _data_options,
    _run_data,
    "Time the way of images to the device: each stage, the whole loader, and beside it the\n"
    "same pipeline built from torchvision's ImageFolder, RandomResizedCrop and DataLoader.\n"
    "Settings such as --data.path DIR stand above the config.",
    config=config_kind,
)
VERB = VerbGroup(
    "bench",
    "Time training steps, how they grow with a setting, and the loader.",
    [STEP, GROW, DATA],
    gone={
        name: f"is now 'python -m benchmarks {name}', called in a clone of the project"
        for name in ("scale", "report", "index")
    },
)
