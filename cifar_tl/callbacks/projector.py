"""Features of validation images before and after fine-tuning, for TensorBoard's embedding projector."""

import math
from pathlib import Path

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cifar_tl.callbacks.freezing import evaluating
from cifar_tl.data.datamodule import CIFAR10DataModule

IMAGES = 1000
DIMENSIONS = 64
"""Principal components that are kept: 2,048 dimensions as text would be 40 MB, and the projector does so anyway."""


class Projector:
    """Write the projector's files: features, labels and thumbnails.

    The images are validation's, at most IMAGES of them at equal distances, and the same before and after: the test set
    is read once, at the end, so it cannot give features at the unfreeze. `before` is the backbone as it was when it was
    frozen, which is ImageNet's; `after` is that of the best epoch. Files of an earlier start of the run stay valid.

    Args:
        datamodule: Has the images.
        folder: TensorBoard's, of the run.
    """

    def __init__(self, datamodule: CIFAR10DataModule, folder: str) -> None:
        self.datamodule = datamodule
        self.config = Path(folder) / "projector_config.pbtxt"
        self.folder = Path(folder) / "projector"

    def write(self, name: str, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the features that the module's backbone gives now.

        Args:
            name: `before` or `after`.
            trainer: Says in which precision to compute.
            module: Is left as it is.
        """
        features = self._features(trainer, module)
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savetxt(self.folder / f"{name}.tsv", principal_components(features, DIMENSIONS), "%.4g", delimiter="\t")
        chosen = self._chosen()
        labels = [self.datamodule.classes[label] for label in self.datamodule.targets("val")[chosen].tolist()]
        (self.folder / "labels.tsv").write_text("\n".join(labels) + "\n")
        images = self.datamodule.images("val", chosen).cpu().permute(0, 2, 3, 1).numpy()
        Image.fromarray(sprite(images)).save(self.folder / "thumbnails.png")
        there = [n for n in ("before", "after") if (self.folder / f"{n}.tsv").is_file()]
        height, width = images.shape[1:3]
        self.config.write_text("".join(_entry(n, height, width) for n in there))

    def _chosen(self) -> Tensor:
        """Return positions in the validation split, at equal distances: a split sorted by class gives all classes."""
        size = self.datamodule.sizes["val"]
        return torch.arange(0, size, math.ceil(size / IMAGES))

    @torch.no_grad()
    def _features(self, trainer: L.Trainer, module: L.LightningModule) -> NDArray[np.float64]:
        """Return what the backbone gives for the chosen images, (images, features)."""
        backbone = module.get_submodule("backbone")
        batches = self.datamodule.normalized("val", self._chosen())
        with evaluating(backbone), trainer.precision_plugin.forward_context():
            kept = [backbone(images.to(module.device)).float().cpu() for images in batches]
        return np.asarray(torch.cat(kept).numpy(), dtype=np.float64)


def principal_components(features: NDArray[np.float64], dimensions: int) -> NDArray[np.float64]:
    """Return the coordinates of features, (images, n), on their first principal components, (images, dimensions)."""
    centred = features - features.mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T)  # images are fewer than features: the smaller problem
    largest = np.argsort(-values)[:dimensions]
    return np.asarray(vectors[:, largest] * np.sqrt(np.maximum(values[largest], 0)))


def sprite(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images, (images, height, width, 3), as one square of rows, as the projector reads them."""
    count, height, width, channels = images.shape
    side = math.ceil(math.sqrt(count))
    filled = np.zeros((side * side, height, width, channels), dtype=np.uint8)
    filled[:count] = images
    return filled.reshape(side, side, height, width, channels).swapaxes(1, 2).reshape(side * height, side * width, -1)


def _entry(name: str, height: int, width: int) -> str:
    return (
        f'embeddings {{\n  tensor_name: "features/{name}"\n  tensor_path: "projector/{name}.tsv"\n'
        '  metadata_path: "projector/labels.tsv"\n'
        f'  sprite {{\n    image_path: "projector/thumbnails.png"\n    single_image_dim: {width}\n'
        f"    single_image_dim: {height}\n  }}\n}}\n"
    )
