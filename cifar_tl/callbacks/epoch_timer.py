"""Wall-clock times of an epoch, for the callbacks that tell them."""

import time
from typing import Any

import lightning as L


class EpochTimer(L.Callback):
    """Time every epoch; a base class, so that no callback depends on another one.

    Attributes:
        images: Training images of the epoch, of all processes.
        train_seconds: From the start of the epoch's first training step to the end of its last one.
    """

    def __init__(self) -> None:
        self.images = 0
        self.train_seconds = 0.0

    def epoch_seconds(self) -> float:
        """Return the seconds since the last epoch ended, or since training started: all that an epoch costs."""
        return time.perf_counter() - self._epoch_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the first epoch's clock."""
        self._epoch_start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the training's clock."""
        if batch_idx == 0:
            self._train_start = time.perf_counter()
            self.images = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images, and stop the clock after the last of them."""
        self.images += len(batch[0]) * trainer.world_size
        if trainer.is_last_batch:
            self.train_seconds = time.perf_counter() - self._train_start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the next epoch's clock; subclasses tell the times first."""
        self._epoch_start = time.perf_counter()
