"""What a tutorial does, to measure against: a Dataset of images, transforms one by one, a DataLoader with workers."""

from collections.abc import Callable

import lightning as L
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms

from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD
from cifar_tl.model.backbone import FEATURES
from cifar_tl.model.head import dense_head


class Images(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 gives them, transformed one by one.

    Args:
        images: (examples, 3, 32, 32), uint8.
        targets: (examples,).
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = targets.tolist()
        # the same augmentation as augment=flip_crop
        self.transform: Callable[[Image.Image], Tensor] = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def dataloader(
    images: Tensor, targets: Tensor, batch_size: int, workers: int, pin: bool
) -> DataLoader[tuple[Tensor, int]]:
    """Return a shuffling DataLoader whose workers live on from one epoch to the next; `pin` is for GPUs."""
    return DataLoader(
        Images(images, targets),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
    )


class Classifier(L.LightningModule):
    """Fine-tuning as a Lightning tutorial writes it.

    Args:
        classes: Classes.
        learning_rate: Of everything.
        frozen: Train the head alone; the images still go through the rest in every epoch.
    """

    def __init__(self, classes: int, learning_rate: float, frozen: bool = False) -> None:
        super().__init__()
        self.model = torchvision.models.resnet50()
        self.model.requires_grad_(not frozen)
        self.model.fc = dense_head(FEATURES, [128, 64], classes, 0.0)
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.learning_rate = learning_rate
        self.frozen = frozen

    def on_train_epoch_start(self) -> None:
        """Keep the frozen BatchNorm in eval mode, as Lightning's page on transfer learning and Keras do."""
        if self.frozen:
            self.model.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; log it and the accuracy."""
        images, targets = batch
        logits = self.model(images)
        loss: Tensor = self.loss(logits, targets)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", self.accuracy(logits, targets), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with its defaults."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
