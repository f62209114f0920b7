"""What trains when, and at which learning rate: pure functions of the epoch, so that a resumed run cannot differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_tl.errors import UserError, check_choice, check_int, check_number

STAGES = ("layer4", "layer3", "layer2", "layer1", "stem")
"""The backbone's stages in the order in which they unfreeze: from the top, which is the most specific to ImageNet."""


@dataclass(frozen=True)
class Phase:
    """Some epochs during which the same stages train.

    Attributes:
        name: `frozen`, `fine-tune`, or `fine-tune from STAGE` where only some stages train.
        start: First epoch, counted from 0.
        end: Epoch after the last.
        stages: The backbone's stages that train; the head always does.
    """

    name: str
    start: int
    end: int
    stages: tuple[str, ...]


class FinetuneSchedule:
    """The phases of a run and the learning rates inside them.

    The epochs before `unfreeze_at_epoch` and those from it on are one segment each; a schedule runs once through each
    segment. `gradual` unfreezing splits the second segment into several phases under one schedule.

    Args:
        max_epochs: Epochs of the whole run.
        unfreeze_at_epoch: First epoch of fine-tuning; 0 trains everything from the start, None never unfreezes.
        stage_epochs: Epochs between the unfreezes of two stages; 0 unfreezes all at once.
        head_lr: Learning rate of the head while the backbone is frozen.
        backbone_lr: Learning rate of the backbone once it trains.
        head_lr_unfrozen: Learning rate of the head once the backbone trains.
        schedule: `constant` or `cosine` (to zero), within each segment.
        warmup_epochs: Epochs of linear warm-up at the start of each segment, fractions allowed.

    Raises:
        UserError: A value that cannot be, or an unfreeze that is never reached.
    """

    def __init__(
        self,
        max_epochs: int,
        unfreeze_at_epoch: int | None,
        stage_epochs: int,
        head_lr: float,
        backbone_lr: float,
        head_lr_unfrozen: float,
        schedule: str,
        warmup_epochs: float,
    ) -> None:
        self.max_epochs = check_int("trainer.max_epochs", max_epochs, 1)
        self.head_lr = check_number("finetune.head_lr", head_lr, 0)
        self.backbone_lr = check_number("finetune.backbone_lr", backbone_lr, 0)
        self.head_lr_unfrozen = check_number("finetune.head_lr_unfrozen", head_lr_unfrozen, 0)
        self.schedule = check_choice("finetune.schedule", schedule, ("constant", "cosine"))
        self.warmup_epochs = check_number("finetune.warmup_epochs", warmup_epochs, 0)
        stage_epochs = check_int("finetune.stage_epochs", stage_epochs, 0)
        if unfreeze_at_epoch is None:
            self.unfreeze_at_epoch = max_epochs
        else:
            self.unfreeze_at_epoch = check_int("finetune.unfreeze_at_epoch", unfreeze_at_epoch, 0)
            if unfreeze_at_epoch >= max_epochs:
                raise UserError(
                    f"finetune.unfreeze_at_epoch={unfreeze_at_epoch} is never reached: trainer.max_epochs={max_epochs} "
                    f"and epochs count from 0. Lower it, raise trainer.max_epochs, or stay frozen with null."
                )
        self.phases = self._phases(stage_epochs)

    def _phases(self, stage_epochs: int) -> list[Phase]:
        unfreeze, end = self.unfreeze_at_epoch, self.max_epochs
        phases = [Phase("frozen", 0, unfreeze, ())] if unfreeze > 0 else []
        if unfreeze == end:
            return phases
        if stage_epochs == 0:
            return [*phases, Phase("fine-tune", unfreeze, end, STAGES)]
        for count, stage in enumerate(STAGES, start=1):
            start = unfreeze + (count - 1) * stage_epochs
            if start >= end:
                raise UserError(
                    f"finetune.stage_epochs={stage_epochs} is too long: {stage} would unfreeze at epoch {start}, after the "
                    f"run's {end} epochs. Lower it, or raise trainer.max_epochs to {start + 1} or more."
                )
            last = stage == STAGES[-1]
            name = "fine-tune" if last else f"fine-tune from {stage}"
            phases.append(Phase(name, start, end if last else start + stage_epochs, STAGES[:count]))
        return phases

    def phase(self, epoch: int) -> Phase:
        """Return the phase that an epoch (from 0) belongs to; past the end, the last phase."""
        return next((p for p in self.phases if epoch < p.end), self.phases[-1])

    def learning_rates(self, epoch: int, batch: int, batches: int) -> dict[str, float]:
        """Return the learning rate per part for one step.

        Args:
            epoch: Epoch of the step, from 0.
            batch: Step within the epoch, from 0.
            batches: Steps per epoch.

        Returns:
            `head` and `backbone`; the backbone's is 0 while it is frozen.
        """
        frozen = epoch < self.unfreeze_at_epoch
        start, end = (0, self.unfreeze_at_epoch) if frozen else (self.unfreeze_at_epoch, self.max_epochs)
        done = epoch - start + batch / batches
        factor = 1.0
        if self.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(1.0, done / (end - start))))
        if self.warmup_epochs > 0:
            factor *= min(1.0, (done + 1 / batches) / self.warmup_epochs)
        if frozen:
            return {"head": self.head_lr * factor, "backbone": 0.0}
        return {"head": self.head_lr_unfrozen * factor, "backbone": self.backbone_lr * factor}

    def peak_learning_rates(self, phase: Phase) -> dict[str, float]:
        """Return the rates that a phase's schedule starts from, per part."""
        if not phase.stages:
            return {"head": self.head_lr, "backbone": 0.0}
        return {"head": self.head_lr_unfrozen, "backbone": self.backbone_lr}


def epochs_text(phase: Phase) -> str:
    """Return a phase's epochs as people count them in this program: `0..9` (from 0, last included)."""
    return f"{phase.start}..{phase.end - 1}" if phase.end > phase.start + 1 else f"{phase.start}"


def stages_text(stages: Sequence[str]) -> str:
    """Return what trains, in words."""
    if not stages:
        return "head"
    return "head and whole backbone" if len(stages) == len(STAGES) else "head and " + ", ".join(stages)
