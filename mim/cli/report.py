"""``mim report``."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from mim.cli.options import Verb, add_words, say


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the comparison folder")
    add_words(parser, "--columns", "one more table, of these alone", "MEASURE")
    parser.add_argument("--watch", action="store_true", help="serve a live page; writes nothing")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on: this machine's")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")


def _run(options: argparse.Namespace) -> int:
    from mim.report import report_server, write_report

    folder = Path(options.folder)
    if not options.watch:
        say(f"report: {write_report(folder, options.columns or ())}")
        return 0
    with report_server(folder, options.host, options.port, options.every) as server:
        address = f"http://{options.host}:{server.server_port}/"
        say(f"watching {options.folder} at {address} (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


VERB = Verb(
    "report",
    "Write a comparison's report again from what its folders hold.",
    _options,
    _run,
    "Write report.html, report.md, results.csv, tables/ and figures/ of a comparison; or,\n"
    "with --watch, serve the page and renew it as its runs train, until Ctrl-C.",
)
