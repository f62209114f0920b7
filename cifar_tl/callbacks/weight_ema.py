"""The callback that averages weights over the steps of fine-tuning."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifar_tl.errors import check_int, check_number


class WeightEMA(WeightAveraging):
    """Validate, keep and test an exponential moving average of the weights; training itself goes on without it.

    It begins with the weights after the first step that counts; until then it is the training's weights, where
    Lightning's EMAWeightAveraging keeps, and validates, those from before the training. Buffers are averaged, too, such
    as the statistics of a BatchNorm that trains. `checkpoints.BestCheckpoint` saves the average.

    Args:
        decay: Share of the old average that a step keeps: 0.995 averages over some 200 steps.
        start_epoch: First epoch whose steps count; None for the first one of all.

    Raises:
        UserError: A value that cannot be.
    """

    def __init__(self, decay: float = 0.995, start_epoch: int | None = None) -> None:
        key = "callbacks.ema"
        decay = check_number(f"{key}.decay", decay, 0, below=1)
        self.start_epoch = 0 if start_epoch is None else check_int(f"{key}.start_epoch", start_epoch, 0)
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # torch's
        self._counts = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether a step counts."""
        return step_idx is not None and self._counts

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the average to where the model now is."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()  # read in every step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Find out whether this step counts."""
        counts = trainer.current_epoch >= self.start_epoch
        if counts and not self._counts:  # where several batches make a step, the one before it does not
            self._latest_update_step = max(self._latest_update_step, trainer.global_step)
        self._counts = counts

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save both, the average as the model."""
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        self._follow(pl_module)
        super()._swap_models(pl_module)

    def _copy_average_to_current(self, pl_module: L.LightningModule) -> None:
        self._follow(pl_module)
        super()._copy_average_to_current(pl_module)

    def _follow(self, pl_module: L.LightningModule) -> None:
        """Keep the average at the model's weights as long as no step has counted."""
        if self._average_model is not None and self._average_model.n_averaged == 0:
            self._average_model.module.load_state_dict(pl_module.state_dict())
