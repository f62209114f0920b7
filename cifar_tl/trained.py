"""A trained model as its checkpoint tells it: weights, classes, normalization and where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifar_tl.checkpoints import read_checkpoint
from cifar_tl.errors import UserError
from cifar_tl.model.classifier import ImageClassifier
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.run import build_module


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds.

    Attributes:
        path: The checkpoint.
        module: In eval mode, on the CPU.
        config: Of its run.
        facts: Of its run: classes, normalization, hashes, versions, device, commit.
        epoch: Of its run, from 0, after which it was saved.
    """

    path: Path
    module: ResNet50Classifier
    config: DictConfig
    facts: dict[str, Any]
    epoch: int

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of their indices."""
        return tuple(self.facts["classes"])

    def classifier(self, input: str = "uint8") -> ImageClassifier:
        """Return the model with its normalization inside; see ImageClassifier."""
        normalization = self.facts["normalization"]
        classifier = ImageClassifier(
            self.module.backbone, self.module.head, normalization["mean"], normalization["std"], input
        )
        return classifier.eval()


def restore(path: Path) -> Trained:
    """Read a checkpoint of cifar_tl.train and rebuild its model.

    Raises:
        UserError: No such file, a broken one, somebody else's, or one of a version with another model.
    """
    checkpoint = read_checkpoint(path)
    try:
        config = OmegaConf.create(checkpoint["cifar_tl"]["config"])
        facts = checkpoint["cifar_tl"]["facts"]
        module = build_module(config, facts["classes"])
        module.load_state_dict(checkpoint["state_dict"])
        epoch = int(checkpoint["epoch"])
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path} does not fit this version of cifar_tl "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Use the version that wrote it, or train again."
        ) from error
    return Trained(path, module.eval(), config, facts, epoch)
