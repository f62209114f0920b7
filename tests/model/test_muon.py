"""Muon gives timm's steps, for kernels of all shapes; what it computes differently is only how."""

import pytest
import torch
from timm.optim.muon import Muon as TimmMuon
from timm.optim.muon import zeropower_via_newtonschulz
from torch import nn

from cifar_tl.model.muon import COEFFICIENTS, Muon, full_precision, newton_schulz, orthogonalized

SHAPES = [(16, 8, 3, 3), (16, 8, 3, 3), (32, 4, 1, 1), (8, 64, 1, 1), (12, 12, 1, 1)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    kernels = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return kernels, [nn.Parameter(torch.randn(16, generator=generator))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(64, 147), (32, 32), (128, 32), (16, 144)])
def test_newton_schulz_on_gram_matrices_is_newton_schulz(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, *shape, generator=generator)
    matrix[0] += 10 * torch.randn(shape[0], 1, generator=generator) * torch.randn(1, shape[1], generator=generator)
    expected = zeropower_via_newtonschulz(matrix.double(), 3, [COEFFICIENTS], dtype=torch.float64)
    (got,) = orthogonalized([matrix.to(dtype)], 128, 3, [1.0])
    assert got.dtype == dtype
    allowed = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    assert (got - expected).norm() < allowed * expected.norm()


@pytest.mark.parametrize(
    ("shape", "heights"), [((16, 40), [8, 8]), ((40, 16), [8, 8]), ((12, 40), [6, 6]), ((8, 9), [8])]
)
def test_blocks_of_the_shorter_side_are_orthogonalized_each_for_itself(shape, heights):
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    (got,) = orthogonalized([matrix.double()], 8, 3, [1.0])
    shorter = 1 if shape[0] <= shape[1] else 2
    expected = [
        zeropower_via_newtonschulz(block.double(), 3, [COEFFICIENTS], dtype=torch.float64)
        for block in matrix.split(heights, dim=shorter)
    ]
    torch.testing.assert_close(got, torch.cat(expected, dim=shorter))


def test_matrices_of_one_height_iterate_together(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 16, 40), (1, 48, 8), (3, 8, 9), (1, 4, 4)]  # blocks of 8 rows, but the last with 4
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    alone = [orthogonalized([m], 8, 3, [1.0])[0] for m in matrices]
    iterated = []
    monkeypatch.setattr("cifar_tl.model.muon.newton_schulz", lambda *a: iterated.append(a[0]) or newton_schulz(*a))
    lengths = [1.0, -2.0, 0.5, 3.0]
    for together, length, expected in zip(orthogonalized(matrices, 8, 3, lengths), lengths, alone, strict=True):
        torch.testing.assert_close(together, length * expected)
    assert [tuple(gram.shape) for gram in iterated] == [(4 + 1 + 3, 8, 8), (1, 4, 4)]


def test_a_step_cuts_large_kernels_into_blocks():
    kernel = nn.Parameter(torch.zeros(16, 8, 3, 3))
    optimizer = Muon([{"params": [kernel], "muon": True, "lr": 1.0}], 0.0, 3, block=4)
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    blocks = kernel.grad.reshape(4, 4, 72)
    expected = torch.cat([zeropower_via_newtonschulz(b, 3, [COEFFICIENTS], dtype=torch.float32) for b in blocks])
    torch.testing.assert_close(kernel.detach(), (-0.2 * 72**0.5 * expected).view_as(kernel), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_direction_of_a_step_explodes_however_steep_the_gradients_spectrum(dtype):
    # Gram matrices that are rounded to bfloat16 have negative eigenvalues, and iterating multiplies these by thousands
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 128, generator=generator))[0] for n in (128, 1152))
    kernel = nn.Parameter(torch.zeros(128, 128, 3, 3, dtype=dtype))
    kernel.grad = (left * torch.arange(1, 129) ** -1.5 @ right.T).view(kernel.shape).to(dtype)
    Muon([{"params": [kernel], "muon": True, "lr": 1.0}], 0.0, 5, block=128).step()
    directions = kernel.detach().double().flatten(1) / (0.2 * 1152**0.5)
    assert torch.linalg.matrix_norm(directions, 2) < 1.3


@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_products_of_a_step_are_never_rounded_to_tf32(monkeypatch, precision):
    seen = []

    def note(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return orthogonalized(*arguments)

    monkeypatch.setattr("cifar_tl.model.muon.orthogonalized", note)
    monkeypatch.setattr("cifar_tl.model.muon.cpu_matmul_precision", lambda: precision)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        kernel = nn.Parameter(torch.zeros(4, 8))
        kernel.grad = torch.ones(4, 8)
        Muon([{"params": [kernel], "muon": True, "lr": 1.0}], 0.0, 5, block=128).step()
        assert seen == [precision]
        assert torch.get_float32_matmul_precision() == "high"
        with full_precision(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (128, 1152), (2048, 128)])
def test_products_of_a_step_are_those_of_float32_on_this_cpu(rows, columns):
    matrices = torch.randn(4, rows, columns, generator=torch.Generator().manual_seed(0))
    with full_precision(torch.device("cpu")):
        product = matrices @ matrices.mT
    exact = matrices.double() @ matrices.double().mT
    assert (product - exact).abs().max() < 1e-5 * exact.abs().max()


def test_steps_are_timms():
    ours, theirs = parameters(), parameters()
    muon = Muon(
        [
            {"params": ours[0], "weight_decay": 0.1, "muon": True},
            {"params": ours[1], "weight_decay": 0.0, "muon": False},
        ],
        momentum=0.9,
        iterations=3,
        block=256,
    )
    options = {"nesterov": True, "momentum": 0.9, "ns_coefficients": "original", "ns_steps": 3}
    timm = TimmMuon(
        [
            {"params": theirs[0], "weight_decay": 0.1, **options},
            {"params": theirs[1], "weight_decay": 0.0, "use_fallback": True, "betas": (0.9, 0.999), "eps": 1e-8},
        ]
    )
    start = [p.detach().clone() for p in ours[0]]
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for mine, others in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            others.grad = mine.grad.clone()
        for optimizer in (muon, timm):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            optimizer.step()
    for before, mine, others in zip(start, ours[0], theirs[0], strict=True):
        assert (mine - others).norm() < 0.05 * (others - before).norm()  # bfloat16 on both sides
    torch.testing.assert_close(ours[1], theirs[1])


def test_steps_do_not_depend_on_how_kernels_lie_in_memory():
    kernels = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        kernels[layout] = [nn.Parameter(p.detach().to(memory_format=layout)) for p in parameters()[0]]
        optimizer = Muon([{"params": kernels[layout], "muon": True, "lr": 0.1}], 0.9, 5, 8)
        generator = torch.Generator().manual_seed(1)
        for p in kernels[layout]:
            p.grad = torch.randn(p.shape, generator=generator).to(memory_format=layout)
        optimizer.step()
    for contiguous, channels_last, before in zip(*kernels.values(), parameters()[0], strict=True):
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(contiguous, channels_last, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(contiguous, before, atol=1e-2)


@pytest.mark.parametrize(("decay", "rate"), [(0.1, 0.01), (0.0, 0.01), (0.1, 0.0), (1e-7, 0.01)])
def test_decay_and_step_are_one_step(decay, rate):
    kernels = parameters()[0]
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in kernels]
    before = [p.detach().clone() for p in kernels]
    for p, grad in zip(kernels, grads, strict=True):
        p.grad = grad
    Muon([{"params": kernels, "muon": True, "lr": rate, "weight_decay": decay}], 0.0, 5, block=128).step()
    for p, grad, start in zip(kernels, grads, before, strict=True):
        matrix = grad.flatten(1).double()
        direction = zeropower_via_newtonschulz(matrix, 5, [COEFFICIENTS], dtype=torch.float64).view_as(p)
        expected = start * (1 - rate * decay) - rate * 0.2 * max(matrix.shape) ** 0.5 * direction
        torch.testing.assert_close(p.detach(), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    kernels, vectors = parameters()
    before = [p.detach().clone() for p in kernels]
    optimizer = Muon([{"params": kernels, "weight_decay": 0.1, "muon": True}, {"params": vectors}], 0.9, 3, 256)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    kernels[0].grad = torch.ones_like(kernels[0])
    optimizer.step()
    assert not torch.equal(kernels[0], before[0])
    assert all(torch.equal(p, q) for p, q in zip(kernels[1:], before[1:], strict=True))


def test_its_state_survives_a_checkpoint():
    def steps(optimizer, kernels, count, generator):
        for _ in range(count):
            for p in kernels:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    def make():
        kernels = parameters()[0]
        groups = [{"params": kernels, "muon": True, "weight_decay": 0.1, "lr": 0.01}]
        optimizer = Muon(groups, 0.9, 3, 256)
        return optimizer, kernels

    straight, kernels = make()
    steps(straight, kernels, 4, torch.Generator().manual_seed(0))
    first, before = make()
    generator = torch.Generator().manual_seed(0)
    steps(first, before, 2, generator)
    second, after = make()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for p, q in zip(after, before, strict=True):
            p.copy_(q)
    steps(second, after, 2, generator)
    assert all(torch.equal(p, q) for p, q in zip(kernels, after, strict=True))
