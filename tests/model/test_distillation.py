import pytest
import torch

from cifar_tl.model import distillation
from cifar_tl.model.distillation import ridge_regression, standardize

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(500, 7, generator=RANDOM) + 3


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Give what goes through images in parts more than one of them."""
    monkeypatch.setattr(distillation, "ROWS", 64)


def test_the_map_is_the_one_of_least_squares(monkeypatch):
    true = torch.randn(8, 5, generator=RANDOM)
    noisy = X @ true[:-1] + true[-1] + torch.randn(500, 5, generator=RANDOM)
    monkeypatch.setattr(distillation, "RIDGES", (0.0,))
    inputs = torch.cat([X, torch.ones(500, 1)], dim=1)
    expected = torch.linalg.lstsq(inputs, noisy).solution
    torch.testing.assert_close(ridge_regression(X, noisy), expected, rtol=1e-3, atol=1e-3)
    # what is held out chooses, and counts afterwards
    monkeypatch.setattr(distillation, "RIDGES", (100.0, 0.0, 10.0))
    torch.testing.assert_close(ridge_regression(X, noisy), expected, rtol=1e-3, atol=1e-3)


def test_few_images_do_not_get_a_map_that_fits_them_alone():
    true = torch.zeros(60, 5)
    true[:3] = 1
    features, others = (torch.randn(n, 60, generator=RANDOM) for n in (80, 1000))

    def error(fitted):
        return (others @ fitted[:-1] + fitted[-1] - others @ true).square().mean()

    teacher = features @ true + 2 * torch.randn(80, 5, generator=RANDOM)
    least_squares = torch.linalg.lstsq(torch.cat([features, torch.ones(80, 1)], dim=1), teacher).solution
    assert error(ridge_regression(features, teacher)) < error(least_squares) / 2


def test_features_that_say_the_same_twice_have_a_map_all_the_same():
    fitted = ridge_regression(torch.cat([X, X], dim=1), X)
    assert fitted.isfinite().all()
    mapped = torch.cat([X, X], dim=1) @ fitted[:-1] + fitted[-1]
    assert (mapped - X).square().mean() < 0.05 * X.var()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_feature_of_the_teacher_counts_the_same(dtype):
    teacher = (X * torch.tensor([1.0, 2, 3, 4, 5, 6, 1e-9])).to(dtype)
    teacher[0, 0] = 1000.0
    standardize(teacher)
    assert teacher.dtype == dtype
    torch.testing.assert_close(teacher[:, 1:6].float().mean(0), torch.zeros(5), rtol=0, atol=0.01)
    torch.testing.assert_close(teacher[:, 1:6].float().std(0), torch.ones(5), rtol=0, atol=0.01)
    assert teacher[0, 0] == 10  # 22 standard deviations from the mean
    assert teacher[:, 6].float().abs().max() < 0.01  # next to constant: its noise is not made large
