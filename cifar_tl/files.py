"""Writing a file in one step, so that nobody ever finds half of one under its name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifar_tl.errors import UserError


def check_writable(path: Path, key: str = "output") -> None:
    """Make the folder of a file that is to be written later.

    Args:
        path: Of the file.
        key: Of the config, for the error.

    Raises:
        UserError: It cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(0, "is a folder, or in one that is write-protected")
    except OSError as error:
        raise UserError(_unwritable(path, key, error)) from error


@contextmanager
def written_in_one_step(path: Path, key: str = "output") -> Iterator[Path]:
    """Give a temporary path beside `path`, of the same ending, that takes its place when the block ends well.

    Args:
        path: Of the file; its folder is made.
        key: Of the config, for the error.

    Raises:
        UserError: It cannot be written there.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(_unwritable(path, key, error)) from error
    finally:
        with suppress(OSError):  # it is not there, nor may its folder be
            partial.unlink()


def _unwritable(path: Path, key: str, error: OSError) -> str:
    no_folder = isinstance(error, FileExistsError | NotADirectoryError)
    reason = f"{path.parent} is no folder" if no_folder else error.strerror or error
    return f"{key}={path} cannot be written: {reason}. Give another place."
