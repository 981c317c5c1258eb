"""What stands above all rooms: from a folder of images to a run, numbers or a report."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mim.compare import CompareConfig, Launch, read_compare_config, run_comparison
from mim.core.config import Config
from mim.core.errors import choice_error
from mim.core.settings import read_mapping, read_tree
from mim.evaluate import evaluate as evaluate_encoder
from mim.evaluate import evaluate_run, inference, on_images, run_encoder
from mim.interop.starting import complete, pretrain_from
from mim.model import encode
from mim.report import read_comparison, write_report
from mim.report.overview import closing_table, live_overview
from mim.training.choices import MODEL, source_of
from mim.training.loading import load
from mim.training.runtime.machine import pick_device
from mim.training.runtime.trackers import track_report
from mim.training.settings import checked

__all__ = [
    "CompareConfig",
    "Launch",
    "compare",
    "complete",
    "complete_comparison",
    "embed",
    "encode",
    "evaluate",
    "load",
    "next_steps",
    "predict",
    "pretrain",
    "pretrain_from",
    "read_compare_config",
]

SHOWS = ("auto", "live", "plain", "quiet")


def pretrain(
    output: str | Path | Config,
    data: str | Path | None = None,
    model: str = MODEL,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Pre-train one model on a folder of images, as ``mim pretrain DATA --output OUTPUT`` does.

    Args:
        output: the run folder, which must not hold a run unless ``resume`` is ``auto``; or a whole
            config, which stands alone.
        data: folder of images, or what else ``data.path`` may be.
        model: timm's name of the encoder.
        settings: dotted ones, such as ``{"train.epochs": 50, "model.regime.name": "zero"}``. What
            is not among them follows from the images and the machine.

    Returns:
        What ``result.json`` holds.

    Raises:
        UserError, TrainingError, LostProcess, Interrupted: as
            :func:`mim.training.pretrain.pretrain`.
    """
    if isinstance(output, Config):
        return pretrain_from(output, alone=True)
    given = {**_of_model(model, settings), "output": str(output)}
    return pretrain_from(checked(read_tree(Config, [], complete(data, [], given))), alone=True)


def _of_model(model: str, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings with the model; weights name theirs, where none is given."""
    given = dict(settings or {})
    return given if model == MODEL else {"model.backbone": model, **given}


def next_steps(config: Config) -> list[str]:
    """What to type after a run."""
    run = config.output
    return [
        f"next: mim visualize reconstruct {run}      what it predicts",
        f"      mim evaluate knn,linear {run}        how good it is, by labelled images",
        f"      mim embed {run} DIR --output features.npy",
        f"      mim export {run} --to timm --output encoder.safetensors",
    ]


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    evaluations: Sequence[str] = ("knn", "linear"),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    device: str = "auto",
    precision: str = "fp32",
) -> dict[str, dict[str, float]]:
    """Measure the encoder of a run, as ``mim evaluate`` does.

    Args:
        run: the run folder.
        data: folder of labelled images. By default those of the run, and the numbers are added to
            its ``result.json``; numbers on other images are only returned.
        evaluations: their names.
        settings: evaluation -> what differs from its defaults.
        device: auto, cpu, cuda, cuda:1 or mps.
        precision: fp32, bf16 or fp16, of the encoder.

    Returns:
        Evaluation -> named numbers; accuracies lie between 0 and 1.

    Raises:
        UserError: as :func:`mim.evaluate.evaluate`.
    """
    place = pick_device(device, "device")
    own = {name: dict(given) for name, given in (settings or {}).items()}
    if data is None:
        return evaluate_run(Path(run), evaluations, own, device=place, precision=precision)
    encoder = on_images(run_encoder(Path(run)), data, source_of(Path(data))[0])
    wanted = {name: own.get(name) for name in evaluations}
    return evaluate_encoder(encoder, wanted, device=place, precision=precision)


def embed(
    run: str | Path, images: str | Path, output: str | Path, *, device: str = "auto", **how: Any
) -> Path:
    """Write the features of all images below a folder; see :func:`mim.evaluate.inference.embed`."""
    return inference.embed(run, images, output, device=pick_device(device), **how)


def predict(
    run: str | Path, images: str | Path, output: str | Path, *, device: str = "auto", **how: Any
) -> Path:
    """Write classes, label maps or boxes; see :func:`mim.evaluate.inference.predict`."""
    return inference.predict(run, images, output, device=pick_device(device), **how)


def compare(
    config: CompareConfig | str | Path,
    command: str | Path = "",
    show: str = "auto",
    launch: Launch | None = None,
    *,
    data: str | Path | None = None,
    model: str = MODEL,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Run a comparison and write its report: ``mim.compare("runs/regimes", "photos/")``.

    Args:
        config: the comparison; or the folder for one of the three regimes, with three seeds each.
        command: how it was called, for the report; after a folder the images, as ``data``.
        show: live (a table of all runs, on a terminal), plain (lines), quiet (failures alone), all
            on stderr; auto is live on a terminal and plain elsewhere.
        launch: where the runs are computed; by default here, one after the other.
        data: after a folder: the images.
        model: likewise timm's name of the encoder.
        settings: likewise dotted settings of a comparison (``axes``, ``base.train.epochs``).

    Returns:
        The path of ``report.html``.

    Raises:
        UserError, KeyboardInterrupt: as :func:`mim.compare.runner.run_comparison`, which also says
            what is kept of an earlier call.
    """
    if not isinstance(config, CompareConfig):
        based = {f"base.{key}": value for key, value in _of_model(model, None).items()}
        given = {**based, **(settings or {}), "output": str(config)}
        config = read_tree(CompareConfig, [], complete_comparison(data or command, [], given))
        command = ""
    return compare_runs(config, str(command), show, launch)[0]


def complete_comparison(
    data: str | Path | None, files: Sequence[str | Path], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """:func:`complete` for a comparison: also its axes, and no evaluation without labels.

    Runs of an earlier call in the same folder keep what was chosen then.
    """
    folder = Path(str(settings.get("output", CompareConfig().output)))
    earlier = next((path.parent for path in sorted(folder.glob("*/config.yaml"))), None)
    known = complete(data, files, settings, "base.", earlier)
    given = {*settings, *(key for file in files for key in read_mapping(file))}
    if data is not None and not {"axes", "seeds", "variants"} & given:
        known["axes"] = {"model.regime.name": ["drop", "zero", "token"], "seed": [0, 1, 2]}
    if data is not None and "evaluations" not in given and known.get("base.data.source") == "flat":
        known["evaluations"] = {}
    return known


def compare_runs(
    config: CompareConfig, command: str = "", show: str = "auto", launch: Launch | None = None
) -> tuple[Path, list[str]]:
    """:func:`compare`, and the folders of the runs that failed."""
    if show not in SHOWS:
        raise choice_error("show", show, SHOWS)
    if show == "auto":
        show = "live" if Console(stderr=True).is_terminal else "plain"
    output = Path(config.output)
    watch = functools.partial(live_overview, output, Console(stderr=True))
    failed = run_comparison(
        config,
        command,
        show,
        launch,
        watch=watch if show == "live" else None,
        on_end=lambda: _report(config, output),
    )
    return output / "report.html", failed


def _report(config: CompareConfig, output: Path) -> None:
    """Write the report and give it to the trackers, where there are any."""
    write_report(output)
    files = [output / name for name in ("report.html", "report.md", "results.csv")]
    files += sorted((output / "tables").iterdir())
    text = (output / "report.md").read_text(encoding="utf-8")
    table = closing_table(read_comparison(output))
    track_report(config.base, config.name, output, files, table, text)
