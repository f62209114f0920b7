"""Muon for the backbone's kernels and AdamW for everything else, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from cifar_tl.hardware import cpu_matmul_precision

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
        alike: dict[tuple[torch.Size, bool], list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            alike[p.shape, p.is_contiguous()].append(i)
        # stacked in the order in which kernels lie in memory, channels last or not: that of columns changes nothing
        stacks = [
            params[0].new_empty(
                len(members), *(shape if plain else (shape[0], *shape[2:], shape[1])), dtype=torch.float32
            )
            for (shape, plain), members in alike.items()
        ]

        def kernels(stacks: Sequence[Tensor]) -> list[Tensor]:
            views = list(params)
            for ((_, plain), members), stack in zip(alike.items(), stacks, strict=True):
                for i, kernel in zip(members, stack if plain else stack.movedim(-1, 2), strict=True):
                    views[i] = kernel
            return views

        updates = kernels(stacks)
        torch._foreach_copy_(updates, buffers)
        torch._foreach_lerp_(updates, [g.float() for g in grads], 1 - self.momentum)  # Nesterov's
        # weights move by lr * weight_decay of the way to these, which is decay and step in one
        decay = lr * weight_decay
        matrices = [stack.flatten(2) for stack in stacks]
        lengths = [-0.2 * max(m.shape[1:]) ** 0.5 * (1 / weight_decay if decay else lr) for m in matrices]
        with full_precision(params[0].device):
            directions = orthogonalized(matrices, self.block, self.iterations, lengths)
        targets = kernels([d.view_as(stack).to(params[0].dtype) for d, stack in zip(directions, stacks, strict=True)])
        if decay:
            torch._foreach_lerp_(params, targets, decay)
        else:
            torch._foreach_add_(params, targets)

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
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices as what they are, even where GPUs are allowed to round them to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(cpu_matmul_precision() if device.type == "cpu" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def orthogonalized(matrices: Sequence[Tensor], block: int, iterations: int, lengths: Sequence[float]) -> list[Tensor]:
    """Bring the singular values of blocks of matrices close to a length by Newton-Schulz iterations on Gram matrices.

    Every iterate of Newton-Schulz is a polynomial of the Gram matrix times the matrix that it started from. The
    polynomial is built up among square matrices, and meets the matrix once at the end: for the kernels of ResNet-50,
    two to nine times as wide as high, about half the products. Gram matrices of one size iterate together, whatever
    the width of their blocks: ResNet-50's kernels of 20 shapes have two.

    It takes float32: a Gram matrix that is rounded to bfloat16 or TF32 has negative eigenvalues where the spectrum is
    steep, and the iteration, which would bring singular values to 1, multiplies these by thousands.

    Args:
        matrices: Each (batch, rows, columns), contiguous, float32 or float64, all of one type.
        block: Rows of a block at most, or columns, if these are fewer: the shorter side of a matrix is cut into equal
            blocks. The products of a block with n rows grow with the square and the cube of n.
        iterations: 5 are usual; fewer move weak directions less.
        lengths: One for each entry of `matrices`; negative ones point the other way.

    Returns:
        Of the same shapes.
    """
    wide = [m.shape[1] <= m.shape[2] for m in matrices]
    blocks = [in_blocks(m, block) for m in matrices]
    heights: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(blocks):
        heights[min(x.shape[1:])].append(i)
    results = list(matrices)
    for members in heights.values():
        grams = [blocks[i] @ blocks[i].mT if wide[i] else blocks[i].mT @ blocks[i] for i in members]
        polynomials = newton_schulz(torch.cat(grams), iterations)
        factors = torch.split(polynomials, [len(gram) for gram in grams])
        torch._foreach_mul_(factors, [lengths[i] for i in members])
        for i, polynomial in zip(members, factors, strict=True):
            product = polynomial @ blocks[i] if wide[i] else blocks[i] @ polynomial
            results[i] = in_place_of(matrices[i], product)
    return results


def in_blocks(matrices: Tensor, block: int) -> Tensor:
    """Cut (batch, rows, columns) along the shorter side, (batch * blocks, rows, columns), contiguous."""
    batch, rows, columns = matrices.shape
    shorter = min(rows, columns)
    height = next(h for h in range(min(shorter, block), 0, -1) if shorter % h == 0)
    if rows <= columns:
        return matrices.view(-1, height, columns)
    return matrices.view(batch, rows, -1, height).transpose(1, 2).contiguous().view(-1, rows, height)


def in_place_of(matrices: Tensor, blocks: Tensor) -> Tensor:
    """Undo `in_blocks`: return blocks as matrices of the shape of those that they were cut from."""
    batch, rows, columns = matrices.shape
    if rows <= columns:
        return blocks.view(matrices.shape)
    return blocks.view(batch, -1, rows, blocks.shape[2]).transpose(1, 2).reshape(matrices.shape)


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
