"""Early stopping that a resumed run neither forgets nor is stuck with."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import early_stopping

log = logging.getLogger(__name__)


class EarlyStopping(early_stopping.EarlyStopping):
    """Lightning's; but a run that it has ended stays ended, and goes on if it is resumed with more patience.

    Lightning's own forgets on a resume that it has stopped, trains another epoch, and takes the patience of the
    checkpoint instead of the config's.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state, but for the patience, which is the config's."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the training before it starts, if it had been ended."""
        reasons = early_stopping.EarlyStoppingReason
        out_of_patience = self.wait_count >= max(1, self.patience)
        if out_of_patience or self.stopping_reason not in (reasons.NOT_STOPPED, reasons.PATIENCE_EXHAUSTED):
            trainer.should_stop = True
            if trainer.is_global_zero:
                more = " More patience would let it go on." if out_of_patience else ""
                log.info("stopped    early, before it was resumed: %s%s", self.stopping_reason_message, more)
        else:
            self.stopped_epoch = 0
