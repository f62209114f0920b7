"""The page of one run: RUN/report.html, and its figures in RUN/figures."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cifar_tl.reports import run_predictions, run_training
from cifar_tl.reports.original import beside_original
from cifar_tl.reports.page import FigureFolder, Section, write_page
from cifar_tl.runs.folder import Run, read_run
from cifar_tl.runs.formatting import duration_text, percent, percent_range
from cifar_tl.runs.metrics import wilson_interval
from cifar_tl.runs.predictions import PREDICTIONS
from cifar_tl.runs.record import METRICS

REPORT, FIGURES = "report.html", "figures"


def write_run_report(folder: Path, output: Path | None = None) -> Path:
    """Draw what a run left; an unfinished or damaged run gets what can be drawn, and the page says what cannot.

    Args:
        folder: The run's.
        output: Gets the page and its figures; None for the run's own.

    Returns:
        The page's path.

    Raises:
        OSError: It cannot be written.
    """
    run = read_run(folder)
    output = output or folder
    figures = FigureFolder(output / FIGURES)
    sections: list[Section] = []
    problems: list[str] = []

    def attempt(heading: str, macro: str, source: str, prepare: Callable[[], Mapping[str, Any] | None]) -> None:
        """Add a section if there is something in it; what a file lacks costs the sections that need it alone."""
        try:
            if (data := prepare()) is not None:
                sections.append(Section(heading, macro, data))
        except OSError:
            raise  # a full or write-protected disk is not the record's fault
        except Exception as error:  # whatever odd values lead to
            reason = f"has no {error}" if isinstance(error, KeyError) else f"is odd: {error}"
            problems.append(f"'{heading}' could not be drawn: {source} {reason}.")

    if run.metrics:
        attempt("Schedule, and what happened", "schedule", METRICS, lambda: run_training.schedule(run))
        attempt("Curves", "curves", METRICS, lambda: run_training.curves(run, figures))
        attempt("Beside the original", "original", METRICS, lambda: beside_original(run, figures))
    attempt("Classes", "classes", METRICS, lambda: run_predictions.classes(run, figures))
    if run.predictions is not None:
        shown = run_predictions.ImageSections(run.predictions, run.images, figures)
        for heading, macro, prepare in (
            ("What the unfreeze changed", "unfreeze", lambda: run_predictions.unfreeze(run, figures)),
            ("Most confused pairs", "confused", shown.confused_pairs),
            ("Calibration", "calibration", lambda: run_predictions.calibration(run, figures)),
            ("Mistakes", "mistakes", shown.mistakes),
            ("Most and least certain", "certainty", shown.certainty),
        ):
            attempt(heading, macro, PREDICTIONS, prepare)
    if run.metrics:
        attempt("Time", "time", METRICS, lambda: run_training.time(run))
    attempt("Repeat it", "repeat", METRICS, lambda: run_training.repeat(run))
    lines = [*_warnings(run), *run.problems, *problems, *figures.problems]
    beside = output.resolve() == folder.resolve()
    place = "" if beside else quote(os.fsencode(os.path.relpath(folder.resolve(), output.resolve()))) + "/"
    write_page(output / REPORT, "run.html.j2", sections=sections, lines=lines, place=place, **_header(run))
    return output / REPORT


def _warnings(run: Run) -> list[str]:
    """Return what a reader should know before all numbers."""
    warnings = [*run.metrics.get("warnings", []), *leaks(run)]
    if not run.finished and not (run.status == "unknown" and run.predictions is not None):  # these are of a test
        done = len(run.metrics.get("epoch", []))
        planned = max((phase["end"] for phase in run.metrics.get("plan", [])), default=0)
        epochs = f"{done} of {planned} epochs" if planned else f"{done} epochs"
        why = f" {run.metrics['pruned']}" if "pruned" in run.metrics else ""
        warnings.insert(
            0, f"This run has not finished (status: {run.status}). {epochs} are recorded; there is no test result.{why}"
        )
    return warnings


def leaks(run: Run) -> list[str]:
    """Return what says that images of a run are in two splits, nothing where none is."""
    duplicates = run.metrics.get("duplicates", {})
    found = []
    if count := duplicates.get("test", 0):
        example = " is ".join(map(str, duplicates.get("example") or []))
        found.append(
            f"{count:,} test images are training or validation images, too, pixel for pixel"
            f"{f' ({example})' if example else ''}: the test says too much good of the model."
        )
    if count := duplicates.get("val", 0):
        found.append(
            f"{count:,} validation images are training images, too, pixel for pixel: validation says too much good of "
            f"the model, and chooses its epoch."
        )
    return found


def _header(run: Run) -> dict[str, Any]:
    """Return the title and the run's results."""
    metrics, tested, folder = run.metrics, run.test_metrics, run.folder.resolve()
    started = str(run.starts[0].get("started", folder.name))
    tiles = []
    if "best/val/acc" in metrics and "best/epoch" in metrics:
        tiles.append((percent(metrics["best/val/acc"]), f"validation accuracy, best epoch {metrics['best/epoch']}"))
    for key, name in (("test/loss", "test loss (cross-entropy)"), ("test/ece", "test ECE, 15 bins")):
        if key in tested:
            tiles.append((f"{tested[key]:.4f}", name))
    for phase in metrics.get("phases", []):
        speed = f"{phase['name']}, {phase['images_per_s']:,.0f} images/s trained"
        tiles.append((duration_text(phase["seconds"]), speed))
    accuracy = None
    if "test/acc" in tested and run.test_confusion is not None:
        images = int(run.test_confusion.sum())
        low, high = tested.get("test/acc_interval") or wilson_interval(tested["test/acc"], images)
        accuracy = {
            "value": percent(tested["test/acc"]),
            "images": f"{images:,}",
            "interval": percent_range(low, high),
        }
    return {
        "title": f"{metrics.get('experiment', folder.parent.name)}, {started[:10]} {started[11:16]}",
        "overrides": " ".join(run.overrides or []),
        "accuracy": accuracy,
        "results": tiles,
    }
