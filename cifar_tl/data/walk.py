"""The files in a folder, by one rule for training and for predicting: what is hidden or no file is skipped, counted."""

import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin", "lost+found"}
SYSTEM |= {"system volume information"}
"""Names, in lower case, that macOS, Windows, Linux and NAS systems leave beside people's files."""

HIDDEN, OF_THE_SYSTEM, IRREGULAR, REPEATED = "hidden", "of the system", "no regular file", "link to a folder met before"
"""Why an entry is skipped."""


def skipped_by_name(path: str) -> str | None:
    """Return why a path is skipped for the name of a part of it, HIDDEN or OF_THE_SYSTEM; None if it is not."""
    for part in path.split("/"):
        if part.startswith(".") and part not in (".", ".."):
            return HIDDEN
        if part.lower() in SYSTEM:
            return OF_THE_SYSTEM
    return None


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder or a link to one; False, too, where `Path.is_dir` would raise OSError."""
    return os.path.isdir(path)  # noqa: PTH112


@dataclass
class Found:
    """What is in a folder, with the folders in it.

    Attributes:
        files: Regular files and links to them, sorted; broken links, too, for whoever reads them to say so.
        skipped: How many entries were skipped, by the reason; a skipped folder counts as one.
        unlisted: Folders that cannot be listed, with the reason.
    """

    files: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unlisted: dict[Path, str] = field(default_factory=dict)


def walk(root: Path) -> Found:
    """Find the files in a folder. Links to folders are followed, each folder is entered once: loops end.

    A folder that can be reached by a link and without one is entered without.
    """
    found = Found()
    entered: set[tuple[int, int]] = set()
    links: list[Path] = []

    def enter(folder: Path) -> None:
        pending = [folder]
        while pending:
            folder = pending.pop()
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in entered:
                    found.skipped[REPEATED] += 1
                    continue
                entered.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                found.unlisted[folder] = error.strerror or str(error)
                continue
            for entry in entries:
                if reason := skipped_by_name(entry.name):
                    found.skipped[reason] += 1
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_symlink() and is_folder(entry.path):
                    links.append(Path(entry.path))
                elif _may_be_read(entry):
                    found.files.append(Path(entry.path))
                else:
                    found.skipped[IRREGULAR] += 1

    enter(root)
    while links:
        links.sort(reverse=True)
        enter(links.pop())
    found.files.sort()
    return found


def _may_be_read(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # a broken link, or one of a loop: reading it says what is wrong
        return True


def counts_text(counts: Mapping[str, int]) -> str:
    """Return counts with their names, the largest first: `.avif 8, .txt 2`."""
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def skipped_text(skipped: Mapping[str, int]) -> str:
    """Return what was skipped, and why, in a line: `3 entries: hidden 2, no regular file 1`."""
    total = sum(skipped.values())
    return f"{total:,} {'entry' if total == 1 else 'entries'}: {counts_text(skipped)}"
