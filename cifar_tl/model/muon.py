"""Muon for the backbone's kernels and AdamW for everything else, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
    forward and backward pass. Here the iteration runs on Gram matrices, for all of one size at once, and large kernels
    are cut into blocks that are orthogonalized each for itself (Khaled et al. 2025, arXiv:2510.16981, without their
    full steps between).

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
        updates = list(torch._foreach_lerp(grads, buffers, self.momentum))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        shapes: dict[torch.Size, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            shapes[p.shape].append(i)
        # channels last, as kernels lie in memory: the order of columns changes nothing, and other orders take copies
        matrices = [
            torch.stack([updates[i].movedim(1, -1).flatten(1) for i in members]).float() for members in shapes.values()
        ]
        with full_precision():
            directions = orthogonalized(matrices, self.block, self.iterations)
        torch._foreach_mul_(directions, [-lr * 0.2 * max(d.shape[1:]) ** 0.5 for d in directions])
        for (shape, members), direction in zip(shapes.items(), directions, strict=True):
            kernels = direction.to(params[0].dtype).view(-1, shape[0], *shape[2:], shape[1]).movedim(-1, 2)
            for i, kernel in zip(members, kernels, strict=True):
                updates[i] = kernel
        torch._foreach_add_(params, updates)

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


def orthogonalized(matrices: Sequence[Tensor], block: int, iterations: int) -> list[Tensor]:
    """Bring the singular values of blocks of matrices close to 1 by Newton-Schulz iterations on their Gram matrices.

    Every iterate of Newton-Schulz is a polynomial of the Gram matrix times the matrix that it started from. The
    polynomial is built up among square matrices, and meets the wide one once at the end: for the kernels of ResNet-50,
    two to nine times as wide as high, about half the products. Gram matrices of one size iterate together, whatever
    the width of their blocks: ResNet-50's kernels of 20 shapes have two.

    It takes float32: a Gram matrix that is rounded to bfloat16 or TF32 has negative eigenvalues where the spectrum is
    steep, and the iteration, which would bring singular values to 1, multiplies these by thousands.

    Args:
        matrices: Each (batch, rows, columns), float32 or float64, all of one type.
        block: Rows of a block at most, the shorter side of a matrix being cut into equal blocks. The products of a
            block with n rows grow with the square and the cube of n.
        iterations: 5 are usual; fewer move weak directions less.

    Returns:
        Of the same shapes.
    """
    blocks = [in_blocks(m if m.shape[1] <= m.shape[2] else m.mT, block) for m in matrices]
    heights: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(blocks):
        heights[x.shape[1]].append(i)
    results = list(matrices)
    for members in heights.values():
        polynomials = newton_schulz(torch.cat([blocks[i] @ blocks[i].mT for i in members]), iterations)
        for i, polynomial in zip(members, torch.split(polynomials, [len(blocks[i]) for i in members]), strict=True):
            batch, rows, columns = matrices[i].shape
            wide = torch.bmm(polynomial, blocks[i]).view(batch, min(rows, columns), max(rows, columns))
            results[i] = wide if rows <= columns else wide.mT
    return results


def in_blocks(matrices: Tensor, block: int) -> Tensor:
    """Cut (batch, rows, columns) into equal blocks of at most `block` rows, (batch * blocks, height, columns)."""
    batch, rows, columns = matrices.shape
    height = next(h for h in range(min(rows, block), 0, -1) if rows % h == 0)
    return matrices.reshape(batch * rows // height, height, columns)


def newton_schulz(gram: Tensor, iterations: int) -> Tensor:
    """Return what the iteration multiplies each matrix X with: a polynomial of its Gram matrix X X^T.

    Args:
        gram: (batch, n, n); the root of its trace is the norm by which X is divided first.
        iterations: Of Newton-Schulz, at least 1.

    Returns:
        (batch, n, n).
    """
    a, b, c = COEFFICIENTS
    scale = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-14).rsqrt()[:, None, None]
    gram = gram * scale**2
    polynomial = scale
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # a I + b G + c G^2
        factor.diagonal(dim1=1, dim2=2).add_(a)
        polynomial = factor * scale if i == 0 else factor @ polynomial
        if i + 1 < iterations:
            gram = factor @ gram @ factor  # all of them are polynomials of one matrix, and commute
    return polynomial
