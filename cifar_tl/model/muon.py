"""Muon for the backbone's kernels and AdamW for everything else, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024)."""


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) beside AdamW.

    timm's Muon gives the same steps to kernels of one block. It multiplies wide matrices in every iteration and in
    bfloat16 on every device, and takes kernels one by one; for ResNet-50 on a CPU that cost more than the network's
    forward and backward pass. Here the iteration runs on Gram matrices, for all kernels of one shape at once, and large
    kernels are cut into blocks that are orthogonalized each for itself (Khaled et al. 2025, arXiv:2510.16981, without
    their full steps between).

    Args:
        groups: Parameter groups. Those with `muon: True` hold kernels, (out, in, ...), which are flattened to matrices
            of (out, rest); the others are trained by AdamW.
        momentum: Nesterov's, for Muon.
        iterations: Of Newton-Schulz.
        block: Rows of a block at most, the shorter side of a matrix being its rows.

    Blocks move by `lr * 0.2 * sqrt(longer side)` times an all but orthogonal matrix: as far as AdamW would at the same
    rate (Liu et al. 2025, arXiv:2502.16982, section 2.2). Weight decay is decoupled in both.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, iterations: int, block: int) -> None:
        self.momentum = momentum
        self.iterations = iterations
        self.block = block
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step over all parameters that have a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["muon"] else self._adamw)(params, group["lr"], group["weight_decay"])
        return loss

    def _muon(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, buffers, self.momentum)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            shapes[len(p), p[0].numel()].append(i)
        for (rows, columns), members in shapes.items():
            matrices = torch.stack([updates[i].reshape(rows, columns) for i in members]).float()
            with full_precision():
                directions = blockwise_orthogonalized(matrices, self.block, self.iterations)
            directions = directions.to(params[0].dtype)
            step = -lr * 0.2 * max(rows, columns) ** 0.5
            for i, direction in zip(members, directions, strict=True):
                params[i].add_(direction.view_as(params[i]), alpha=step)

    def _adamw(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices as what they are, even where GPUs are allowed to round them to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def blockwise_orthogonalized(matrices: Tensor, block: int, iterations: int) -> Tensor:
    """Orthogonalize equal blocks of matrices, cut along their shorter side, with at most `block` rows each.

    The products of a matrix with n rows grow with the square and the cube of n.

    Args:
        matrices: (batch, rows, columns).
        block: Rows of a block at most; a matrix with no more is one block.
        iterations: As in `orthogonalized`.

    Returns:
        Of the same shape.
    """
    batch, rows, columns = matrices.shape
    if rows > columns:
        return blockwise_orthogonalized(matrices.mT, block, iterations).mT
    height = next(h for h in range(min(rows, block), 0, -1) if rows % h == 0)
    blocks = matrices.reshape(batch * rows // height, height, columns)
    return orthogonalized(blocks, iterations).view(batch, rows, columns)


def orthogonalized(matrices: Tensor, iterations: int) -> Tensor:
    """Bring the singular values of matrices close to 1 by Newton-Schulz iterations on their Gram matrices.

    Every iterate of Newton-Schulz is a polynomial of the Gram matrix times the matrix that it started from. The
    polynomial is built up among square matrices, and meets the wide one once at the end: for the kernels of ResNet-50,
    two to nine times as wide as high, about half the products. It takes float32: a Gram matrix that is rounded to
    bfloat16 or TF32 has negative eigenvalues where the spectrum is steep, and the iteration, which would bring singular
    values to 1, multiplies these by thousands.

    Args:
        matrices: (batch, rows, columns), float32 or float64.
        iterations: 5 are usual; fewer move weak directions less.

    Returns:
        Of the same shape.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT, iterations).mT
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    polynomial = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand_as(gram)
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # a I + b G + c G^2
        factor.diagonal(dim1=1, dim2=2).add_(a)
        polynomial = factor if i == 0 else factor @ polynomial
        if i + 1 < iterations:
            gram = factor @ gram @ factor  # all of them are polynomials of one matrix, and commute
    return torch.bmm(polynomial, x)
