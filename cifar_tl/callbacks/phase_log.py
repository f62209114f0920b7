"""What a run says while it runs: a card per phase and a line per epoch."""

import logging
import math

import lightning as L
import torch

from cifar_tl.callbacks.epoch_timer import EpochTimer
from cifar_tl.callbacks.freezing import BATCHNORM_POLICIES
from cifar_tl.hardware import peak_memory
from cifar_tl.runs.formatting import duration_text
from cifar_tl.schedule import FinetuneSchedule, epochs_text, stages_text

log = logging.getLogger(__name__)

BATCHNORM_TEXT = dict(
    zip(
        BATCHNORM_POLICIES,
        ("statistics stay as they are", "statistics of each batch", "running statistics move to the training images'"),
        strict=True,
    )
)


class PhaseLog(EpochTimer):
    """Log a card at the start of each phase and a line at the end of each epoch, and have loggers log in each epoch.

    Args:
        schedule: The phases and learning rates.
        batchnorm: The BatchNorm policy of stages that train.
    """

    def __init__(self, schedule: FinetuneSchedule, batchnorm: str) -> None:
        super().__init__()
        self.schedule = schedule
        self.batchnorm = batchnorm

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the loss and the learning rates of steps logged in each epoch, however few steps it has."""
        super().on_train_start(trainer, pl_module)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, max(1, steps))  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Log the phase's card, once the epoch's callbacks have put the module into the phase."""
        phase = self.schedule.phase(trainer.current_epoch)
        if batch_idx == 0 and trainer.current_epoch == phase.start and trainer.is_global_zero:
            learning_rates = self.schedule.peak_learning_rates(phase)
            lines = [f"Phase '{phase.name}', epochs {epochs_text(phase)}: {stages_text(phase.stages)} train"]
            head = {id(p) for p in pl_module.get_submodule("head").parameters()}
            for group in trainer.optimizers[0].param_groups:  # those of an optimizer of one's own need not have names
                part = "head" if any(id(p) in head for p in group["params"]) else "backbone"
                count = sum(p.numel() for p in group["params"] if p.requires_grad)
                rate = learning_rates[part] * group.get("lr_scale", 1.0)
                lines.append(
                    f"  {group.get('name', part):<18} {count:>12,} parameters train   learning rate {rate:<8g} "
                    f"weight decay {group.get('weight_decay', 0):g}"
                )
            statistics = BATCHNORM_TEXT[self.batchnorm] if phase.stages else "statistics stay as they are"
            lines.append(f"  BatchNorm          {self.batchnorm if phase.stages else 'frozen'}: {statistics}")
            lines.append(f"  memory             {memory_text(pl_module.device)}")
            log.info("\n%s", "\n".join(lines))
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's line."""
        metrics = self.epoch_metrics(trainer)
        parts = [
            f"{split} loss {metrics[f'{split}/loss']:.4f} acc {metrics[f'{split}/acc']:.4f}"
            for split in ("train", "val")
            if f"{split}/loss" in metrics
        ]
        if trainer.is_global_zero:
            log.info(
                "epoch %2d/%d %s  %s  %.0f images/s  %s",
                trainer.current_epoch,
                self.schedule.max_epochs - 1,
                self.schedule.phase(trainer.current_epoch).name,
                "  ".join(parts),
                self.images / self.train_seconds,
                duration_text(self.epoch_seconds()),
            )
        super().on_train_epoch_end(trainer, pl_module)


def memory_text(device: torch.device) -> str:
    """Return the peak memory so far: of the host process, and of the GPU if there is one."""
    names = {"host": "host", "gpu": "GPU"}
    return ", ".join(f"{amount:.1f} GiB {names[where]} (peak)" for where, amount in peak_memory(device.type).items())
