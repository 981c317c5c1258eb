"""Fill the reference of settings when the site is built: a hook of mkdocs.

A page asks for groups of settings by a comment, ``<!-- settings: mask -->``. The tables are read
from the parsers that check the settings, so that they cannot differ from what a run accepts.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser

from mim.compare.runner import CompareConfig
from mim.core.config import Config
from mim.core.settings import config_parser
from mim.evaluate import EVALUATIONS

_MARK = re.compile(r"<!-- settings: ([\w ]+) -->")
_HEAD = "| setting | type | default | meaning |\n| --- | --- | --- | --- |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("``", "`")


def _kind(kind: Any) -> str:
    """Name a type as a reader would write it."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Annotated:
        return _kind(typing.get_args(kind)[0])
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return f"`{name}`"


def _rows(parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield the key and the table row of each setting; blocks have no row of their own."""
    blocks = {a.dest.rpartition(".")[0] for a in parser._actions}
    for action in parser._actions:
        key, kind = action.dest, getattr(action, "_typehint", None) or action.type
        if kind is None or key in blocks or key == "config" or not action.help:
            continue
        default = "" if action.default is None else f"`{action.default}`"
        parts = (f"`{key}`", _kind(kind), default, action.help)
        yield key, "| " + " | ".join(map(_cell, parts)) + " |"


def _tables(parser: ArgumentParser, wanted: str) -> str:
    """Write one table for each block of settings below ``wanted``."""
    blocks: dict[str, list[str]] = {}
    for key, row in _rows(parser):
        block = key.rpartition(".")[0]
        if f"{block}.".startswith(f"{wanted}.") if wanted else not block:
            blocks.setdefault(block, []).append(row)
    heads = {name: f"## `{name}`\n\n" if name else "" for name in blocks}
    return "\n\n".join(heads[name] + "\n".join([_HEAD, *rows]) for name, rows in blocks.items())


def _group(name: str) -> str:
    if name == "evaluations":
        settings = {each: EVALUATIONS.get(each).Settings for each in EVALUATIONS}
        tables = {each: _tables(config_parser(kind), "") for each, kind in settings.items()}
        return "\n\n".join(f"## `{each}`\n\n{table}" for each, table in tables.items())
    if name == "compare":
        return _tables(config_parser(CompareConfig), "")
    return _tables(config_parser(Config), "" if name == "top" else name)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark by its tables; mkdocs calls this for every page."""
    return _MARK.sub(lambda mark: "\n\n".join(map(_group, mark[1].split())), markdown)
