"""The part of a run's page that says what fine-tuning added to the frozen features, class by class."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_tl.reports import figures, html, svg
from cifar_tl.runs.formatting import percent, points
from cifar_tl.runs.metrics import Z95
from cifar_tl.runs.predictions import Predictions


def unfreeze(predictions: Predictions, metrics: Mapping[str, Any], out: Path) -> str:
    """Return every class' recall on validation at the end of the frozen phase and in the best epoch.

    Nothing where nothing unfrozen, or where the best epoch came before the unfreeze.
    """
    unfrozen = [phase["start"] for phase in metrics.get("plan", []) if phase["stages"]]
    if predictions.frozen is None or not unfrozen or metrics["best/epoch"] < min(unfrozen):
        return ""
    val, names = predictions.val, predictions.classes
    before, after = predictions.frozen.right, val.right
    rows, values = [], []
    for label, name in enumerate(names):
        members = val.targets == label
        if not members.any():
            continue
        values.append((name, float(before[members].mean()), float(after[members].mean())))
        rows.append([name, *_row(before[members], after[members])])
    rows.sort(key=lambda row: -float(row[4]))
    values.sort(key=lambda value: value[1] - value[2])
    rows.append(["all", *_row(before, after)])
    gained, lost = rows[0], rows[-2]
    said = f"Recall per class before and after: {gained[0]} {gained[4]} points, ..., {lost[0]} {lost[4]} points."
    drawn = figures.changes("Recall on validation", [name for name, *_ in values], [both for _, *both in values])
    head = ["class, validation", "images", "frozen %", "best %", "points", "interval", "now right", "now wrong"]
    summary = (
        f"<p>Validation accuracy was {percent(before.mean())} with the frozen backbone and is {percent(after.mean())} "
        f"in the best epoch: {int((after & ~before).sum()):,} images became right, {int((before & ~after).sum()):,} "
        "wrong. Intervals hold 95 % and are paired over the images.</p>"
    )
    shown = html.figure(svg.save(drawn, out, "unfreeze", said), "From the end of the frozen phase to the best epoch.")
    return html.figures(shown, summary) + html.table(head, rows, "Recall per class before and after the unfreeze")


def _row(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> list[str]:
    """Return the cells of one class."""
    difference = after.astype(float) - before.astype(float)
    mean, count = float(difference.mean()), len(difference)
    half = Z95 * float(difference.std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0
    return [
        f"{count:,}",
        f"{100 * before.mean():.1f}",
        f"{100 * after.mean():.1f}",
        points(mean, 1),
        f"{points(mean - half, 1)} to {points(mean + half, 1)}",
        f"{int((after & ~before).sum()):,}",
        f"{int((before & ~after).sum()):,}",
    ]
