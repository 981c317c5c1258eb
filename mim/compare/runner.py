"""Many runs from one base config: the regimes on the same images, masks, batches and weights."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from mim.core import progress
from mim.core.config import Config
from mim.core.cpu.allocator import keep_freed_memory
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.lock import InUse, in_use, sole_use
from mim.core.plugins import beside, keep_plugins
from mim.core.settings import leaves, read_args, to_dict, to_yaml
from mim.core.signals import between_imports, hear, start_server
from mim.training import checkpoint
from mim.training.settings import checked, load_config

if TYPE_CHECKING:
    from mim.evaluate import Encoder

# Imported once; the process of each run starts with them. The last two are what the probes and the
# small sets import when they are used.
SERVER_MODULES = [
    "mim.training.pretrain",
    "mim.evaluate",
    "sklearn.linear_model",
    "sklearn.datasets",
]


VARIANT = "variant"


@dataclass(frozen=True)
class CompareConfig:
    """A comparison: a base config, the axes that vary, and the evaluations."""

    output: str = "runs/compare"
    """The comparison folder; holds a folder for each run."""
    name: str = "comparison"
    """Title of the report."""
    axes: dict[str, Any] = field(
        default_factory=lambda: {"model.regime.name": ["drop", "zero", "token"], "seed": [0]}
    )
    """Dotted config keys and the values each takes; every combination is a run."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """One more axis, of settings that change together: a name and its dotted keys."""
    evaluations: dict[str, Any] = field(default_factory=lambda: {"linear": {}, "knn": {}})
    """Evaluations and their settings; empty for images without labels."""
    references: list[str] = field(default_factory=list)
    """Run folders, imported ones above all, whose encoders are evaluated on the same images and
    stand in the tables beside the runs; nothing is trained for them."""
    base: Config = field(default_factory=Config)
    """What all runs share."""

    def __post_init__(self) -> None:
        for key, values in self.axes.items():
            if not isinstance(values, list) or not values:
                hint = """; write --axes '{"mask.ratio": [0.5, 0.75]}'"""
                reason = "must be a list of values" + (hint if isinstance(values, dict) else "")
                raise setting_error(f"axes.{key}", values, reason)
            self._check_key("axes", key)
            if len({json.dumps(value) for value in values}) < len(values):
                raise setting_error(f"axes.{key}", values, "names a value twice")
        for name, settings in self.variants.items():
            setting = f"variants.{name}"
            if not isinstance(settings, dict):
                raise setting_error(setting, settings, "must map dotted keys to values")
            for key in settings:
                self._check_key(setting, key)
                if key in self.axes:
                    raise setting_error(setting, key, "is an axis already")

    def _check_key(self, setting: str, key: str) -> None:
        known = leaves(Config)
        if key not in known and not key.startswith("model.backbone_args."):
            raise choice_error(setting, key, known)
        if key in ("output", "resume"):
            raise setting_error(setting, key, "cannot vary: each run has its own folder")

    @property
    def all_axes(self) -> dict[str, list[Any]]:
        """The axes; first the names of the variants, where there are any."""
        return {VARIANT: list(self.variants), **self.axes} if self.variants else self.axes

    def settings_of(self, axes: dict[str, Any]) -> dict[str, Any]:
        """Dotted keys and values that a run's place on the axes stands for."""
        plain = {key: value for key, value in axes.items() if key != VARIANT}
        return {**self.variants.get(axes.get(VARIANT, ""), {}), **plain}


@dataclass(frozen=True)
class Planned:
    """One run of a comparison, or one of its two kinds of reference.

    Attributes:
        folder: name of its folder.
        kind: run, untrained, pixels or given.
        axes: dotted key -> value.
        config: of the run; ``output`` is its folder.
        given: the run folder whose encoder is evaluated, of kind given.
    """

    folder: str
    kind: str
    axes: dict[str, Any]
    config: Config
    given: str = ""


def _label(axes: dict[str, Any]) -> str:
    """A folder name: the last part of each key that tells something, and its value."""
    parts = []
    for key, value in axes.items():
        words = [word for word in key.split(".") if word not in ("name", "model")]
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
        parts.append(f"{words[-1] if words else key}={safe}")
    label = ",".join(parts) or "run"
    if len(label) > 120:  # file systems end at 255 bytes
        label = f"{label[:100]}-{hashlib.sha256(label.encode()).hexdigest()[:12]}"
    return label


def _vary(base: Config, axes: dict[str, Any], output: Path) -> Config:
    tree = {**to_dict(base), "output": str(output), "resume": "auto"}
    for key, value in axes.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return load_config(None, tree)


def plan(config: CompareConfig) -> list[Planned]:
    """All runs and references, in order; every run's config is checked.

    The untrained reference stands once for each seed and encoder, raw pixels once.

    Raises:
        UserError: if one of the runs has a config that cannot work.
    """
    output = Path(config.output)
    planned: list[Planned] = []
    keys = list(config.all_axes)
    for values in itertools.product(*config.all_axes.values()):
        axes = dict(zip(keys, values, strict=True))
        folder = _label(axes)
        varied = _vary(config.base, config.settings_of(axes), output / folder)
        planned.append(Planned(folder, "run", axes, varied))
    if len({item.folder for item in planned}) < len(planned):
        raise UserError("axes: two runs would share a folder; shorten or rename the values")
    if config.evaluations:
        planned += list(_references(config, planned, output))
    planned += list(_given(config, output))
    return planned


def _given(config: CompareConfig, output: Path) -> Iterator[Planned]:
    """The encoders under ``references``, on the images of the base config.

    Raises:
        UserError: if one is no run folder, two have the same name, or nothing is to be evaluated.
    """
    if config.references and not config.evaluations:
        reason = "are evaluated, and no evaluations are named"
        raise setting_error("references", config.references, reason)
    names = [Path(path).resolve().name for path in config.references]
    if len(set(names)) < len(names):
        raise setting_error("references", config.references, "has two folders of one name")
    for name, path in zip(names, config.references, strict=True):
        checkpoint.read_config(path)
        folder = f"given,{name}"
        own = replace(config.base, output=str(output / folder))
        yield Planned(folder, "given", {}, own, str(Path(path).resolve()))


def _references(config: CompareConfig, runs: list[Planned], output: Path) -> Iterator[Planned]:
    varied = {key for settings in config.variants.values() for key in settings}

    def kept(run: Planned, belongs: Callable[[str], bool]) -> dict[str, Any]:
        """The axes that a reference depends on."""
        return {
            key: value
            for key, value in run.axes.items()
            if (any(map(belongs, varied)) if key == VARIANT else belongs(key))
        }

    seen = set()
    for run in runs:
        encoder = to_dict(run.config)
        key = json.dumps([run.config.seed, encoder["data"], _encoder_part(encoder)], sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        axes = kept(run, lambda key: key == "seed" or _is_encoder_axis(key))
        folder = "untrained" + ("," + _label(axes) if axes else "")
        yield Planned(folder, "untrained", axes, replace(run.config, output=str(output / folder)))
    seen.clear()
    for run in runs:
        key = json.dumps(to_dict(run.config)["data"], sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        axes = kept(run, lambda key: key.startswith("data."))
        folder = "pixels" + ("," + _label(axes) if axes else "")
        yield Planned(folder, "pixels", axes, replace(run.config, output=str(output / folder)))


def _encoder_part(tree: dict[str, Any]) -> list[Any]:
    model = tree["model"]
    return [model["backbone"], model["backbone_args"], model["position_embedding"]]


def _is_encoder_axis(key: str) -> bool:
    return key.startswith(("model.backbone", "model.position_embedding", "data."))


def _evaluations_key(evaluations: dict[str, Any]) -> str:
    return json.dumps(evaluations, sort_keys=True)


def run_one(item: Planned, evaluations: dict[str, Any]) -> None:
    """Train where needed, then evaluate; the run folder's ``result.json`` says both.

    Raises:
        UserError: as :func:`mim.training.pretrain.pretrain` and :func:`mim.evaluate.evaluate`.
    """
    import torch

    from mim.evaluate import evaluate, pixels_encoder, run_encoder, untrained_encoder
    from mim.training.pretrain import ONLINE, pretrain

    began = time.monotonic()
    evaluate_seconds = 0.0
    checked(item.config)  # a process of its own has not imported the plugins yet
    run = Path(item.config.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    if item.kind == "run":
        result = pretrain(item.config)
        encoder = run_encoder(run) if evaluations else None
    else:
        checkpoint.prepare_folder(run)
        checkpoint.write_config(run, item.config)
        untrained = item.kind == "untrained"
        if item.given:
            encoder = _on_images_of(run_encoder(Path(item.given)), item.config)
        elif untrained:
            encoder = untrained_encoder(item.config)
        else:
            encoder = pixels_encoder(item.config.data)
        result = {"format": checkpoint.FORMAT, "status": "finished", "config": to_dict(item.config)}
        result["seed"] = item.config.seed if untrained else None
    result |= {"kind": item.kind, "name": item.folder, "axes": item.axes}
    if item.given:
        result["given"] = item.given
    if encoder is not None:
        left_out = _without_encoder(evaluations) if encoder.vit is None else {}
        for name, reason in left_out.items():
            print(f"{item.folder}: {name} left out: {reason}", file=sys.stderr, flush=True)
        wanted = {name: given for name, given in evaluations.items() if name not in left_out}
        online = {k: v for k, v in result.get("evaluations", {}).items() if k == ONLINE}
        progress.stage(f"{item.folder}  evaluating: {', '.join(wanted)}")
        evaluating = time.monotonic()
        measured = evaluate(encoder, wanted, device=device, folder=run)
        evaluate_seconds = time.monotonic() - evaluating
        result["evaluations"] = {**online, **measured}
        if left_out:
            result["evaluations_left_out"] = left_out
    result["evaluated_with"] = _evaluations_key(evaluations)
    # Of this call: a run that goes on later has spent more. wall_seconds is of the training.
    result["seconds"] = {"run": time.monotonic() - began, "evaluate": evaluate_seconds}
    checkpoint.write_json_atomic(run / "result.json", result)


def _without_encoder(evaluations: dict[str, Any]) -> dict[str, str]:
    """Evaluations that raw pixels cannot have, and why."""
    from mim.evaluate import EVALUATIONS, EncoderEvaluation

    reason = "it needs an encoder, and raw pixels have none"
    names = [n for n in evaluations if issubclass(EVALUATIONS.get(n), EncoderEvaluation)]
    return dict.fromkeys(names, reason)


def _on_images_of(encoder: Encoder, config: Config) -> Encoder:
    """An encoder on other images, read at its own size and with its own normalisation."""
    own = encoder.data
    data = replace(
        config.data,
        image_size=own.image_size,
        channels=own.channels,
        mean=own.mean,
        std=own.std,
    )
    return replace(encoder, data=data)


def _child(
    item: Planned, evaluations: dict[str, Any], show: str, share: tuple[int, int] = (0, 1)
) -> None:
    """One run in a process of its own: its memory is its own, and its failure too."""
    _take_share(*share)
    if show != "plain":
        progress.silence()
    if show == "live":  # what libraries print would tear the table on the terminal
        run = Path(item.config.output)
        checkpoint.prepare_folder(run)
        with (run / "stderr.log").open("ab") as file:
            os.dup2(file.fileno(), 2)

    # A fork server's children inherit its start method; loader workers started by it would not
    # notice when the run is killed.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with between_imports():
            hear()
            code = run_noted(item, evaluations)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def run_noted(item: Planned, evaluations: dict[str, Any]) -> int:
    """:func:`run_one`; what fails is noted in the run folder. Returns the exit code."""
    from mim.training.pretrain import Interrupted, TrainingError

    try:
        run_one(item, evaluations)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        return 130
    except InUse as error:  # by a job of an earlier call: what it writes is its own
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        known = isinstance(error, (UserError, TrainingError))
        if not known:
            traceback.print_exc()
        text = str(error) if known else f"{type(error).__name__}: {error}"
        _write_failure(item, text)
        return 1
    return 0


def _end_with_parent() -> None:
    """Save and stop when the comparison was killed: a second call shall find the folder free."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _write_failure(item: Planned, error: str) -> None:
    run = Path(item.config.output)
    run.mkdir(parents=True, exist_ok=True)
    failure = {
        "format": checkpoint.FORMAT,
        "status": "failed",
        "error": error,
        "kind": item.kind,
        "name": item.folder,
        "axes": item.axes,
        "seed": item.config.seed,
        "config": to_dict(item.config),
    }
    checkpoint.write_json_atomic(run / "result.json", failure)


def _state(item: Planned, evaluations: str) -> str:
    """done, or what is left: evaluate or train.

    Raises:
        UserError: if the folder holds a run with another config.
    """
    run = Path(item.config.output)
    if not (run / "config.yaml").is_file():
        return "train"
    old = _loose_config(run)
    checkpoint.check_same_run(checkpoint.fingerprint(old), item.config, run)
    if old.data.fingerprint not in (None, item.config.data.fingerprint):
        reason = "holds a run over other images: names or labels have changed"
        raise UserError(f"output: {str(run)!r} {reason}. Choose another output")
    result = checkpoint.read_result(run)
    if result.get("status") != "finished":
        (run / "result.json").unlink(missing_ok=True)  # of a failure: try again
        return "train"
    return "done" if result.get("evaluated_with") == evaluations else "evaluate"


def _loose_config(run: Path) -> Config:
    return read_args(Config, ["--config", str(run / "config.yaml")])


SHOWS = ("auto", "live", "plain", "quiet")


@dataclass(frozen=True)
class Launch:
    """Where and how the runs of a comparison are computed; it changes no number.

    Attributes:
        jobs: how many at once. Of several on one machine, speed and memory tell little.
        launcher: local, or submitit (SLURM; needs ``mim[slurm]``).
        slurm: what submitit is told: timeout_min, slurm_partition, gpus_per_node, ...
    """

    jobs: int = 1
    launcher: str = "local"
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise setting_error("--jobs", self.jobs, "must be at least 1")
        if self.launcher not in LAUNCHERS:
            raise choice_error("--launcher", self.launcher, LAUNCHERS)
        if self.slurm and self.launcher != "submitit":
            raise setting_error("--slurm", self.slurm, "is for --launcher submitit")


LAUNCHERS = ("local", "submitit")


def compare(
    config: CompareConfig, command: str = "", show: str = "auto", launch: Launch | None = None
) -> Path:
    """Run a comparison and write its report.

    Finished runs are kept; an interrupted one goes on from its checkpoint; a run whose config has
    changed is refused. A run that fails is reported, and the others go on.

    Args:
        config: the comparison.
        command: how it was called, for the report.
        show: live (a table of all runs, on a terminal), plain (lines), quiet (failures alone), all
            on stderr; auto is live on a terminal and plain elsewhere. Where it is live, what a run
            prints to stderr goes to ``stderr.log`` in its folder.
        launch: where the runs are computed; by default here, one after the other.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: for a mistake in the config, before any training.
        Interrupted: after a signal, with everything saved.
    """
    if show not in SHOWS:
        raise choice_error("show", show, SHOWS)
    if show == "auto":
        show = "live" if Console(stderr=True).is_terminal else "plain"
    output = Path(config.output)
    checkpoint.prepare_folder(output)
    with sole_use(output):
        return _compare(config, command, show, launch or Launch())


def _compare(config: CompareConfig, command: str, show: str, launch: Launch) -> Path:
    from mim.evaluate import build_evaluation, check_files
    from mim.report import write_report

    output = Path(config.output)
    planned = plan(config)
    built = {name: build_evaluation(name, given) for name, given in config.evaluations.items()}
    for item in planned:
        if item.kind != "pixels":
            check_files(built, Path(item.config.output))
    planned, shown = _with_copies(_check_data(planned, config), config)
    todo = _evaluations_key(config.evaluations)
    states = {item.folder: _state(item, todo) for item in planned}
    overview = {
        "format": checkpoint.FORMAT,
        "name": config.name,
        "axes": config.all_axes,
        "variants": config.variants,
        "command": command,
        "base": to_dict(config.base),
        "evaluations": config.evaluations,
        "runs": [item.folder for item in planned],
        "planned": [
            {"folder": i.folder, "kind": i.kind, "axes": i.axes, "seed": i.config.seed}
            for i in planned
        ],
    }
    checkpoint.write_json_atomic(output / "comparison.json", overview)
    checkpoint.write_text_atomic(output / "compare.yaml", to_yaml(shown))

    with _signals_interrupt():
        failed = _run_all(planned, states, config.evaluations, output, show, launch)
    report = write_report(output)
    _track(config, output)
    if failed:
        names = ", ".join(failed)
        print(f"{len(failed)} of {len(planned)} failed: {names}", file=sys.stderr)
    return report


def _with_copies(
    planned: list[Planned], config: CompareConfig
) -> tuple[list[Planned], CompareConfig]:
    """All runs load the comparison's copies of plug-ins: a later edit reaches none of them."""
    output, own = Path(config.output), config.base.plugins
    kept = keep_plugins(own, output)
    copies = tuple(beside(plugin, output / "compare.yaml") for plugin in kept)
    held = [
        replace(item, config=replace(item.config, plugins=copies))
        if item.config.plugins == own
        else item
        for item in planned
    ]
    return held, replace(config, base=replace(config.base, plugins=kept))


def _track(config: CompareConfig, output: Path) -> None:
    """The report as the trackers' artifact, where there are trackers."""
    from mim.report import read_comparison
    from mim.report.overview import closing_table
    from mim.training.runtime.trackers import track_report

    files = [output / name for name in ("report.html", "report.md", "results.csv")]
    files += sorted((output / "tables").iterdir())
    text = (output / "report.md").read_text(encoding="utf-8")
    table = closing_table(read_comparison(output))
    track_report(config.base, config.name, output, files, table, text)


def _run_all(
    planned: list[Planned],
    states: dict[str, str],
    evaluations: dict[str, Any],
    output: Path,
    show: str,
    launch: Launch,
) -> list[str]:
    """Runs what is left, so many at once as there are jobs; returns the folders that failed."""
    from mim.report.overview import Watched, live_overview

    failed = []
    stopped: list[tuple[Planned, int | None]] = []
    with contextlib.ExitStack() as stack:
        watched = Watched()
        if show == "live":
            watched = stack.enter_context(live_overview(output, Console(stderr=True)))
        jobs: Jobs = _LocalJobs(evaluations, show, launch.jobs)
        if launch.launcher == "submitit":
            from mim.compare.launchers import SubmittedJobs

            work = functools.partial(run_noted, evaluations=evaluations)
            jobs = SubmittedJobs(work, output, launch.slurm)
        left = deque(enumerate(planned, start=1))
        try:
            while left or jobs.running:
                while left and len(jobs.running) < launch.jobs:
                    number, item = left.popleft()
                    state = states[item.folder]
                    if show == "plain":
                        line = f"[{number}/{len(planned)}] {item.folder}: {state}"
                        print(line, file=sys.stderr, flush=True)
                    if state != "done":
                        watched.active.add(item.folder)
                        jobs.start(item)
                for item, code in jobs.wait() if jobs.running else []:
                    watched.active.discard(item.folder)
                    if code in _INTERRUPTED:
                        stopped.append((item, code))
                        raise KeyboardInterrupt
                    if code:
                        failed.append(item.folder)
                        _note_death(item, code)
        except KeyboardInterrupt:
            # Ctrl-C has reached the children too, a kill of this process has not.
            stopped += jobs.stop()
            stack.close()  # the table gives the terminal back
            for item, last in stopped:
                print(f"{item.folder}: {_left_as(item, last)}", file=sys.stderr, flush=True)
            raise
    return failed


_INTERRUPTED = (130, 138, 143)


def _left_as(item: Planned, code: int | None) -> str:
    """What a run that was stopped has left."""
    run = Path(item.config.output)
    found = checkpoint.checkpoints(run)
    saved = f"goes on from {found[-1].stem}" if found else "had saved nothing yet"
    if checkpoint.read_result(run).get("status") == "finished":
        saved = "is trained"
    if code is None:
        return f"its job has not left in time, and may still compute; {saved}"
    if code == 0:
        return "finished"
    how = "stopped" if code in _INTERRUPTED else f"ended without saving (code {code})"
    return f"{how}; {saved}"


class Jobs(Protocol):
    """Where runs are computed.

    Attributes:
        running: what was started and has not ended.
    """

    @property
    def running(self) -> Collection[object]: ...

    def start(self, item: Planned) -> None:
        """Start a run."""

    def wait(self) -> list[tuple[Planned, int]]:
        """Those that have ended, one at least, each with its exit code."""

    def stop(self) -> list[tuple[Planned, int | None]]:
        """Let all save, and wait for them; each with its exit code, None where it does not end."""


class _LocalJobs:
    """A process of this machine for each run.

    Args:
        evaluations: of every run.
        show: see :func:`compare`.
        count: how many run at once; they share GPUs, or the cores.
    """

    def __init__(self, evaluations: dict[str, Any], show: str, count: int) -> None:
        self.evaluations, self.show, self.count = evaluations, show, count
        self.running: dict[Any, tuple[Any, Planned, int]] = {}
        self._context = server_context()

    def start(self, item: Planned) -> None:
        place = min(set(range(self.count)) - {place for _, _, place in self.running.values()})
        share = (place, self.count)
        arguments = (item, self.evaluations, self.show, share)
        process = self._context.Process(target=_child, args=arguments)
        process.start()
        self.running[process.sentinel] = (process, item, place)

    def wait(self) -> list[tuple[Planned, int]]:
        ended = []
        for sentinel in multiprocessing.connection.wait(list(self.running)):
            process, item, _ = self.running.pop(sentinel)
            process.join()
            ended.append((item, int(process.exitcode)))
        return ended

    def stop(self) -> list[tuple[Planned, int | None]]:
        for process, _, _ in self.running.values():
            process.terminate()
        for process, _, _ in self.running.values():
            process.join()
        return [(item, int(process.exitcode)) for process, item, _ in self.running.values()]


def _take_share(place: int, count: int) -> None:
    """Of ``count`` runs at once, this one takes its GPU in turn, and its part of the cores."""
    import torch

    if count == 1:
        return
    # What the launcher of this comparison was given, not what the machine has.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1, which end a comparison as Ctrl-C does.

    Attributes:
        code: the exit code, 128 + the signal's number.
    """

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    old: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
        for name in ("SIGTERM", "SIGUSR1"):  # Windows lacks the second
            if number := getattr(signal, name, None):
                old[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _note_death(item: Planned, code: int | None) -> None:
    """A process that was killed could not write why it failed."""
    run = Path(item.config.output)
    if checkpoint.read_result(run).get("status") == "failed" or in_use(run):
        return
    _write_failure(item, f"the process ended with code {code} (a kill, or no memory left)")


def server_context() -> Any:
    """Processes that start with the libraries loaded and no threads running, where possible."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    start_server()
    return context


def _check_data(planned: list[Planned], config: CompareConfig) -> list[Planned]:
    """Open each distinct data set once, so that its faults show before any training.

    Returns:
        The plan, with the fingerprint of its images in each config: runs that come later may not
        see others.
    """
    from mim.data import open_source, steps_per_epoch
    from mim.evaluate import build_evaluation

    seen: dict[str, str] = {}
    held = []
    for item in planned:
        key = json.dumps(to_dict(item.config.data), sort_keys=True)
        if key not in seen:
            train = open_source(item.config.data, "train")
            val = open_source(item.config.data, "val")
            steps_per_epoch(train, item.config.data)
            for name, settings in config.evaluations.items():
                build_evaluation(name, settings).check(train, val)
            seen[key] = f"{train.fingerprint()}-{val.fingerprint()}"
        wanted = item.config.data.fingerprint
        if wanted not in (None, seen[key]):
            reason = f"asks for other images than there are, which have {seen[key]}"
            raise setting_error("data.fingerprint", wanted, reason)
        data = replace(item.config.data, fingerprint=seen[key])
        held.append(replace(item, config=replace(item.config, data=data)))
    return held


def read_compare_config(args: list[str], **parser_args: Any) -> CompareConfig:
    """The comparison that command-line arguments describe.

    Raises:
        UserError: for an unknown key or a value that is refused.
    """
    return read_args(CompareConfig, args, **parser_args)
