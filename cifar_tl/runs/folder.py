"""Run folders read back: whatever of a run is there, and the names of what is not."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cifar_tl.errors import UserError
from cifar_tl.runs.metrics import Ints, class_scores, confusion_matrix, scores
from cifar_tl.runs.predictions import (
    IMAGES,
    PREDICTIONS,
    Predictions,
    SplitPredictions,
    read_images,
    read_predictions,
)
from cifar_tl.runs.record import METRICS, TEST_KEYS, faults, flat, metrics_of_test, read_metrics
from cifar_tl.runs.resume import PRUNING, config_flags

OVERRIDES = Path(".hydra") / "overrides.yaml"
CONFIG = Path(".hydra") / "config.yaml"
REPLACED = "replaced"
"""Folder of runs that cifar_tl.reproduce set aside for others of the same name."""


@dataclass
class Run:
    """What a run left, as far as it can be read.

    Attributes:
        folder: The run's.
        metrics: What metrics.json holds, without values of the wrong type; empty if it cannot be read.
        overrides: What was typed, such as `seed=1`, without `resume=` and Hydra's own; None if that is not recorded.
        config: Values by dotted key, interpolations as they are written; empty if that is not recorded.
        predictions: None if there are none.
        images: (height, width, 3), uint8, of some test images, by their index.
        problems: What is missing or damaged, in sentences.
    """

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None
    images: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`finished`, `running`, `interrupted`, `failed`, `pruned`, or `unknown`."""
        return str(self.metrics.get("status", "unknown"))

    @property
    def finished(self) -> bool:
        """Whether the run came to its test result."""
        return self.status == "finished"

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Facts of each start of the run, the resumes included; see START_KEYS."""
        return list(self.metrics.get("starts") or [self.metrics])

    @property
    def training_starts(self) -> list[dict[str, Any]]:
        """Those that trained: others found all epochs trained, and tested."""
        trained = [start for start in self.starts if start.get("epoch") in self.metrics.get("epoch", [])]
        return trained if trained and self.finished else self.starts  # an unfinished one has not come to an epoch's end

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of their indices; empty if they are not recorded."""
        return self.predictions.classes if self.predictions is not None else list(self.metrics.get("classes", []))

    @property
    def test_metrics(self) -> dict[str, Any]:
        """`test/acc` and the other metrics of the test: metrics.json's; what it lacks, from the predictions."""
        there = {key: self.metrics[key] for key in (f"test/{name}" for name in TEST_KEYS) if key in self.metrics}
        if self.predictions is None or len(there) == len(TEST_KEYS):
            return there
        return {**_measured(self.predictions.test, len(self.classes)), **there}

    @property
    def test_confusion(self) -> Ints | None:
        """`test/confusion` as (classes, classes), int64; None if there is none."""
        try:
            counts = np.array(self.test_metrics.get("test/confusion", []), dtype=np.int64)
        except ValueError:  # rows of different lengths
            return None
        return counts if counts.shape == (len(self.classes),) * 2 and counts.sum() > 0 else None

    @property
    def sweep(self) -> str | None:
        """The choice in conf/sweep of whose jobs the run was one; None of another run."""
        return next((o.removeprefix("sweep=") for o in self.overrides or () if o.startswith("sweep=")), None)

    @property
    def command(self) -> str | None:
        """The command that repeats the run, also if it was one of a sweep."""
        if self.overrides is None:
            return None
        of_sweep = ("sweep=", PRUNING) if self.sweep else ()
        its_own = [override for override in self.overrides if not override.lstrip("+~").startswith(of_sweep)]
        return " ".join(["python -m cifar_tl.train", *map(shlex.quote, [*config_flags(self.folder), *its_own])])


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run's, finished or not."""
    return (folder / METRICS).is_file() or ((folder / OVERRIDES).is_file() and (folder / "train.log").is_file())


def find_runs(folder: Path) -> list[Path]:
    """Return the folder if it is a run's, and otherwise the runs below it but those in REPLACED, job 2 before job 10.

    Raises:
        UserError: There is none.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder. Give a run's folder, outputs/EXPERIMENT/TIME, or a "
            f"sweep's, outputs/sweeps/TIME."
        )
    if is_run(folder):
        return [folder]
    candidates = {path.parent for path in folder.rglob(METRICS)} | {
        path.parents[1] for path in folder.rglob(str(OVERRIDES))
    }
    runs = [path for path in candidates if is_run(path) and REPLACED not in path.relative_to(folder).parts]
    if not runs:
        raise UserError(
            f"{folder} is no run and holds none: a run's folder has a {METRICS}. Runs are in outputs/EXPERIMENT/TIME, "
            f"those of sweeps in outputs/sweeps/TIME."
        )
    return sorted(runs, key=lambda path: [(int(p), "") if p.isdecimal() else (-1, p) for p in path.parts])


def read_run(folder: Path) -> Run:
    """Read what a run left; what cannot be read is named in `problems`."""
    run = Run(folder)
    try:
        metrics = read_metrics(folder)
        wrong = faults(metrics)
        run.metrics = {key: value for key, value in metrics.items() if key not in wrong}
        run.problems += [f"{METRICS}: {text}; what needs it is left out." for text in wrong.values()]
        needed = ("test/acc", "best/val/acc") if run.finished else ()
        run.problems += [f"{METRICS} has no {key}." for key in needed if key not in metrics]
    except FileNotFoundError:
        tested = (folder / PREDICTIONS).is_file()  # they are written after the test
        lost = "curves, times and what was run are missing" if tested else "the run ended before its first epoch did"
        run.problems.append(f"{METRICS} is missing: {lost}.")
    except (ValueError, OSError) as error:
        run.problems.append(f"{METRICS} cannot be read ({error}): curves, times and what was run are missing.")
    run.overrides = read_overrides(folder)
    run.config = _read_config(folder)
    try:
        run.predictions = read_predictions(folder)
    except FileNotFoundError:
        if run.finished:
            run.problems.append(f"{PREDICTIONS} is missing: all that is drawn from single images is left out.")
    except ValueError as error:
        run.problems.append(f"{error}. All that is drawn from single images is left out.")
    if run.predictions is not None and run.status not in ("finished", "unknown"):
        run.predictions = None
        run.problems.append(
            f"{PREDICTIONS} is of before the run went on: what is drawn from single images is left out."
        )
    if run.predictions is not None:
        try:
            run.images = read_images(folder)
        except FileNotFoundError:
            run.problems.append(f"{IMAGES} is missing: images are shown by their number alone.")
        except ValueError as error:
            run.problems.append(f"{error}. Images are shown by their number alone.")
        _check_agreement(run)
    return run


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read several runs."""
    return [read_run(folder) for folder in folders]


def read_overrides(folder: Path) -> list[str] | None:
    """Return what was typed for a run, without `resume=` and Hydra's own; None if that is not recorded."""
    try:
        given = yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(given, list):
        return None
    return [str(o) for o in given if not str(o).startswith(("resume=", "hydra.", "hydra/"))]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return flat(config) if isinstance(config, dict) else {}


def _check_agreement(run: Run) -> None:
    """Add a problem if metrics.json and predictions.npz are of different runs."""
    assert run.predictions is not None
    if "test/acc" in run.metrics and len(run.predictions.test.targets):
        recorded, predicted = run.metrics["test/acc"], run.predictions.test.accuracy
        if abs(recorded - predicted) > 1e-5:
            run.problems.append(
                f"{METRICS} says test/acc {recorded:.6g}, {PREDICTIONS} {predicted:.6g}: they are not of the same run. "
                f"Test metrics are those of {METRICS}; what is drawn from single images is from {PREDICTIONS}."
            )


def _measured(test: SplitPredictions, classes: int) -> dict[str, Any]:
    """Return the metrics of a test, under the keys of metrics.json."""
    confusion = confusion_matrix(test.predicted, test.targets, classes)
    details = {f"test/{name}": values.tolist() for name, values in class_scores(confusion).items()}
    scalars = {f"test/{name}": value for name, value in scores(test.logits, test.targets).items()}
    return metrics_of_test(scalars, {**details, "test/confusion": confusion.tolist()}, len(test.targets))
