"""The files of an image, a folder or an archive, one by one, with limits: nothing is extracted to disk."""

import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cifar_tl.errors import UserError

Archive = TypeVar("Archive", zipfile.ZipFile, tarfile.TarFile)

ZIP_ENDINGS = (".zip",)
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

MAX_FILE_BYTES = 100_000_000
"""A file or member with more is not read."""
MAX_ARCHIVE_BYTES = 100_000_000_000
"""Uncompressed. What comes after it in an archive is not read."""
MAX_MEMBERS = 2_000_000
"""Per archive."""
MAX_TAR_HEADER_BYTES = 1_000_000
"""A tar header may announce a name of gigabytes, and tarfile would read it into memory."""


class UnreadableFile(Exception):
    """A file whose bytes cannot be had; its text says why."""


@dataclass(frozen=True)
class InputFile:
    """A file that was found.

    Attributes:
        path: The input's path with the file's place in it, as the file system or the archive spells it (bytes that are
            not UTF-8 are surrogates).
        read: Returns its bytes or raises UnreadableFile; may be called from any thread.
    """

    path: str
    read: Callable[[], bytes]


@contextmanager
def input_files(source: Path) -> Iterator[tuple[int | None, Iterator[InputFile]]]:
    """Open an input and give its files.

    Files whose name, or that of a folder around them, begins with a dot are left out. Links to folders are not
    followed, so that a loop of links ends. Files of a folder and of a zip come sorted by path; those of a tar as they
    lie in it, because a compressed tar can only be read from its beginning to its end.

    Args:
        source: A file, a folder, or an archive (told by its ending).

    Yields:
        How many files there are, None if that is not known beforehand, and the files.

    Raises:
        UserError: Nothing is there, the archive cannot be opened, or there are no files in it.
    """
    name = source.name.lower()
    if not os.path.lexists(source):
        raise UserError(f"input={source}: no such file or folder.")
    if source.is_dir():
        files = sorted(_folder_files(source), key=lambda file: file.path)
        _refuse_empty(source, len(files))
        yield len(files), iter(files)
    elif name.endswith(ZIP_ENDINGS):
        with _opened(source, lambda: zipfile.ZipFile(source)) as archive:
            files = list(_zip_files(source, archive))
            _refuse_empty(source, len(files))
            yield len(files), iter(files)
    elif name.endswith(TAR_ENDINGS):
        with _opened(source, lambda: tarfile.open(source, "r|*", tarinfo=_LimitedTarInfo)) as archive:
            yield None, _tar_files(source, archive)
    else:
        yield 1, iter([InputFile(str(source), lambda: _read_path(source))])


def _refuse_empty(source: Path, files: int) -> None:
    if files == 0:
        raise UserError(f"input={source} has no images: there is no file in it, names with a leading dot aside.")


def _opened(source: Path, open_archive: Callable[[], Archive]) -> Archive:
    try:
        return open_archive()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"input={source} cannot be opened as an archive: it is broken, or something else than its name says "
            f"({_first_line(error)})."
        ) from error


def _hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def _folder_files(root: Path) -> Iterator[InputFile]:
    unlisted: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unlisted.append):
        for name in subfolders:
            path = Path(folder, name)
            if path.is_symlink() and not name.startswith("."):
                yield InputFile(str(path), _failing("a link to a folder: not followed"))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                yield InputFile(str(path), partial(_read_path, path))
    for error in unlisted:
        yield InputFile(str(error.filename), _failing(f"folder cannot be listed: {error.strerror}"))


def _read_path(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise UnreadableFile("not a regular file")
        with path.open("rb") as file:
            return _limited(file.read(MAX_FILE_BYTES + 1))
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror or error}") from error


def _zip_files(source: Path, archive: zipfile.ZipFile) -> Iterator[InputFile]:
    total = 0
    members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda member: member.filename)
    for number, member in enumerate(m for m in members if not _hidden(m.filename)):
        path = f"{source}/{member.filename}"
        total += member.file_size
        if total > MAX_ARCHIVE_BYTES or number >= MAX_MEMBERS:
            yield InputFile(path, _failing(_beyond_limits()))
        elif member.file_size > MAX_FILE_BYTES:
            yield InputFile(path, _failing(_too_large(member.file_size)))
        else:
            yield InputFile(path, partial(_read_zip, archive, member))


def _read_zip(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as file:
            return _limited(file.read(MAX_FILE_BYTES + 1))  # the size in the directory may be a lie
    except UnreadableFile:
        raise
    except Exception as error:  # BadZipFile, zlib.error, RuntimeError (encrypted), NotImplementedError (method), ...
        raise UnreadableFile(f"broken in the archive: {_first_line(error)}") from error


def _tar_files(source: Path, archive: tarfile.TarFile) -> Iterator[InputFile]:
    total = number = 0
    try:
        for member in archive:
            if member.isdir() or _hidden(member.name):
                continue
            path = f"{source}/{member.name}"
            total, number = total + member.size, number + 1
            if total > MAX_ARCHIVE_BYTES or number > MAX_MEMBERS:
                yield InputFile(path, _failing(f"{_beyond_limits()}; nor is what follows"))
                return
            if not member.isfile():
                yield InputFile(path, _failing("a link or a device, not a file"))
            elif member.size > MAX_FILE_BYTES:
                yield InputFile(path, _failing(_too_large(member.size)))
            else:
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                data = content.read()
                yield InputFile(path, lambda data=data: data)  # type: ignore[misc]  # mypy cannot infer it
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        number += 1
        yield InputFile(str(source), _failing(f"the archive is broken from here on: {_first_line(error)}"))
    _refuse_empty(source, number)


class _LimitedTarInfo(tarfile.TarInfo):
    """A member whose extended header, read into memory as a whole, has a limit."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_LimitedTarInfo":
        """Parse a header block."""
        info = super().frombuf(buf, encoding, errors)
        if info.type in (b"x", b"g", b"X", b"L", b"K") and info.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        return info


def _limited(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableFile(_too_large(len(data)))
    return data


def _failing(message: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise UnreadableFile(message)

    return read


def _too_large(size: int) -> str:
    return f"too large: {size:,} bytes or more, at most {MAX_FILE_BYTES:,} are read"


def _beyond_limits() -> str:
    return (
        f"not read: the archive has more than {MAX_ARCHIVE_BYTES:,} bytes uncompressed, or more than "
        f"{MAX_MEMBERS:,} files"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
