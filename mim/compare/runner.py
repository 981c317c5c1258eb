"""The runs of a comparison, one after the other or several at once: trained, then evaluated."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from mim import moved
from mim.compare.budget import equal_budget
from mim.compare.launchers import Launch, LocalJobs, SubmittedJobs
from mim.compare.plan import (
    RULES,
    CompareConfig,
    Planned,
    check_measure,
    hold_to_images,
    plan,
    with_copies,
)
from mim.compare.rounds import keep_disagreement, rounds
from mim.compare.shared_steps import take_shared_steps, with_shared_steps
from mim.compare.tune import tuned
from mim.core import progress
from mim.core.config import Config, DataConfig
from mim.core.cpu.process import tune_process
from mim.core.errors import TrainingError, UserError
from mim.core.fingerprints import same_images
from mim.core.lock import InUse, in_use, sole_use
from mim.core.registry import Registry
from mim.core.settings import flatten, read_args, to_dict, to_yaml
from mim.core.signals import Interrupted
from mim.data.detection import FOLDERS, keep_outside
from mim.evaluate import (
    EVALUATIONS,
    Encoder,
    EncoderEvaluation,
    evaluate,
    pixels_encoder,
    record,
    run_encoder,
    untrained_encoder,
)
from mim.evaluate.protocol import Protocol, encoder_digest, files_of, outdated, protocol_of
from mim.interop.starting import pretrain_from
from mim.masks.generators import MASKS
from mim.model.decoders import DECODERS
from mim.model.regimes import REGIMES
from mim.model.targets import TARGETS
from mim.training import checkpoint
from mim.training.results import NAME, read_result, update_result
from mim.training.runtime.machine import pick_device
from mim.training.settings import checked

Watch = Callable[[], AbstractContextManager[set[str]]]
"""Shows the runs meanwhile; holds the folders of those that are being computed."""


class State(NamedTuple):
    """What is left to do for a run.

    Attributes:
        todo: train, evaluate or done.
        again: evaluations that were measured and are to be measured again, and why.
    """

    todo: str
    again: dict[str, str]


def run_comparison(
    config: CompareConfig,
    command: str = "",
    show: str = "plain",
    launch: Launch | None = None,
    watch: Watch | None = None,
    on_end: Callable[[], object] = lambda: None,
) -> list[str]:
    """Train and evaluate what is left of a comparison.

    Finished runs are kept, and so is each evaluation whose settings, images and encoder are those
    it was measured with; an interrupted run resumes from its checkpoint; a run whose config has
    changed is refused. A run that fails is reported, and the others continue.

    Args:
        config: the comparison.
        command: how it was called, for the report.
        show: plain (lines), quiet (failures alone), or live, where ``watch`` shows the runs and
            what a run prints to stderr goes to ``stderr.log`` in its folder.
        launch: where the runs are computed; by default here, one after the other.
        watch: opened while runs are computed.
        on_end: called after the last run, while the folder is still this process's alone.

    Returns:
        The folders of the runs that failed.

    Raises:
        UserError: for a mistake in the config, before any training.
        KeyboardInterrupt: after a signal, with everything saved.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        reason = "starts its own processes; call it once, without torchrun or accelerate launch"
        raise UserError(f"compare: {reason} (WORLD_SIZE is {world}); --jobs N runs N at once")
    output = Path(config.output)
    if config.base.data.source in FOLDERS and not (output / "comparison.json").is_file():
        keep_outside("output", output, config.base.data.path)
    checkpoint.prepare_folder(output)
    with sole_use(output):
        planned = plan(config)
        planned, lengths = equal_budget(planned, config)
        planned, config = with_copies(hold_to_images(planned, config.evaluations), config)
        for length in lengths if show != "quiet" else ():
            progress.note(length.line(config.budget))
        work = functools.partial(_run_all, output=output, show=show, launch=launch or Launch())
        with _signals_interrupt():
            planned = tuned(planned, config, functools.partial(_run_tuning, work, config))
            planned = with_shared_steps(planned)
            states = _states(planned, config, command)
            if show != "quiet":
                _note_states(planned, states, config)
            failed: list[str] = []
            begun: set[str] = set()
            for part in rounds(planned, config):
                begun |= {item.folder for item in part}
                _announce(output, [i.folder for i in planned if i.folder in begun])
                decides = config.decides if config.primary or config.seeds else ""
                failed += work(part, states, config.evaluations, ("primary", decides), watch=watch)
            keep_disagreement([item for item in planned if item.folder in begun], config)
        on_end()
    if failed:
        names = ", ".join(failed)
        progress.note(f"{len(failed)} of {len(begun)} failed: {names}")
    return failed


def _run_tuning(
    work: Callable[..., list[str]],
    config: CompareConfig,
    items: list[Planned],
    evaluations: dict[str, Any],
) -> None:
    """Train and evaluate the runs in which settings are chosen, as far as they are not finished."""
    held, rule = hold_to_images(items, evaluations), config.tune_rule
    states = {item.folder: _state(item, evaluations, {}, {}) for item in held}
    work(held, states, evaluations, ("tune.by", rule.by if rule else ""))


def _note_states(planned: list[Planned], states: dict[str, State], config: CompareConfig) -> None:
    """Say what is measured again, and what a row lacks."""
    for item in planned:
        state = states[item.folder]
        for name, reason in state.again.items():
            progress.note(f"{item.folder}: {name} is measured again: {reason}")
        if item.kind == "pixels" and state.todo != "done":
            for name, reason in _without_encoder(config.evaluations).items():
                progress.note(f"{item.folder}: {name} left out: {reason}")


def _states(planned: list[Planned], config: CompareConfig, command: str) -> dict[str, State]:
    """What is left of each run; the plan is written down once every run may go on."""
    output, digests = Path(config.output), dict[str, str]()
    before = _inputs_before(output)
    inputs = {i.folder: files_of(to_dict(i.config), digests) for i in planned}
    states = {}
    for item in planned:
        known = (before.get(item.folder, {}), inputs[item.folder])
        states[item.folder] = _state(item, config.evaluations, *known)
    overview = {
        "format": checkpoint.FORMAT,
        "name": config.name,
        "axes": config.all_axes,
        "variants": config.variants,
        "command": command,
        "base": to_dict(config.base),
        **{key: getattr(config, key) for key in RULES},
        "components": _components(planned),
        "runs": [item.folder for item in planned],
        "planned": [
            {"folder": item.folder, "kind": item.kind, "axes": item.axes}
            | {"seed": item.config.seed, "inputs": inputs[item.folder]}
            for item in planned
        ],
    }
    checkpoint.write_json_atomic(output / "comparison.json", overview)
    checkpoint.write_text_atomic(output / "compare.yaml", to_yaml(config))
    return states


def _components(planned: list[Planned]) -> dict[str, str]:
    """Setting and name of every component -> what it says of itself, for the recipes."""
    registries: dict[str, Registry[Any]] = {
        "mask.name": MASKS,
        "model.regime.name": REGIMES,
        "model.decoder.name": DECODERS,
        "model.target.name": TARGETS,
    }
    found = {}
    for item in planned:
        tree = flatten(to_dict(item.config))
        for key, registry in registries.items():
            words = (registry.get(tree[key]).__doc__ or "").strip().partition("\n\n")[0]
            found[f"{key} {tree[key]}"] = f"{tree[key]}: {' '.join(words.split())}"
    return found


def _announce(output: Path, folders: list[str]) -> None:
    """Write down which runs have begun or are about to, for whoever reads the folder."""
    path = output / "comparison.json"
    overview = json.loads(path.read_text(encoding="utf-8"))
    checkpoint.write_json_atomic(path, {**overview, "runs": folders})


def _inputs_before(output: Path) -> dict[str, dict[str, str]]:
    """What each run was planned to read when the comparison was called last."""
    try:
        content = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
        return {item["folder"]: item.get("inputs") or {} for item in content.get("planned", [])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"cannot be read ({error}); remove it, and it is written again"
        raise UserError(f"{output / 'comparison.json'}: {reason}") from error


def _state(
    item: Planned, evaluations: dict[str, Any], before: Mapping[str, str], inputs: Mapping[str, str]
) -> State:
    """What is left of a run.

    Args:
        item: the run.
        evaluations: all that it shall have.
        before: digests of the files that its training was to read when it began.
        inputs: the digests of today.

    Raises:
        UserError: if the folder holds a run with another config, or of other files.
    """
    run = Path(item.config.output)
    begin = State("train" if item.kind == "run" else "evaluate", {})
    if not (run / "config.yaml").is_file():
        return begin
    old = read_args(Config, ["--config", str(run / "config.yaml")])
    checkpoint.check_same_run(checkpoint.fingerprint(old), item.config, run)
    other = "Choose another output"
    saved, seen = old.data.fingerprint, item.config.data.fingerprint
    if item.kind == "run" and saved is not None and (seen is None or not same_images(saved, seen)):
        reason = "holds a run over other images: names, labels or contents have changed"
        raise UserError(f"output: {str(run)!r} {reason}. {other}")
    for key, digest in inputs.items() if item.kind == "run" else ():
        if before.get(key, digest) != digest:
            reason = f"holds a run over other files: the content of {key} has changed"
            raise UserError(f"output: {str(run)!r} {reason}. {other}")
    result = read_result(run)
    if result.get("status") == "failed" and (item.kind != "run" or "steps" in result):
        kept = {key: value for key, value in result.items() if key != "error"}
        # An evaluation failed.
        result = update_result(run, lambda _: {**kept, "status": "finished"})
    if result.get("status") != "finished":
        (run / NAME).unlink(missing_ok=True)  # of a failure: try again
        return begin
    left = _left(item, evaluations, result)
    again = {name: reason for name, reason in left.items() if reason}
    return State("evaluate" if left else "done", again)


def _left(item: Planned, evaluations: dict[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """The evaluations that are to be measured, and why they are measured again."""
    if not evaluations:
        return {}
    # Of an older version, which knew of the evaluations' settings alone.
    legacy = result.get("evaluated_with") == json.dumps(evaluations, sort_keys=True)
    return outdated(result, _protocols(item, evaluations), legacy)


def _protocols(item: Planned, evaluations: dict[str, Any]) -> dict[str, Protocol]:
    """What the numbers of a run's evaluations depend on."""
    config, weights = item.config, None
    if item.given:
        own, weights = checkpoint.read_config(item.given), Path(item.given)
        config = replace(own, data=_read_as(own.data, config.data))
    elif item.kind == "run":
        weights = Path(config.output)
    kind = item.kind if item.kind in ("untrained", "pixels") else "run"
    encoder = encoder_digest(config, weights, kind)
    without = _without_encoder(evaluations) if item.kind == "pixels" else {}
    return {
        name: protocol_of(name, given, item.config.data.fingerprint or "", encoder)
        for name, given in evaluations.items()
        if name not in without
    }


def run_one(item: Planned, evaluations: dict[str, Any]) -> None:
    """Train where needed, then evaluate; the run folder's ``result.json`` says both.

    Raises:
        UserError: as :func:`mim.training.pretrain.pretrain` and :func:`mim.evaluate.evaluate`.
    """
    began = time.monotonic()
    checked(item.config)  # a process of its own has not imported the plugins yet
    run = Path(item.config.output)
    device = pick_device(item.config.train.device, "train.device")
    tune_process(device)
    facts = _facts(item)
    if item.kind == "run":
        facts |= take_shared_steps(item)
        pretrain_from(item.config, with_decoder=False)  # alike for every regime
    else:
        checkpoint.prepare_folder(run)
        checkpoint.write_config(run, item.config)
        facts |= {"format": checkpoint.FORMAT, "status": "finished"}
        facts |= {"config": to_dict(item.config)}
        facts["seed"] = item.config.seed if item.kind == "untrained" else None
        if item.given:
            facts["given"] = item.given
    update_result(run, lambda result: {**result, **facts})
    evaluating = time.monotonic()
    if evaluations:
        _evaluate(item, evaluations, device)
    ended = time.monotonic()
    # Of this call: a run that was resumed has spent more. wall_seconds is of the training.
    seconds = {"run": ended - began, "evaluate": ended - evaluating if evaluations else 0.0}
    update_result(run, lambda result: {**result, "seconds": seconds})


def _facts(item: Planned) -> dict[str, Any]:
    return {"kind": item.kind, "name": item.folder, "axes": item.axes}


def _evaluate(item: Planned, evaluations: dict[str, Any], device: str) -> None:
    """Measure what is left; each evaluation is written as it ends."""
    run = Path(item.config.output)
    encoder = _encoder(item)
    left_out = _without_encoder(evaluations) if encoder.vit is None else {}
    if left_out:
        update_result(run, lambda result: {**result, "evaluations_left_out": left_out})
    left = _left(item, evaluations, read_result(run))
    protocols = _protocols(item, evaluations)

    def keep(name: str, numbers: dict[str, float]) -> None:
        record(run, encoder, name, evaluations[name], numbers, protocols[name])

    if left:
        progress.stage(f"{item.folder}  evaluating: {', '.join(left)}")
        wanted = {name: evaluations[name] for name in left}
        evaluate(encoder, wanted, device=device, folder=run, on_result=keep)


def _encoder(item: Planned) -> Encoder:
    if item.given:
        encoder = run_encoder(Path(item.given))
        return replace(encoder, data=_read_as(encoder.data, item.config.data))
    if item.kind == "run":
        return run_encoder(Path(item.config.output))
    if item.kind == "untrained":
        return untrained_encoder(item.config)
    return pixels_encoder(item.config.data)


def _without_encoder(evaluations: dict[str, Any]) -> dict[str, str]:
    """Evaluations that raw pixels cannot have, and why."""
    names = [n for n in evaluations if issubclass(EVALUATIONS.get(n), EncoderEvaluation)]
    return dict.fromkeys(names, "it needs an encoder, and raw pixels have none")


def _read_as(own: DataConfig, data: DataConfig) -> DataConfig:
    """Other images, read at an encoder's own size and with its own normalisation."""
    measured = replace(data.measured, mean=own.measured.mean, std=own.measured.std)
    if own.measured.range is not None:
        measured = replace(measured, range=own.measured.range)
    kept = {key: getattr(own, key) for key in ("image_size", "channels", "mean", "std", "range")}
    return replace(data, measured=measured, **kept)


def run_noted(item: Planned, evaluations: dict[str, Any], show: str = "plain") -> int:
    """Call :func:`run_one`, note a failure in the run folder, and return the exit code."""
    if show != "plain":
        progress.silence()
    try:
        if show == "live":  # what libraries print would tear the table on the terminal
            run = Path(item.config.output)
            checkpoint.prepare_folder(run)
            with (run / "stderr.log").open("ab") as file:
                os.dup2(file.fileno(), 2)
        run_one(item, evaluations)
    except Interrupted as stop:
        progress.note(str(stop))
        return stop.code
    except KeyboardInterrupt:
        return 130
    except InUse as error:  # by a job of an earlier call: what it writes is its own
        progress.note(str(error))
        return _NOTED
    except Exception as error:
        plain = isinstance(error, (UserError, TrainingError))
        if not plain and not isinstance(error, OSError):
            traceback.print_exc()
        _write_failure(item, str(error) if plain else f"{type(error).__name__}: {error}")
        return _NOTED
    return 0


def _write_failure(item: Planned, error: str) -> None:
    """Note a failure beside what the run has reached: its training, evaluations that ended."""
    failure = {"format": checkpoint.FORMAT, "status": "failed", "error": error, **_facts(item)}
    failure |= {"seed": item.config.seed, "config": to_dict(item.config)}
    run = Path(item.config.output)
    try:
        run.mkdir(parents=True, exist_ok=True)
        update_result(run, lambda result: {**result, **failure})
    except (OSError, UserError) as cannot:  # such as a full disk, which may be what failed
        progress.note(f"{item.folder}: {error}; it cannot be noted: {cannot}")


def _run_all(
    planned: list[Planned],
    states: dict[str, State],
    evaluations: dict[str, Any],
    decides: tuple[str, str],
    *,
    output: Path,
    show: str,
    launch: Launch,
    watch: Watch | None = None,
) -> list[str]:
    """Run what is left, ``launch.jobs`` at once; return the folders that failed.

    Raises:
        UserError: once a run lacks the measure that decides, which a setting names.
    """
    if show == "live" and watch is None:  # tuning, before there is a table of runs
        show = "plain"
    failed = []
    stopped: list[tuple[Planned, int | None]] = []
    work = functools.partial(run_noted, evaluations=evaluations)
    jobs: LocalJobs | SubmittedJobs
    if launch.launcher == "submitit":
        jobs = SubmittedJobs(work, output, launch.slurm)
    else:
        jobs = LocalJobs(functools.partial(work, show=show), launch.jobs)
    with contextlib.ExitStack() as stack:
        active = stack.enter_context(watch()) if watch is not None else set[str]()
        left = deque(enumerate(planned, start=1))
        try:
            while left or jobs.running:
                while left and len(jobs.running) < launch.jobs:
                    number, item = left.popleft()
                    todo = states[item.folder].todo
                    if show == "plain":
                        progress.note(f"[{number}/{len(planned)}] {item.folder}: {todo}")
                    if todo == "done":
                        _check_measured(item, *decides)
                    else:
                        active.add(item.folder)
                        jobs.start(item)
                for item, code in jobs.wait() if jobs.running else []:
                    active.discard(item.folder)
                    if code in _INTERRUPTED:
                        stopped.append((item, code))
                        raise KeyboardInterrupt
                    if code == 0:
                        _check_measured(item, *decides)
                    else:
                        failed.append(item.folder)
                    if code not in (0, _NOTED):
                        _note_death(item, code)
        except (KeyboardInterrupt, UserError):
            # Ctrl-C has reached the children too, a kill of this process has not.
            stopped += jobs.stop()
            stack.close()  # the table gives the terminal back
            for item, last in stopped:
                progress.note(f"{item.folder}: {_left_as(item, last)}")
            raise
    return failed


def _check_measured(item: Planned, setting: str, wanted: str) -> None:
    """Refuse a measure that a run was evaluated for and has not."""
    evaluations = read_result(Path(item.config.output)).get("evaluations", {})
    numbers = evaluations.get(wanted.partition(".")[0], {})
    if item.kind == "run" and numbers:
        check_measure(setting, wanted, numbers)


_INTERRUPTED = (130, 138, 143)
_NOTED = 1


def _left_as(item: Planned, code: int | None) -> str:
    """What a run that was stopped has left."""
    run = Path(item.config.output)
    found = checkpoint.checkpoints(run)
    saved = f"goes on from {found[-1].stem}" if found else "had saved nothing yet"
    if read_result(run).get("status") == "finished":
        saved = "is trained"
    if code is None:
        return f"its job has not left in time, and may still compute; {saved}"
    if code == 0:
        return "finished"
    how = "stopped" if code in _INTERRUPTED else f"ended without saving (code {code})"
    return f"{how}; {saved}"


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
    if read_result(run).get("status") == "failed" or (run.is_dir() and in_use(run)):
        return
    _write_failure(item, f"the process ended with code {code} (a kill, or no memory left)")


def __getattr__(name: str) -> Any:
    return moved.attribute(__name__, name)
