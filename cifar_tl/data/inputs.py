"""The files of an image, a folder or an archive, one by one, with limits: nothing is extracted to disk."""

import codecs
import lzma
import os
import stat
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cifar_tl.data.walk import IRREGULAR, counts_text, is_folder, skipped_by_name, walk
from cifar_tl.errors import UserError, first_line

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


@dataclass
class Inputs:
    """What an input has.

    Attributes:
        total: How many files; None if that is not known beforehand.
        files: Each once. Those of a folder and of a zip sorted by path; those of a tar as they lie in it, because a
            compressed tar can only be read from its beginning to its end; those of a list in its order.
        skipped: How many entries were skipped, by the reason (see `cifar_tl.data.walk`); complete once `files` is read.
    """

    total: int | None
    files: Iterator[InputFile]
    skipped: Counter[str]


@contextmanager
def open_inputs(source: Path) -> Iterator[Inputs]:
    """Open an input.

    What is hidden, belongs to the system or is no regular file is skipped, in archives, too; a tar's hard links, whose
    content stands at another place in it, cannot be read. Links to folders are
    followed, but no folder is entered twice.

    Args:
        source: A file, a folder, an archive (told by its ending), `@LIST` for a text file with a path per line, or `@-`
            for such a list from standard input.

    Yields:
        Its files.

    Raises:
        UserError: Nothing is there, the archive cannot be opened, or there are no files in it (of a tar: when the last
            one has been asked for).
    """
    name = source.name.lower()
    skipped: Counter[str] = Counter()
    if not os.path.lexists(source):
        if not str(source).startswith("@"):
            hint = " Patterns are not expanded: `find` can list files for input=@-." if "*" in str(source) else ""
            raise UserError(f"input={source}: no such file or folder.{hint}")
        named = [file for path in dict.fromkeys(_listed(source)) for file in _path_files(path, skipped)]
        files = list({file.path: file for file in named}.values())  # a folder and a file in it may be named
        _refuse_empty(source, len(files), skipped)
        yield Inputs(len(files), iter(files), skipped)
    elif name.endswith(ZIP_ENDINGS) and not source.is_dir():
        with _opened(source, lambda: zipfile.ZipFile(source)) as archive:
            files = list(_zip_files(source, archive, skipped))
            _refuse_empty(source, len(files), skipped)
            yield Inputs(len(files), iter(files), skipped)
    elif name.endswith(TAR_ENDINGS) and not source.is_dir():
        with _opened(source, lambda: tarfile.open(source, "r:*", tarinfo=_LimitedTarInfo)) as archive:
            yield Inputs(None, _tar_files(source, archive, skipped), skipped)
    else:
        files = list(_path_files(source, skipped))
        _refuse_empty(source, len(files), skipped)
        yield Inputs(len(files), iter(files), skipped)


def _refuse_empty(source: Path, files: int, skipped: Counter[str]) -> None:
    if files == 0:
        aside = f", apart from what is skipped ({counts_text(skipped)})" if skipped else ""
        raise UserError(f"input={source} has no images: there is no file in it{aside}.")


def _listed(source: Path) -> list[Path]:
    """Return the paths of a list: one per line, or separated by NUL bytes, as `find -print0` writes them."""
    path = str(source)[1:]
    try:
        if path == "-" and sys.stdin is None:
            raise OSError("it is closed")
        content = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # of PowerShell
            content = content.decode("utf-16").encode()
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"input={source}: the list {path} cannot be read: {reason}. It should be a text file with a path per line, "
            f"or - for standard input."
        ) from error
    content = content.removeprefix(codecs.BOM_UTF8)  # of editors on Windows
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [Path(os.fsdecode(line)) for line in lines if line.strip()]


def _path_files(path: Path, skipped: Counter[str]) -> Iterator[InputFile]:
    """Return the files of a folder, or a file itself."""
    if not is_folder(path):
        yield InputFile(str(path), partial(_read_path, path))
        return
    found = walk(path)
    skipped.update(found.skipped)
    files = [InputFile(str(file), partial(_read_path, file)) for file in found.files]
    for folder, reason in found.unlisted.items():
        files.append(InputFile(str(folder), _failing(f"folder cannot be listed: {reason}")))
    yield from sorted(files, key=lambda file: file.path)


def _opened(source: Path, open_archive: Callable[[], Archive]) -> Archive:
    try:
        return open_archive()
    except Exception as error:  # BadZipFile, TarError, OSError, UnicodeDecodeError, NotImplementedError (version), ...
        raise UserError(
            f"input={source} cannot be opened as an archive: it is broken, or something else than its name says "
            f"({first_line(error).rstrip(':')})."
        ) from error


def _read_path(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise UnreadableFile("not a regular file")
        with path.open("rb") as file:
            return _limited(file.read(MAX_FILE_BYTES + 1))
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror or error}") from error


def _zip_files(source: Path, archive: zipfile.ZipFile, skipped: Counter[str]) -> Iterator[InputFile]:
    total = number = 0
    # programs on Windows write `\\` between folders, which the format does not allow
    members = sorted((member.filename.replace("\\", "/"), at, member) for at, member in enumerate(archive.infolist()))
    for name, _, member in members:
        if name.endswith("/"):
            continue  # a folder
        if reason := skipped_by_name(name) or _irregular(member):
            skipped[reason] += 1
            continue
        path = f"{source}/{name}"
        total, number = total + member.file_size, number + 1
        if total > MAX_ARCHIVE_BYTES or number > MAX_MEMBERS:
            yield InputFile(path, _failing(_beyond_limits()))
        elif member.file_size > MAX_FILE_BYTES:
            yield InputFile(path, _failing(_too_large(member.file_size)))
        else:
            yield InputFile(path, partial(_read_zip, archive, member))


def _irregular(member: zipfile.ZipInfo) -> str | None:
    """Return IRREGULAR for a link or a device that a Unix program has stored."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    return IRREGULAR if kind not in (0, stat.S_IFREG) else None


def _read_zip(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as file:
            return _limited(file.read(MAX_FILE_BYTES + 1))  # the size in the directory may be a lie
    except UnreadableFile:
        raise
    except Exception as error:  # BadZipFile, zlib.error, RuntimeError (encrypted), NotImplementedError (method), ...
        raise UnreadableFile(f"broken in the archive: {first_line(error)}") from error


def _tar_files(source: Path, archive: tarfile.TarFile, skipped: Counter[str]) -> Iterator[InputFile]:
    total = number = 0
    try:
        for member in archive:
            if member.isdir():
                continue
            if reason := skipped_by_name(member.name) or (None if member.isfile() or member.islnk() else IRREGULAR):
                skipped[reason] += 1
                continue
            path = f"{source}/{member.name}"
            total, number = total + member.size, number + 1
            if member.islnk():  # to follow it is to go back to the beginning of a compressed archive
                yield InputFile(path, _failing(f"hard link: its content is that of {member.linkname} in the archive"))
            elif total > MAX_ARCHIVE_BYTES or number > MAX_MEMBERS:
                yield InputFile(path, _failing(f"{_beyond_limits()}; nor is what follows"))
                return
            elif member.size > MAX_FILE_BYTES:
                yield InputFile(path, _failing(_too_large(member.size)))
            else:
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                data = content.read()
                yield InputFile(path, lambda data=data: data)  # type: ignore[misc]  # mypy cannot infer it
        assert archive.fileobj is not None
        archive.fileobj.read(MAX_TAR_HEADER_BYTES)  # padding, then the checksum of a gzip
    except (tarfile.TarError, ValueError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        number += 1
        yield InputFile(str(source), _failing(f"the archive is broken from here on: {first_line(error)}"))
    _refuse_empty(source, number, skipped)


class _LimitedTarInfo(tarfile.TarInfo):
    """A member whose extended header, read into memory as a whole, has a limit."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_LimitedTarInfo":
        """Parse a header block; what is none ends the reading, as it does not in a TarFile, but for the first one."""
        try:
            info = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
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
