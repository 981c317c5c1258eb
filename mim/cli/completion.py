"""Completion scripts of shells, by shtab, from the parsers that the verbs themselves use."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from mim.cli.parsing import ParserTaken, VerbParser
from mim.core.config import Config
from mim.core.errors import UserError
from mim.core.settings import config_parser

SHELLS = ("bash", "zsh", "tcsh")
Verb = Callable[[list[str]], int]


def completion_script(shell: str, verbs: Mapping[str, Verb]) -> str:
    """The script of a shell.

    Args:
        shell: one of :data:`SHELLS`.
        verbs: name -> function; its docstring says what it does.

    Raises:
        UserError: if shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab: pip install shtab") from error
    parser = argparse.ArgumentParser(prog="mim")
    parser.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="verb")
    for name, verb in verbs.items():
        about = (verb.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=about)
        for source in _sources(name, verb):
            _copy(source, command)
    return str(shtab.complete(parser, shell))


def _sources(name: str, verb: Verb) -> list[argparse.ArgumentParser]:
    """The parsers whose options a verb takes; settings of configs come from their dataclasses."""
    if name == "pretrain":
        return [config_parser(Config)]
    found: list[argparse.ArgumentParser] = []
    VerbParser.taking = True
    try:
        verb([])
    except ParserTaken as taken:
        found.append(taken.parser)
    finally:
        VerbParser.taking = False
    if name == "compare":
        from mim.compare.runner import CompareConfig

        found.append(config_parser(CompareConfig))
    return found


def _copy(source: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    import shtab

    files = ("--config", "--json", "--output", "run", "folder", "first", "second", "file")
    for action in source._actions:
        taken = [option for option in action.option_strings if option.startswith("--")]
        if action.option_strings and not taken:
            continue
        if "--help" in taken:
            continue
        kept = [option for option in taken if option not in target._option_string_actions]
        if taken and not kept:
            continue
        is_flag = bool(taken) and action.nargs == 0
        help_ = (action.help or "").replace("%", "%%")
        if is_flag:
            target.add_argument(*kept, action="store_true", help=help_)
            continue
        choices = list(action.choices) if action.choices else None
        names = kept or [action.dest]
        added = target.add_argument(*names, nargs="?", choices=choices, help=help_)
        if {*names} & {*files}:
            added.complete = shtab.FILE  # type: ignore[attr-defined]
