"""Metrics of a classifier from its logits: per-class scores, calibration, confusions, rankings. NumPy only."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15
"""Equal bins of confidence for ECE, as in Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017)."""

Z95 = 1.959964
"""Standard deviations on each side that hold 95% of a normal distribution."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Bounds of a fitted temperature; it is one of them where the minimum lies beyond, as with every answer right."""


def wilson_interval(share: float, examples: int, z: float = Z95) -> tuple[float, float]:
    """Return the 95% Wilson score interval (1927) of a share, such as an accuracy, over independent examples.

    Without examples it is 0 to 1.
    """
    if examples == 0:
        return 0.0, 1.0
    center = (share + z**2 / (2 * examples)) / (1 + z**2 / examples)
    spread = math.sqrt(share * (1 - share) / examples + z**2 / (4 * examples**2))
    half = z / (1 + z**2 / examples) * spread
    return max(0.0, center - half), min(1.0, center + half)  # rounding would pass the ends


def paired_interval(differences: Floats) -> tuple[float, float]:
    """Return the 95% interval of the mean of paired differences, clipped to -1 and 1.

    It is Wald's with two more pairs, one that differs either way (Bonett and Price 2012, Journal of Educational and
    Behavioral Statistics 37, 479-488): without them, few pairs that all differ one way would be a certainty.

    Args:
        differences: (pairs,): what one gets right and the other does not is 1, the reverse is -1; or means over seeds.
    """
    n = len(differences) + 2
    mean = float(differences.sum()) / n
    half = Z95 * math.sqrt(((float((differences**2).sum()) + 2) / n - mean**2) / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """Return probabilities, (examples, classes), of logits divided by a temperature."""
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def negative_log_likelihood(logits: NDArray[np.floating], targets: Ints, temperature: float = 1.0) -> float:
    """Return the mean cross-entropy, in nats, of logits divided by a temperature."""
    scaled = logits.astype(np.float64) / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    return float((log_sum - shifted[np.arange(len(targets)), targets]).mean())


def fit_temperature(logits: NDArray[np.floating], targets: Ints) -> float:
    """Return the temperature T for which softmax(logits / T) has the lowest cross-entropy.

    Temperature scaling is Guo et al. (ICML 2017). The cross-entropy is convex in 1 / T; bisection finds where its
    slope, the expected logit minus the target's, changes sign.

    Args:
        logits: (examples, classes), of images that the model was not trained on.
        targets: (examples,), class indices.

    Returns:
        Between MIN_TEMPERATURE and MAX_TEMPERATURE; NaN of logits that are not finite.
    """
    if not np.isfinite(logits).all():
        return math.nan
    logits = logits.astype(np.float64)
    of_target = logits[np.arange(len(targets)), targets]
    low, high = MIN_TEMPERATURE, MAX_TEMPERATURE
    for _ in range(60):
        middle = math.sqrt(low * high)
        expected = (softmax(logits, middle) * logits).sum(axis=1)
        if (expected - of_target).mean() > 0:  # the cross-entropy falls as T grows
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def scores(logits: NDArray[np.floating], targets: Ints) -> dict[str, Any]:
    """Return the scalar metrics of a set of images.

    Args:
        logits: (examples, classes).
        targets: (examples,), class indices.

    Returns:
        `acc`; `acc_interval`, its 95% Wilson interval; `loss`, the mean cross-entropy in nats; `ece`, over BINS bins;
        both NaN of logits that are not finite.
    """
    finite = np.isfinite(logits).all(axis=1)  # argmax makes class 0 of what is no number
    accuracy = float((finite & (logits.argmax(axis=1) == targets)).mean())
    return {
        "acc": accuracy,
        "acc_interval": list(wilson_interval(accuracy, len(targets))),
        "loss": negative_log_likelihood(logits, targets),
        "ece": reliability(softmax(logits), targets).ece if finite.all() else math.nan,
    }


@dataclass(frozen=True)
class Reliability:
    """How often predictions of one confidence are right, in BINS equal bins of confidence.

    Attributes:
        counts: Predictions per bin.
        confidence: Mean confidence per bin, 0 where a bin is empty.
        accuracy: Share that is right per bin, 0 where a bin is empty.
    """

    counts: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean distance of accuracy and confidence, weighted by the bins' counts."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(1, self.counts.sum()))


def reliability(probabilities: Floats, targets: Ints) -> Reliability:
    """Bin predictions by their confidence; bins are closed below, the last one above, too.

    The bins are those of torchmetrics, but for confidences of exactly 1, which torchmetrics counts as a 16th bin.

    Args:
        probabilities: (examples, classes).
        targets: (examples,), class indices.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == targets
    which = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(which, minlength=BINS)
    divisor = np.maximum(counts, 1)
    return Reliability(
        counts,
        np.bincount(which, weights=confidence, minlength=BINS) / divisor,
        np.bincount(which, weights=right, minlength=BINS) / divisor,
    )


def confusion_matrix(predicted: Ints, targets: Ints, classes: int) -> Ints:
    """Return counts, (classes, classes), int64: rows are true classes, columns predicted ones."""
    return np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_scores(confusion: Ints) -> dict[str, Floats]:
    """Return `precision`, `recall` and `f1` of every class, (classes,); a share without examples is 0.

    Args:
        confusion: From `confusion_matrix`.
    """
    right, examples, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        "precision": right / np.maximum(1, predicted),
        "recall": right / np.maximum(1, examples),
        "f1": 2 * right / np.maximum(1, examples + predicted),
    }


def confused_pairs(confusion: Ints, count: int) -> list[tuple[int, int]]:
    """Return the pairs of classes confused most, both directions together; the more frequent direction first."""
    both = np.triu(confusion + confusion.T, k=1)
    most = np.argsort(-both, axis=None, kind="stable")[:count].tolist()
    pairs = [divmod(at, len(both)) for at in most if both.flat[at]]
    return [(a, b) if confusion[a, b] >= confusion[b, a] else (b, a) for a, b in pairs]


def top_mistakes(probabilities: Floats, targets: Ints, count: int) -> Ints:
    """Return positions of wrong predictions, the most confident first."""
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    wrong = probabilities.argmax(axis=1)[order] != targets[order]
    return np.asarray(order[wrong][:count])


def most_certain(probabilities: Floats, count: int) -> Ints:
    """Return positions of the most confident predictions, right or wrong."""
    return np.argsort(-probabilities.max(axis=1), kind="stable")[:count]


def least_certain(probabilities: Floats, count: int) -> Ints:
    """Return positions of the least confident predictions."""
    return np.argsort(probabilities.max(axis=1), kind="stable")[:count]


def mistaken(probabilities: Floats, targets: Ints, true: int, predicted: int, count: int) -> Ints:
    """Return positions of images of class `true` predicted as `predicted`, the most confident first."""
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    chosen = (targets[order] == true) & (probabilities.argmax(axis=1)[order] == predicted)
    return np.asarray(order[chosen][:count])
