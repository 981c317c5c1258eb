"""Measures the project: ``python -m benchmarks NAME``, in a clone of it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gpu import check_gpu, format_check_gpu
from benchmarks.many import bench_index, bench_report, format_many
from benchmarks.ranks import check_scale, format_check
from benchmarks.roofline import Card, format_roofline, roofline, roofline_figure
from benchmarks.scale import Machine, bench_scale, format_scale
from benchmarks.whole import bench_whole, format_whole
from mim.compare.cost.step import append_table
from mim.core.config import Config
from mim.core.errors import UserError, choice_error
from mim.core.files import prepare_folder, write_json_atomic
from mim.training.settings import checked, read_args

_CONFIGURED = ("scale", "gpu", "roofline", "whole")  # they read a config, and settings above it


def _parser() -> argparse.ArgumentParser:
    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("--json", metavar="FILE", help="also write every figure to this file")
    files.add_argument("--append", metavar="FILE", help="add the table to this Markdown file")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)

    about = "Predict step time and memory on many GPUs. Settings stand above the config."
    scale = names.add_parser("scale", parents=[files], help=about, description=about)
    scale.add_argument("--config", required=True, help="a pre-training config")
    scale.add_argument("--gpus", default="1,8,64", help="how many, separated by commas")
    scale.add_argument("--images", type=int, help="on each GPU; by default data.batch_size")
    machine = "a rate or size of the machine: " + ", ".join(item.name for item in fields(Machine))
    scale.add_argument("--machine", nargs="+", default=[], metavar="KEY=VALUE", help=machine)
    check = "predict and measure this many processes here, each with data.batch_size images"
    scale.add_argument("--check", type=int, metavar="PROCESSES", help=check)
    scale.add_argument("--rounds", type=int, default=5, help="timed rounds of --check")

    about = "Compare a GPU with the CPU and count what waits. Settings stand above the config."
    gpu = names.add_parser("gpu", parents=[files], help=about, description=about)
    gpu.add_argument("--config", required=True, help="a pre-training config")
    gpu.add_argument("--steps", type=int, default=10, help="that are watched for waits")

    about = "Predict where a step on a GPU loses its time. Settings stand above the configs."
    roof = names.add_parser("roofline", parents=[files], help=about, description=about)
    roof.add_argument("--config", required=True, nargs="+", help="pre-training configs")
    roof.add_argument("--regimes", default="drop,zero,token", help="separated by commas")
    roof.add_argument("--tflops", type=float, default=Card.tflops, help="rate of matrix products")
    roof.add_argument("--terabytes", type=float, default=Card.terabytes, help="memory, a second")
    roof.add_argument("--figure", metavar="FILE", help="also draw the parts")

    about = "Time whole runs beside their bare steps, in turns. Settings stand above the config."
    whole = names.add_parser("whole", parents=[files], help=about, description=about)
    whole.add_argument("--config", required=True, help="a pre-training config")
    whole.add_argument("--rounds", type=int, default=3, help="pairs of a run and bare steps")
    whole.add_argument("--steps", type=int, default=50, help="bare steps of a round")

    about = "Time the report of a comparison of many runs, which are made up."
    report = names.add_parser("report", parents=[files], help=about, description=about)
    report.add_argument("--runs", default="100,1000,10000", help="how many, separated by commas")

    about = "Time listing, subsets, order and masks of many images, which are empty files."
    index = names.add_parser("index", parents=[files], help=about, description=about)
    counts = "50000,200000,1000000"
    index.add_argument("--images", default=counts, help="how many, separated by commas")
    return parser


def _run(options: argparse.Namespace, settings: Sequence[str]) -> tuple[dict[str, Any], str]:
    """All figures, and the table that shows them."""
    if options.name not in _CONFIGURED:
        if options.name == "report":
            figures = bench_report(_numbers(options.runs, "--runs"))
        else:
            figures = bench_index(_numbers(options.images, "--images"))
        return figures, format_many(figures)
    if options.name == "roofline":
        return _roofline(options, settings)
    config = checked(read_args(Config, ["--config", options.config, *settings]))
    if options.name == "gpu":
        figures = check_gpu(config, options.steps)
        return figures, format_check_gpu(figures)
    if options.name == "whole":
        figures = bench_whole(config, options.rounds, options.steps)
        return figures, format_whole(figures)
    gpus, machine = _numbers(options.gpus, "--gpus"), _machine(options.machine)
    if options.check is not None:
        figures = check_scale(config, options.check, options.rounds)
        return figures, format_check(figures)
    figures = bench_scale(config, machine, gpus, options.images)
    return figures, format_scale(figures)


def _roofline(options: argparse.Namespace, settings: Sequence[str]) -> tuple[dict[str, Any], str]:
    configs = {
        Path(path).stem: checked(read_args(Config, ["--config", path, *settings]))
        for path in options.config
    }
    card = Card(options.tflops, options.terabytes)
    figures = roofline(configs, options.regimes.split(","), card)
    if options.figure:
        roofline_figure(figures).savefig(options.figure, dpi=150)
    return figures, format_roofline(figures)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        reason = f"{text!r} is not a list of whole numbers separated by commas"
        raise UserError(f"{option}: {reason}") from error


def _machine(pairs: Sequence[str]) -> Machine:
    kinds = {item.name: int if item.name == "node" else float for item in fields(Machine)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in kinds:
            raise choice_error("--machine", key, kinds)
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise UserError(f"--machine: {pair!r} is not KEY=NUMBER") from error
    return Machine(**values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options, settings = parser.parse_known_args(args)
    if settings and options.name not in _CONFIGURED:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    try:
        for option in ("json", "append"):
            if getattr(options, option):
                prepare_folder(Path(getattr(options, option)).parent, f"--{option}")
        figures, table = _run(options, settings)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        write_json_atomic(Path(options.json), figures)
    if options.append:
        command = shlex.join(["python", "-m", "benchmarks", *args])
        append_table(Path(options.append), command, table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
