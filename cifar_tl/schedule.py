"""What trains when, and at which learning rate: pure functions of the epoch, so that a resumed run cannot differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cifar_tl.errors import UserError, check_choice, check_int, check_number

STAGES = ("layer4", "layer3", "layer2", "layer1", "stem")
"""A torchvision ResNet's stages in the order in which they unfreeze: from the top, the most specific to ImageNet."""
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Phase:
    """Some epochs during which the same stages train.

    Attributes:
        name: `frozen`, `fine-tune`, `fine-tune from STAGE` while further stages are still to unfreeze, or `fine-tune at
            96x96` where images grow.
        start: First epoch, counted from 0.
        end: Epoch after the last.
        stages: The backbone's stages that train; the head always does.
        upscale: Factor by which the model enlarges its images; None: as it was built.
    """

    name: str
    start: int
    end: int
    stages: tuple[str, ...]
    upscale: int | None = None


class Phases(list[Phase]):
    """The phases of a run, in order.

    Args:
        max_epochs: Epochs of the whole run.
        unfreeze_at_epoch: First epoch of fine-tuning; 0 trains everything from the start, None never unfreezes.
        stage_epochs: Epochs between the unfreezing of two stages; 0 unfreezes all at once.
        upscales: Factors by which the model enlarges its images, one after the other, each for the same share of
            fine-tuning (progressive resizing); none leave its images as they are.
        stages: Those of STAGES that unfreeze; None for all.

    Raises:
        UserError: An unfreeze that is never reached, or a value that cannot be.
    """

    def __init__(
        self,
        max_epochs: int,
        unfreeze_at_epoch: int | None,
        stage_epochs: int = 0,
        upscales: Sequence[int] = (),
        stages: Sequence[str] | None = None,
    ) -> None:
        self.max_epochs = check_int("trainer.max_epochs", max_epochs, 1)
        stage_epochs = check_int("finetune.stage_epochs", stage_epochs, 0)
        if unfreeze_at_epoch is None:
            _check_unused(stage_epochs, upscales, stages)
            unfreeze_at_epoch = max_epochs
        elif isinstance(unfreeze_at_epoch, str):
            raise UserError(
                f"finetune.unfreeze_at_epoch={unfreeze_at_epoch} is not allowed: give a whole number of at least 0, or "
                f"null for a backbone that stays frozen."
            )
        elif check_int("finetune.unfreeze_at_epoch", unfreeze_at_epoch, 0) >= max_epochs:
            raise UserError(
                f"finetune.unfreeze_at_epoch={unfreeze_at_epoch} is never reached: trainer.max_epochs={max_epochs} "
                f"and epochs count from 0. Lower it, raise trainer.max_epochs, or stay frozen with null."
            )
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.stages = _stages(stages)
        if unfreeze_at_epoch > 0:
            self.append(Phase("frozen", 0, unfreeze_at_epoch, ()))
        if upscales:
            self.extend(self._progressive(upscales, stage_epochs))
        elif unfreeze_at_epoch < max_epochs and stage_epochs == 0:
            self.append(Phase("fine-tune", unfreeze_at_epoch, max_epochs, self.stages))
        elif unfreeze_at_epoch < max_epochs:
            self.extend(self._gradual(stage_epochs))

    def _gradual(self, stage_epochs: int) -> list[Phase]:
        end = self.unfreeze_at_epoch + (len(self.stages) - 1) * stage_epochs
        if end >= self.max_epochs:
            raise UserError(
                f"finetune.stage_epochs={stage_epochs} is too long: the last stage, {self.stages[-1]}, would unfreeze "
                f"at epoch {end}, after the run's {self.max_epochs} epochs. Lower it, or raise trainer.max_epochs to "
                f"{end + 1} or more."
            )
        phases = []
        for count, stage in enumerate(self.stages, start=1):
            start = self.unfreeze_at_epoch + (count - 1) * stage_epochs
            last = count == len(self.stages)
            name = "fine-tune" if last else f"fine-tune from {stage}"
            phases.append(Phase(name, start, self.max_epochs if last else start + stage_epochs, self.stages[:count]))
        return phases

    def _progressive(self, upscales: Sequence[int], stage_epochs: int) -> list[Phase]:
        key, epochs = "finetune.progressive_resizing", self.max_epochs - self.unfreeze_at_epoch
        if not isinstance(upscales, Sequence):
            raise UserError(f"{key}={upscales} is not allowed: give a list of factors, as [2,3,4].")
        text = f"{key}=[{','.join(map(str, upscales))}]"
        for upscale in upscales:
            check_int(f"each factor of {key}", upscale, 1)
        if any(after < before for before, after in pairwise(upscales)):
            raise UserError(f"{text}: no factor can be smaller than the one before it.")
        if stage_epochs:
            raise UserError(f"{text} and finetune.stage_epochs={stage_epochs} are not possible together: set one.")
        if epochs < len(upscales):
            raise UserError(
                f"{text} needs an epoch of fine-tuning for each factor, and there are {epochs}: see trainer.max_epochs "
                f"and finetune.unfreeze_at_epoch."
            )
        factors, parts = list(upscales), len(upscales)
        starts = [self.unfreeze_at_epoch + math.ceil(i * epochs / parts) for i in range(parts + 1)]
        return [
            Phase(
                f"fine-tune at {32 * factor}x{32 * factor}",
                starts[factors.index(factor)],
                starts[factors.index(factor) + factors.count(factor)],
                self.stages,
                factor,
            )
            for factor in sorted(set(factors))
        ]

    def at(self, epoch: int) -> Phase:
        """Return the phase that an epoch (from 0) belongs to; past the end, the last phase."""
        return next((p for p in self if epoch < p.end), self[-1])


def _check_unused(stage_epochs: int, upscales: Sequence[int], stages: Sequence[str] | None) -> None:
    """Refuse what is about fine-tuning where nothing is fine-tuned."""
    given: dict[str, object] = {"stage_epochs": stage_epochs, "progressive_resizing": upscales, "stages": stages}
    for name, value in given.items():
        if value:
            shown = value
            if isinstance(value, Sequence) and not isinstance(value, str):
                shown = f"[{','.join(map(str, value))}]"
            raise UserError(
                f"finetune.{name}={shown} would have no effect: with finetune.unfreeze_at_epoch=null the backbone "
                f"stays frozen. Leave one of the two out."
            )


def _stages(given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the stages that unfreeze, in the order of STAGES."""
    if given is None:
        return STAGES
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(f"finetune.stages={given} is not allowed: give a list of stages, as [layer3,layer4].")
    names = list(given)
    for name in names:
        check_choice("a stage in finetune.stages", name, STAGES)
    if not names:
        raise UserError("finetune.stages=[] unfreezes nothing: name a stage, or give finetune=head_only.")
    return tuple(stage for stage in STAGES if stage in names)


class FinetuneSchedule:
    """The phases of a run and the learning rates inside them.

    The epochs before `unfreeze_at_epoch` and those from it on are one segment each; the learning rate's schedule runs
    once through each segment. Gradual unfreezing and progressive resizing split the second segment into several phases
    under one schedule.

    Args:
        max_epochs: Epochs of the whole run.
        unfreeze_at_epoch: First epoch of fine-tuning; 0 trains everything from the start, None never unfreezes.
        head_lr: Learning rate of the head while the backbone is frozen.
        backbone_lr: Learning rate of the backbone once it trains.
        head_lr_unfrozen: Learning rate of the head once the backbone trains; None for `head_lr`.
        schedule: `constant` or `cosine` (to zero), within each segment.
        warmup_epochs: Epochs of linear warm-up at the start of each segment, fractions allowed.
        stage_epochs: Epochs between the unfreezing of two stages; 0 unfreezes all at once.
        progressive_resizing: Factors by which the model enlarges its images, each for the same share of fine-tuning,
            and for two shares if given twice; None leaves its images as they are.
        stages: Those of STAGES that unfreeze; None for all.

    Raises:
        UserError: A value that cannot be, or an unfreeze that is never reached.
    """

    def __init__(
        self,
        max_epochs: int,
        unfreeze_at_epoch: int | None,
        head_lr: float,
        backbone_lr: float,
        head_lr_unfrozen: float | None = None,
        schedule: str = "cosine",
        warmup_epochs: float = 0.0,
        stage_epochs: int = 0,
        progressive_resizing: Sequence[int] | None = None,
        stages: Sequence[str] | None = None,
    ) -> None:
        self.phases = Phases(max_epochs, unfreeze_at_epoch, stage_epochs, progressive_resizing or (), stages)
        self.max_epochs, self.unfreeze_at_epoch = self.phases.max_epochs, self.phases.unfreeze_at_epoch
        self.head_lr = check_number("finetune.head_lr", head_lr, 0)
        self.backbone_lr = check_number("finetune.backbone_lr", backbone_lr, 0)
        unfrozen = head_lr if head_lr_unfrozen is None else head_lr_unfrozen
        self.head_lr_unfrozen = check_number("finetune.head_lr_unfrozen", unfrozen, 0)
        self.schedule = check_choice("finetune.schedule", schedule, SCHEDULES)
        self.warmup_epochs = check_number("finetune.warmup_epochs", warmup_epochs, 0)

    def check_warmup(self) -> None:
        """Refuse a warm-up that is longer than what it begins: the learning rates would never be reached.

        Raises:
            UserError: It is.
        """
        lengths = {"frozen epochs": self.unfreeze_at_epoch}
        lengths["epochs of fine-tuning"] = self.max_epochs - self.unfreeze_at_epoch
        for what, length in lengths.items():
            if 0 < length < self.warmup_epochs:
                raise UserError(
                    f"finetune.warmup_epochs={self.warmup_epochs:g} is too long for {length} {what}: their learning "
                    f"rate would never be reached. Lower it."
                )

    def phase(self, epoch: int) -> Phase:
        """Return the phase that an epoch (from 0) belongs to; past the end, the last phase."""
        return self.phases.at(epoch)

    def learning_rates(self, epoch: int, batch: int, batches: int) -> dict[str, float]:
        """Return the learning rate of the head and of the backbone for one step.

        Args:
            epoch: Epoch of the step, from 0.
            batch: Step within the epoch, from 0.
            batches: Steps per epoch.

        Returns:
            `head` and `backbone`; the backbone's is 0 while it is frozen.
        """
        start, _ = self._segment(epoch)
        warmup = 1.0
        if self.warmup_epochs > 0:
            warmup = min(1.0, (epoch - start + (batch + 1) / batches) / self.warmup_epochs)
        return {name: rate * warmup for name, rate in self._scheduled(epoch, batch / batches).items()}

    def peak_learning_rates(self, phase: Phase) -> dict[str, float]:
        """Return the highest learning rates of a phase, of head and backbone: those it starts from, warm-up aside."""
        return self._scheduled(phase.start, 0.0)

    def _segment(self, epoch: int) -> tuple[int, int]:
        frozen = epoch < self.unfreeze_at_epoch
        return (0, self.unfreeze_at_epoch) if frozen else (self.unfreeze_at_epoch, self.max_epochs)

    def _scheduled(self, epoch: int, share: float) -> dict[str, float]:
        """Return the learning rates where `share` of an epoch is over, without warm-up."""
        start, end = self._segment(epoch)
        match self.schedule:
            case "constant":
                factor = 1.0
            case "cosine":
                factor = 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - start + share) / (end - start))))
            case _:
                raise NotImplementedError(f"{self.schedule} is one of SCHEDULES and has no case here")
        if epoch < self.unfreeze_at_epoch:
            return {"head": self.head_lr * factor, "backbone": 0.0}
        return {"head": self.head_lr_unfrozen * factor, "backbone": self.backbone_lr * factor}


def epochs_text(phase: Phase) -> str:
    """Return a phase's epochs counted from 0, the last one included: `0..9`."""
    return f"{phase.start}..{phase.end - 1}" if phase.end > phase.start + 1 else f"{phase.start}"


def stages_text(stages: Sequence[str]) -> str:
    """Return what trains, in words."""
    if not stages:
        return "head"
    return "head and whole backbone" if len(stages) == len(STAGES) else "head and " + ", ".join(stages)
