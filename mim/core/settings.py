"""Reading and writing configs: YAML files, dotted overrides, the command line (jsonargparse)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from mim.core.config import Config
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.files import parse_yaml

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """Raises a one-line :class:`UserError` where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        text = " ".join(lines) or "the arguments could not be read"
        raise UserError(_unknown_arguments(text, self) or _wrong_type(text) or text)


_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
_TYPES |= {"list": "a list", "tuple": "a list", "dict": "a mapping", "NoneType": "null"}


def _wrong_type(message: str) -> str:
    """jsonargparse's words on a value of the wrong type, in ours."""
    head = r"Parser key \"(?P<key>[^\"]+)\": "
    if found := re.match(head + "Unable to load config '(?P<value>[^']*)'", message):
        key, value = found["key"], found["value"]
        return (
            f"{key}: {value!r} is neither a mapping of settings nor a file of them; a single "
            f"setting is given as --{key}.NAME VALUE"
        )
    one = r"Expected a <class '(?P<one>\w+)'>\. Got value: "
    several = r"Does not validate .* Subtypes: \[(?P<several>.*?)\] Errors: .* Given value: "
    found = re.fullmatch(f"{head}(?:{one}|{several})(?P<value>.*)", message)
    if found is None:
        return ""
    kinds = [found["one"]] if found["one"] else re.findall(r"(\w+)(?:'>|\[)", found["several"])
    wanted = " or ".join(dict.fromkeys(_TYPES.get(kind, kind) for kind in kinds))
    hint = """; write --axes '{"mask.ratio": [0.5, 0.75]}'""" if found["key"] == "axes" else ""
    return f"{found['key']}: {found['value']!r} must be {wanted}{hint}"


def _unknown_arguments(message: str, parser: ArgumentParser) -> str:
    """The arguments that are no options, and what was meant."""
    head, _, rest = message.partition("unrecognized arguments: ")
    if head or not rest:
        return ""
    first = rest.split()[0]
    if not first.startswith("-"):
        hint = f"; a config file is given by --config {first}" if Path(first).is_file() else ""
        return f"unrecognized arguments: {rest}{hint}"
    option, known = first.partition("=")[0], list(parser._option_string_actions)
    near = [f"--base.{option[2:]}"] if f"--base.{option[2:]}" in known else []
    near += [name for name in known if name.endswith(f".{option[2:]}") and name not in near]
    near = near or difflib.get_close_matches(option, known, n=2)
    hint = f" (did you mean {' or '.join(near[:3])}?)" if near else ""
    return f"unrecognized arguments: {rest}{hint}"


def config_parser(kind: type, **parser_args: Any) -> ArgumentParser:
    """A parser with ``--config FILE`` (repeatable) and an option for each field of a dataclass."""
    parser = _Parser(default_env=False, allow_abbrev=False, **parser_args)
    parser.add_argument("--config", action="config", help="YAML file; later ones override.")
    parser.add_class_arguments(kind, as_group=False)
    return parser


def instantiate(parser: ArgumentParser, namespace: Namespace, kind: type[T]) -> T:
    """The dataclass that parsed arguments describe.

    Raises:
        UserError: if a value is refused.
    """
    namespace = namespace.clone()
    for extra in ("config", "print_config"):
        namespace.pop(extra, None)
    _check_nulls(namespace.as_dict(), kind)
    built = parser.instantiate(namespace)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(built, name) for name in names})


def _check_blocks(tree: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """jsonargparse lets a number pass where a block of settings belongs."""
    hints = get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise choice_error("config", f"{prefix}{key}", [f"{prefix}{name}" for name in hints])
    for key, hint in hints.items():
        value = tree.get(key)
        if not dataclasses.is_dataclass(hint) or key not in tree or isinstance(value, str):
            continue
        if not isinstance(value, Mapping):
            raise setting_error(prefix + key, value, "must be a mapping of settings")
        _check_blocks(value, cast(type, hint), f"{prefix}{key}.")


def _check_nulls(tree: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """jsonargparse lets null pass for any setting."""
    for key, hint in get_type_hints(kind).items():
        value = tree.get(key)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            _check_nulls(value, cast(type, hint), f"{prefix}{key}.")
        elif value is None and key in tree and hint is not Any and NoneType not in get_args(hint):
            raise setting_error(prefix + key, None, "must be given; null is no value of it")


def _check_file(path: str | Path, kind: type) -> None:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config: {str(path)!r} is not a file")
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"config: {path} holds no mapping of settings")
    _check_kind(loaded, path, kind)
    _check_blocks(loaded, kind)


def _check_kind(loaded: Mapping[str, Any], path: Path, kind: type) -> None:
    """A comparison's file is no run's, and the other way round."""
    has = "base" in get_type_hints(kind)
    if not has and "base" in loaded:
        raise UserError(f"config: {path} is of a comparison (base, axes): give it to mim compare")
    alone = {"data", "model", "mask", "train", "optim"} & set(map(str, loaded))
    if has and alone and "base" not in loaded:
        raise UserError(
            f"config: {path} is of one run; a comparison has {', '.join(sorted(alone))} under "
            "base, beside axes (see configs/compare/demo.yaml)"
        )


def _config_files(args: Sequence[str]) -> Iterator[str]:
    for place, arg in enumerate(args):
        if arg == "--config" and place + 1 < len(args):
            yield args[place + 1]
        elif arg.startswith("--config="):
            yield arg.partition("=")[2]


_known_parser = functools.cache(config_parser)  # half a second each; parsing changes none


def read_args(kind: type[T], args: Sequence[str], **parser_args: Any) -> T:
    """Parse command-line arguments into a dataclass.

    Raises:
        UserError: for an unknown key, a value of the wrong type or one that is refused.
    """
    parser = _known_parser(cast(Any, kind), **parser_args)
    for file in _config_files(args):
        _check_file(file, kind)
    return instantiate(parser, parser.parse_args(list(args)), kind)


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Config:
    """Read and check a config.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: ``["mask.ratio=0.6", ...]`` or ``{"mask.ratio": 0.6, ...}``.

    Raises:
        UserError: for a missing file, an unknown key or a value that is refused.
    """
    args = [] if path is None else ["--config", str(path)]
    pairs: list[tuple[str, Any]]
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = []
        for item in overrides:
            key, equals, value = item.removeprefix("--").partition("=")
            if not equals:
                raise UserError(f"override {item!r} has not the form key=value")
            pairs.append((key, value))
    for key, value in pairs:
        text = value if isinstance(value, str) else _to_yaml_line(value)
        args.append(f"--{key}={text}")
    return checked(read_args(Config, args))


def _to_yaml_line(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def checked(config: Config) -> Config:
    """Import the config's plugins and check that its parts fit; returns it.

    Raises:
        UserError: if they do not.
    """
    for plugin in config.plugins:
        import_plugin(plugin)
    from mim.model.model import check_config  # torch is slow to import and not needed for --help

    check_config(config)
    return config


def import_plugin(plugin: str) -> None:
    """Import a module by name, or a file ending in ``.py``, once.

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
    name = f"mim_plugin_{path.stem}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise UserError(f"plugins: {plugin!r} is not a file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain mappings, lists and scalars."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """A config as YAML, enough to run it again."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
