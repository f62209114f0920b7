"""torchvision's ResNet-50 without its classifier, computed as fast as a CPU can."""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, linear, relu
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from cifar_tl.errors import check_int

FEATURES = 2048
"""Length of the feature vector after global average pooling."""

IMAGENET_MEAN: tuple[float, ...] = tuple(ResNet50_Weights.IMAGENET1K_V1.transforms().mean)
IMAGENET_STD: tuple[float, ...] = tuple(ResNet50_Weights.IMAGENET1K_V1.transforms().std)
"""Per channel, of images in [0, 1]: what every ImageNet ResNet-50 of torchvision was trained with."""


class Backbone(ResNet):  # type: ignore[misc]  # torchvision has no types
    """ResNet-50 up to and including its global average pooling, randomly initialized.

    Its state dict is torchvision's, without `fc`.

    Args:
        upscale: Enlarge the images by this factor first (bicubic); 1 leaves them as they are.
    """

    def __init__(self, upscale: int) -> None:
        super().__init__(TunedBottleneck, [3, 4, 6, 3])
        self.fc = nn.Identity()
        self.upscale = check_int("model.upscale", upscale, 1)
        self.tuned_for_cpu = False

    @property
    def tuned_for_cpu(self) -> bool:
        """Whether layers are computed in the way that is fastest on CPUs (see `convolve`); False at first."""
        return self._tuned

    @tuned_for_cpu.setter
    def tuned_for_cpu(self, tuned: bool) -> None:
        self._tuned = tuned
        for module in self.modules():
            if isinstance(module, TunedBottleneck):
                module.tuned = tuned

    def forward(self, images: Tensor) -> Tensor:
        """Compute features.

        Args:
            images: (batch, 3, height, width), float, ImageNet-normalized.

        Returns:
            (batch, 2048).
        """
        if self.upscale > 1:
            images = interpolate(images, scale_factor=self.upscale, mode="bicubic")
        if self._tuned:
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(relu(convolve(images, self.conv1, self.bn1, self._tuned)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


def conv_batchnorm_pairs(backbone: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yield each convolution of a torchvision ResNet with the BatchNorm layer behind it."""
    for name, conv in backbone.named_modules():
        if isinstance(conv, nn.Conv2d):
            parent, _, last = name.rpartition(".")
            bn = "1" if last == "0" else last.replace("conv", "bn")  # downsample.0 and .1, conv2 and bn2
            yield conv, cast(nn.BatchNorm2d, backbone.get_submodule(f"{parent}.{bn}".lstrip(".")))


class TunedBottleneck(Bottleneck):  # type: ignore[misc]  # torchvision has no types
    """torchvision's bottleneck block, by `convolve`."""

    tuned = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the shape that torchvision's gives."""
        tuned = self.tuned
        shortcut = x if self.downsample is None else convolve(x, self.downsample[0], self.downsample[1], tuned)
        x = relu(convolve(x, self.conv1, self.bn1, tuned))
        x = relu(convolve(x, self.conv2, self.bn2, tuned))
        return relu(convolve(x, self.conv3, self.bn3, tuned) + shortcut)


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
