"""Fill the reference of settings when the site is built: a hook of mkdocs.

A page asks for groups of settings by a comment, ``<!-- settings: mask -->``. The lists are read
from the dataclasses that check the settings, so that they cannot differ from what a run accepts.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from mim.compare.runner import CompareConfig
from mim.core.config import Config
from mim.core.settings import explanations, leaves
from mim.evaluate import EVALUATIONS

_MARK = re.compile(r"<!-- settings: ([\w ]+) -->")


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
    whole = typing.get_origin(kind) or kind
    name = whole.__name__ if isinstance(whole, type) else str(whole)
    inside = ", ".join(_kind(each).strip("`") for each in arguments if each is not Ellipsis)
    more = ", ..." if Ellipsis in arguments else ""
    return f"`{name}[{inside}{more}]`" if arguments else f"`{name}`"


def _items(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the key and the entry of each setting."""
    for key, (owner, name) in leaves(kind).items():
        default = getattr(owner(), name)
        hint = typing.get_type_hints(owner, include_extras=True)[name]
        head = f"- **`{key}`** ({_kind(hint)}; default `{'null' if default is None else default}`)"
        text = " ".join(explanations(owner).get(name, "").split()).replace("``", "`")
        yield key, f"{head}  \n  {text}"


def _lists(kind: type, wanted: str = "") -> str:
    """Write one list for each block of settings below ``wanted``."""
    blocks: dict[str, list[str]] = {}
    for key, item in _items(kind):
        block = key.rpartition(".")[0]
        if f"{block}.".startswith(f"{wanted}.") if wanted else not block:
            blocks.setdefault(block, []).append(item)
    heads = {name: f"## `{name}`\n\n" if name else "" for name in blocks}
    return "\n\n".join(heads[name] + "\n".join(items) for name, items in blocks.items())


def _group(name: str) -> str:
    if name == "evaluations":
        settings = {each: EVALUATIONS.settings(each) for each in EVALUATIONS}
        return "\n\n".join(f"## `{each}`\n\n{_lists(kind)}" for each, kind in settings.items())
    if name == "compare":
        return _lists(CompareConfig)
    return _lists(Config, "" if name == "top" else name)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark by its lists; mkdocs calls this for every page."""
    return _MARK.sub(lambda mark: "\n\n".join(map(_group, mark[1].split())), markdown)
