"""Temperature scaling (Guo et al., ICML 2017): one number that makes probabilities mean what they say."""

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = 0.01, 100.0


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature T for which softmax(logits / T) has the lowest cross-entropy.

    The cross-entropy is convex in 1 / T, so that its minimum is where its slope changes sign, found by bisection.

    Args:
        logits: (examples, classes), of images that the model was not trained on.
        targets: (examples,), class indices.

    Returns:
        Between LOWEST and HIGHEST, and one of these if the minimum lies beyond (every answer right, for one).
    """
    logits = logits.double()
    of_target = logits.gather(1, targets[:, None]).mean()

    def slope(log_inverse: float) -> float:
        """Return the cross-entropy's slope over 1 / T: expected minus observed logit."""
        probabilities = (logits * math.exp(log_inverse)).softmax(dim=1)
        return float((probabilities * logits).sum(dim=1).mean() - of_target)

    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    for _ in range(60):
        middle = (low + high) / 2
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())
