"""predictions.npz and images.npz: what a run predicted, and small pictures of what is worth looking at."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_tl.files import replacing
from cifar_tl.runs.metrics import (
    Ints,
    confused_pairs,
    confusion_matrix,
    least_certain,
    mistaken,
    most_certain,
    softmax,
    top_mistakes,
)

PREDICTIONS, IMAGES = "predictions.npz", "images.npz"
SPLIT_KEYS, FROZEN = ("logits", "targets", "indices"), "frozen_val_logits"

MISTAKES, CERTAIN, UNCERTAIN = 24, 12, 12
"""Pictures in the galleries of a report."""
CONFUSED_PAIRS, PAIR_EXAMPLES = 8, 6
"""Confused pairs that a report lists, and pictures per direction."""


@dataclass(frozen=True)
class SplitPredictions:
    """What a model predicted for the images of one split.

    Attributes:
        logits: (examples, classes), float32, before the softmax.
        targets: (examples,), int64.
        indices: (examples,), int64: which image of the official training set (validation) or test set each one is.
    """

    logits: NDArray[np.float32]
    targets: Ints
    indices: Ints

    @property
    def predicted(self) -> Ints:
        """The class with the highest logit, (examples,)."""
        return np.asarray(self.logits.argmax(axis=1))

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each prediction is right, (examples,)."""
        return np.asarray(self.predicted == self.targets)

    @property
    def accuracy(self) -> float:
        """Share that is right."""
        return float(self.right.mean())


@dataclass(frozen=True)
class Predictions:
    """A run's predictions with the weights of its best epoch.

    Attributes:
        classes: Names, in the order of their indices.
        val: Validation; every temperature and threshold is chosen here.
        test: Test; only measured.
        frozen: Validation at the end of the frozen phase; None if there was none, or nothing unfrozen.
    """

    classes: list[str]
    val: SplitPredictions
    test: SplitPredictions
    frozen: SplitPredictions | None = None


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write predictions.npz; it needs no pickle to be read."""
    arrays: dict[str, NDArray[Any]] = {"classes": np.array(predictions.classes, dtype=np.str_)}
    for name, split in (("val", predictions.val), ("test", predictions.test)):
        arrays |= {
            f"{name}_logits": split.logits.astype(np.float32),
            f"{name}_targets": split.targets.astype(np.int64),
            f"{name}_indices": split.indices.astype(np.int64),
        }
    if predictions.frozen is not None:
        arrays[FROZEN] = predictions.frozen.logits.astype(np.float32)
    _save(folder / PREDICTIONS, arrays)


def read_predictions(folder: Path) -> Predictions:
    """Read predictions.npz.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or holds something else.
    """
    keys = ("classes", *(f"{split}_{key}" for split in ("val", "test") for key in SPLIT_KEYS))
    data = _load(folder / PREDICTIONS, keys, optional=(FROZEN,))
    classes = [str(name) for name in data["classes"]]
    splits = [SplitPredictions(*(data[f"{split}_{key}"] for key in SPLIT_KEYS)) for split in ("val", "test")]
    if FROZEN in data:
        splits.append(SplitPredictions(data[FROZEN], splits[0].targets, splits[0].indices))
    for split in splits:
        lengths = {len(split.logits), len(split.targets), len(split.indices)}
        if split.logits.ndim != 2 or split.logits.shape[1] != len(classes) or len(lengths) != 1:
            raise ValueError(f"{PREDICTIONS}: arrays of different lengths")
        if not np.isfinite(split.logits).all():
            raise ValueError(f"{PREDICTIONS}: logits that are not finite")
        if not len(split.targets):
            raise ValueError(f"{PREDICTIONS}: a split without images")
        if not 0 <= split.targets.min() <= split.targets.max() < len(classes):
            raise ValueError(f"{PREDICTIONS}: targets that are none of the {len(classes)} classes")
    return Predictions(classes, *splits)


def worth_showing(test: SplitPredictions) -> Ints:
    """Return the positions, sorted, of the test images that the galleries of a report show."""
    probabilities = softmax(test.logits)
    confusion = confusion_matrix(test.predicted, test.targets, test.logits.shape[1])
    chosen = [
        top_mistakes(probabilities, test.targets, MISTAKES),
        most_certain(probabilities, CERTAIN),
        least_certain(probabilities, UNCERTAIN),
    ]
    for pair in confused_pairs(confusion, CONFUSED_PAIRS):
        for true, predicted in (pair, pair[::-1]):
            chosen.append(mistaken(probabilities, test.targets, true, predicted, PAIR_EXAMPLES))
    return np.unique(np.concatenate(chosen))


def write_images(folder: Path, indices: Ints, images: NDArray[np.uint8]) -> None:
    """Write images.npz.

    Args:
        folder: The run's.
        indices: (examples,), which image of the official test set each one is.
        images: (examples, 3, height, width), uint8, RGB.
    """
    _save(folder / IMAGES, {"indices": indices.astype(np.int64), "images": images.transpose(0, 2, 3, 1)})


def read_images(folder: Path) -> dict[int, NDArray[np.uint8]]:
    """Return images.npz as (height, width, 3) uint8 images by their index in the test set.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or holds something else.
    """
    data = _load(folder / IMAGES, ("indices", "images"))
    if data["images"].ndim != 4 or data["images"].dtype != np.uint8 or len(data["images"]) != len(data["indices"]):
        raise ValueError(f"{IMAGES}: not one uint8 image per index")
    return dict(zip(data["indices"].tolist(), data["images"], strict=True))


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an archive, replacing the old one in one step."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _load(path: Path, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
    """Read an archive, without pickle.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or lacks a key.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            return {key: data[key] for key in (*keys, *(key for key in optional if key in data))}
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise ValueError(f"{path.name}: {error.args[0]}") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be read: {error or type(error).__name__}") from error
