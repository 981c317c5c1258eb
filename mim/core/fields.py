"""What a setting is: frozen dataclasses whose types say which values they take.

``Literal`` says the choices of a value and :class:`Bound` its limits. Everything that is read is
plain (numbers, texts, booleans, null, lists, mappings) and is brought to those types here. Nothing
that is read can name a class, so that no file of settings runs code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from mim.core.errors import UserError, choice_error, setting_error
from mim.core.files import parse_yaml

T = TypeVar("T")

# --- What a value may be --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bound:
    """A limit of a value, for ``Annotated[int, Bound(...)]``."""

    holds: Callable[[Any], bool]
    says: str
    """The rest of the sentence "mask.ratio: 2.0 ..."."""


def at_least(low: float) -> Bound:
    return Bound(lambda value: value >= low, f"must be at least {low}")


def at_most(high: float) -> Bound:
    return Bound(lambda value: value <= high, f"must be at most {high}")


def above(low: float) -> Bound:
    return Bound(lambda value: value > low, f"must be above {low}")


def span(most: float = math.inf) -> Bound:
    """A pair (from, to) above 0."""
    limit = "" if most == math.inf else f" <= {most:g}"
    says = f"must be 0 < from <= to{limit}"
    return Bound(lambda pair: 0 < pair[0] <= pair[1] <= most and pair[1] < math.inf, says)


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]
Share = Annotated[float, Bound(lambda x: 0 < x <= 1, "must be above 0 and at most 1")]
BelowOne = Annotated[float, Bound(lambda x: 0 <= x < 1, "must be at least 0 and below 1")]
Between = Annotated[float, Bound(lambda x: 0 < x < 1, "must lie between 0 and 1")]
Span = Annotated[tuple[float, float], span()]
SpanToOne = Annotated[tuple[float, float], span(1)]


class _WrongType(UserError):
    """A value of none of the types that its setting takes."""


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {str: "a text", types.NoneType: "null", tuple: "a list", list: "a list"}
_WORDS |= {dict: "a mapping"}
_BUILDERS = ("class_path", "init_args", "dict_kwargs")


def plain(setting: str, value: Any) -> Any:
    """Check that a value without a type of its own is plain.

    Raises:
        UserError: for an object, or a key by which other tools name a class to build.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise setting_error(setting, key, "must be a text: it is the name of a setting")
            if key in _BUILDERS:
                raise setting_error(setting, key, "is refused: settings are values, not code")
            plain(f"{setting}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            plain(setting, item)
    elif value is not None and type(value) not in (bool, int, float, str):
        reason = "must be a number, a text, true, false, null, a list or a mapping of these"
        raise setting_error(setting, value, reason)
    return value


def fit(setting: str, value: Any, hint: Any) -> Any:
    """Convert a value to the type of its setting; read text as YAML where the type is no text.

    Raises:
        UserError: naming the setting, the value and what would be valid.
    """
    listed = isinstance(value, str) and value.startswith("[") and _takes_list(hint)
    if isinstance(value, str) and (listed or not _takes_text(hint)):
        try:
            value = parse_yaml(value)
        except yaml.YAMLError as error:
            reason = f"cannot be read: {' '.join(str(error).split())}"
            raise setting_error(setting, value, reason) from error
    elif value == "null" and types.NoneType in get_args(hint):
        value = None
    return _fit(setting, value, hint)


def _takes_text(hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(isinstance(choice, str) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return any(map(_takes_text, get_args(hint)))
    return hint is str or (isinstance(hint, type) and dataclasses.is_dataclass(hint))


def _takes_list(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return any(map(_takes_list, get_args(hint)))
    return get_origin(hint) in (tuple, list)


def _fit(setting: str, value: Any, hint: Any) -> Any:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        value = _fit(setting, value, args[0])
        for bound in args[1:]:
            if isinstance(bound, Bound) and not bound.holds(value):
                raise setting_error(setting, value, bound.says + _in_per_cent(value, bound))
        return value
    if kind in (Union, types.UnionType):
        for part in args:
            try:
                return _fit(setting, value, part)
            except _WrongType:
                continue
    elif kind is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in args):
            raise choice_error(setting, value, map(str, args))
        return value
    elif kind in (Any, dict):
        if kind is Any or isinstance(value, Mapping):
            return plain(setting, value)
    elif kind in (tuple, list):
        if isinstance(value, (tuple, list)):
            return _fit_items(setting, value, kind, args)
    elif dataclasses.is_dataclass(kind):
        return build(cast(type, kind), value, setting)
    elif kind is float and type(value) in (int, float):
        if math.isinf(value):
            raise setting_error(setting, value, "must be finite")
        return float(value)
    elif type(value) is kind:
        return value
    words = " or ".join(dict.fromkeys(_words(hint)))
    raise _WrongType(f"{setting}: {value!r} must be {words}")


def _in_per_cent(value: Any, bound: Bound) -> str:
    """Asks whether a value is meant in per cent, where that would be valid."""
    is_number = isinstance(value, (int, float)) and 5 <= value < 100
    return f" (did you mean {value / 100:g}?)" if is_number and bound.holds(value / 100) else ""


def _words(hint: Any) -> Iterator[str]:
    kind = get_origin(hint) or hint
    if kind is Annotated:
        yield from _words(get_args(hint)[0])
    elif kind in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _words(part)
    else:
        yield _WORDS.get(kind, "a mapping of settings")


def _fit_items(setting: str, value: Sequence[Any], kind: type, args: tuple[Any, ...]) -> Any:
    if kind is list or args[-1] is Ellipsis:
        return kind(_fit(setting, item, args[0]) for item in value)
    if len(value) != len(args):
        raise setting_error(setting, value, f"must have {len(args)} values")
    return tuple(_fit(setting, item, part) for item, part in zip(value, args, strict=True))


# --- Blocks of settings ---------------------------------------------------------------------------


def hints(kind: Any) -> dict[str, Any]:
    """Map the fields of a dataclass to their types."""
    return _hints(kind)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    found = get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def fit_fields(block: Any, where: str = "") -> None:
    """Bring every field of a new dataclass to its type, in place (``UserError`` if refused)."""
    prefix = f"{where}." if where else ""
    for name, hint in hints(type(block)).items():
        object.__setattr__(block, name, _fit(f"{prefix}{name}", getattr(block, name), hint))


class Settings:
    """Base of the blocks of settings: frozen dataclasses that check themselves when made.

    ``class TrainConfig(Settings, where="train")`` says which dotted key the block stands under.
    """

    where: ClassVar[str] = ""

    def __init_subclass__(cls, where: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if where is not None:
            cls.where = where

    def __post_init__(self) -> None:
        fit_fields(self, self.where)

    def error(self, name: str, reason: str, value: Any = None) -> UserError:
        """Build the error for a field whose value does not go with the others."""
        shown = getattr(self, name) if value is None else value
        return setting_error(f"{self.where}.{name}".removeprefix("."), shown, reason)


def build(kind: type[T], value: Any, setting: str = "") -> T:
    """Make a block of settings from a mapping; the rest keeps its defaults.

    Raises:
        UserError: for an unknown key, or a value that is refused.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        names = ", ".join(hints(kind))
        raise UserError(
            f"{setting}: {value!r} cannot be given, since {setting} holds several settings; "
            f"each is given by itself, as --{setting}.NAME VALUE, where NAME is {names}"
        )
    if not isinstance(value, Mapping):
        raise setting_error(setting, value, "must be a mapping of settings")
    prefix, known = f"{setting}." if setting else "", hints(kind)
    for key in value:
        if key not in known:
            raise choice_error("config", f"{prefix}{key}", [prefix + name for name in known])
    for field in dataclasses.fields(cast(Any, kind)):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in value and not has_default:
            raise setting_error(prefix + field.name, None, "must be given")
    block = kind(**{name: fit(prefix + name, item, known[name]) for name, item in value.items()})
    if not isinstance(block, Settings):
        fit_fields(block, setting)
    return block


def add_block(parent: type, name: str, settings: type) -> None:
    """Add the settings of a component to a block of settings, as one more field.

    The class changes in place, so that every reference sees it; existing blocks have the defaults.
    """
    own = dict(parent.__annotations__)
    if name in hints(parent):
        raise ValueError(f"{name!r} is a setting of {parent.__name__} already")
    made = [key for key in vars(parent) if key in _MADE_BY_DATACLASS]
    fields = {key: vars(parent)["__dataclass_fields__"][key] for key in own}
    for key in made:
        delattr(parent, key)
    for key, field in fields.items():
        setattr(parent, key, field)
    parent.__annotations__ = {**own, name: settings}
    setattr(parent, name, dataclasses.field(default=settings(), metadata={"component": True}))
    dataclasses.dataclass(frozen=True)(parent)
    _hints.cache_clear()


_MADE_BY_DATACLASS = {
    *("__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__", "__replace__"),
    *("__match_args__", "__signature__", "__dataclass_fields__", "__dataclass_params__"),
}


def came_later(kind: Any, old: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted settings that an old run does not name, and what they were in its time.

    They are the fields with ``metadata={"before": VALUE}``: those that were added with a default
    that changes what a run computes. Of components, only the chosen one's are of interest.

    Args:
        kind: of the config.
        old: the run's settings, by dotted key.
        prefix: of the keys of this block.
    """
    chosen = {old.get(f"{prefix}{selector}") for selector in ("name", "source")}
    for field in dataclasses.fields(kind):
        key, inner = prefix + field.name, hints(kind)[field.name]
        if dataclasses.is_dataclass(inner):
            if not field.metadata.get("component") or field.name in chosen:
                yield from came_later(inner, old, f"{key}.")
        elif "before" in field.metadata and key not in old:
            yield key, field.metadata["before"]


def is_free(kind: Any, key: str) -> bool:
    """Whether a dotted setting may change when a run resumes (``metadata={"free": True}``)."""
    head, _, rest = key.partition(".")
    for field in dataclasses.fields(kind):
        if field.name == head:
            inner = hints(kind)[head]
            nested = bool(rest) and dataclasses.is_dataclass(inner)
            return bool(field.metadata.get("free")) or (nested and is_free(inner, rest))
    return False
