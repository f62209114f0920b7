"""The linear map from a network's features to its teacher's."""

import torch
from torch import Tensor

ROWS = 8192
"""Images whose features are in float64 at a time."""
RIDGE = 1e-3
"""Of ridge regression: share of the mean square of an input that is added to each."""
FURTHEST = 10.0
"""Standard deviations from the mean, at most, of a teacher's feature: averages of few pixels have long tails."""
SMALLEST = 1e-3
"""What a standard deviation counts as, at least: some features are next to constant."""


def standardize(teacher: Tensor) -> None:
    """Give every feature a mean of 0 and a standard deviation of 1, in place.

    Args:
        teacher: (images, length).
    """
    parts = torch.split(teacher, ROWS)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(teacher)
    variance = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / len(teacher)
    std = variance.sqrt().clamp(min=SMALLEST)
    for part in parts:
        part.copy_(((part - mean) / std).clamp(-FURTHEST, FURTHEST))


def ridge_regression(features: Tensor, teacher: Tensor) -> Tensor:
    """Return the linear map from features to the teacher's features of the same images that has the least squares.

    Args:
        features: (images, length).
        teacher: (images, another length).

    Returns:
        (length + 1, another length), float32: `features @ map[:-1] + map[-1]` is like `teacher`.
    """
    length = features.shape[1] + 1
    gram = torch.zeros(length, length, dtype=torch.float64, device=features.device)
    products = torch.zeros(length, teacher.shape[1], dtype=torch.float64, device=features.device)
    for x, y in zip(torch.split(features, ROWS), torch.split(teacher, ROWS), strict=True):
        inputs = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
        gram += inputs.T @ inputs
        products += inputs.T @ y.double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, products)
    return solution.float()
