"""Early stopping that waits for the unfreeze, and that a resumed run neither forgets nor is stuck with."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging, early_stopping

from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze
from cifar_tl.errors import UserError, check_int, suggest

log = logging.getLogger(__name__)


class EarlyStopping(early_stopping.EarlyStopping):
    """Lightning's; but a run that it has ended stays ended, and goes on if it is resumed with more patience.

    Lightning's own forgets on a resume that it has stopped, trains another epoch, and takes the patience of the
    checkpoint instead of the config's.

    Args:
        monitor: A metric's name, as it is logged.
        start_epoch: Earlier epochs are not looked at. None for the first one of BackboneUnfreeze's last phase: a head
            that has stopped improving says nothing about what fine-tuning will do, nor a stage about the next one, or
            images about larger ones.
        patience: Validations that it waits for a better one.
        kwargs: Lightning's.

    Raises:
        UserError: No number of epochs.
    """

    def __init__(self, monitor: str, start_epoch: int | None = None, patience: int = 3, **kwargs: Any) -> None:
        key = "callbacks.early_stopping"
        super().__init__(monitor, patience=check_int(f"{key}.patience", patience, 0), **kwargs)
        self.start_epoch = start_epoch if start_epoch is None else check_int(f"{key}.start_epoch", start_epoch, 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state, but for the patience, which is the config's."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the training before it starts, if it had been ended and patience is no longer than it was."""
        reasons = early_stopping.EarlyStoppingReason
        if self.stopping_reason is reasons.PATIENCE_EXHAUSTED and self.wait_count < self.patience:
            self.stopping_reason, self.stopping_reason_message, self.stopped_epoch = reasons.NOT_STOPPED, None, 0
        elif self.stopping_reason is not reasons.NOT_STOPPED:
            trainer.should_stop = True
            if trainer.is_global_zero:
                longer = "more patience or " if self.stopping_reason is reasons.PATIENCE_EXHAUSTED else ""
                said = (self.stopping_reason_message or "").rstrip(".")
                left = trainer.max_epochs is not None and self.stopped_epoch + 1 < trainer.max_epochs
                callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning adds it
                averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)
                without = "callbacks=ema" if averages else "callbacks=none"
                way_on = f" With {longer}{without} it goes on." if left else ""
                log.info("stopped    early, before it was resumed: %s.%s", said, way_on)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the epoch, if it counts."""
        if self._counts(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the epoch, if it counts.

        Raises:
            UserError: `monitor` is not measured; already where the epoch does not count.
        """
        measured = [name for name in trainer.callback_metrics if not name.endswith("_step")]
        if self.monitor not in measured and any(name.startswith("val/") for name in measured):
            shown = ", ".join(name for name in measured if name.count("/") == 1)
            raise UserError(
                f"EarlyStopping's monitor={self.monitor} is not measured: choose {shown}, or val/recall/CLASS and the "
                f"like.{suggest(self.monitor, measured)}"
            )
        if self._counts(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def _counts(self, trainer: L.Trainer) -> bool:
        start = self.start_epoch
        if start is None:
            unfreezes = [c for c in trainer.callbacks if isinstance(c, BackboneUnfreeze)]  # type: ignore[attr-defined]
            start = unfreezes[0].schedule.phases[-1].start if unfreezes else 0
        return trainer.current_epoch >= start
