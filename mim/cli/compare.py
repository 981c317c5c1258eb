"""``mim compare``."""

from __future__ import annotations

import argparse
import functools
import shlex

from mim.cli.options import Verb, add_json, add_words, read_pairs, say, show, take_folder

DETAILS = (
    "mim compare DIR --output FOLDER compares the three regimes on the images in DIR, and tells "
    "what it chooses. Without DIR: "
    "Pre-train every combination of the axes from one base config (--base.KEY VALUE), evaluate "
    "each the same way, and write report.html, report.md and results.csv. Call it again to go "
    "on: finished runs are kept. --show live, plain or quiet says what is shown meanwhile (live "
    "is a table of all runs, and the default on a terminal); --json FILE also writes every "
    "run's state and numbers (- for stdout). --plan runs nothing and says what the comparison "
    "takes and what difference it can show. --jobs N computes N runs at once: they share the "
    "GPUs, or the cores, so that their speed tells little. --launcher submitit makes each run "
    "a job of SLURM, N in the queue at once; --slurm KEY=VALUE ... tells submitit what a job "
    "needs (timeout_min=600 slurm_partition=gpu gpus_per_node=1)."
)


def _options(parser: argparse.ArgumentParser) -> None:
    """The options beside those of the comparison's config."""
    parser.add_argument("--plan", action="store_true", help="what it takes and can show; no run")
    parser.add_argument("--show", default="auto", help="live, plain or quiet")
    add_json(parser, "write every run's state and numbers")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--launcher", default="local", help="local or submitit")
    add_words(parser, "--slurm", "what a job of submitit needs")


def _config_kind() -> type:
    from mim.compare.plan import CompareConfig

    return CompareConfig


def _run(options: argparse.Namespace) -> int:
    from mim.api import Launch, compare_runs, complete_comparison, read_compare_config

    data, words = take_folder(options.settings, "base.")
    fill = functools.partial(complete_comparison, data)
    launch = Launch(options.jobs, options.launcher, read_pairs(options.slurm, "--slurm"))
    config = read_compare_config(words, prog="mim compare", description=DETAILS, complete=fill)
    if options.plan:
        from mim.compare.rounds import forecast

        for line in forecast(config, options.jobs).lines():
            say(line)
        return 0
    command = "mim compare " + shlex.join(options.settings)
    report, failed = compare_runs(config, command, options.show, launch)
    from mim.core.terminal import show_table
    from mim.report import read_comparison, summary_line
    from mim.report.overview import as_json, closing_table

    comparison = read_comparison(report.parent)

    def text() -> None:
        if options.show != "quiet":
            show_table(*closing_table(comparison))
            say(summary_line(comparison))
        say(f"report: {report}")

    show(options, as_json(comparison, report), text)
    return 1 if failed else 0


VERB = Verb(
    "compare",
    "Pre-train and evaluate a grid of runs, everything else held equal; write the report.",
    _options,
    _run,
    config=_config_kind,
    helps=False,
)
