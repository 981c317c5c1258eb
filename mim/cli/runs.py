"""``mim runs`` and ``mim diff``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mim.cli.options import Verb, add_json, add_words, show


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="where to look")
    add_words(parser, "--where", "conditions")
    add_words(parser, "--show", "more columns", "KEY")
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    from mim.core.terminal import show_table
    from mim.report.runs import as_json, find_runs, listing

    root = Path(options.folder)
    found = find_runs(root, options.where)
    table = listing(found, root, options.show)
    show(options, [as_json(item) for item in found], lambda: show_table(*table))
    return 0


def _diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN", help="a run folder")
    parser.add_argument("second", metavar="RUN", help="another one")
    add_json(parser)


def _run_diff(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mim.core.terminal import show_table
    from mim.report.runs import diff_rows, diff_runs, read_run

    found = diff_runs(*(read_run(Path(path)) for path in (options.first, options.second)))
    heads = ("part", "key", "first", "second", "change")
    show(options, [asdict(item) for item in found], lambda: show_table(heads, diff_rows(found)))
    return 0


VERB = Verb(
    "runs",
    "List and filter the run folders below a folder.",
    _options,
    _run,
    "List run folders: their state, what they are and what they reached. In a pipe: lines\n"
    "with tabs. --where takes any setting or number: model.regime.name=zero\n"
    "'linear.accuracy>0.8' status=failed.",
)
DIFF = Verb(
    "diff",
    "What differs between two runs: settings, data, environment, results.",
    _diff_options,
    _run_diff,
    "What differs between two runs, and by how much.",
)
