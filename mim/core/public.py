"""What may leave the machine: settings and messages without folders, servers and signatures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import unquote

_NAMES = ("source", "backbone", "name", "variant", "cpu", "device")
"""Keys of names whose slash is no folder's, as in torchvision/CIFAR10."""
_TEXTS = ("command", "error")
_URL = r"[A-Za-z][A-Za-z0-9+.-]*:/{1,3}[^\s'\"<>|]+"
_PATH = r"(?:~[\w.-]*|\.{0,2}|[A-Za-z]:)[/\\](?!\])[^\s'\"<>|:;,)]+"
_PROSE = re.compile(r"[\n'\"]|: |\s--?\w|.[\s=][A-Za-z][A-Za-z0-9+.-]*://")
_IN_QUOTES = r"(?P<quote>['\"])(?P<quoted>[^'\"\n]*[/\\][^'\"\n]*)(?P=quote)"
_PLACE = re.compile(rf"{_IN_QUOTES}|(?<![\w/\\.'\"~-])(?P<bare>{_URL}|{_PATH})")


def public(value: Any, apart: Collection[str] = (), key: str = "") -> Any:
    """Returns plain settings in which each path or URL is its last part: a file's or folder's name.

    Args:
        value: of any depth; keys of mappings are read too.
        apart: texts that stay told apart, by a digest, where their last parts are the same.
        key: the setting whose value it is.
    """
    if isinstance(value, Mapping):
        return {_key(str(k)): public(v, apart, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item, apart, key) for item in value]
    if not isinstance(value, str):
        return value
    if value in apart:
        return f"{_name(value)}#{hashlib.sha256(value.encode()).hexdigest()[:4]}"
    last = key.rpartition(".")[2]
    if last in _NAMES and not _PLACE.match(value):
        return value
    if last in _TEXTS or _PROSE.search(value):
        return public_text(value)
    return _name(value) if "/" in value or "\\" in value else value


def public_text(text: str) -> str:
    """Returns a message or a command whose paths and URLs are their last parts."""

    def name(found: re.Match[str]) -> str:
        if found["bare"]:
            return _name(found["bare"])
        return f"{found['quote']}{_name(found['quoted'])}{found['quote']}"

    return _PLACE.sub(name, text)


def _key(key: str) -> str:
    """A key may be a place, behind a word too."""
    word, space, rest = key.partition(" ")
    is_word = "/" not in word and "\\" not in word
    return f"{word}{space}{public(rest)}" if is_word else str(public(key))


def _name(place: str) -> str:
    """The last part, of a URL without its signature."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", place):
        path = unquote(re.split(r"[?#]", place)[0]).partition(":")[2].lstrip("/")
        place = path if "/" in path.rstrip("/") else "URL"  # a server alone
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1]
