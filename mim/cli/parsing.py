"""The parser of a verb that takes no config."""

from __future__ import annotations

import argparse
from typing import Any

from mim.core.errors import UserError


class ParserTaken(BaseException):
    """Carries a verb's parser out, before it parses anything."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


class VerbParser(argparse.ArgumentParser):
    """The parser of a verb: a mistake is one line, and it can be had without parsing."""

    taking = False

    def error(self, message: str) -> None:  # type: ignore[override]
        """See argparse; raises instead of printing the usage."""
        raise UserError(f"{self.prog}: {message}")

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """See argparse."""
        if VerbParser.taking:
            raise ParserTaken(self)
        return super().parse_known_args(*args, **options)
