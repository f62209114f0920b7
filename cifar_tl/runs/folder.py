"""Run folders read back: whatever of a run is there, and the names of what is not."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cifar_tl.errors import UserError
from cifar_tl.runs.metrics import Ints, confusion_matrix
from cifar_tl.runs.predictions import IMAGES, PREDICTIONS, Predictions, read_images, read_predictions

METRICS, OVERRIDES = "metrics.json", Path(".hydra") / "overrides.yaml"


@dataclass
class Run:
    """What a run left, as far as it can be read.

    Attributes:
        folder: The run's.
        metrics: What metrics.json holds; empty if it cannot be read.
        overrides: What was typed, such as `seed=1`, without `resume=` and Hydra's own; None if nothing says.
        predictions: None if there are none.
        images: (height, width, 3), uint8, of some test images, by their index.
        problems: What is missing or damaged, for people.
    """

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] | None = None
    predictions: Predictions | None = None
    images: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`finished`, `running`, `interrupted`, `failed`, or `unknown`."""
        return str(self.metrics.get("status", "unknown"))

    @property
    def finished(self) -> bool:
        """Whether the run came to its test result."""
        return self.status == "finished"

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of their indices; empty if nothing says."""
        return self.predictions.classes if self.predictions is not None else list(self.metrics.get("classes", []))

    @property
    def test_confusion(self) -> Ints | None:
        """Counts on the test set by true class and prediction, from either file; None if there are none."""
        if self.predictions is not None:
            test = self.predictions.test
            return confusion_matrix(test.predicted, test.targets, len(self.classes))
        try:
            counts = np.array(self.metrics["test/confusion"], dtype=np.int64)
        except (KeyError, ValueError, TypeError):
            return None
        return counts if counts.shape == (len(self.classes),) * 2 and counts.sum() > 0 else None

    @property
    def command(self) -> str | None:
        """The command that repeats the run."""
        if self.overrides is None:
            return None
        return " ".join(["python -m cifar_tl.train", *(_quoted(o) for o in self.overrides)])


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run's, finished or not."""
    return (folder / METRICS).is_file() or ((folder / OVERRIDES).is_file() and (folder / "train.log").is_file())


def find_runs(folder: Path) -> list[Path]:
    """Return the folder if it is a run's, and otherwise the runs below it, job 2 before job 10.

    Raises:
        UserError: There is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a run's folder, or a sweep's: outputs/EXPERIMENT/TIME.")
    if is_run(folder):
        return [folder]
    candidates = {path.parent for path in folder.rglob(METRICS)} | {
        path.parents[1] for path in folder.rglob(str(OVERRIDES))
    }
    runs = [path for path in candidates if is_run(path)]
    if not runs:
        raise UserError(
            f"{folder} is no run and holds none: a run's folder has a {METRICS}. Runs are in outputs/EXPERIMENT/TIME."
        )
    return sorted(runs, key=lambda path: [(int(p), "") if p.isdigit() else (-1, p) for p in path.parts])


def read_run(folder: Path) -> Run:
    """Read what a run left; what cannot be read is named in `problems`."""
    run = Run(folder)
    try:
        metrics = json.loads((folder / METRICS).read_text())
        if not isinstance(metrics, dict):
            raise ValueError("it holds no object")
        run.metrics = metrics
    except FileNotFoundError:
        run.problems.append(f"{METRICS} is missing: the run ended before its first epoch did.")
    except (ValueError, OSError) as error:
        run.problems.append(f"{METRICS} cannot be read ({error}): curves, times and what was run are missing.")
    run.overrides = _overrides(folder)
    try:
        run.predictions = read_predictions(folder)
    except FileNotFoundError:
        if run.finished:
            run.problems.append(f"{PREDICTIONS} is missing: all that is drawn from single images is left out.")
    except ValueError as error:
        run.problems.append(f"{error}. All that is drawn from single images is left out.")
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


def _overrides(folder: Path) -> list[str] | None:
    try:
        given = yaml.safe_load((folder / OVERRIDES).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(given, list):
        return None
    return [str(o) for o in given if not str(o).startswith(("resume=", "hydra.", "hydra/"))]


def _check_agreement(run: Run) -> None:
    """Say so if the two files are not of the same run."""
    assert run.predictions is not None
    if "test/acc" in run.metrics and len(run.predictions.test.targets):
        theirs, ours = run.metrics["test/acc"], run.predictions.test.accuracy
        if not isinstance(theirs, int | float) or abs(theirs - ours) > 1e-5:
            run.problems.append(
                f"{METRICS} says test/acc {theirs}, {PREDICTIONS} {ours:.4f}: they are not of the same run. "
                f"Figures below are {PREDICTIONS}'s."
            )


def _quoted(override: str) -> str:
    return override if re.fullmatch(r"[\w.,:=/@+~%-]+", override) else f"'{override}'"
