"""The metrics of a report, recomputed by others: torchmetrics and torch."""

import math

import numpy as np
import pytest
import torch
from handmade import CLASSES, scored
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional import classification as theirs

from cifar_tl.runs.metrics import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
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
    scores,
    softmax,
    top_mistakes,
    wilson_interval,
)


@pytest.fixture(scope="module")
def on_test():
    return scored(seed=1, examples=1000, strength=1.0)


def test_confusion_and_class_scores_are_torchmetrics(on_test):
    confusion = confusion_matrix(on_test.predicted, on_test.targets, len(CLASSES))
    predicted, targets = torch.from_numpy(on_test.predicted), torch.from_numpy(on_test.targets)
    expected = theirs.multiclass_confusion_matrix(predicted, targets, len(CLASSES))
    np.testing.assert_array_equal(confusion, expected)
    assert on_test.accuracy == pytest.approx(theirs.multiclass_accuracy(predicted, targets, len(CLASSES), "micro"))
    ours = class_scores(confusion)
    for name in ("precision", "recall", "f1"):
        score = getattr(theirs, f"multiclass_{name.replace('f1', 'f1_score')}")
        np.testing.assert_allclose(ours[name], score(predicted, targets, len(CLASSES), average="none"), rtol=1e-6)
    never = class_scores(np.array([[2, 0], [0, 0]]))
    assert [never[name].tolist() for name in ("precision", "recall", "f1")] == [[1, 0]] * 3


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
    assert sum(reliability(probabilities, on_test.targets).counts) == len(on_test.targets)


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_bins_are_those_of_torchmetrics(classes, sharpness):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, 5000)
    logits = rng.normal(size=(5000, classes))
    logits[np.arange(5000), targets] += 1
    probabilities = softmax(sharpness * logits)
    referee = MulticlassCalibrationError(classes, n_bins=15)
    expected = referee(torch.from_numpy(probabilities), torch.from_numpy(targets)).item()
    assert reliability(probabilities, targets).ece == pytest.approx(expected, abs=1e-5)


def test_a_confidence_of_exactly_1_is_in_the_last_bin():
    bins = reliability(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
    assert bins.counts.tolist() == [0] * 14 + [2]
    assert bins.ece == 0.5


def test_scores_are_torchs(on_test):
    found = scores(on_test.logits, on_test.targets)
    logits, targets = torch.from_numpy(on_test.logits), torch.from_numpy(on_test.targets)
    assert found["acc"] == float((logits.argmax(dim=1) == targets).double().mean())
    assert found["loss"] == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-6)
    assert found["ece"] == reliability(softmax(on_test.logits), on_test.targets).ece
    assert tuple(found["acc_interval"]) == wilson_interval(found["acc"], 1000)


def found_by_torch(predictions):
    """The temperature of the lowest cross-entropy, by LBFGS in its logarithm."""
    logits, targets = torch.from_numpy(predictions.logits).double(), torch.from_numpy(predictions.targets)
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithm], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(logits / logarithm.exp(), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logarithm.exp().item()


def test_temperature_is_the_minimum_that_torch_finds_and_never_worse(on_test):
    def loss(temperature):
        return negative_log_likelihood(on_test.logits, on_test.targets, temperature)

    temperature = fit_temperature(on_test.logits, on_test.targets)
    assert temperature > 1.5  # these logits are made too large
    assert temperature == pytest.approx(found_by_torch(on_test), rel=1e-4)
    assert loss(temperature) <= loss(1.0)


def test_temperature_of_known_logits():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(50_000, 5)).astype(np.float32)
    targets = (softmax(logits).cumsum(axis=1) < rng.random((50_000, 1))).sum(axis=1)
    assert fit_temperature(logits, targets) == pytest.approx(1, abs=0.02)
    assert fit_temperature(3 * logits, targets) == pytest.approx(3 * fit_temperature(logits, targets), rel=1e-6)


def test_logits_that_are_not_finite_have_no_temperature():
    logits, targets = np.array([[np.nan, 1.0], [0.0, 1.0]], np.float32), np.array([0, 1])
    assert math.isnan(fit_temperature(logits, targets))
    numbers = scores(logits, targets)
    assert (math.isnan(numbers["loss"]), math.isnan(numbers["ece"]), numbers["acc"]) == (True, True, 0.5)


def test_temperature_is_a_bound_where_everything_is_right_or_wrong():
    assert fit_temperature(10 * np.eye(5), np.arange(5)) == pytest.approx(MIN_TEMPERATURE, rel=1e-6)
    assert fit_temperature(10 * np.eye(5), np.roll(np.arange(5), 1)) == pytest.approx(MAX_TEMPERATURE, rel=1e-6)


def test_rankings():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45], [0.3, 0.7]])
    targets = np.array([0, 0, 1, 0])
    assert top_mistakes(probabilities, targets, 5).tolist() == [1, 3, 2]
    assert most_certain(probabilities, 2).tolist() == [0, 1]
    assert least_certain(probabilities, 1).tolist() == [2]
    assert mistaken(probabilities, targets, 0, 1, 9).tolist() == [1, 3]


def test_confused_pairs_count_both_directions_and_leave_out_what_is_never_confused():
    confusion = np.array([[5, 1, 0], [4, 9, 0], [0, 2, 7]])
    assert confused_pairs(confusion, 5) == [(1, 0), (2, 1)]


@pytest.mark.parametrize(("better", "worse", "images"), [(3, 0, 100), (5, 0, 10_000), (7, 2, 10_000), (60, 40, 1000)])
def test_the_interval_of_a_paired_difference_is_that_of_bonett_and_price(better, worse, images):
    p, q, n = (better + 1) / (images + 2), (worse + 1) / (images + 2), images + 2
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / n)
    differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * (images - better - worse))
    assert paired_interval(differences) == pytest.approx((p - q - half, p - q + half))


def test_few_images_that_differ_one_way_are_no_certainty():
    for differing, certain in ((5, False), (6, True)):  # McNemar's exact test: p = 0.06 and 0.03
        assert (paired_interval(np.array([1.0] * differing + [0.0] * 9000))[0] > 0) is certain


def test_the_interval_of_a_paired_difference_holds_it_in_95_of_100_tests():
    draw = np.random.default_rng(0)
    for images, difference in ((20, 0.05), (100, 0.01), (1000, 0.002)):
        tests = draw.binomial(1, difference, (2000, images)).astype(float)
        holds = [low <= difference <= high for low, high in map(paired_interval, tests)]
        assert np.mean(holds) > 0.93


def test_interval_of_nothing_is_everything():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
