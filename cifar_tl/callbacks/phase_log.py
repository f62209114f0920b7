"""What a run says while it runs: a card per phase and a line per epoch."""

import logging

import lightning as L
import torch

from cifar_tl.callbacks.freezing import BATCHNORM_POLICIES
from cifar_tl.callbacks.run_recorder import RunRecorder
from cifar_tl.hardware import peak_memory
from cifar_tl.runs.formatting import duration_text
from cifar_tl.schedule import FinetuneSchedule, epochs_text, stages_text

log = logging.getLogger(__name__)

BATCHNORM_TEXT = dict(
    zip(
        BATCHNORM_POLICIES,
        ("statistics stay ImageNet's", "statistics of each batch", "running statistics move to CIFAR-10's"),
        strict=True,
    )
)


class PhaseLog(L.Callback):
    """Log a card at the start of each phase and a line at the end of each epoch.

    Args:
        plan: The phases.
        batchnorm: The BatchNorm policy of stages that train.
        record: Has the epoch's figures; must come before this callback.
    """

    def __init__(self, plan: FinetuneSchedule, batchnorm: str, record: RunRecorder) -> None:
        self.plan = plan
        self.batchnorm = batchnorm
        self.record = record

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the phase's card."""
        phase = self.plan.phase(trainer.current_epoch)
        if trainer.current_epoch != phase.start or not trainer.is_global_zero:
            return
        rates = self.plan.peak_learning_rates(phase)
        lines = [f"Phase '{phase.name}', epochs {epochs_text(phase)}: {stages_text(phase.stages)} train"]
        for group in trainer.optimizers[0].param_groups:
            count = sum(p.numel() for p in group["params"] if p.requires_grad)
            lines.append(
                f"  {group['name']:<18} {count:>12,} parameters train   learning rate {rates[group['part']]:<8g} "
                f"weight decay {group['weight_decay']:g}"
            )
        statistics = BATCHNORM_TEXT[self.batchnorm] if phase.stages else "statistics stay ImageNet's"
        lines.append(f"  BatchNorm          {self.batchnorm if phase.stages else 'frozen'}: {statistics}")
        if speeds := self.record.phase_speeds():
            lines.append(f"  so far             {speeds[-1]['images_per_s']:,.0f} images/s in '{speeds[-1]['name']}'")
        lines.append(f"  memory             {memory_text(pl_module.device)}")
        log.info("\n%s", "\n".join(lines))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's line."""
        row = self.record.epochs[-1]
        if trainer.is_global_zero:
            log.info(
                "epoch %2d/%d %s  train loss %.4f acc %.4f  val loss %.4f acc %.4f  %.0f images/s  %s",
                row["epoch"],
                self.plan.max_epochs - 1,
                row["phase"],
                row["train/loss"],
                row["train/acc"],
                row["val/loss"],
                row["val/acc"],
                row["images"] / row["train_seconds"],
                duration_text(row["seconds"]),
            )


def memory_text(device: torch.device) -> str:
    """Return the peak memory so far: of the host process, and of the GPU if there is one."""
    names = {"host": "host", "gpu": "GPU"}
    return ", ".join(f"{amount:.1f} GiB {names[where]} (peak)" for where, amount in peak_memory(device.type).items())
