"""``mim doctor``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mim.cli.options import Verb, add_json, show


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="whose images and precision are tried")
    parser.add_argument("--output", default="runs", metavar="DIR", help="where runs shall go")
    parser.add_argument("--quick", action="store_true", help="time nothing")
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    from mim.core.terminal import show_table
    from mim.training.doctor import as_rows, examine
    from mim.training.settings import load_config

    checks = examine(load_config(options.config), Path(options.output), options.quick)
    rows = [[check.name, check.state, check.found, check.advice] for check in checks]
    heads = ("what", "state", "found", "what to set")
    show(options, as_rows(checks), lambda: show_table(heads, rows))
    return 1 if any(check.state == "problem" for check in checks) else 0


VERB = Verb(
    "doctor",
    "Check versions, devices, precision, loader speed and disk, and say what to set.",
    _options,
    _run,
    "Look at this machine and say what to set. Exit code 1 where something cannot work.",
)
