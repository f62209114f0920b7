"""The sections of a run's page on what it predicts: classes, unfreeze, confused pairs, calibration, single images."""

from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_tl.reports import figures
from cifar_tl.reports.page import FigureFolder, Thumbnail, thumbnail
from cifar_tl.runs.folder import Run
from cifar_tl.runs.formatting import percent, percent_range, points
from cifar_tl.runs.metrics import (
    Ints,
    class_scores,
    confused_pairs,
    confusion_matrix,
    fit_temperature,
    least_certain,
    mistaken,
    most_certain,
    negative_log_likelihood,
    paired_interval,
    reliability,
    softmax,
    top_mistakes,
    wilson_interval,
)
from cifar_tl.runs.predictions import CERTAIN, CONFUSED_PAIRS, MISTAKES, PAIR_EXAMPLES, UNCERTAIN, Predictions
from cifar_tl.runs.table import Table


def classes(run: Run, folder: FigureFolder) -> dict[str, Any] | None:
    """Return the confusion matrix and every class' scores on the test set, with 95% Wilson intervals."""
    tested, matrix, names = run.test_metrics, run.test_confusion, run.classes
    if matrix is None:
        return None
    examples, predicted = matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist()
    # as the test computed them; a file without them has the confusion matrix, from which they follow
    follow = class_scores(matrix)
    recall, precision, f1 = (tested.get(f"test/{name}", follow[name]) for name in ("recall", "precision", "f1"))
    found = [(share, *wilson_interval(share, count)) for share, count in zip(recall, examples, strict=True)]
    rows = []
    for i, (name, (share, low, high)) in enumerate(zip(names, found, strict=True)):
        trusted = percent_range(*wilson_interval(precision[i], predicted[i]), 1)
        scores = [f"{100 * share:.1f}", percent_range(low, high, 1), f"{100 * precision[i]:.1f}", trusted]
        scores.append(f"{100 * f1[i]:.1f}")
        rows.append([name, f"{examples[i]:,}", *(scores if examples[i] else ["-"] * len(scores))])
    there = [i for i, count in enumerate(examples) if count]
    means = [f"{100 * fmean(values[i] for i in there):.1f}" for values in (recall, precision, f1)]
    mean = "mean" if len(there) == len(names) else f"mean of {len(there)}"
    rows.append([mean, f"{matrix.sum():,}", means[0], "", means[1], "", means[2]])
    order = sorted(there, key=lambda i: -recall[i])
    best, worst = order[0], order[-1]
    confusion = folder.draw(
        "confusion",
        partial(figures.confusion, "Confusion, test set", matrix, names),
        f"Confusion matrix: {matrix.trace():,} of {matrix.sum():,} images are on the diagonal.",
        "Images by true class (row) and prediction (column). Blue: right. Red: wrong, on a scale of its own.",
    )
    title = "Recall per class with 95% interval"
    per_class = folder.draw(
        "per_class",
        partial(figures.intervals, title, [names[i] for i in order], [found[i] for i in order]),
        f"Recall per class, from {names[best]} ({percent(recall[best], 1)}) down to {names[worst]} "
        f"({percent(recall[worst], 1)}).",
        "Share of each class' images that are predicted as it.",
    )
    head = ["class", "images", "recall %", "95% interval", "precision %", "95% interval", "F1 %"]
    return {"figures": [confusion, per_class], "table": Table("Scores per class", head, rows)}


def unfreeze(run: Run, folder: FigureFolder) -> dict[str, Any] | None:
    """Return every class' recall on validation at the end of the frozen phase and in the best epoch.

    Returns:
        None where nothing unfrozen, or where the best epoch came before the unfreeze.
    """
    predictions = run.predictions
    unfrozen = [phase["start"] for phase in run.metrics.get("plan", []) if phase["stages"]]
    if predictions is None or predictions.frozen is None or not unfrozen:
        return None
    if run.metrics.get("best/epoch", -1) < min(unfrozen):
        return None
    val, before, after = predictions.val, predictions.frozen.right, predictions.val.right
    present = [(name, val.targets == label) for label, name in enumerate(predictions.classes)]
    changed = [
        (name, float(before[members].mean()), float(after[members].mean()), _changes(before[members], after[members]))
        for name, members in present
        if members.any()
    ]
    changed.sort(key=lambda each: each[1] - each[2])
    gained, lost = changed[0], changed[-1]
    figure = folder.draw(
        "unfreeze",
        lambda: figures.changes("Recall on validation", [n for n, *_ in changed], [(b, a) for _, b, a, _ in changed]),
        f"Recall per class before and after: {gained[0]} {gained[3][3]} points, ..., {lost[0]} {lost[3][3]} points.",
        "From the end of the frozen phase to the best epoch.",
    )
    head = ["class, validation", "images", "frozen %", "best %", "points", "interval", "now right", "now wrong"]
    rows = [[name, *cells] for name, _, _, cells in changed] + [["all", *_changes(before, after)]]
    return {
        "figure": figure,
        "before": percent(before.mean()),
        "after": percent(after.mean()),
        "became_right": f"{int((after & ~before).sum()):,}",
        "became_wrong": f"{int((before & ~after).sum()):,}",
        "table": Table("Recall per class before and after the unfreeze", head, rows),
    }


def calibration(run: Run, folder: FigureFolder) -> dict[str, Any]:
    """Return how well confidence agrees with accuracy, before and after temperature scaling."""
    assert run.predictions is not None
    val, test = run.predictions.val, run.predictions.test
    temperature = fit_temperature(val.logits, val.targets)
    scaled = f"temperature {temperature:.3f}"
    before, after = (reliability(softmax(test.logits, t), test.targets) for t in (1.0, temperature))
    figure = folder.draw(
        "reliability",
        partial(figures.reliability, "Reliability, test set", {"as trained": before, scaled: after}),
        f"Reliability diagram: ECE {before.ece:.4f} as trained, {after.ece:.4f} after temperature scaling.",
        "On the dashed line, predictions of a confidence are right as often as it says.",
    )
    rows: list[list[str]] = []
    for name, split in (("validation", val), ("test", test)):
        columns = []
        for t in (1.0, temperature):
            probabilities = softmax(split.logits, t)
            loss = negative_log_likelihood(split.logits, split.targets, t)
            ece = reliability(probabilities, split.targets).ece
            confidence = percent(probabilities.max(axis=1).mean())
            columns.append([f"{loss:.4f}", f"{ece:.4f}", confidence, percent(split.accuracy)])
        metrics = ("negative log-likelihood", "ECE", "mean confidence", "accuracy")
        rows += [[f"{name}: {metric}", *both] for metric, *both in zip(metrics, *columns, strict=True)]
    return {
        "figure": figure,
        "temperature": f"{temperature:.3f}",
        "overconfident": temperature > 1,
        "table": Table("Calibration before and after", ["", "as trained", scaled], rows),
    }


class ImageSections:
    """The sections that show single test images.

    Args:
        predictions: Of the run.
        images: (height, width, 3), uint8, by their index in the test set; a grey square stands for any other one.
        folder: Gets the galleries as figures.
    """

    def __init__(self, predictions: Predictions, images: dict[int, NDArray[np.uint8]], folder: FigureFolder) -> None:
        self.test, self.names = predictions.test, predictions.classes
        self.probabilities = softmax(self.test.logits)
        self.images = images
        self.folder = folder

    def confused_pairs(self) -> dict[str, Any]:
        """Return the pairs of classes that are confused most often, with examples."""
        matrix = confusion_matrix(self.test.predicted, self.test.targets, len(self.names))
        mistakes, shown, pairs = int((~self.test.right).sum()), 0, []
        for pair in confused_pairs(matrix, CONFUSED_PAIRS):
            ways: list[dict[str, Any]] = []
            for true, predicted in (pair, pair[::-1]):
                examples = mistaken(self.probabilities, self.test.targets, true, predicted, PAIR_EXAMPLES)
                count = int(matrix[true, predicted])
                ways.append(
                    {
                        "true": self.names[true],
                        "predicted": self.names[predicted],
                        "count": count,
                        "share": percent(count / max(1, int(matrix[true].sum())), 1),
                        "examples": [self._thumbnail(at) for at in examples.tolist()],
                    }
                )
            both = sum(way["count"] for way in ways)
            shown += both
            names = {"first": self.names[pair[0]], "second": self.names[pair[1]]}
            pairs.append({**names, "ways": ways, "share": percent(both / max(1, mistakes), 1)})
        return {"pairs": pairs, "shown": f"{shown:,}", "mistakes": f"{mistakes:,}"}

    def mistakes(self) -> dict[str, Any]:
        """Return the most confident mistakes."""
        chosen = top_mistakes(self.probabilities, self.test.targets, MISTAKES)
        return {"images": self._gallery("mistakes", "Most confident mistakes, test set", chosen)}

    def certainty(self) -> dict[str, Any]:
        """Return the images with the lowest and with the highest confidence."""
        least, most = least_certain(self.probabilities, UNCERTAIN), most_certain(self.probabilities, CERTAIN)
        return {
            "least": self._gallery("least_certain", "Least certain, test set", least),
            "most": self._gallery("most_certain", "Most certain, test set", most),
        }

    def _gallery(self, name: str, title: str, chosen: Ints) -> list[dict[str, Any]]:
        """Draw a gallery as a figure, of the images that are there; return the items of the page's gallery."""
        test, positions = self.test, chosen.tolist()
        there = [at for at in positions if int(test.indices[at]) in self.images]
        if there:
            texts = figures.captions(self.names, self.probabilities[there], test.targets[there])
            shown = [self.images[int(test.indices[at])] for at in there]
            self.folder.draw(name, partial(figures.gallery, title, shown, texts), title)
        return [
            {
                "image": self._thumbnail(at),
                "predicted": self.names[test.predicted[at]],
                "true": "" if test.right[at] else self.names[test.targets[at]],
                "confidence": f"{self.probabilities[at].max():.2f}",
            }
            for at in positions
        ]

    def _thumbnail(self, at: int) -> Thumbnail:
        test = self.test
        predicted, index = self.names[test.predicted[at]], int(test.indices[at])
        verdict = "rightly" if test.right[at] else f"but is {self.names[test.targets[at]]}"
        alt_text = f"test image {index}: predicted {predicted} {self.probabilities[at].max():.2f}, {verdict}"
        return thumbnail(self.images.get(index), alt_text)


def _changes(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> list[str]:
    """Return the cells of a class in the table of the unfreeze."""
    difference = after.astype(float) - before.astype(float)
    low, high = paired_interval(difference)
    return [
        f"{len(difference):,}",
        f"{100 * before.mean():.1f}",
        f"{100 * after.mean():.1f}",
        points(float(difference.mean()), 1),
        f"{points(low, 1)} to {points(high, 1)}",
        f"{int((after & ~before).sum()):,}",
        f"{int((before & ~after).sum()):,}",
    ]
