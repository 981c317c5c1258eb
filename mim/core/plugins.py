"""Plug-ins: Python modules and files that register components of one's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from mim.core.errors import UserError


def import_plugin(plugin: str) -> None:
    """Import a module by name, or a file ending in ``.py``; the same code is imported once.

    Raises:
        UserError: if there is none.
    """
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: no module {plugin!r} ({error})") from error
        return
    path = Path(plugin).resolve()
    if not path.is_file():
        raise UserError(f"plugins: {plugin!r} is not a file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"mim_plugin_{path.stem}_{digest[:12]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # the next attempt shall not take it for imported
        raise
