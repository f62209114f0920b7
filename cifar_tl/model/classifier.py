"""The model as others use it: images in, logits out, normalization inside."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cifar_tl.errors import check_choice
from cifar_tl.model.head import logits_of

INPUTS = {
    "uint8": "uint8, (batch, 3, 32, 32), RGB, 0 to 255",
    "float": "float32, (batch, 3, 32, 32), RGB, 0 to 1",
}


class ImageClassifier(nn.Module):
    """Normalization, backbone and head.

    Args:
        backbone: From (batch, 3, height, width) to features.
        head: From features to logits.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        input: A key of INPUTS.
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Module, mean: Sequence[float], std: Sequence[float], input: str
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        whole = 255 if check_choice("input", input, INPUTS) == "uint8" else 1
        std_tensor = torch.tensor(std).view(1, 3, 1, 1)
        # one multiplication and one addition, rounded as the training's batches are (see ArrayLoader)
        self.register_buffer("scale", 1 / (whole * std_tensor))
        self.register_buffer("offset", -torch.tensor(mean).view(1, 3, 1, 1) / std_tensor)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: (batch, 3, 32, 32), RGB; uint8 or float as the constructor was told.

        Returns:
            Logits, (batch, classes); their softmax is the probabilities.
        """
        return logits_of(self.head, self.backbone(images.float() * self.scale + self.offset))
