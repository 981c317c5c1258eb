"""The verbs' parser, and the options that several verbs share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim.core.errors import UserError

if TYPE_CHECKING:
    from mim.core.config import Config

STDOUT = "-"
FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""How the shells complete a file."""


class OutputFile(str):
    """A file that a verb writes: one that cannot be written is refused before the work."""


class VerbParser(argparse.ArgumentParser):
    """Raises a mistake as one line and takes no option by its beginning."""

    def __init__(self, prog: str, description: str, add_help: bool = True) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        form: Any = {"add_help": add_help, "formatter_class": raw, "allow_abbrev": False}
        super().__init__(prog=prog, description=description, **form)

    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog}: {message}")


@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    name: str
    """As it is typed: ``pretrain``, ``bench step``."""
    about: str
    """What it does, in a line."""
    options: Callable[[argparse.ArgumentParser], None]
    """Adds its options to a parser."""
    run: Callable[[argparse.Namespace], int]
    """Does it; returns the exit code. ``command`` is what was typed."""
    details: str = ""
    """What ``--help`` says instead of ``about``."""
    config: Callable[[], type] | None = None
    """Gives the dataclass whose settings may follow; ``run`` finds them under ``settings``."""
    helps: bool = True
    """Whether ``--help`` is about the options here; otherwise the config's parser answers it."""

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """The options, without a look at the files they name.

        Raises:
            UserError: for an unknown option or a value that is refused.
        """
        parser = VerbParser(f"mim {self.name}", self.details or self.about, self.helps)
        self.options(parser)
        if self.config is None:
            options = parser.parse_args(args)
        else:
            options, settings = parser.parse_known_args(args)
            options.settings = settings
        options.command = shlex.join(["mim", *self.name.split(), *args])
        return options

    def __call__(self, args: Sequence[str]) -> int:
        """Run it; returns the exit code."""
        options = self.parse(args)
        for name, value in vars(options).items():
            if isinstance(value, OutputFile) and value != STDOUT:
                prepare_file(Path(value), f"--{name}")
        return self.run(options)


class VerbGroup:
    """Verbs under a common name: ``mim bench step``.

    Args:
        name: the common name.
        about: what they do, in a line.
        verbs: the verbs.
        gone: names of verbs that have left, and what to do instead.
    """

    def __init__(
        self, name: str, about: str, verbs: Sequence[Verb], gone: dict[str, str] | None = None
    ) -> None:
        self.name, self.about, self.gone = name, about, gone or {}
        self.verbs = {verb.name.removeprefix(f"{name} "): verb for verb in verbs}

    def __call__(self, args: Sequence[str]) -> int:
        """Run the verb that the first argument names; returns the exit code."""
        if args and args[0] in self.gone:
            raise UserError(f"{self.name} {args[0]}: {self.gone[args[0]]}")
        lines = [f"{name:<10} {verb.about}" for name, verb in self.verbs.items()]
        about = "\n".join([f"{self.about} Each verb has its own --help.", *lines])
        parser = VerbParser(f"mim {self.name}", about)
        parser.add_argument("what", choices=tuple(self.verbs), help="what to do")
        return self.verbs[parser.parse_args(args[:1]).what](args[1:])


_SHORT = {"--model": "model.backbone", "--device": "train.device", "--weights": "model.weights"}
"""Short names of settings, for the verbs that take a folder of images."""


def take_folder(words: Sequence[str], block: str = "") -> tuple[str | None, list[str]]:
    """The folder of images among the words of a verb, and the other words.

    Short names of settings become long ones, below ``block``. The name of a config file stays, for
    the config's parser to refuse.
    """
    folder, rest, words = None, [], list(words)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if word.startswith("-"):
            long = f"--{block}{_SHORT[option]}" if option in _SHORT else option
            rest.append(long + equals + value)
            if not equals and option not in ("-h", "--help", "--print_config") and words:
                rest.append(words.pop(0))
        elif folder is None and not word.endswith((".yaml", ".yml")):
            folder = word
        else:
            rest.append(word)
    return folder, rest


def say(text: object) -> None:
    """Print a line to stdout."""
    from mim.core.terminal import printable

    print("\n".join(map(printable, str(text).split("\n"))), flush=True)


def no_options(parser: argparse.ArgumentParser) -> None:
    """Adds none."""


def config_kind() -> type:
    """The config of a run."""
    from mim.core.config import Config

    return Config


def add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """``--config``, behind which any setting can follow."""
    about = "YAML file, later ones override; any setting can follow, such as --data.path DIR"
    add = parser.add_argument(
        "--config", action="append", required=required, metavar="FILE", help=about
    )
    add.complete = FILE  # type: ignore[attr-defined]


def read_config(
    options: argparse.Namespace, *more: str, whole: bool = True, prog: str | None = None
) -> Config:
    """The config of :func:`add_config` and of the settings that followed.

    Args:
        options: of the verb.
        more: settings above all others.
        whole: whether its model must fit the images too.
        prog: what the config's parser calls the verb.

    Raises:
        UserError: for a setting that is refused.
    """
    from mim.core.config import Config
    from mim.core.plugins import import_plugin
    from mim.training.settings import checked, read_args

    files = [word for file in options.config or () for word in ("--config", file)]
    known: dict[str, Any] = {} if prog is None else {"prog": prog}
    config = read_args(Config, [*files, *options.settings, *more], **known)
    if whole:
        return checked(config)
    for plugin in config.plugins:
        import_plugin(plugin)
    return config


def add_file(
    parser: argparse.ArgumentParser, option: str, about: str, metavar: str = "FILE"
) -> None:
    """A file that the verb writes; see :class:`OutputFile`."""
    add = parser.add_argument(option, type=OutputFile, metavar=metavar, help=about)
    add.complete = FILE  # type: ignore[attr-defined]


def add_json(parser: argparse.ArgumentParser, about: str = "write all of it as JSON") -> None:
    """``--json``; see :func:`show`."""
    add_file(parser, "--json", f"{about}, to a file (- for stdout, alone)")


def show(options: argparse.Namespace, value: Any, text: Callable[[], None]) -> None:
    """Write what ``--json`` asks for; print the text unless the JSON goes to stdout."""
    from mim.core.files import write_json_atomic
    from mim.core.terminal import show_json

    if options.json == STDOUT:
        show_json(value)
        return
    if options.json is not None:
        write_json_atomic(Path(options.json), value)
    text()


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", help="auto (by default), cpu, cuda, cuda:1 or mps")


def add_list(
    parser: argparse.ArgumentParser, option: str, about: str, kind: Callable[[str], Any] = str
) -> None:
    """Values separated by commas; an option that is repeated adds to them. None without any."""
    nouns: dict[Callable[[str], Any], str] = {int: "whole numbers", float: "numbers"}
    what = nouns.get(kind, "names")

    def read(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError as error:
            reason = f"{text!r} is no list of {what} separated by commas"
            raise UserError(f"{option}: {reason}") from error

    parser.add_argument(option, type=read, action="extend", help=f"{about}; separated by commas")


def add_words(
    parser: argparse.ArgumentParser, option: str, about: str, metavar: str = "KEY=VALUE"
) -> None:
    """Words; an option that is repeated adds to them."""
    parser.add_argument(option, nargs="+", action="extend", default=[], metavar=metavar, help=about)


def read_pairs(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """The values of ``KEY=VALUE`` words, read as YAML.

    Raises:
        UserError: for a pair that cannot be read.
    """
    import yaml

    from mim.core.files import parse_yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{option} {pair!r} has not the form key=value")
        try:
            settings[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{option}: {pair!r} cannot be read: {reason}") from error
    return settings


def at_least_one(text: str) -> int:
    """The type of an option that counts something."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number") from error
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def prepare_file(path: Path, option: str) -> None:
    """Refuse, before the work, a path where no file can be written.

    Raises:
        UserError: naming the option.
    """
    from mim.core.files import prepare_folder

    prepare_folder(path.parent, option)
    if path.is_dir():
        raise UserError(f"{option}: {str(path)!r} is a folder, not a file")
