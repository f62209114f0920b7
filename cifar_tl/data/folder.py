"""Class folders of images, `train/CLASS/*`, `test/CLASS/*` and perhaps `val/CLASS/*`, brought to 32x32."""

import logging
import os
import re
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_tl.data.decode import SIZE, SUFFIXES, NoImage, UnreadableImage, decode, default_threads
from cifar_tl.data.lazy import LazyImages, in_workers
from cifar_tl.data.splits import image_digest
from cifar_tl.data.walk import counts_text, is_folder, skipped_by_name, skipped_text, walk
from cifar_tl.errors import UserError, check_int

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
VAL_FOLDERS = ("val", "valid", "validation")
"""Names that a folder of validation images may have."""
SHOWN_PROBLEMS = 100
CHECKED_AT_ONCE = 64
"""Files per task of a worker process."""


@dataclass(frozen=True)
class Reading:
    """What became of a file.

    Attributes:
        pixels: (3, 32, 32), uint8; None where they are not kept, or there are none.
        digest: Of the pixels; empty if the file has no image.
        resized: Whether the image was of another size.
        left_out: What a file is that does not claim to be an image, such as `.txt` or `HEIC`; empty for images.
        problem: Why there are no pixels; empty if there are, or if the file is left out.
        notes: See Decoded.
        guessed_bits: See Decoded.
    """

    pixels: NDArray[np.uint8] | None = None
    digest: bytes = b""
    resized: bool = False
    left_out: str = ""
    problem: str = ""
    notes: tuple[str, ...] = ()
    guessed_bits: int = 0


class ImageFolders:
    """A folder of images in torchvision's ImageFolder layout, once for training and once for testing.

    Images of a third one, of a name in VAL_FOLDERS, are for validation, and behind those of `train`.

    Which files are images is told by their content. Images that are not 32x32 are resized to it (bicubic). What is
    skipped, left out and resized is logged. One of the two splits may be missing as long as nobody reads it.

    Args:
        root: Has `train` and `test`, each with one folder per class; their names are compared after Unicode's NFC.
        workers: 0 reads all images into memory (3 KB each); otherwise so many processes decode them in every epoch,
            and once before, to find broken files.

    Raises:
        UserError: No such layout there, or the splits have different classes.
    """

    def __init__(self, root: str | Path, workers: int) -> None:
        self.root = Path(root)
        self.workers = check_int("data.workers", workers, 0)
        with self._readable():
            self._folders = {split: self._class_folders(split) for split in SPLITS if (self.root / split).is_dir()}
            if not self._folders:
                raise UserError(f"data.root={self.root}{self._what_is_there()}{self._layout()}")
        first, *others = self._folders
        for other in others:
            self._compare(first, other)
        self.classes = tuple(sorted(self._folders[first]))
        self._val = [name for name in VAL_FOLDERS if is_folder(self.root / name)]
        self.own_val = 0
        self._files: dict[str, list[Path]] = {}

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say which folder cannot be read, and of which key it is.

        Raises:
            UserError: One cannot.
        """
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.root={self.root} cannot be read: {error.filename or self.root}: {error.strerror}. Give a folder "
                f"that can be read."
            ) from error

    def _class_folders(self, split: str) -> dict[str, Path]:
        """Return the folders of a split's classes by their names in NFC."""
        folders: dict[str, Path] = {}
        for path in sorted((self.root / split).iterdir()):
            name = unicodedata.normalize("NFC", path.name)
            if skipped_by_name(path.name) or not is_folder(path):
                continue
            if name.encode(errors="replace").decode() != name:
                raw = os.fsencode(path.name)
                raise UserError(f"{path.parent} has a class folder whose name is not UTF-8, {raw!r}: rename it.")
            if name in folders:
                raise UserError(f"{path.parent} has the class {name} twice, spelt in two ways of Unicode. Join them.")
            folders[name] = path
        if len(folders) < 2:
            has = f"has {len(folders)}" + (f" ({', '.join(folders)})" if folders else "")
            raise UserError(
                f"data.root={self.root}: {self.root / split} needs at least two class folders of images, {has}."
                f"{self._layout()}"
            )
        return folders

    def _layout(self) -> str:
        return (
            f" Lay images out as {self.root}/train/CLASS/* and {self.root}/test/CLASS/*, with at least two class "
            f"folders in each; images to validate on may be in {self.root}/val/CLASS/*."
        )

    def _what_is_there(self) -> str:
        """Say what a root without `train` and `test` is."""
        if not self.root.is_dir():
            return ": no such folder."
        absolute = self.root.resolve()
        for levels, above in (("one level", absolute.parent), ("two levels", absolute.parent.parent)):
            if all(is_folder(above / split) for split in SPLITS) and absolute.relative_to(above).parts[0] in SPLITS:
                return f" is {levels} too deep: give data.root={above}."
        inside = [path for path in sorted(absolute.iterdir()) if all(is_folder(path / split) for split in SPLITS)]
        if inside:
            return f" is one level too high: give data.root={inside[0]}."
        return f" has no folder train and no folder test.{self._folders_there()}"

    def _folders_there(self) -> str:
        names = [
            path.name for path in sorted(self.root.iterdir()) if is_folder(path) and not skipped_by_name(path.name)
        ]
        return f" Its folders are: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}." if names else ""

    def _compare(self, a: str, b: str) -> None:
        """Refuse two folders of different classes."""
        ours, theirs = (set(self._folders[split]) for split in (a, b))
        lines = []
        for one, names in ((a, ours - theirs), (b, theirs - ours)):
            if names:
                lines.append(f"only in {one}: {', '.join(sorted(names))}")
        if not lines:
            return
        raise UserError(
            f"data.root={self.root}: {a} and {b} have different classes; {'; '.join(lines)}. Each class needs a "
            f"folder of the same name in both (names are compared with upper and lower case)."
        )

    def prepare(self) -> None:
        """Fetch nothing: the files are read when the splits are."""

    def read(self, splits: Sequence[str]) -> dict[str, tuple[Tensor | LazyImages, Tensor]]:
        """Decode every image of some splits and return them by split; one error names all that cannot be used.

        Raises:
            UserError: A split is not there, a class has no image, or a file is no readable image.
        """
        if missing := [split for split in splits if split not in self._folders]:
            raise UserError(f"data.root={self.root} has no folder {missing[0]}.{self._folders_there()}{self._layout()}")
        if "train" in splits:
            self._look_at_val()
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of a file's faults is said here
        if self.workers:
            log.info("data.workers=%d: every image is decoded once now, to find what is broken", self.workers)
        problems: dict[Path, str] = {}
        skipped: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        guessed_bits: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        result = {split: self._read(split, problems, skipped, left_out, notes, guessed_bits) for split in splits}
        if len(guessed_bits) > 1:
            log.warning(
                "warning: grey TIFFs and PNGs do not say how many of their 16 bits they use, and each one's brightest "
                "pixel was taken as a sign (%s): if they are of one kind, their brightness differs now. Convert them "
                "to 8 bits.",
                counts_text(guessed_bits),
            )
        if notes:
            log.info("noted      %s", counts_text(notes))
        if skipped:
            log.info("skipped    %s", skipped_text(skipped))
        if left_out:
            log.info("left out   %s without an image in them: %s", _files(left_out.total()), counts_text(left_out))
        if problems:
            raise UserError(self._problems_text(problems))
        return result

    def _look_at_val(self) -> None:
        """Refuse folders of validation images that do not fit to the others."""
        if len(self._val) > 1:
            raise UserError(f"data.root={self.root} has the folders {' and '.join(self._val)}: keep one of them.")
        for name in self._val:
            with self._readable():
                self._folders[name] = self._class_folders(name)
            self._compare("train", name)

    def name(self, split: str, index: int) -> str:
        """Return the path of an image of a split that has been read, from the root."""
        return str(self._files[split][index].relative_to(self.root))

    def _read(
        self,
        split: str,
        problems: dict[Path, str],
        skipped: Counter[str],
        left_out: Counter[str],
        notes: Counter[str],
        guessed_bits: Counter[str],
    ) -> tuple[Tensor | LazyImages, Tensor]:
        """Read a split; add what is wrong, skipped, left out, noted and guessed to what is given."""
        start = time.perf_counter()
        candidates: list[Path] = []
        labels: list[int] = []
        for_validation: list[bool] = []
        places = [split, *self._val] if split == "train" else [split]
        for place in places:
            with self._readable():
                entries = list(os.scandir(self.root / place))
            for entry in entries:
                if reason := skipped_by_name(entry.name):
                    skipped[reason] += 1
                elif not is_folder(entry.path):
                    left_out["beside the class folders"] += 1
            for label, name in enumerate(self.classes):
                found = walk(self._folders[place][name])
                skipped.update(found.skipped)
                problems |= {folder: f"folder cannot be listed: {reason}" for folder, reason in found.unlisted.items()}
                candidates += found.files
                labels += [label] * len(found.files)
                for_validation += [place in self._val] * len(found.files)

        readings = list(_read_in_workers(candidates, self.workers) if self.workers else _read_all(candidates))
        kept = [at for at, reading in enumerate(readings) if reading.digest]
        others: dict[int, Counter[str]] = {label: Counter() for label in range(len(self.classes))}
        for path, label, held_out, reading in zip(candidates, labels, for_validation, readings, strict=True):
            if reading.left_out and held_out:
                left_out[reading.left_out] += 1
            elif reading.left_out:
                others[label][reading.left_out] += 1
            notes.update(re.sub(r" of (at most|0 to) \d+|,", "", note) for note in reading.notes)  # no image's own
            if reading.guessed_bits:
                guessed_bits[f"{reading.guessed_bits}-bit"] += 1
            if reading.problem:
                problems[path] = reading.problem
        targets = torch.tensor([labels[at] for at in kept], dtype=torch.int64)
        counts = Counter(label for label, held_out in zip(labels, for_validation, strict=True) if not held_out)
        for label, name in enumerate(self.classes):
            left_out.update(others[label])
            if counts[label] == others[label].total():
                instead = f" ({counts_text(others[label])})" if others[label] else ""
                problems.setdefault(self._folders[split][name], f"no images in it{instead}")

        own_val = ""
        if split == "train" and self._val:
            self.own_val = sum(for_validation[at] for at in kept)
            own_val = f" ({self.own_val:,} of them in {self._val[0]}, to validate on)"
            if not self.own_val:
                problems[self.root / self._val[0]] = "no images in it"
        self._files[split] = files = [candidates[at] for at in kept]
        if not files:
            return torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8), targets
        resized = sum(reading.resized for reading in readings)
        log.info(
            "read       %s: %s images%s, %s resized to %dx%d, %.1f s",
            " and ".join(str(self.root / place) for place in places),
            f"{len(files):,}",
            own_val,
            f"{resized:,}",
            SIZE,
            SIZE,
            time.perf_counter() - start,
        )
        if self.workers:
            return LazyImages(files, read_pixels, self.workers, [readings[at].digest for at in kept]), targets
        pixels = [reading.pixels for reading in readings if reading.pixels is not None]
        return torch.from_numpy(np.stack(pixels)), targets

    def _problems_text(self, problems: dict[Path, str]) -> str:
        lines = [f"  {path.relative_to(self.root)}: {why}" for path, why in sorted(problems.items())]
        if len(lines) > SHOWN_PROBLEMS:
            lines[SHOWN_PROBLEMS:] = [f"  and {len(lines) - SHOWN_PROBLEMS:,} more"]
        return "\n".join(
            [
                f"data.root={self.root} cannot be used as it is:",
                *lines,
                "Replace or remove the files; fill an empty class folder, or remove it from all splits alike.",
            ]
        )


def _files(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"


def _read_all(files: Sequence[Path]) -> Iterator[Reading]:
    """Decode files in a pool of threads, keeping the pixels."""
    with ThreadPoolExecutor(default_threads()) as pool:
        yield from pool.map(read, files)


def _read_in_workers(files: Sequence[Path], workers: int) -> Iterator[Reading]:
    """Decode files in worker processes, keeping only what is to be known of the pixels."""
    batches = [
        list(range(start, min(start + CHECKED_AT_ONCE, len(files)))) for start in range(0, len(files), CHECKED_AT_ONCE)
    ]
    for readings in in_workers(_read_without_pixels, files, batches, workers):
        yield from readings


def _read_without_pixels(files: Sequence[Path]) -> list[Reading]:
    return [replace(reading, pixels=None) for reading in map(read, files)]


def read(path: Path) -> Reading:
    """Decode a file, or say what is wrong with it; a file that is no image and does not claim to be one is left out."""
    try:
        with path.open("rb") as file:
            decoded = decode(file)
    except NoImage as error:
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            return Reading(problem=str(error))
        return Reading(left_out=error.kind or suffix or "no ending")
    except UnreadableImage as error:
        return Reading(problem=str(error))
    except MemoryError:
        return Reading(problem="too large for the memory of this machine")
    except OSError as error:
        return Reading(problem=f"cannot be read: {error.strerror or error}")
    digest = image_digest(decoded.pixels)
    return Reading(decoded.pixels, digest, decoded.resized, notes=decoded.notes, guessed_bits=decoded.guessed_bits)


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Return the image of a file, (3, 32, 32), uint8.

    Raises:
        UserError: It is not readable any more.
    """
    reading = read(path)
    if reading.pixels is None:
        raise UserError(
            f"{path} was a readable image when the run began, and is none now: {reading.problem or 'no image'}. "
            f"Put it back, and go on with resume=last."
        )
    return reading.pixels
