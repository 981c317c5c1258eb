"""Plug-ins: Python modules and files that register a user's own components.

Their code is part of a run: files are copied into its folder, compared by content when it resumes,
and, where the folder comes from elsewhere, run only if the user allows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mim.core.errors import UserError
from mim.core.files import write_text_atomic

FOLDER = "plugins"
"""Where a run folder keeps the files."""


def _digest(plugin: str) -> str:
    """What identifies the code of a plug-in."""
    path = Path(plugin)
    if plugin.endswith(".py") and path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(plugin.encode()).hexdigest()


def identity(plugin: str) -> str:
    """Identify a plug-in by name and content, wherever it lies, for the fingerprint of a run."""
    return f"{Path(plugin).stem} {_digest(plugin)[:16]}" if plugin.endswith(".py") else plugin


def import_plugin(plugin: str) -> None:
    """Import a module by name, or a file ending in ``.py``; the same code is imported once."""
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: no module {plugin!r} ({error})") from error
        _note(plugin)
        return
    path = Path(plugin).resolve()
    if not path.is_file():
        raise UserError(f"plugins: {plugin!r} is not a file")
    name = f"mim_plugin_{_digest(plugin)[:16]}"  # by content: a run's copy may have another name
    _note(plugin)
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # else the next attempt would take it for imported
        raise


def keep_plugins(plugins: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Copy plug-in files into a folder; return the plug-ins with paths relative to it.

    Raises:
        UserError: if a file differs from the copy that is there already.
    """
    kept: list[str] = []
    for plugin in plugins:
        if not plugin.endswith(".py"):
            kept.append(plugin)
            continue
        path, number = Path(plugin), 1
        name = f"{FOLDER}/{path.stem}.py"
        while name in kept:
            number += 1
            name = f"{FOLDER}/{path.stem}_{number}.py"
        copy, text = folder / name, path.read_text(encoding="utf-8")
        if copy.is_file() and copy.read_text(encoding="utf-8") != text:
            raise UserError(
                f"plugins: {plugin!r} is not what it was when {str(folder)!r} was begun, whose "
                f"copy is {name}: a run has one code. Choose another output, or undo the change"
            )
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(copy, text)
        kept.append(name)
    return tuple(kept)


def beside(plugin: str, file: Path) -> str:
    """Resolve a plug-in that a config file names: relative to that file, if it is there."""
    path = file.parent / plugin
    return str(path.resolve()) if plugin.endswith(".py") and path.is_file() else plugin


# --- Whose code may run ---------------------------------------------------------------------------


def _record(plugin: str) -> Path:
    cache = os.environ.get("MIM_CACHE") or Path.home() / ".cache" / "mim"
    return Path(cache) / FOLDER / _digest(plugin)


def _note(plugin: str) -> None:
    """Remember that this code has run here, because a user of this machine named it."""
    with contextlib.suppress(OSError):  # without a home folder the user is asked again
        _record(plugin).parent.mkdir(parents=True, exist_ok=True)
        _record(plugin).touch()


_trusted = False


def trust_all() -> None:
    """Let the plug-ins of any run folder run, from now on in this process."""
    global _trusted
    _trusted = True


def check_trust(plugins: Iterable[str], run: Path, trust: bool = False) -> None:
    """Refuse, by a ``UserError``, code of a run folder that has never run on this machine."""
    unknown = [plugin for plugin in plugins if not _record(plugin).is_file()]
    if unknown and not (trust or _trusted):
        raise UserError(
            f"plugins: {str(run)!r} would run Python that has not run on this machine: "
            f"{', '.join(unknown)}. Read it, then allow it by --trust (in Python: trust=True)"
        )
