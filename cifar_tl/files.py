"""Writing a file in one step, so that nobody ever finds half of one under its name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifar_tl.errors import UserError


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
        raise UserError(f"{key}={path} cannot be written: {error.strerror or error}. Give another place.") from error
    finally:
        with suppress(OSError):  # it is not there, nor may its folder be
            partial.unlink()
