"""What an epoch took and what it measured, for the callbacks that tell it."""

import time
from typing import Any

import lightning as L
import torch

from cifar_tl.runs.record import shortest


class EpochTimer(L.Callback):
    """Time every epoch and tell its metrics from older ones; a base class, so that no callback depends on another one.

    Attributes:
        images: Training images of the epoch, of all processes.
        train_seconds: From the start of the epoch's first training step to the end of its last one.
        complete: Whether the epoch's training was not cut short.
    """

    def __init__(self) -> None:
        self.images = 0
        self.train_seconds = 0.0
        self.complete = False
        self._validated = False

    def epoch_seconds(self) -> float:
        """Return the seconds since the last epoch ended, or since training started: all that an epoch costs."""
        return time.perf_counter() - self._epoch_start

    def epoch_metrics(self, trainer: L.Trainer) -> dict[str, float]:
        """Return what this epoch has measured; the Trainer's metrics keep the values of earlier epochs beside it."""
        fresh = {"train/": self.complete, "val/": self._validated}
        metrics = {name: shortest(float(value)) for name, value in trainer.callback_metrics.items()}
        return {
            n: v for n, v in metrics.items() if all(is_fresh or not n.startswith(s) for s, is_fresh in fresh.items())
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the first epoch's clock."""
        self._epoch_start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the training's clock."""
        if batch_idx == 0:
            self._train_start = time.perf_counter()
            self.images, self.complete, self._validated = 0, False, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images, and read the clock; at the last batch, wait for what a GPU has been given."""
        if trainer.is_last_batch and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.images += len(batch[0]) * trainer.world_size
        self.train_seconds = time.perf_counter() - self._train_start
        self.complete = trainer.is_last_batch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the epoch has been validated."""
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the next epoch's clock; subclasses tell the times first."""
        self._epoch_start = time.perf_counter()
