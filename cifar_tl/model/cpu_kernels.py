"""Convolution and BatchNorm computed as fast as a CPU can: the same function and gradients, but for rounding."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


def convolve(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, tuned: bool) -> Tensor:
    """Convolve and normalize.

    `tuned` gives the same function and the same gradients, but for rounding. A BatchNorm layer in eval mode is folded
    into the convolution where there are more activations than weights, which spares passes over them; as this is done
    anew every time and is part of the gradient, BatchNorm's weight and bias train as always.

    Args:
        x: (batch, channels, height, width).
        conv: Without bias.
        bn: The layer after it.
        tuned: Compute in the way that is fastest on CPUs.

    Returns:
        (batch, channels of conv, height / stride, width / stride).
    """
    if not tuned:
        return cast(Tensor, bn(conv(x)))
    stride, padding = conv.stride[0], int(conv.padding[0])
    outputs = len(x) * math.ceil(x.shape[2] / stride) * math.ceil(x.shape[3] / stride)
    hooked = bn._forward_pre_hooks or bn._forward_hooks  # somebody wants the layer to be called
    if not bn.training and not hooked and outputs > conv.weight[0].numel():
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        kernel = conv.weight * scale[:, None, None, None]
        return _convolution(x, kernel, bn.bias - bn.running_mean * scale, stride, padding)
    return cast(Tensor, bn(_convolution(x, conv.weight, None, stride, padding)))


def _convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Convolve; where maps or kernels are small, by the matrix product that libraries for CPUs do not make of it.

    Activations are in channels-last order: a pixel's channels are a row of the product, without a copy. What is cut is
    cut from views in the order of the memory, so that gradients come back in it.
    """
    size = kernel.shape[2]
    if all(n + 2 * padding - size < stride for n in x.shape[2:]):
        # the result is one pixel, as in layer4 at 32x32: a product over the taps that meet a pixel
        high, wide = (min(size - padding, n) for n in x.shape[2:])
        used = kernel[:, :, padding : padding + high, padding : padding + wide]
        return linear(x[:, :, :high, :wide].flatten(1), used.flatten(1), bias)[:, :, None, None]
    if size == 1:
        pixels = x.permute(0, 2, 3, 1)
        if stride > 1:
            pixels = pixels[:, ::stride, ::stride]  # the others are never looked at
        # two dimensions: linear() would take batches of tiny products where pixels are left out
        out = linear(pixels.flatten(0, 2), kernel.flatten(1), bias)
        return out.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)
    if size == 3 and stride == padding == 1 and x.shape[2:] == (2, 2):
        # each of 4 pixels meets each of 4 by one tap
        rows = [kernel[:, :, 1 - i : 3 - i, 1 - j : 3 - j].flatten(1) for i in (0, 1) for j in (0, 1)]
        out = linear(x.flatten(1), torch.cat(rows), None if bias is None else bias.repeat(4))
        return out.view(len(x), 2, 2, -1).permute(0, 3, 1, 2)
    return conv2d(x, kernel, bias, stride, padding)
