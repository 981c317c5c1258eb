"""Run folders: checkpoints and the encoder's weights.

A checkpoint holds only tensors and plain values and is read with ``weights_only=True``, so that
loading one never runs code.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mim.core.errors import TrainingError, UserError
from mim.core.fields import came_later, is_free
from mim.core.files import (  # noqa: F401  (part of this module's interface)
    file_digest,
    prepare_folder,
    write_atomic,
    write_json_atomic,
    write_text_atomic,
)
from mim.core.plugins import identity, keep_plugins
from mim.core.settings import flatten, to_dict, to_yaml
from mim.training.results import read_result  # noqa: F401  (part of this module's interface)
from mim.training.settings import Config, read_tree

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of ``result.json``, and of checkpoints before ``CHECKPOINT_FORMAT``."""
CHECKPOINT_FORMAT = 2
TASK = "mim_task"
"""Metadata key of a file of weights: the evaluation that its head is for."""
_NAME = re.compile(r"step_(\d+)\.pt")
_MILESTONE = "# milestone"  # sha256sum skips such a line


def write_config(run: Path, config: Config) -> None:
    """Writes ``config.yaml`` into a run folder, and copies of the plug-ins that it names.

    Raises:
        UserError: if a plug-in differs from the copy that is there already.
    """
    kept = keep_plugins(config.plugins, run)
    write_text_atomic(run / "config.yaml", to_yaml(replace(config, plugins=kept)))


def read_config(run: str | Path, trust: bool = False) -> Config:
    """Reads the config of a run folder and imports its plug-ins.

    Args:
        run: the folder.
        trust: whether plug-ins may run that have never run on this machine.

    Raises:
        UserError: if there is no config, or its plug-ins are not trusted.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{str(run)!r} is no run folder: it has no config.yaml")
    # Unchecked: what only training needs (a file of masks, a teacher's weights) may be gone.
    return read_tree(Config, [path], trust=trust)


def checkpoints(run: str | Path) -> list[Path]:
    """Lists the checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (Path(run) / "checkpoints").glob("step_*.pt")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def path_of(run: Path, step: int) -> Path:
    """Returns where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step:08d}.pt"


def digest_file(path: Path) -> Path:
    """Returns the path of a checkpoint's SHA-256, in the form that ``sha256sum -c`` reads."""
    return path.with_name(f"{path.name}.sha256")


def _is_milestone(path: Path) -> bool:
    recorded = digest_file(path)
    return recorded.is_file() and recorded.read_bytes().startswith(_MILESTONE.encode())


def save_checkpoint(
    run: Path, state: dict[str, Any], step: int, keep: int, milestone: bool = False
) -> Path:
    """Writes ``checkpoints/step_N.pt`` atomically, then removes all but the newest ``keep``.

    Its digest is written first, so that a checkpoint of this version always has one.

    Args:
        run: the run folder.
        state: its content besides format and step.
        step: steps done.
        keep: number of checkpoints that stay, milestones not counted.
        milestone: whether it is never removed.

    Returns:
        Its path.

    Raises:
        OSError: if it cannot be written; earlier ones are untouched.
    """
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    path = path_of(run, step)
    content = {"format": CHECKPOINT_FORMAT, "step": step, **state}

    def write(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's zip writer hides that the disk is full
            free, needed = shutil.disk_usage(folder).free, _bytes(content)
            if free < needed:
                reason = f"{os.strerror(errno.ENOSPC)} ({free:,} bytes free, {needed:,} needed)"
                raise OSError(errno.ENOSPC, reason) from error
            raise OSError(f"torch cannot write it: {error}") from error
        comment = f"{_MILESTONE}\n" if milestone else ""
        line = f"{comment}{file_digest(temporary)}  {path.name}\n"
        write_text_atomic(digest_file(path), line)

    write_atomic(path, write)
    passing = [old for old in checkpoints(run) if not _is_milestone(old)]
    for old in passing[:-keep]:
        old.unlink()
        digest_file(old).unlink(missing_ok=True)
    return path


def _bytes(value: Any) -> int:
    """Returns the size of the tensors in a state."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(_bytes, parts)) if isinstance(value, (dict, list, tuple)) else 0


def snapshot(value: Any) -> Any:
    """Copies a state's tensors to host memory, where training does not change them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(part) for part in value)
    return value


class RunStore:
    """The checkpoints of a run folder, each with the run's identity besides the state."""

    def __init__(self, run: Path, keep: int, identity: dict[str, Any] | None = None) -> None:
        self.run, self.keep, self.identity = run, keep, identity or {}
        self.path, self.place, self.again = run, f"of {str(run)!r}", "go on with --resume auto"

    def write(self, state: dict[str, Any], step: int, milestone: bool) -> None:
        save_checkpoint(self.run, {**self.identity, **state}, step, self.keep, milestone)


class FileStore:
    """The single file from which a stopped evaluation resumes.

    Args:
        path: of the file.
        identity: of the computation; a file with another one is not used.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self.place, self.again = f"in {str(path)!r}", "do the same again"

    def read(self) -> dict[str, Any] | None:
        """Returns the state that was written last; None if there is none to resume from."""
        if not self.path.is_file():
            return None
        reason = "is of other settings, images or weights"
        try:
            saved = read_checkpoint(self.path)
            if saved["format"] == CHECKPOINT_FORMAT and saved["fingerprint"] == self.identity:
                return saved
        except UserError as error:
            reason = str(error)
        logger.warning("%s: %s; begun anew", self.path, reason)
        return None

    def write(self, state: dict[str, Any], step: int, milestone: bool) -> None:
        """Replaces the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        of_run = {"format": CHECKPOINT_FORMAT, "step": step, "fingerprint": self.identity}
        write_atomic(self.path, lambda temporary: torch.save({**of_run, **state}, temporary))

    def remove(self) -> None:
        """Deletes the file once the evaluation is done."""
        self.path.unlink(missing_ok=True)


class Saver:
    """Saves checkpoints; leaving the context waits for the last one.

    Args:
        store: where they go.
        background: whether :meth:`save` returns while a thread writes a copy of the state.
    """

    def __init__(self, store: RunStore | FileStore, background: bool = False) -> None:
        self.store, self.background = store, background
        self._thread: threading.Thread | None = None
        self._error: TrainingError | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.check()

    def save(self, state: dict[str, Any], step: int, milestone: bool = False) -> None:
        """Writes a checkpoint, once the one before is written.

        Raises:
            TrainingError: if either cannot be written.
        """
        self.wait()
        if self.background:
            arguments = (snapshot(state), step, milestone)
            # Not a daemon: Python waits for it at exit.
            self._thread = threading.Thread(target=self._write, args=arguments, name="mim-saver")
            self._thread.start()
        else:
            self._write(state, step, milestone)
            self.check()

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk; raises as :meth:`check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises TrainingError if a checkpoint could not be written."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, state: dict[str, Any], step: int, milestone: bool) -> None:
        try:
            self.store.write(state, step, milestone)
        except OSError as error:
            self._error = TrainingError(
                f"checkpoint of step {step} cannot be saved in {str(self.store.path)!r}: "
                f"{error.strerror or error}; the last good one is kept. Make room, then "
                f"{self.store.again}"
            )
        except Exception as error:
            if not self.background:
                raise
            # The run stops with it at its next step.
            reason = f"{type(error).__name__}: {error}"
            self._error = TrainingError(f"checkpoint of step {step} cannot be saved: {reason}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        UserError: if the file is torn, altered, holds code, or is of another format.
    """
    recorded = digest_file(path)
    if recorded.is_file():  # older versions wrote none
        *_, line = recorded.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if file_digest(path) != line.partition(" ")[0]:
            damage = f"is damaged: its SHA-256 is not the one in {recorded.name}"
            raise UserError(f"checkpoint {str(path)!r} {damage}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error)
        raise UserError(f"checkpoint {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, CHECKPOINT_FORMAT):
        known = f"{FORMAT} or {CHECKPOINT_FORMAT}"
        raise UserError(f"checkpoint {str(path)!r} is not of format {known} of mim")
    return state


def upgraded(state: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Converts a run's checkpoint to the current format.

    Format 1 was flat; early versions of it kept no flags of steps, no ``watch`` and no ``images``.
    """
    if state["format"] == CHECKPOINT_FORMAT:
        return state
    pending = state["pending"]
    rows = pending.tolist() if pending.dim() == 2 else [[loss, 0.0] for loss in pending.tolist()]
    hooks: dict[str, Any] = {"held_out": {"loss": state["val_loss"]}}
    if state.get("online"):
        hooks["online"] = {**state["online"], "accuracy": state["online_accuracy"]}
    counters = {name: state[name] for name in ("elapsed", "train_seconds", "train_loss")}
    counters["images"] = state.get("images", state["step"] * batch_size)
    counters["rows"] = [{"loss": loss, "flag": flag} for loss, flag in rows]
    unchanged = ("step", "fingerprint", "data", "model", "optimizer", "ema", "scaler")
    return {
        **{name: state[name] for name in unchanged if name in state},
        "format": CHECKPOINT_FORMAT,
        "watch": state.get("watch") or {},
        "state": counters,
        "hooks": hooks,
    }


def newest_checkpoint(run: str | Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads the newest sound checkpoint of a run.

    Returns:
        Its content, None if there is no checkpoint at all, and what is wrong with each newer one.

    Raises:
        UserError: if there are checkpoints and none is sound.
    """
    passed_over: list[str] = []
    found = checkpoints(run)
    for path in reversed(found):
        try:
            return read_checkpoint(path), passed_over
        except UserError as error:
            passed_over.append(str(error))
    if found:
        raise UserError(f"{str(run)!r} holds no sound checkpoint: {'; '.join(passed_over)}")
    return None, passed_over


def fingerprint(config: Config) -> dict[str, Any]:
    """Returns the dotted settings that decide what is computed."""
    flat = flatten(to_dict(config))
    flat["plugins"] = [identity(plugin) for plugin in config.plugins]
    return {key: value for key, value in flat.items() if not is_free(Config, key)}


def check_same_run(saved: dict[str, Any], config: Config, run: Path) -> None:
    """Compares a config with the :func:`fingerprint` in the checkpoint of a run folder.

    Raises:
        UserError: naming the settings that differ.
    """
    now = fingerprint(config)
    # A setting that an older version did not have was at its default, or as it was before it.
    defaults = fingerprint(Config()) | dict(came_later(Config, saved)) | {"plugins": now["plugins"]}
    # A setting that an older version did not know to be free may differ.
    binding = {key: value for key, value in saved.items() if not is_free(Config, key)}
    saved = {**{key: defaults[key] for key in now if key in defaults}, **binding}
    code = [{name.split()[0]: name for name in side.pop("plugins")} for side in (saved, now)]
    edited = [name for name in code[0] if code[1].get(name, code[0][name]) != code[0][name]]
    if edited:
        raise UserError(
            f"resume: {str(run)!r} was begun with other code: plug-in {', '.join(edited)} was "
            f"edited since; its copy is in {str(run / 'plugins')!r}. Choose another output"
        )
    differing = [
        f"{key} was {saved.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        shown = "; ".join(differing[:3]) + more
        raise UserError(
            f"resume: {str(run)!r} holds another run: {shown}. Choose another output, or resume it "
            f"with its own settings: --config {run / 'config.yaml'} --resume auto"
        )


def save_encoder(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes timm keys as safetensors, for ``timm.create_model(..., checkpoint_path=...)``."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    content = save(state, metadata={"format": "pt", **metadata})
    write_atomic(path, lambda temporary: _write_bytes(temporary, content))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def backbone_state(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the encoder's part of a model's state dict, under timm's keys."""
    prefix = "backbone."
    return {k[len(prefix) :]: v for k, v in model_state.items() if k.startswith(prefix)}


def model_state(path: str | Path) -> dict[str, Tensor]:
    """Reads the model's weights, or their EMA, from a run folder or a checkpoint file.

    Raises:
        UserError: if there is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        state, _ = newest_checkpoint(path)
        if state is None:
            raise UserError(f"{str(path)!r} holds no checkpoint")
    elif path.is_file():
        state = read_checkpoint(path)
    else:
        raise UserError(f"{str(path)!r} is neither a run folder nor a checkpoint")
    return state["ema"] if state.get("ema") else state["model"]


def encoder_weights(run: str | Path) -> dict[str, Tensor]:
    """Reads a run's encoder from ``encoder.safetensors``, or from the newest checkpoint.

    Raises:
        UserError: if there is neither.
    """
    path = Path(run) / "encoder.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own kinds
            raise UserError(f"{str(path)!r} cannot be read: {error}") from error
    return backbone_state(model_state(run))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a file.

    Raises:
        OSError: if it cannot be opened.
        SafetensorError: if it is cut short, or of another format.
    """
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()  # the file itself is no mapping
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
