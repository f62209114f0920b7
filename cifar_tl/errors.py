"""The one error class for mistakes that a person can put right, and the checks that raise it."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake that the person at the keyboard can put right.

    Its text says what was given, what is allowed and what to do. It is printed without a traceback, exit code 1.
    """


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGUSR1; the text says what is saved and how to go on. Exit code 130.

    No Exception: Hydra would note it as a failure of one job and start the sweep's next one (Hydra issue 3078).
    """


class GpuLostError(BaseException):
    """An error of CUDA's, after which all that a process asks of the GPU fails, too. No Exception, as above."""


class Pruned(Exception):
    """A search ended the run, which does worse than others did; the text says where. Its result counts as it is."""


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the closest allowed name, or an empty string."""
    names = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(given.lower(), names, n=1)
    return f" Did you mean {names[close[0]]}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def check_int(key: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return `value` if it is a whole number from `minimum` to `maximum`; raise UserError naming `key` otherwise."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or value < minimum or (maximum is not None and value > maximum):  # type: ignore[operator]  # an int
        upper = "" if maximum is None else f" and at most {maximum}"
        raise UserError(f"{key}={value} is not allowed: give a whole number of at least {minimum}{upper}.")
    return value  # type: ignore[return-value]  # an int


def check_number(key: str, value: object, minimum: float, below: float = float("inf")) -> float:
    """Return `value` as a float if minimum <= value < below; raise UserError naming `key` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < below:
        upper = "" if below == float("inf") else f" and below {below:g}"
        raise UserError(f"{key}={value} is not allowed: give a number of at least {minimum:g}{upper}.")
    return float(value)


def check_choice(key: str, value: object, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`; raise UserError naming `key` and the choices otherwise."""
    choices = list(allowed)
    if value not in choices:
        raise UserError(f"{key}={value} is not allowed: choose {', '.join(choices)}.{suggest(str(value), choices)}")
    return str(value)


def check_flag(key: str, value: object) -> bool:
    """Return `value` if it is True or False; raise UserError naming `key` otherwise."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={value} is not allowed: give true or false.")
    return value


def check_path(key: str, value: object) -> Path:
    """Return a path, `~` being the home folder; raise UserError naming `key` if it is a list, null or empty.

    A number is a path, too: a folder may be called 2024.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        shown = "null" if value is None else value
        raise UserError(f"{key}={shown} is not allowed: give one path.")
    try:
        return Path(str(value)).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UserError(f"{key}={value}: {error}") from error
