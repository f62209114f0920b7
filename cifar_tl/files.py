"""Writing a file in one step, so that nobody finds half of one under its name; damage; locks between processes."""

import fcntl
import os
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cifar_tl.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, of the same ending, that takes its place when the block ends well.

    The folder is made. What was there stays whole if the block fails.

    Raises:
        OSError: It cannot be written there.
    """
    path = path.resolve() if path.is_symlink() else path  # the link stays one
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk has no name
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # it is not there, nor may its folder be
            partial.unlink()


def remove_partial_files(folder: Path, older_than_s: float = 0) -> None:
    """Delete what killed processes have left of files in a folder; nobody may be writing such old ones there."""
    for path in folder.glob(".*.partial*"):
        with suppress(FileNotFoundError):  # somebody else has deleted it
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text in one step, as UTF-8 whatever the locale.

    File names that the locale's encoding has no characters for are written with the bytes that they have on disk.

    Raises:
        OSError: It cannot be written there.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")


def check_intact(path: Path) -> None:
    """Compare the checksums that torch.save has written into a file; torch.load does not, and reads damaged values.

    A file in torch's format of before 1.6 has none; one that was written without them
    (torch.serialization.set_crc32_options) counts as damaged.

    Raises:
        zipfile.BadZipFile: Values have changed since it was written.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def lock(path: Path, wait: bool = True) -> TextIO:
    """Return a file that is locked until it is closed. A process that dies lets go of it.

    Raises:
        BlockingIOError: Another process has it, and `wait` is False.
    """
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written later, as `output=` names it.

    Raises:
        UserError: It cannot be written there.
    """
    with writing_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
            raise PermissionError(0, "is a folder or a device, or in a folder that is write-protected")


@contextmanager
def writing_for(path: Path, key: str = "output") -> Iterator[None]:
    """Turn what the file system refuses into a UserError that names the config's key."""
    try:
        yield
    except OSError as error:
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{path.parent} is no folder" if no_folder else error.strerror or error
        raise UserError(f"{key}={path} cannot be written: {reason}. Give another place.") from error


def say(text: str) -> None:
    """Print text, letters that the console does not have as escapes: folders may have any names."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError as error:
        print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), flush=True)
