"""How long runs will take here: some steps of each kind are measured, and the rest is multiplication."""

import time
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from cifar_tl import run
from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze
from cifar_tl.callbacks.feature_cache import decide, memory_for_features
from cifar_tl.data.datamodule import CIFAR10DataModule, build_datamodule
from cifar_tl.hardware import prepare_for, resolve_accelerator
from cifar_tl.model.weights import load_weights

WARM_UP, STEPS, SECONDS = 2, 10, 3.0
"""Training steps that do not count; measuring ends after so many more, or so many seconds of them."""
AROUND = 19.0
"""Seconds of a run that are not its epochs: start, pictures, report (the README has them, measured on 2 CPU cores)."""
EVALUATE_VIEWS = 7
"""Views of the test set that cifar_tl.evaluate computes: the single one, and six of which flips are two."""


class Stopwatch(L.Callback):
    """Time steps, and stop training when there are enough."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._start(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Take the time of a step."""
        self._add(trainer, len(batch[0]))
        steps = len(self.images) - WARM_UP
        if steps > 0 and (steps == STEPS or self.ends[-1] - self.ends[WARM_UP] > SECONDS):
            trainer.should_stop = True

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the time of a batch."""
        self._add(trainer, len(batch[0]))

    def images_per_s(self, warm_up: int) -> float:
        """Return the speed after the first steps, or that of all where there are no more."""
        first = min(warm_up, len(self.images) - 1)
        return sum(self.images[first:]) / (self.ends[-1] - self.ends[first])

    def _start(self, trainer: L.Trainer) -> None:
        self.images: list[int] = []
        self.ends = [self._now(trainer)]

    def _add(self, trainer: L.Trainer, images: int) -> None:
        self.images.append(images)
        self.ends.append(self._now(trainer))

    def _now(self, trainer: L.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Estimate:
    """Seconds of runs on this device; a setting is measured when it first comes up. Reads the data and the weights."""

    def __init__(self) -> None:
        self._speeds: dict[str, tuple[float, float]] = {}
        self._data: dict[str, CIFAR10DataModule] = {}
        self._features: set[str] = set()

    def seconds(self, config: DictConfig, done: int, train: bool, evaluate: bool) -> float:
        """Return how long a run takes.

        Args:
            config: Of the run.
            done: Epochs that it has behind it.
            train: Whether it is to be trained, or only evaluated.
            evaluate: Whether cifar_tl.evaluate follows.

        Raises:
            UserError: A mistake in the config, the data or the weights.
        """
        data = self.datamodule(config)
        training, evaluation = self.speeds(config, data)
        sizes, plan = data.sizes, run.build_schedule(config)
        seconds = evaluate * EVALUATE_VIEWS * sizes["test"] / evaluation
        if not train:
            return seconds
        tuning = plan.max_epochs - max(done, plan.unfreeze_at_epoch)
        frozen = max(0, plan.unfreeze_at_epoch - done)
        memory = memory_for_features(resolve_accelerator(config.trainer.accelerator))
        mode = str(config.finetune.cache_features).lower()
        views = decide(mode, plan, run.build_augment(config)(0), sizes, memory, 1).views
        forward = tuning * sizes["val"] + sizes["test"]
        if frozen and views:
            features = str([config.data, config.model.upscale, config.trainer.precision, views])
            if features not in self._features or config.finetune.features_folder is None:
                forward += views * sizes["train"] + sizes["val"]
            self._features.add(features)
        else:
            forward += frozen * (sizes["train"] + sizes["val"])
        return seconds + AROUND + tuning * sizes["train"] / training + forward / evaluation

    def datamodule(self, config: DictConfig) -> CIFAR10DataModule:
        """Return the data of a run, loaded."""
        key = str(config.data)
        if key not in self._data:
            self._data[key] = build_datamodule(config.data, run.build_augment(config), 0)
            self._data[key].prepare_data()
            self._data[key].setup("fit")
            self._data[key].setup("test")
        return self._data[key]

    def speeds(self, config: DictConfig, data: CIFAR10DataModule) -> tuple[float, float]:
        """Return images a second of fine-tuning and of evaluation."""
        finetune, model, trainer = config.finetune, config.model, config.trainer
        key = str(
            [
                (model.upscale, model.weights, config.data.batch_size, config.data.eval_batch_size),
                (finetune.batchnorm, finetune.optimizer, trainer.accelerator, trainer.precision, config.augment),
            ]
        )
        if key not in self._speeds:
            self._speeds[key] = _measure(config, data)
        return self._speeds[key]


def _measure(config: DictConfig, data: CIFAR10DataModule) -> tuple[float, float]:
    unfrozen = OmegaConf.merge(config, {"finetune": {"unfreeze_at_epoch": 0, "stage_epochs": 0}})
    assert isinstance(unfrozen, DictConfig)
    accelerator = resolve_accelerator(config.trainer.accelerator)
    module = run.build_module(unfrozen, data.classes)
    prepare_for(accelerator, module)
    if config.model.weights is not None:
        load_weights(module.backbone, config.model.weights, config.model.filter_rms)
    data.augment = run.build_augment(unfrozen)
    stopwatch = Stopwatch()

    def trainer(**limits: Any) -> L.Trainer:
        keys = {**config.trainer, "min_epochs": 0, **limits}
        callbacks = [BackboneUnfreeze(run.build_schedule(unfrozen), config.finetune.batchnorm), stopwatch]
        cuda = accelerator == "cuda"
        return run.build_trainer(keys, callbacks=callbacks, logger=False, enable_checkpointing=False, benchmark=cuda)

    trainer(max_epochs=-1, limit_val_batches=0).fit(module, datamodule=data)
    training = stopwatch.images_per_s(WARM_UP)
    trainer(limit_val_batches=2).validate(module, datamodule=data, verbose=False)
    return training, stopwatch.images_per_s(1)
