"""The linear map from a network's features to its teacher's."""

import torch
from torch import Tensor

ROWS = 8192
"""Images whose features are in float64 at a time."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Of ridge regression: multiples of an input's mean square that are added to each, of which held-out images choose."""
HELD_OUT = 10
"""One image of so many is held out."""
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
    """Return the linear map from features to the teacher's features of the same images.

    It has the least squares beside a penalty on its own size, the one of RIDGES with which a map that is fitted without
    some of the images fits these best. Few images want a large one: they have a map that fits them and no others.

    Args:
        features: (images, length).
        teacher: (images, another length).

    Returns:
        (length + 1, another length), float32: `features @ map[:-1] + map[-1]` is like `teacher`.
    """
    held_out = torch.arange(len(features), device=features.device) % HELD_OUT == 0
    fitted = _sums(features[~held_out], teacher[~held_out])
    others = _sums(features[held_out], teacher[held_out])

    def error(ridge: float) -> float:
        """Return the squared error of the held-out images, but for a term that all maps have."""
        solution = _solution(*fitted, ridge)
        gram, products = others
        return float((solution * (gram @ solution - 2 * products)).sum())

    best = min(RIDGES, key=error)
    gram, products = (a + b for a, b in zip(fitted, others, strict=True))
    return _solution(gram, products, best).float()


def _sums(features: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs' products with each other and with the outputs, summed over the images, in float64."""
    length = features.shape[1] + 1
    gram = torch.zeros(length, length, dtype=torch.float64, device=features.device)
    products = torch.zeros(length, teacher.shape[1], dtype=torch.float64, device=features.device)
    for x, y in zip(torch.split(features, ROWS), torch.split(teacher, ROWS), strict=True):
        inputs = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
        gram += inputs.T @ inputs
        products += inputs.T @ y.double()
    return gram, products


def _solution(gram: Tensor, products: Tensor, ridge: float) -> Tensor:
    penalized = gram.clone()
    penalized.diagonal().add_(ridge * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(penalized, products)
    return solution
