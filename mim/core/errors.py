"""The one exception a user's mistake raises: a single line, no traceback, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in a setting, a file or the data; the CLI prints one line and exits with 2."""


class WorkerError(RuntimeError):
    """A loader process died; the message is one line, and the CLI exits with 1."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line, and the last good checkpoint is kept."""


class LostProcess(RuntimeError):
    """Another process of the run died, hangs or failed; the message is one line."""

    code = 75  # the exit code of ``sysexits.h`` for "try again"


def setting_error(setting: str, value: object, reason: str) -> UserError:
    """Build the error for a value that a setting (a dotted key) cannot take.

    ``reason`` says what is wrong and what would be valid.
    """
    return UserError(f"{setting}: {value!r} {reason}")


@contextmanager
def blaming(setting: str, value: object) -> Iterator[None]:
    """Name the setting in a mistake that is found inside, whose message is the reason alone."""
    try:
        yield
    except UserError as error:
        raise setting_error(setting, value, str(error)) from error


_LISTED = 40
"""Up to this number all names are listed; of more, those that resemble what was given."""


def choice_error(setting: str, value: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is none of the valid ones; lists them and the nearest."""
    names = sorted(choices)
    if not names:
        return setting_error(setting, value, "cannot be: there is nothing to choose from")
    near = get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if len(names) <= _LISTED:
        return setting_error(setting, value, f"is not one of {', '.join(names)}{hint}")
    alike = [name for name in names if str(value) in name.split(".")]
    alike += get_close_matches(str(value), [name for name in names if name not in alike], n=4)
    hint = f"; did you mean {' or '.join(map(repr, alike[:4]))}?" if alike else ""
    return setting_error(setting, value, f"is none of the {len(names)} names{hint}")
