"""The callbacks that keep what the model predicts for every validation and test image."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from cifar_tl.data.batch import class_indices
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.runs.predictions import Predictions, SplitPredictions, worth_showing, write_images, write_predictions


class PredictionsCollector(L.Callback):
    """Collect the logits that `validation_step` and `test_step` return, without a pass over the data of its own.

    A base class, so that no callback depends on another one.

    Args:
        datamodule: Knows which images are evaluated.

    Attributes:
        val: The validation of this epoch; None before it, and in an epoch without one.
        test: The latest test; None before the first.
    """

    def __init__(self, datamodule: CIFAR10DataModule) -> None:
        self.datamodule = datamodule
        self.val: SplitPredictions | None = None
        self.test: SplitPredictions | None = None
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the validation of the epoch before: this one may have none."""
        self.val = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start over."""
        self._logits, self._targets = [], []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch."""
        self._logits.append(outputs.detach())
        self._targets.append(class_indices(batch[1]))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the batches together."""
        self.val = self._together(trainer, "val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the batches together."""
        self.test = self._together(trainer, "test")

    def _together(self, trainer: L.Trainer, split: str) -> SplitPredictions:
        """Put the batches of all processes together, in the order of the split."""
        logits, targets = torch.cat(self._logits).float().cpu(), torch.cat(self._targets).cpu()
        # process r has examples r, r + world_size, ...
        indices = self.datamodule.indices[split][trainer.global_rank :: trainer.world_size][: len(targets)]
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, (logits, targets, indices))
            logits, targets, indices = (torch.cat(parts) for parts in zip(*shares, strict=True))
            order = indices.argsort()
            logits, targets, indices = logits[order], targets[order], indices[order]
        return SplitPredictions(logits.numpy(), targets.numpy(), indices.numpy())


class PredictionsRecorder(PredictionsCollector):
    """Write predictions.npz and images.npz after the test.

    The validation predictions of the epoch with the highest validation accuracy, the first of equals, are kept, and
    those of the last epoch before the unfreeze; they travel in checkpoints, for resumed runs.

    Args:
        datamodule: Knows which images are evaluated.
        folder: The run's.
        unfreeze_at_epoch: First epoch of fine-tuning.
        max_epochs: Epochs of the whole run.
    """

    def __init__(self, datamodule: CIFAR10DataModule, folder: Path, unfreeze_at_epoch: int, max_epochs: int) -> None:
        super().__init__(datamodule)
        self.folder = folder
        self.last_frozen = unfreeze_at_epoch - 1 if unfreeze_at_epoch < max_epochs else None
        self._best: dict[str, Tensor] = {}
        self._frozen: Tensor | None = None
        self._best_accuracy = -1.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the epoch's validation if it is the best so far, or the last of the frozen phase."""
        if self.val is None:
            return
        accuracy = float(trainer.callback_metrics["val/acc"])
        if accuracy > self._best_accuracy:
            self._best_accuracy = accuracy
            self._best = {name: torch.from_numpy(values) for name, values in vars(self.val).items()}
        if trainer.current_epoch == self.last_frozen:
            self._frozen = torch.from_numpy(self.val.logits)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files."""
        test = self.test
        if not trainer.is_global_zero or test is None or not self._best:
            return
        val = SplitPredictions(**{name: tensor.numpy() for name, tensor in self._best.items()})
        frozen = SplitPredictions(self._frozen.numpy(), val.targets, val.indices) if self._frozen is not None else None
        write_predictions(self.folder, Predictions(list(self.datamodule.classes), val, test, frozen))
        chosen = worth_showing(test)
        where = np.searchsorted(self.datamodule.indices["test"].numpy(), test.indices[chosen])
        images = self.datamodule.images("test", torch.from_numpy(where))
        write_images(self.folder, test.indices[chosen], images.cpu().numpy())

    def state_dict(self) -> dict[str, Any]:
        """Return the validation predictions of the best epoch and of the last one before the unfreeze."""
        return {"accuracy": self._best_accuracy, "best": self._best, "frozen": self._frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what the run that is resumed has kept."""
        self._best_accuracy, self._best = state_dict["accuracy"], state_dict["best"]
        self._frozen = state_dict["frozen"]
