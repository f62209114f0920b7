"""What TensorBoard shows of a run beside its scalars: pictures, PR curves, hyperparameters and the projector."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from cifar_tl.callbacks.predictions_recorder import PredictionsCollector
from cifar_tl.callbacks.projector import Projector
from cifar_tl.data.batch import Batch, class_indices
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.reports import figures
from cifar_tl.runs.metrics import confusion_matrix, reliability, softmax, top_mistakes
from cifar_tl.runs.predictions import MISTAKES, SplitPredictions
from cifar_tl.runs.record import flat
from cifar_tl.schedule import FinetuneSchedule, Phase, epochs_text, stages_text

log = logging.getLogger(__name__)

SHOWN = 36
"""Images of the first batch."""
PER_CLASS = 8
"""Images of each class in the sample grid."""
HPARAMS = (
    "experiment",
    "seed",
    "data.limit",
    "data.train_limit",
    "data.batch_size",
    "augment.flip",
    "augment.crop_padding",
    "augment.rotation",
    "augment.scale",
    "augment.cutout",
    "augment.color_jitter",
    "augment.mixup",
    "augment.cutmix",
    "model._target_",
    "model.weights",
    "model.filter_rms",
    "model.upscale",
    "model.head",
    "model.dropout",
    "model.conventions",
    "finetune.unfreeze_at_epoch",
    "finetune.stages",
    "finetune.stage_epochs",
    "finetune.progressive_resizing",
    "finetune.distill_upscale",
    "finetune.head_lr",
    "finetune.head_lr_unfrozen",
    "finetune.backbone_lr",
    "finetune.schedule",
    "finetune.warmup_epochs",
    "finetune.batchnorm",
    "finetune.optimizer",
    "finetune.momentum",
    "finetune.weight_decay",
    "finetune.label_smoothing",
    "finetune.frozen_augment",
    "callbacks.ema.decay",
    "trainer.max_epochs",
    "trainer.precision",
)
"""The recipe and the keys of the config that the HParams page has; all of them would make it unreadable."""


class TensorBoardFigures(PredictionsCollector):
    """Write figures into TensorBoard's event files, if the run has a TensorBoardLogger.

    cifar_tl/runs/README.md lists their tags. They are drawn from what the run computes anyway, apart from the
    projector's features. No random numbers are drawn, and the model stays as it is. A figure that cannot be drawn is a
    warning, never the end of a run. On a resumed run, what the first start has written of the training is not written
    again.

    Args:
        datamodule: Has the images.
        schedule: The phases and learning rates.
        config: The run's, resolved, with the recipe's name as `experiment`.
    """

    def __init__(self, datamodule: CIFAR10DataModule, schedule: FinetuneSchedule, config: Mapping[str, Any]) -> None:
        super().__init__(datamodule)
        self.schedule = schedule
        self.config = config
        self.writer: SummaryWriter | None = None
        self._first_batch: Batch | None = None
        self._best: tuple[float, int] = (-1.0, -1)
        self._seconds = 0.0
        self._since = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find TensorBoard's writer; without one, nothing is drawn."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if loggers and trainer.is_global_zero:
            self.writer = loggers[0].experiment
            self.projector = Projector(self.datamodule, loggers[0].log_dir)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what the images and the plan are."""
        self._since = time.perf_counter()
        if self.writer is None or trainer.global_step > 0:
            return
        with self._softly("inputs/samples"):
            self._picture("inputs/samples", sample_grid(self.datamodule), 0)
            self.writer.add_text("phases", plan_markdown(self.schedule), 0)
        if self.schedule.unfreeze_at_epoch == 0:
            self._project("before", trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the phase."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.writer is None:
            return
        phase, epoch = self.schedule.phase(trainer.current_epoch), trainer.current_epoch
        self.writer.add_scalar("phase", self.schedule.phases.index(phase), trainer.global_step)
        if epoch == phase.start > 0:
            entered = f"Epoch {epoch}: **{phase.name}**, {stages_text(phase.stages)} train."
            self.writer.add_text("phases", entered, trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the first batch of the run and of fine-tuning as the network sees it; not where it sees features."""
        first = batch_idx == 0 and trainer.current_epoch in (0, self.schedule.unfreeze_at_epoch)
        if self.writer is not None and first and batch[0].ndim == 4:
            self._first_batch = batch[0][:SHOWN].detach().clone(), class_indices(batch[1])[:SHOWN].clone()
            self._first_step = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what the epoch has left: its first batch, at the end of a phase what validation says, its features."""
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        accuracy = float(trainer.callback_metrics.get("val/acc", -1.0))
        if accuracy > self._best[0]:
            self._best = (accuracy, trainer.current_epoch)
        if self.writer is None:
            return
        phase, step = self.schedule.phase(trainer.current_epoch), trainer.global_step - 1
        self.writer.add_scalar("phase", self.schedule.phases.index(phase), step)
        if self._first_batch is not None:
            with self._softly("inputs/first_batch"):
                images, targets = self._first_batch
                names = [self.datamodule.classes[target] for target in targets.tolist()]
                title = f"First training batch of epoch {trainer.current_epoch}, as the network sees it"
                shown = list(denormalized(images, self.datamodule.mean, self.datamodule.std))
                self._picture("inputs/first_batch", figures.gallery(title, shown, names), self._first_step)
            self._first_batch = None
        if trainer.current_epoch == phase.end - 1:
            self._show_validation(phase, step)
        if trainer.current_epoch == self.schedule.unfreeze_at_epoch - 1:  # the next epoch may enlarge images
            self._project("before", trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what validation says of a phase that ends before its time, as by early stopping."""
        if self.writer is not None:
            self._show_validation(self.schedule.phase(trainer.current_epoch), trainer.global_step - 1)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what the test says, fill the HParams page and finish the projector."""
        test = self.test
        if self.writer is None or test is None:
            return
        step = trainer.global_step
        self._pictures("test", test, "test set", step)
        with self._softly("test/pr"):
            probabilities = softmax(test.logits)
            for index, name in enumerate(self.datamodule.classes):
                self.writer.add_pr_curve(f"test/pr/{name}", test.targets == index, probabilities[:, index], step)
        with self._softly("hparams"):
            self._hparams({k: float(v) for k, v in trainer.callback_metrics.items()}, step)
        if self.schedule.unfreeze_at_epoch < self.schedule.max_epochs:
            self._project("after", trainer, pl_module)
        self.writer.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return what the HParams page will need of the epochs so far."""
        return {"best": list(self._best), "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what the run that is resumed has kept."""
        accuracy, epoch = state_dict["best"]
        self._best, self._seconds = (accuracy, epoch), state_dict["seconds"]

    def _show_validation(self, phase: Phase, step: int) -> None:
        """Show the epoch's validation, unless it had none or has been shown."""
        if self.val is not None:
            self._pictures("val", self.val, f"validation, end of '{phase.name}'", step)
        self.val = None

    def _pictures(self, split: str, predictions: SplitPredictions, where: str, step: int) -> None:
        """Show confusion matrix, reliability diagram and gallery of mistakes of a split."""
        classes = self.datamodule.classes
        probabilities = softmax(predictions.logits)
        with self._softly(f"{split}/confusion"):
            matrix = confusion_matrix(predictions.predicted, predictions.targets, len(classes))
            self._picture(f"{split}/confusion", figures.confusion(f"Confusion, {where}", matrix, classes), step)
        with self._softly(f"{split}/reliability"):
            bins = {"as trained": reliability(probabilities, predictions.targets)}
            self._picture(f"{split}/reliability", figures.reliability(f"Reliability, {where}", bins), step)
        with self._softly(f"{split}/mistakes"):
            chosen = top_mistakes(probabilities, predictions.targets, MISTAKES)
            if len(chosen):
                at = np.searchsorted(self.datamodule.indices[split].numpy(), predictions.indices[chosen])
                images = list(self.datamodule.images(split, torch.from_numpy(at)).cpu().permute(0, 2, 3, 1).numpy())
                texts = figures.captions(classes, probabilities[chosen], predictions.targets[chosen])
                gallery = figures.gallery(f"Most confident mistakes, {where}", images, texts)
                self._picture(f"{split}/mistakes", gallery, step)

    def _project(self, name: str, trainer: L.Trainer, module: L.LightningModule) -> None:
        with self._softly("projector"):
            self.projector.write(name, trainer, module)

    def _picture(self, tag: str, figure: Figure, step: int) -> None:
        assert self.writer is not None
        self.writer.add_image(tag, figures.pixels(figure), step, dataformats="HWC")

    def _hparams(self, metrics: Mapping[str, float], step: int) -> None:
        """Write what the HParams page compares: the config's important keys and the run's results."""
        assert self.writer is not None
        accuracy, epoch = self._best
        own = {"best/val/acc": accuracy, "best/epoch": float(epoch), "time/minutes": self._seconds / 60}
        for tag, value in own.items():
            self.writer.add_scalar(tag, value, step)
        results = {tag: metrics[tag] for tag in ("test/acc", "test/loss", "test/ece")}
        make: Any = hparams  # torch has no types here
        file: Any = self.writer.file_writer
        for summary in make(hparam_values(self.config), {**own, **results}):
            file.add_summary(summary)

    @contextmanager
    def _softly(self, what: str) -> Iterator[None]:
        """Go on without a figure that cannot be drawn."""
        try:
            yield
        except Exception as error:  # whatever it is, a figure is worth less than the run
            log.warning("TensorBoard goes without %s: %s: %s", what, type(error).__name__, error)


def denormalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.uint8]:
    """Return normalized images, (batch, 3, height, width), as (batch, height, width, 3) uint8."""
    shape = (1, 3, 1, 1)
    shown = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return np.asarray((shown * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def sample_grid(datamodule: CIFAR10DataModule) -> Figure:
    """Return the first training images of each class (at most 20 classes), as they are in the data."""
    targets = datamodule.targets("train")
    chosen, names = [], []
    for label, name in list(enumerate(datamodule.classes))[:20]:
        members = (targets == label).nonzero().squeeze(1)[:PER_CLASS]
        chosen.append(members)
        names += [name] * len(members)
    images = datamodule.images("train", torch.cat(chosen)).cpu().permute(0, 2, 3, 1).numpy()
    return figures.gallery("Training images, before augmentation", list(images), names, columns=PER_CLASS)


def plan_markdown(schedule: FinetuneSchedule) -> str:
    """Return the phases as a Markdown table."""
    rows = ["| phase | epochs | trains | head LR | backbone LR |", "|---|---|---|---|---|"]
    for phase in schedule.phases:
        learning_rates = schedule.peak_learning_rates(phase)
        cells = [
            phase.name,
            epochs_text(phase),
            stages_text(phase.stages),
            f"{learning_rates['head']:g}",
            f"{learning_rates['backbone']:g}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def hparam_values(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return HPARAMS and `model.options` with their values, flat.

    A list becomes `128-64`, a path its last part, None `null`.
    """
    values: dict[str, bool | int | float | str] = {}
    given = flat(config)
    for key in (*HPARAMS, *(key for key in given if key.startswith("model.options."))):
        value = given.get(key)
        if isinstance(value, list):
            value = "-".join(map(str, value))
        values[key] = "null" if value is None else value.rsplit("/", 1)[-1] if isinstance(value, str) else value
    return values
