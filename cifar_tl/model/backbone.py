"""torchvision's ResNet-50 without its classifier, computed as fast as a CPU can."""

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu
from torchvision.models.resnet import Bottleneck, ResNet

from cifar_tl.errors import check_int
from cifar_tl.model.cpu_kernels import convolve

FEATURES = 2048
"""Length of the feature vector after global average pooling."""


class Backbone(ResNet):  # type: ignore[misc]  # torchvision has no types
    """ResNet-50 up to and including its global average pooling, randomly initialized.

    Its state dict is torchvision's, without `fc`.

    Args:
        upscale: Enlarge the images by this factor first (bicubic); 1 leaves them as they are.
    """

    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)
    """Bottleneck blocks of layer1 to layer4."""

    def __init__(self, upscale: int) -> None:
        super().__init__(TunedBottleneck, list(self.blocks))
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
