"""Reads and checks the config of a run, with every component registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mim.data  # noqa: F401  (registers the sources)
from mim.core.config import Config
from mim.core.settings import dotted, import_plugin, read_args, read_tree
from mim.model import check_config  # registers masks, regimes, decoders and targets

__all__ = ["Config", "checked", "load_config", "read_args", "read_tree"]


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Reads and checks a config.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: ``["mask.ratio=0.6", ...]`` or ``{"mask.ratio": 0.6, ...}``.

    Raises:
        UserError: for a missing file, an unknown key or a value that is refused.
    """
    return checked(read_tree(Config, [] if path is None else [path], dotted(overrides)))


def checked(config: Config) -> Config:
    """Imports the config's plug-ins, checks that its parts fit together, and returns it.

    Raises:
        UserError: if they do not.
    """
    for plugin in config.plugins:
        import_plugin(plugin)
    check_config(config)
    return config
