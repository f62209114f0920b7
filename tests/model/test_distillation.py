import pytest
import torch

from cifar_tl.model.distillation import cka

X = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)) + 3
Y = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))


def test_cka_is_that_of_the_paper():
    # the feature-space form of Kornblith et al., in numbers of twice the length
    x, y = (values.double() - values.double().mean(0) for values in (X, Y))
    expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert cka(X, Y).item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < expected < 0.9


def test_features_that_are_turned_shifted_and_scaled_are_alike():
    turn, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2)))
    assert cka(X, X @ turn * 5 + 1).item() == pytest.approx(1, abs=1e-5)
    stretched = X * torch.tensor([5.0] + [1.0] * 6)
    assert cka(X, stretched).item() < 0.95


@pytest.mark.parametrize("rows", [1, 20])
def test_images_that_do_not_differ_are_like_nothing_and_pull_at_nothing(rows):
    features = torch.ones(rows, 7, requires_grad=True)
    alike = cka(features, Y[:rows])
    alike.backward()
    assert alike == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_mixed_precision_does_not_reach_it():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cka(X, Y)
    assert mixed == cka(X, Y)
