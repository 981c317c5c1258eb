"""Fill the reference of settings when the site is built: a hook of mkdocs.

A page asks for groups of settings by a comment, ``<!-- settings: mask -->``. The lists are read
from the parsers that check the settings, so that they cannot differ from what a run accepts.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser

from mim.compare.runner import CompareConfig
from mim.core.config import Config
from mim.core.settings import config_parser
from mim.evaluate import EVALUATIONS

_MARK = re.compile(r"<!-- settings: ([\w ]+) -->")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _kind(kind: Any) -> str:
    """Name a type as a reader would write it."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if typing.get_origin(kind) is typing.Annotated:
        return _kind(arguments[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(_kind, arguments))
    if kind is type(None):
        return "null"
    return f"`{kind.__name__ if isinstance(kind, type) and not arguments else kind}`"


def _items(parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield the key and the entry of each setting; blocks have no entry of their own."""
    blocks = {action.dest.rpartition(".")[0] for action in parser._actions}
    for action in parser._actions:
        key, kind = action.dest, getattr(action, "_typehint", None) or action.type
        if kind is None or key in blocks or key == "config" or not action.help:
            continue
        default = "null" if action.default is None else action.default
        head = f"- **`{key}`** ({_kind(kind)}; default `{default}`)  \n  "
        yield key, head + _line(action.help)


def _lists(parser: ArgumentParser, wanted: str) -> str:
    """Write one list for each block of settings below ``wanted``."""
    blocks: dict[str, list[str]] = {}
    for key, item in _items(parser):
        block = key.rpartition(".")[0]
        if f"{block}.".startswith(f"{wanted}.") if wanted else not block:
            blocks.setdefault(block, []).append(item)
    heads = {name: f"## `{name}`\n\n" if name else "" for name in blocks}
    return "\n\n".join(heads[name] + "\n".join(items) for name, items in blocks.items())


def _group(name: str) -> str:
    if name == "evaluations":
        settings = {each: EVALUATIONS.get(each).Settings for each in EVALUATIONS}
        lists = {each: _lists(config_parser(kind), "") for each, kind in settings.items()}
        return "\n\n".join(f"## `{each}`\n\n{items}" for each, items in lists.items())
    if name == "compare":
        return _lists(config_parser(CompareConfig), "")
    return _lists(config_parser(Config), "" if name == "top" else name)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark by its lists; mkdocs calls this for every page."""
    return _MARK.sub(lambda mark: "\n\n".join(map(_group, mark[1].split())), markdown)
