"""The figures of a report, recomputed by others: scikit-learn, torchmetrics, SciPy."""

import numpy as np
import pytest
import torch
from handmade import CLASSES, scored
from scipy.optimize import minimize_scalar
from sklearn import metrics as sk
from torchmetrics.classification import MulticlassCalibrationError

from cifar_tl.runs.metrics import (
    ConfusedPair,
    class_scores,
    confused_pairs,
    confusion_matrix,
    fit_temperature,
    least_certain,
    mistaken,
    most_certain,
    negative_log_likelihood,
    reliability,
    softmax,
    top_mistakes,
    wilson_interval,
)


@pytest.fixture(scope="module")
def on_test():
    return scored(seed=1, examples=1000, strength=1.0)


def test_confusion_and_class_scores_are_scikit_learns(on_test):
    confusion = confusion_matrix(on_test.predicted, on_test.targets, len(CLASSES))
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(on_test.targets, on_test.predicted))
    assert on_test.accuracy == pytest.approx(sk.accuracy_score(on_test.targets, on_test.predicted))
    ours = [(c.precision, c.recall, c.f1, c.examples) for c in class_scores(confusion)]
    theirs = sk.precision_recall_fscore_support(on_test.targets, on_test.predicted)
    np.testing.assert_allclose(np.array(ours).T, theirs)


def test_loss_is_scikit_learns(on_test):
    probabilities = softmax(on_test.logits)
    expected = sk.log_loss(on_test.targets, probabilities)
    assert negative_log_likelihood(on_test.logits, on_test.targets) == pytest.approx(expected)


def test_ece_is_the_definition_and_torchmetrics(on_test):
    probabilities = softmax(on_test.logits)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == on_test.targets
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    ours = reliability(probabilities, on_test.targets).ece
    assert ours == pytest.approx(expected)
    referee = MulticlassCalibrationError(len(CLASSES), n_bins=15)
    assert ours == pytest.approx(
        referee(torch.from_numpy(probabilities), torch.from_numpy(on_test.targets)).item(), abs=1e-4
    )


def test_temperature_is_scipys_minimum_and_never_worse(on_test):
    def loss(temperature):
        return negative_log_likelihood(on_test.logits, on_test.targets, temperature)

    temperature = fit_temperature(on_test.logits, on_test.targets)
    assert temperature > 1.5  # these logits are made too large
    assert temperature == pytest.approx(minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x, rel=1e-4)
    assert loss(temperature) <= loss(1.0)


def test_temperature_stays_finite_where_everything_is_right():
    targets = np.arange(5)
    assert fit_temperature(10 * np.eye(5, dtype=np.float32), targets) == pytest.approx(0.05, rel=1e-6)


def test_rankings():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45], [0.3, 0.7]])
    targets = np.array([0, 0, 1, 0])
    assert top_mistakes(probabilities, targets, 5).tolist() == [1, 3, 2]
    assert most_certain(probabilities, 2).tolist() == [0, 1]
    assert least_certain(probabilities, 1).tolist() == [2]
    assert mistaken(probabilities, targets, 0, 1, 9).tolist() == [1, 3]


def test_confused_pairs_count_both_directions_and_leave_out_what_is_never_confused():
    confusion = np.array([[5, 1, 0], [4, 9, 0], [0, 2, 7]])
    assert confused_pairs(confusion, 5) == [ConfusedPair(1, 0, 4, 1), ConfusedPair(2, 1, 2, 0)]


def test_interval_of_nothing_is_everything():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
