"""The command line: ``mim VERB --config FILE --dotted.key value``.

Exit codes: 0 done; 1 training failed (a loss that is not finite, a run of a comparison); 2 a
mistake in what was asked, in one line; 75 another process was lost, call it again (pretrain: with
--resume auto); 130, 138 and 143 interrupted by SIGINT, SIGUSR1 and SIGTERM, with everything saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim import __version__
from mim.cli.parsing import VerbParser
from mim.core.cpu.threads import choose_waiting
from mim.core.errors import UserError
from mim.core.signals import between_imports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mim.compare.cost import Machine
    from mim.core.config import Config

if (
    "RANK" in os.environ
):  # torch would show C++ stacks of connections that break; mim names the cause
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Large tensors in pages of 2 MB: the first touch of each small page costs more than a write to it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

Verb = Callable[[list[str]], int]


def _say(text: object) -> None:
    print(text, flush=True)


def _pretrain(args: list[str]) -> int:
    """Pre-train one model under one regime."""
    from mim.core.config import Config
    from mim.training.settings import checked, read_args

    about = "Pre-train one model. Everything goes into the run folder (--output)."
    config = checked(read_args(Config, args, prog="mim pretrain", description=about))
    from mim.training.pretrain import pretrain

    result = pretrain(config)
    if int(os.environ.get("RANK", "0")) == 0:
        _say(
            f"{config.output}: {result['steps']} steps, loss {result['train_loss']:.4f}, held-out "
            f"{result['val_loss']:.4f}, {result['images_per_second']:,.0f} images/s"
        )
    return 0


def _parser(verb: str, about: str) -> VerbParser:
    form = argparse.RawDescriptionHelpFormatter
    return VerbParser(prog=f"mim {verb}", description=about, formatter_class=form)


def _settings(pairs: Sequence[str], option: str = "--set") -> dict[str, object]:
    import yaml

    from mim.core.files import parse_yaml

    settings: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{option} {pair!r} has not the form key=value")
        try:
            settings[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{option}: {pair!r} cannot be read: {reason}") from error
    return settings


def _settings_file(path: str) -> dict[str, dict[str, object]]:
    """Evaluation -> settings."""
    import yaml

    from mim.core.files import parse_yaml

    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--settings: {path!r} cannot be read: {reason}") from error
    blocks = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(block, dict) for block in blocks):
        raise UserError(f"--settings: {path!r} does not map evaluations to their settings")
    return content


def _evaluate(args: list[str]) -> int:
    """Measure encoders: probes, fine-tuning, ..., on runs, timm models or untrained ones."""
    about = (
        "Measure encoders on full images; hyper-parameters come from a split of train.\n\n"
        "knn          weighted nearest neighbours (DINO)\n"
        "linear       logistic regression at its optimum, L2 strength chosen\n"
        "linear_grid  many learning rates and weight decays at once (DINOv2, CAPI)\n"
        "linear_mae   batch norm, LARS, augmentation, 90 epochs (MAE)\n"
        "attentive    one cross-attention with a learned query (AIM, CAPI)\n"
        "finetune     all of the encoder with a head, by MAE's recipe; finetune.safetensors\n"
        "robustness   errors on corrupted images (ImageNet-C's kinds), accuracy on A, R, Sketch\n"
        "segment      semantic segmentation of images of its own (--set path=DIR); pictures\n"
        "detect       detection, likewise\n"
        "analysis     each layer's probe, reach of attention, effective rank; figures\n\n"
        "What trains goes on where it was interrupted when the same is called again on a folder,\n"
        "and takes several processes: accelerate launch -m mim evaluate ...; when one is lost,\n"
        "the others say which and end with exit code 75.\n\n"
        "RUN is a run folder (numbers are added to its result.json), or, with --like RUN for the\n"
        "images: untrained, pixels, or TIMM_NAME@CHECKPOINT_FILE."
    )
    parser = _parser("evaluate", about)
    parser.add_argument("evaluation", help="one of these, or several, by commas")
    parser.add_argument("run", nargs="+", metavar="RUN", help="what to measure")
    parser.add_argument("--like", metavar="RUN", help="run folder whose images and sizes are used")
    parser.add_argument("--config", metavar="FILE", help="config whose images and sizes are used")
    parser.add_argument("--settings", metavar="FILE", help="YAML: evaluation to its settings")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings")
    parser.add_argument("--device", help="cpu or cuda; by default what there is")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16, of the encoder")
    lost = "of several processes: seconds after which one that others wait for is lost; 600"
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help=lost)
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to this file")
    own = "Python files or modules that register evaluations or components of your own"
    parser.add_argument("--plugins", nargs="+", default=[], metavar="FILE", help=own)
    options = parser.parse_args(args)
    if options.timeout is not None and not 0 < options.timeout < math.inf:
        raise UserError(f"--timeout: {options.timeout:g} must be above 0 and finite")
    names = options.evaluation.split(",")
    from mim.training import checkpoint

    if options.json:
        checkpoint.prepare_folder(Path(options.json).parent, "--json")
    from mim.core.plugins import import_plugin
    from mim.evaluate import (
        EVALUATIONS,
        TIMEOUT,
        evaluate,
        evaluate_run,
        open_encoder,
        several,
    )
    from mim.training.settings import load_config

    for plugin in options.plugins:
        import_plugin(plugin)
    for spec in [*options.run, *([options.like] if options.like else [])]:
        if (Path(spec) / "config.yaml").is_file():
            checkpoint.read_config(spec)  # its plug-ins may bring the evaluation
    for name in names:
        EVALUATIONS.get(name)
    given = _settings_file(options.settings) if options.settings else {}
    for name in given:
        if name not in names:
            raise UserError(f"--settings: {name!r} has settings, but only {', '.join(names)} run")
    settings = {name: {**given.get(name, {}), **_settings(options.set)} for name in names}
    config = load_config(options.config) if options.config else None
    if options.like:
        config = checkpoint.read_config(options.like)
    import torch

    from mim.training.runtime.machine import pick_device

    device = pick_device(options.device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # each process its own GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    main = int(os.environ.get("RANK", "0")) == 0
    everything = {}
    with several(device, TIMEOUT if options.timeout is None else options.timeout):
        for spec in options.run:
            how = {"device": device, "precision": options.precision}
            if Path(spec).is_dir():
                numbers = evaluate_run(Path(spec), names, settings, **how)
            else:
                numbers = evaluate(open_encoder(spec, config), settings, **how)
            everything[spec] = numbers
            if not main:
                continue
            for name, values in numbers.items():
                # A number for each of 70 corruptions and severities stands in result.json.
                few = {key: value for key, value in values.items() if "_severity_" not in key}
                shown = "  ".join(f"{key} {value:.4g}" for key, value in few.items())
                _say(f"{spec}  {name}  {shown}")
        if options.json and main:
            checkpoint.write_json_atomic(Path(options.json), everything)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _compare(args: list[str]) -> int:
    """Pre-train and evaluate a grid of runs, everything else held equal; write the report."""
    about = (
        "Pre-train every combination of the axes from one base config (--base.KEY VALUE), evaluate "
        "each the same way, and write report.html, report.md and results.csv. Call it again to go "
        "on: finished runs are kept. --show live, plain or quiet says what is told meanwhile (live "
        "is a table of all runs, and the default on a terminal); --json FILE also writes every "
        "run's state and numbers (- for stdout). --jobs N computes N runs at once: they share the "
        "GPUs, or the cores, so that their speed tells little. --launcher submitit makes each run "
        "a job of SLURM, N in the queue at once; --slurm KEY=VALUE ... tells submitit what a job "
        "needs (timeout_min=600 slurm_partition=gpu gpus_per_node=1)."
    )
    flags = VerbParser(prog="mim compare", add_help=False, allow_abbrev=False)
    flags.add_argument("--show", default="auto")
    flags.add_argument("--json")
    flags.add_argument("--jobs", type=int, default=1)
    flags.add_argument("--launcher", default="local")
    flags.add_argument("--slurm", nargs="+", default=[])
    options, rest = flags.parse_known_args(args)
    if options.json not in (None, "-"):
        _prepare_file(Path(options.json), "--json")
    from mim.compare.runner import Launch, compare, read_compare_config

    launch = Launch(options.jobs, options.launcher, _settings(options.slurm, "--slurm"))
    config = read_compare_config(rest, prog="mim compare", description=about)
    command = "mim compare " + shlex.join(rest)
    report = compare(config, command=command, show=options.show, launch=launch)
    from mim.core.terminal import show_table
    from mim.report import read_comparison, summary_line
    from mim.report.overview import as_json, closing_table

    comparison = read_comparison(report.parent)
    _give_json(options.json, as_json(comparison, report))
    if options.json != "-":
        if options.show != "quiet":
            show_table(*closing_table(comparison))
            _say(summary_line(comparison))
        _say(f"report: {report}")
    return 1 if any(run.status == "failed" for run in comparison.runs) else 0


def _give_json(place: str | None, value: Any) -> None:
    """``--json FILE``; - is stdout."""
    from mim.core.terminal import show_json
    from mim.training.checkpoint import write_json_atomic

    if place == "-":
        show_json(value)
    elif place is not None:
        write_json_atomic(Path(place), value)


def _report(args: list[str]) -> int:
    """Write a comparison's report again from what its folders hold."""
    about = (
        "Write report.html, report.md, results.csv, tables/ and figures/ of a comparison; or,\n"
        "with --watch, serve the page and renew it as its runs train, until Ctrl-C."
    )
    parser = _parser("report", about)
    parser.add_argument("folder", metavar="DIR", help="the comparison folder")
    parser.add_argument("--watch", action="store_true", help="serve a live page; writes nothing")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on: this machine's")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    options = parser.parse_args(args)
    from mim.report import report_server, write_report

    if not options.watch:
        _say(f"report: {write_report(Path(options.folder))}")
        return 0
    with report_server(Path(options.folder), options.host, options.port, options.every) as server:
        address = f"http://{options.host}:{server.server_port}/"
        _say(f"watching {options.folder} at {address} (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _list(text: str | None, kind: Callable[[str], Any], option: str) -> list[Any] | None:
    """Values separated by commas."""
    if text is None:
        return None
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option}: {text!r} is no list of {what} separated by commas") from error


def _visualize(args: list[str]) -> int:
    """Draw masks over real images, reconstructions, or attention."""
    parser = _parser("visualize", "Draw pictures (PNG).")
    what = ("masks", "reconstruct", "attention", "algebra")
    explained = "what to draw; algebra: the attention masks, as matrices"
    parser.add_argument("what", choices=what, help=explained)
    either = "a run folder, or for masks and algebra a config file"
    parser.add_argument("run", metavar="RUN", help=either)
    parser.add_argument("--images", type=int, help="how many images (masks: at each ratio)")
    parser.add_argument("--indices", help="which held-out images instead: 3,17,40")
    parser.add_argument("--generators", help="mask generators: random,block (masks: default all)")
    parser.add_argument("--ratios", help="mask ratios: 0.5,0.75,0.9")
    parser.add_argument("--json", metavar="FILE", help="masks: also write the statistics")
    parser.add_argument(
        "--output", help="PNG file; by default in the run folder or beside the config"
    )
    options = parser.parse_args(args)
    if options.images is not None and options.images < 1:
        raise UserError(f"--images: {options.images} must be at least 1")
    _refuse_unused(options)
    generators = _list(options.generators, str, "--generators")
    ratios = _list(options.ratios, float, "--ratios")
    indices = _list(options.indices, int, "--indices")
    from mim.evaluate.visualize import (
        algebra_figure,
        attention_figure,
        reconstruction_figure,
        save_figure,
    )
    from mim.training import checkpoint
    from mim.training.settings import load_config

    place = Path(options.run)
    config = load_config(place) if place.is_file() else checkpoint.read_config(place)
    folder = place.parent if place.is_file() else place
    if options.what not in ("masks", "algebra") and not place.is_dir():
        raise UserError(f"visualize {options.what}: {str(place)!r} is not a run folder")
    output = Path(options.output) if options.output else folder / f"{options.what}.png"
    _prepare_file(output, "--output")
    if options.json:
        _prepare_file(Path(options.json), "--json")
    if options.what == "masks":
        figure = _mask_figure(config, place, generators, ratios, options)
    elif options.what == "reconstruct":
        figure = reconstruction_figure(place, options.images or 4, indices, generators, ratios)
    elif options.what == "attention":
        figure = attention_figure(place, options.images or 4, indices)
    else:
        figure = algebra_figure(config)
    save_figure(figure, output)
    _say(output)
    return 0


# Which options each picture has.
_PICTURES = {
    "masks": ("images", "generators", "ratios", "json"),
    "reconstruct": ("images", "indices", "generators", "ratios"),
    "attention": ("images", "indices"),
    "algebra": (),
}


def _refuse_unused(options: argparse.Namespace) -> None:
    for name in ("images", "indices", "generators", "ratios", "json"):
        if getattr(options, name) is not None and name not in _PICTURES[options.what]:
            able = ", ".join(what for what, names in _PICTURES.items() if name in names)
            raise UserError(
                f"--{name}: has no meaning for visualize {options.what}, but for {able}"
            )


def _prepare_file(path: Path, option: str) -> None:
    """Refuse, before the work, a place where no file can be written."""
    from mim.training.checkpoint import prepare_folder

    prepare_folder(path.parent, option)
    if path.is_dir():
        raise UserError(f"{option}: {str(path)!r} is a folder, not a file")


def _mask_figure(
    config: Config,
    place: Path,
    generators: list[str] | None,
    ratios: list[float] | None,
    options: argparse.Namespace,
) -> Figure:
    from mim.evaluate.visualize import RATIOS, draw_masks, mask_figure
    from mim.training.checkpoint import write_json_atomic
    from mim.training.loading import load

    model = load(place) if place.is_dir() else None
    drawn = draw_masks(config, generators, ratios or RATIOS, model=model)
    rows = []
    for item in drawn:
        row: dict[str, Any] = {"generator": item.generator, "ratio": item.ratio}
        if item.statistics is None:
            _say(f"{item.generator} {item.ratio:g}: {item.refusal}")
            rows.append(row | {"refused": item.refusal})
            continue
        numbers = dict(item.statistics)
        numbers["hidden_share"] = item.statistics["hidden_share"].tolist()
        rows.append(row | numbers)
    if all("refused" in row for row in rows):
        raise UserError(f"visualize masks: no generator fits; {rows[0]['refused']}")
    if options.json:
        write_json_atomic(Path(options.json), {"masks": rows})
    return mask_figure(config, images=options.images or 2, drawn=drawn)


def _bench(args: list[str]) -> int:
    """Time training steps, how they grow and scale, the loader, many runs and images."""
    lines = [f"{name:<10} {(verb.__doc__ or '').strip()}" for name, verb in _BENCH.items()]
    parser = _parser("bench", "\n".join(["Time a config; each verb has its own --help.", *lines]))
    parser.add_argument("what", choices=sorted(_BENCH), help="what to time")
    options = parser.parse_args(args[:1])
    return _BENCH[options.what](args[1:])


def _bench_step(args: list[str]) -> int:
    """Time whole training steps of a config under each regime, beside other codebases."""
    about = (
        "Time training steps: forward, backward, optimizer; medians.\n"
        "Settings such as --train.precision bf16 stand above the config."
    )
    parser = _parser("bench step", about)
    parser.add_argument("--config", required=True, help="a pre-training config")
    parser.add_argument("--regimes", default="drop,zero,token", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds over all regimes")
    parser.add_argument("--steps", type=int, default=2, help="steps of a regime in a round")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to this file")
    peers = "hf, hf-eager, lightly, vit-pytorch, mae; separated by commas; NAME-compiled compiles"
    parser.add_argument("--peer", default="", help=f"time these beside: {peers}")
    parser.add_argument("--mae-path", metavar="DIR", help="a checkout of facebookresearch/mae")
    varied = """named settings to time beside: '{"dense": {"model.regime.name": "zero", ...}}'"""
    parser.add_argument("--variants", metavar="JSON", default="{}", help=varied)
    alone = "do not time the steps' matrix products alone, too: half the time"
    parser.add_argument("--no-products", action="store_true", help=alone)
    parser.add_argument("--append", metavar="FILE", help="add the table to this Markdown file")
    options, rest = parser.parse_known_args(args)
    from mim.compare.cost import append_table, bench_step, format_table
    from mim.training.checkpoint import prepare_folder, write_json_atomic

    if options.json:
        prepare_folder(Path(options.json).parent, "--json")
    config = _read_config(options.config, rest)
    figures = bench_step(
        config,
        [name for name in options.regimes.split(",") if name],
        options.rounds,
        options.steps,
        products=not options.no_products,
        peers=[name for name in options.peer.split(",") if name],
        mae_path=None if options.mae_path is None else Path(options.mae_path),
        variants={
            name: _read_config(options.config, [*rest, *settings])
            for name, settings in _variants(options.variants).items()
        },
    )
    if options.json:
        write_json_atomic(Path(options.json), figures)
    if options.append:
        command = shlex.join(["mim", "bench", "step", *args])
        append_table(Path(options.append), command, format_table(figures))
    _say(format_table(figures))
    return 0


def _bench_grow(args: list[str]) -> int:
    """Time and weigh training steps over the values of one setting: a table and a figure."""
    about = (
        "Time of a training step and its memory at the peak, over the values of any setting, for\n"
        "each regime; all interleaved, medians. Memory is what torch's tensors take: weights,\n"
        "moments and images, and what one step adds. Other settings stand above the config."
    )
    parser = _parser("bench grow", about)
    parser.add_argument("--config", required=True, help="a pre-training config")
    over = "the setting and its values: data.batch_size=16,32,64, or a JSON list behind the ="
    parser.add_argument("--over", required=True, metavar="KEY=VALUES", help=over)
    parser.add_argument("--regimes", default="drop,zero,token", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds over all steps")
    parser.add_argument("--steps", type=int, default=1, help="steps of each in a round")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to this file")
    parser.add_argument("--append", metavar="FILE", help="add the tables to this Markdown file")
    parser.add_argument("--figure", metavar="PNG", help="draw time and memory")
    options, rest = parser.parse_known_args(args)
    for option in ("json", "append", "figure"):
        if getattr(options, option):
            _prepare_file(Path(getattr(options, option)), f"--{option}")
    key, values = _setting_and_values(options.over)
    from mim.compare.cost import append_table, bench_growth, format_growth, growth_figure
    from mim.evaluate.visualize import save_figure
    from mim.training.checkpoint import write_json_atomic

    configs = {value: _read_config(options.config, [*rest, f"--{key}={value}"]) for value in values}
    regimes = options.regimes.split(",")
    figures = bench_growth(key, configs, regimes, options.rounds, options.steps)
    if options.json:
        write_json_atomic(Path(options.json), figures)
    if options.append:
        command = shlex.join(["mim", "bench", "grow", *args])
        append_table(Path(options.append), command, format_growth(figures))
    if options.figure:
        save_figure(growth_figure(figures), Path(options.figure))
    _say(format_growth(figures))
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


def _variants(text: str) -> dict[str, list[str]]:
    """JSON of names and dotted settings -> the settings as arguments."""
    from mim.core.errors import setting_error

    wanted = "must be a JSON mapping of names to mappings of dotted settings"
    try:
        told = json.loads(text)
    except ValueError as error:
        raise setting_error("--variants", text, f"{wanted} ({error})") from error
    if not isinstance(told, dict) or not all(isinstance(each, dict) for each in told.values()):
        raise setting_error("--variants", text, wanted)
    return {
        name: [f"--{key}={_argument(value)}" for key, value in settings.items()]
        for name, settings in told.items()
    }


def _argument(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bench_data(args: list[str]) -> int:
    """Time the loader of a config beside the same pipeline from torchvision, interleaved."""
    about = (
        "Time the way of images to the device: each stage, the whole loader, and beside it the\n"
        "same pipeline built from torchvision's ImageFolder, RandomResizedCrop and DataLoader.\n"
        "Settings such as --data.path DIR stand above the config."
    )
    parser = _parser("bench data", about)
    parser.add_argument("--config", required=True, help="a pre-training config")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds over both pipelines")
    parser.add_argument("--images", type=int, default=512, help="images of a round")
    plain = "class folders of the plain pipeline; by default the config's image folder"
    parser.add_argument("--plain", metavar="DIR", help=plain)
    parser.add_argument("--json", metavar="FILE", help="also write every figure to this file")
    options, rest = parser.parse_known_args(args)
    from mim.compare.cost.loader import bench_data, format_data_table
    from mim.core.config import Config
    from mim.training.checkpoint import prepare_folder, write_json_atomic
    from mim.training.settings import checked, read_args

    if options.json:
        prepare_folder(Path(options.json).parent, "--json")
    arguments = ["--config", options.config, *rest]
    config = checked(read_args(Config, arguments, prog="mim bench data"))
    figures = bench_data(config, options.rounds, options.images, options.plain)
    if options.json:
        write_json_atomic(Path(options.json), figures)
    _say(format_data_table(figures))
    return 0


def _bench_scale(args: list[str]) -> int:
    """Predict step time and memory on many GPUs from what is counted of the model."""
    about = (
        "Predict for numbers of GPUs the time and memory of a step with DDP and with FSDP2, from\n"
        "the model's operations, weights and activations, which are counted, and the machine's\n"
        "rates, which are given. With --check, predict the step of processes on\n"
        "this machine's CPU, and measure it too. Settings stand above the config."
    )
    parser = _parser("bench scale", about)
    parser.add_argument("--config", required=True, help="a pre-training config")
    parser.add_argument("--gpus", default="1,8,64", help="how many, separated by commas")
    each = "images on each GPU at once; by default data.batch_size"
    parser.add_argument("--images", type=int, help=each)
    told = "a rate or size of the machine: matrix_rate, utilisation, memory, memory_rate, node, "
    told += "node_rate, network_rate, link_share, latency"
    parser.add_argument("--machine", nargs="+", default=[], metavar="KEY=VALUE", help=told)
    check = "measure this many processes here instead; data.batch_size is what each takes"
    parser.add_argument("--check", type=int, metavar="PROCESSES", help=check)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of --check")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to this file")
    parser.add_argument("--append", metavar="FILE", help="add the table to this Markdown file")
    options, rest = parser.parse_known_args(args)
    for option in ("json", "append"):
        if getattr(options, option):
            _prepare_file(Path(getattr(options, option)), f"--{option}")
    gpus = _list(options.gpus, int, "--gpus") or []
    config = _read_config(options.config, rest)
    from mim.compare.cost import append_table, bench_scale, check_scale, format_check, format_scale
    from mim.training.checkpoint import write_json_atomic

    if options.check is None:
        figures = bench_scale(config, _machine(options.machine), gpus, options.images)
        table = format_scale(figures)
    else:
        figures = check_scale(config, options.check, options.rounds)
        table = format_check(figures)
    if options.json:
        write_json_atomic(Path(options.json), figures)
    if options.append:
        append_table(Path(options.append), shlex.join(["mim", "bench", "scale", *args]), table)
    _say(table)
    return 0


def _machine(pairs: list[str]) -> Machine:
    from dataclasses import fields

    from mim.compare.cost import Machine
    from mim.core.errors import choice_error

    kinds = {item.name: int if item.name == "node" else float for item in fields(Machine)}
    values: dict[str, Any] = {}
    for key, value in _settings(pairs, "--machine").items():
        if key not in kinds:
            raise choice_error("--machine", key, kinds)
        try:
            values[key] = kinds[key](str(value))
        except ValueError as error:
            raise UserError(f"--machine: {key}={value!r} is no number") from error
    return Machine(**values)


def _bench_report(args: list[str]) -> int:
    """Time the report of a comparison of many runs, which are made up."""
    return _bench_many(args, "report", "runs", "100,1000,10000")


def _bench_index(args: list[str]) -> int:
    """Time listing, subsets, order and masks of many images, which are empty files."""
    return _bench_many(args, "index", "images", "50000,200000,1000000")


def _bench_many(args: list[str], verb: str, what: str, default: str) -> int:
    doc = _BENCH[verb].__doc__ or ""
    parser = _parser(f"bench {verb}", f"{doc.strip()} Nothing is left behind.")
    parser.add_argument(f"--{what}", default=default, help="how many, separated by commas")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to this file")
    parser.add_argument("--append", metavar="FILE", help="add the table to this Markdown file")
    options = parser.parse_args(args)
    for option in ("json", "append"):
        if getattr(options, option):
            _prepare_file(Path(getattr(options, option)), f"--{option}")
    from mim.compare.cost import append_table, bench_index, bench_report, format_many
    from mim.training.checkpoint import write_json_atomic

    counts = _list(getattr(options, what), int, f"--{what}") or []
    figures = bench_report(counts) if verb == "report" else bench_index(counts)
    if options.json:
        write_json_atomic(Path(options.json), figures)
    if options.append:
        command = shlex.join(["mim", "bench", verb, *args])
        append_table(Path(options.append), command, format_many(figures))
    _say(format_many(figures))
    return 0


_BENCH: dict[str, Verb] = {
    "step": _bench_step,
    "grow": _bench_grow,
    "scale": _bench_scale,
    "data": _bench_data,
    "report": _bench_report,
    "index": _bench_index,
}


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML; any setting can follow, --data.KEY")


def _read_config(file: str | None, rest: list[str], *, whole: bool = True) -> Config:
    """``whole``: whether its model must fit the images too."""
    from mim.core.config import Config
    from mim.core.plugins import import_plugin
    from mim.training.settings import checked, read_args

    config = read_args(Config, (["--config", file] if file else []) + rest)
    if whole:
        return checked(config)
    for plugin in config.plugins:
        import_plugin(plugin)
    return config


def _data_inspect(args: list[str]) -> int:
    """Count and draw what a config would train on."""
    about = (
        "Decode the images of both splits; print counts, sizes, modes and unreadable files, and\n"
        "draw a sheet: an image, and its crop and mask in two epochs. Settings may follow:\n"
        "--data.source imagefolder --data.path DIR"
    )
    parser = _parser("data inspect", about)
    _config_arguments(parser)
    parser.add_argument("--images", type=int, help="decode so many of each split, not all")
    parser.add_argument("--output", metavar="PNG", default="inspect.png", help="the sheet")
    parser.add_argument("--json", metavar="FILE", help="also write every number to this file")
    options, rest = parser.parse_known_args(args)
    if options.images is not None and options.images < 1:
        raise UserError(f"--images: {options.images} must be at least 1")
    _prepare_file(Path(options.output), "--output")
    if options.json:
        _prepare_file(Path(options.json), "--json")
    config = _read_config(options.config, rest)
    from dataclasses import asdict

    from mim.core.files import write_json_atomic
    from mim.training.inspection import inspect

    found = inspect(config, images=options.images, output=Path(options.output))
    for part in found.values():
        for line in part.lines():
            _say(line)
    if options.json:
        numbers = {split: asdict(part) for split, part in found.items()}
        write_json_atomic(Path(options.json), numbers)
    _say(options.output)
    return 0


def _data_stats(args: list[str]) -> int:
    """Compute data.mean and data.std of the training images."""
    about = (
        "Print data.mean and data.std of the training images, as YAML for a config. Settings may\n"
        "follow: --data.source imagefolder --data.path DIR"
    )
    parser = _parser("data stats", about)
    _config_arguments(parser)
    parser.add_argument("--images", type=int, help="read so many, not all")
    parser.add_argument("--output", metavar="FILE", help="also write them to this YAML file")
    options, rest = parser.parse_known_args(args)
    if options.images is not None and options.images < 1:
        raise UserError(f"--images: {options.images} must be at least 1")
    if options.output:
        _prepare_file(Path(options.output), "--output")
    config = _read_config(options.config, rest, whole=False)
    import yaml

    from mim.core.files import write_text_atomic
    from mim.training.inspection import statistics

    mean, std = statistics(config.data, options.images)
    tree = {"mean": [round(x, 4) for x in mean], "std": [round(x, 4) for x in std]}
    text = yaml.safe_dump({"data": tree}, default_flow_style=None, sort_keys=False)
    if options.output:
        write_text_atomic(Path(options.output), text)
    _say(text.rstrip())
    return 0


def _data_pack(args: list[str]) -> int:
    """Write an image set as a few large files."""
    about = (
        "Write an image set as a few large files, with labels, ids, class names and digests, for\n"
        "--data.source packed --data.path OUT. Call it again after a kill: it goes on; or when it\n"
        "has ended: it checks every byte."
    )
    parser = _parser("data pack", about)
    parser.add_argument("source", metavar="SRC", help="a folder (imagefolder), or a config file")
    parser.add_argument("output", metavar="OUT", help="the folder of the packed set")
    kinds = "pixels: decoded, memory-mapped; shards: the image files in tar files"
    parser.add_argument("--kind", default="pixels", help=kinds)
    parser.add_argument("--size", type=int, help="pixels: bring the shorter side down to it")
    square = "pixels: cut the longer side down to it too, about the centre"
    parser.add_argument("--square", action="store_true", help=square)
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    options = parser.parse_args(args)
    from mim.core.config import DataConfig
    from mim.data.storage.pack import pack
    from mim.data.storage.packed import Recipe, default_workers, read_manifest
    from mim.training.settings import load_config

    recipe = Recipe(kind=options.kind, size=options.size, square=options.square)
    config = DataConfig(source="imagefolder", path=options.source)
    if not Path(options.source).is_dir():
        config = load_config(options.source).data
    workers = default_workers() if options.workers is None else options.workers
    found = read_manifest(pack(config, options.output, recipe, workers).parent)
    for split, entry in found["splits"].items():
        size = sum(part["bytes"] for part in entry["parts"])
        bad = f", {len(entry['unreadable'])} of them unreadable" if entry["unreadable"] else ""
        _say(f"{split}: {entry['images']} images{bad}, {size / 1e9:.2f} GB")
    _say(f"--data.source packed --data.path {shlex.quote(options.output)}")
    return 0


_DATA_VERBS: dict[str, Verb] = {
    "inspect": _data_inspect,
    "stats": _data_stats,
    "pack": _data_pack,
}


def _data(args: list[str]) -> int:
    """Look at data sets and prepare them: inspect, stats, pack."""
    lines = [f"{name:<10} {(verb.__doc__ or '').strip()}" for name, verb in _DATA_VERBS.items()]
    about = "Look at data sets and prepare them; each verb has its own --help."
    parser = _parser("data", "\n".join([about, *lines]))
    parser.add_argument("what", choices=tuple(_DATA_VERBS), help="what to do")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="of the verb; see its --help")
    options = parser.parse_args(args)
    return _DATA_VERBS[options.what](options.rest)


def _export(args: list[str]) -> int:
    """Write a run's weights as files that others load, with a model card."""
    about = (
        "Write a run's weights for others, and a model card beside them.\n\n"
        "timm         file for timm.create_model(..., checkpoint_path=FILE); .safetensors\n"
        "hf           folder for transformers' from_pretrained\n"
        "safetensors  timm's keys, or with --part model all of them; .safetensors\n"
        "onnx         images to tokens and features, any batch size; .onnx\n"
        "mae          facebookresearch/mae's keys; .pth"
    )
    parser = _parser("export", about)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    choices = ("timm", "hf", "safetensors", "onnx", "mae")
    parser.add_argument("--to", choices=choices, default="timm", help="the layout")
    parser.add_argument("--output", required=True, help="the file, or for hf the folder")
    parser.add_argument(
        "--part",
        choices=("encoder", "model"),
        help="by default the encoder; hf and mae: the model, where it is an MAE",
    )
    options = parser.parse_args(args)
    from mim.interop import export_run

    exported = export_run(options.run, options.to, options.output, options.part)
    _say(f"model card: {exported.card}")
    _say(exported.usage)  # last: scripts read the line that loads it
    return 0


def _import(args: list[str]) -> int:
    """Make a run folder from weights of MAE, timm, DeiT, DINOv2, SimMIM, Hugging Face."""
    about = (
        "Make a run folder, which every verb takes, from a file of weights. Its layout is seen\n"
        "from its keys; each key is loaded, adapted, or named as left out. Settings such as\n"
        "--data.source imagefolder --data.path DIR --data.image_size 96 stand above what the file\n"
        "says. No code in a file is ever run."
    )
    parser = _parser("import", about)
    parser.add_argument("file", metavar="FILE", help="safetensors, torch file, or HF folder")
    parser.add_argument("--output", required=True, metavar="RUN", help="the run folder to make")
    parser.add_argument("--backbone", help="timm's name of the encoder; by default by its sizes")
    parser.add_argument("--from", dest="style", help="key style: timm, hf, simmim or mim")
    parser.add_argument(
        "--part", choices=("model", "encoder"), default="model", help="encoder: without decoder"
    )
    parser.add_argument("--key", help="name under which a torch file holds the weights")
    parser.add_argument("--config", metavar="FILE", help="settings above what the file says")
    options, rest = parser.parse_known_args(args)
    from mim.interop import dotted_arguments, import_run

    imported = import_run(
        options.file,
        options.output,
        dotted_arguments(rest),
        backbone=options.backbone,
        style=options.style,
        part=options.part,
        key=options.key,
        config=options.config,
    )
    for line in imported.account.lines():
        _say(line)
    _say(f"{options.output}: {imported.config.model.backbone}")
    return 0


def _runs(args: list[str]) -> int:
    """List and filter the run folders below a folder."""
    about = (
        "List run folders: their state, what they are and what they reached. In a pipe: lines\n"
        "with tabs. --where takes any setting or number: model.regime.name=zero\n"
        "'linear.accuracy>0.8' status=failed."
    )
    parser = _parser("runs", about)
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="where to look")
    parser.add_argument("--where", nargs="+", default=[], metavar="KEY=VALUE", help="conditions")
    parser.add_argument("--show", nargs="+", default=[], metavar="KEY", help="more columns")
    parser.add_argument("--json", metavar="FILE", help="all they say, to a file (- for stdout)")
    options = parser.parse_args(args)
    if options.json not in (None, "-"):
        _prepare_file(Path(options.json), "--json")
    from mim.core.terminal import show_table
    from mim.report.runs import as_json, find_runs, listing

    root = Path(options.folder)
    found = find_runs(root, options.where)
    _give_json(options.json, [as_json(run) for run in found])
    if options.json != "-":
        show_table(*listing(found, root, options.show))
    return 0


def _diff(args: list[str]) -> int:
    """What differs between two runs: settings, data, environment, results."""
    parser = _parser("diff", "What differs between two runs, and by how much.")
    parser.add_argument("first", metavar="RUN", help="a run folder")
    parser.add_argument("second", metavar="RUN", help="another one")
    parser.add_argument("--json", metavar="FILE", help="to a file (- for stdout)")
    options = parser.parse_args(args)
    if options.json not in (None, "-"):
        _prepare_file(Path(options.json), "--json")
    import dataclasses

    from mim.core.terminal import show_table
    from mim.report.runs import diff_rows, diff_runs, read_run

    found = diff_runs(*(read_run(Path(path)) for path in (options.first, options.second)))
    _give_json(options.json, [dataclasses.asdict(item) for item in found])
    if options.json != "-":
        show_table(("part", "key", "first", "second", "change"), diff_rows(found))
    return 0


def _doctor(args: list[str]) -> int:
    """Check versions, devices, precision, loader speed and disk, and say what to set."""
    about = "Look at this machine and say what to set. Exit code 1 where something cannot work."
    parser = _parser("doctor", about)
    parser.add_argument("--config", metavar="FILE", help="whose images and precision are tried")
    parser.add_argument("--output", default="runs", metavar="DIR", help="where runs shall go")
    parser.add_argument("--quick", action="store_true", help="time nothing")
    parser.add_argument("--json", metavar="FILE", help="to a file (- for stdout)")
    options = parser.parse_args(args)
    if options.json not in (None, "-"):
        _prepare_file(Path(options.json), "--json")
    from mim.cli.doctor import as_rows, examine
    from mim.core.terminal import show_table
    from mim.training.settings import load_config

    checks = examine(load_config(options.config), Path(options.output), options.quick)
    _give_json(options.json, as_rows(checks))
    if options.json != "-":
        rows = [[check.name, check.state, check.found, check.advice] for check in checks]
        show_table(("what", "state", "found", "what to set"), rows)
    return 1 if any(check.state == "problem" for check in checks) else 0


def _debug_batch(args: list[str]) -> int:
    """Compute a step again, and say which tensor is not finite, and where first."""
    about = (
        "Compute a training step again, in the weights before it: every tensor's values that are\n"
        "not finite, its least and its greatest, and a picture of images and masks. Without\n"
        "--step it is the newest step whose loss or gradient was not finite."
    )
    parser = _parser("debug batch", about)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, help="counted from 1, as in metrics.jsonl")
    parser.add_argument("--device", help="cpu or cuda; by default what there is")
    parser.add_argument("--output", metavar="FILE", help="PNG; by default RUN/debug_STEP.png")
    parser.add_argument("--json", metavar="FILE", help="all figures to a file (- for stdout)")
    options = parser.parse_args(args)
    if options.output:
        _prepare_file(Path(options.output), "--output")
    if options.json not in (None, "-"):
        _prepare_file(Path(options.json), "--json")
    from mim.core.terminal import show_table
    from mim.evaluate.visualize import batch_figure, save_figure
    from mim.training.debug import debug_batch

    found = debug_batch(options.run, options.step, options.device)
    output = Path(options.output or Path(options.run) / f"debug_{found.step}.png")
    save_figure(batch_figure(found.original, found.masked, found.titles), output)
    _give_json(options.json, found.as_json())
    if options.json != "-":
        heads = ("what", "name", "shape", "not finite", "least", "greatest")
        show_table(heads, found.rows())
        for line in found.lines():
            _say(line)
        _say(output)
    return 0


_DEBUG: dict[str, Verb] = {"batch": _debug_batch}


def _debug(args: list[str]) -> int:
    """Look into a step of a run that was not finite: batch."""
    lines = [f"{name:<10} {(verb.__doc__ or '').strip()}" for name, verb in _DEBUG.items()]
    about = "Look into what went wrong; each verb has its own --help."
    parser = _parser("debug", "\n".join([about, *lines]))
    parser.add_argument("what", choices=tuple(_DEBUG), help="what to look at")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="of the verb; see its --help")
    options = parser.parse_args(args)
    return _DEBUG[options.what](options.rest)


def _completion(args: list[str]) -> int:
    """Print a shell's completion script (needs shtab)."""
    from mim.cli.completion import SHELLS, completion_script

    parser = _parser("completion", "Print the completion script of a shell.")
    parser.add_argument("shell", choices=SHELLS, help="which")
    options = parser.parse_args(args)
    _say(completion_script(options.shell, VERBS))
    return 0


VERBS: dict[str, Verb] = {
    "pretrain": _pretrain,
    "evaluate": _evaluate,
    "compare": _compare,
    "report": _report,
    "visualize": _visualize,
    "bench": _bench,
    "data": _data,
    "export": _export,
    "import": _import,
    "runs": _runs,
    "diff": _diff,
    "doctor": _doctor,
    "debug": _debug,
    "completion": _completion,
}


def _help() -> str:
    lines = [f"  {name:<10} {(verb.__doc__ or '').strip()}" for name, verb in VERBS.items()]
    return (
        "usage: mim VERB ...\n\n"
        "Pre-train one ViT under interchangeable masking regimes and compare them.\n\n"
        + "\n".join(lines)
        + "\n\n'mim VERB --help' lists the options of a verb.\n"
        "Start with: mim compare --config configs/compare/demo.yaml"
    )


def _unread() -> bool:
    """Whether who read the output, such as ``head``, has gone; another pipe may have broken."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        _say(_help())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        _say(f"mim {__version__}")
        return 0
    if "--trust" in args:  # of every verb: plug-ins of run folders from elsewhere may run
        from mim.core.plugins import trust_all

        args.remove("--trust")
        trust_all()
    try:
        if args[0] not in VERBS:
            from mim.core.errors import choice_error

            raise choice_error("verb", args[0], VERBS)
        choose_waiting()  # before a verb loads torch
        with between_imports():
            return VERBS[args[0]](args[1:])
    except UserError as error:
        _tell(error)
        return 2
    except KeyboardInterrupt as stop:
        print("mim: interrupted; call it again to go on", file=sys.stderr)
        return getattr(stop, "code", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            # Python flushes at its end, once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        code = getattr(error, "code", None)
        if type(error).__name__ == "Interrupted" and isinstance(code, int):
            print(f"mim: {error}", file=sys.stderr)
            return code
        if type(error).__name__ in ("TrainingError", "WorkerError"):
            _tell(error)
            return 1
        if type(error).__name__ == "LostProcess":
            _tell(error)
            sys.stdout.flush()
            sys.stderr.flush()
            # At its end Python would wait, in torch, for what the lost process was to send.
            os._exit(75 if code is None else code)
        if _several():
            _tell(f"{type(error).__name__}: {error}")
        raise


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _tell(error: Exception | str) -> None:
    """Which process it was, of several, and what is wrong."""
    who = f"rank {os.environ.get('RANK', '0')}: " if _several() else ""
    print(f"mim: error: {who}{error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
