"""``mim evaluate``."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from mim.cli.options import Verb, add_device, add_json, add_words, read_pairs, show
from mim.core.errors import UserError

DETAILS = (
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
    "Training that was interrupted resumes when the same is called again on the run folder,\n"
    "and takes several processes: accelerate launch -m mim evaluate ...; when one is lost,\n"
    "the others say which and end with exit code 75.\n\n"
    "RUN is a run folder (numbers are added to its result.json), or, with --like RUN for the\n"
    "images: untrained, pixels, or TIMM_NAME@CHECKPOINT_FILE. With --data DIR it is measured on\n"
    "other images, and the numbers are only printed. Accuracies are printed in per\n"
    "cent, as in a report; --json gives every number as it was measured."
)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evaluation", help="one of these, or several, by commas")
    parser.add_argument("run", nargs="+", metavar="RUN", help="what to measure")
    where = "folder of labelled images, for runs trained on others; see RUN"
    parser.add_argument("--data", metavar="DIR", help=where)
    parser.add_argument("--like", metavar="RUN", help="run folder whose images and sizes are used")
    parser.add_argument("--config", metavar="FILE", help="config whose images and sizes are used")
    parser.add_argument("--settings", metavar="FILE", help="YAML: evaluation to its settings")
    parser.add_argument(
        "--recipe", metavar="NAME", help="take a recipe's settings: see mim recipes"
    )
    add_words(parser, "--set", "settings")
    own = "Python files or modules that register evaluations or components of your own"
    parser.add_argument("--plugins", nargs="+", default=[], metavar="FILE", help=own)
    add_device(parser)
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16, of the encoder")
    lost = "seconds after which a process that others wait for counts as lost; by default 600"
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help=lost)
    add_json(parser, "write every number")


def _run(options: argparse.Namespace) -> int:
    if options.timeout is not None and not 0 < options.timeout < math.inf:
        raise UserError(f"--timeout: {options.timeout:g} must be above 0 and finite")
    names = options.evaluation.split(",")
    from mim.core.plugins import import_plugin
    from mim.evaluate import (
        EVALUATIONS,
        TIMEOUT,
        evaluate,
        evaluate_run,
        on_images,
        open_encoder,
        several,
    )
    from mim.training.checkpoint import read_config
    from mim.training.choices import source_of
    from mim.training.settings import load_config

    for plugin in options.plugins:
        import_plugin(plugin)
    for spec in [*options.run, *([options.like] if options.like else [])]:
        if (Path(spec) / "config.yaml").is_file():
            read_config(spec)  # its plug-ins may bring the evaluation
    for name in names:
        EVALUATIONS.get(name)
    settings = _settings(options, names)

    config = load_config(options.config) if options.config else None
    if options.like:
        config = read_config(options.like)
    device = _device(options.device)
    timeout = TIMEOUT if options.timeout is None else options.timeout
    measured: dict[str, dict[str, Any]] = {}
    with several(device, timeout):
        try:
            for spec in options.run:

                def keep(name: str, numbers: dict[str, float], spec: str = spec) -> None:
                    measured.setdefault(spec, {})[name] = numbers

                how: dict[str, Any] = {"device": device, "precision": options.precision}
                how["on_result"] = keep
                if options.data:
                    images = source_of(Path(options.data))[0]
                    encoder = on_images(open_encoder(spec, config), options.data, images)
                    evaluate(encoder, settings, **how)
                elif Path(spec).is_dir():
                    evaluate_run(Path(spec), names, settings, **how)
                else:
                    evaluate(open_encoder(spec, config), settings, **how)
        finally:
            if measured and int(os.environ.get("RANK", "0")) == 0:
                from mim.core.terminal import show_table
                from mim.report.overview import evaluations_table

                show(options, measured, lambda: show_table(*evaluations_table(measured)))
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _device(wanted: str | None) -> str:
    import torch

    from mim.training.runtime.machine import pick_device

    device = pick_device(wanted)
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # each process its own GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return device


def _settings(options: argparse.Namespace, names: list[str]) -> dict[str, dict[str, Any]]:
    """Evaluation -> settings, of the file and above them of ``--set``."""
    given: dict[str, dict[str, Any]] = {}
    if options.recipe:
        from mim.core.recipes import evaluations_of, recipe_file
        from mim.core.settings import read_mapping

        known = evaluations_of(read_mapping(recipe_file(options.recipe)))
        given = {name: known[name] or {} for name in names if name in known}
    if options.settings:
        from mim.core.files import load_yaml

        path = options.settings
        if not Path(path).is_file():
            raise UserError(f"--settings: {path!r} is not a file")
        try:
            loaded = load_yaml(path)
        except ValueError as error:
            raise UserError(f"--settings: {path!r} cannot be read: {error}") from error
        if not isinstance(loaded, dict) or not all(isinstance(v, dict) for v in loaded.values()):
            raise UserError(f"--settings: {path!r} does not map evaluations to their settings")
        given |= {name: {**given.get(name, {}), **own} for name, own in loaded.items()}
    for name in given:
        if name not in names:
            raise UserError(f"--settings: {name!r} has settings, but only {', '.join(names)} run")
    above = read_pairs(options.set, "--set")
    return {name: {**given.get(name, {}), **above} for name in names}


VERB = Verb(
    "evaluate",
    "Measure encoders: probes, fine-tuning, ..., on runs, timm models or untrained ones.",
    _options,
    _run,
    DETAILS,
)
