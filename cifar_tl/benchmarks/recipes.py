"""What each recipe's training takes on this device: images a second by phase, and the minutes computed from them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig
from torch import Tensor, nn

from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.benchmarks.step import WARM_UP, fit_options
from cifar_tl.build import build_datamodule, build_guard, build_module, build_schedule, build_unfreeze
from cifar_tl.callbacks.distillation import FeatureDistillation
from cifar_tl.callbacks.epoch_seed import EpochSeed
from cifar_tl.callbacks.feature_cache import BackboneFeatures, FeatureCache
from cifar_tl.cli import compose, conf_folder
from cifar_tl.data.batch import Batch
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.hardware import prepare_for
from cifar_tl.model.weights import file_sha256
from cifar_tl.reproduce.frontier import MINUTES, SPEED, draw_frontier
from cifar_tl.reproduce.publish import PROVENANCE, publish
from cifar_tl.runs.table import Table
from cifar_tl.schedule import Phase

RATE = ", images/s"
RECIPES = (
    "seed_baseline",
    "best32",
    "distill32",
    "long32",
    "progressive64",
    "best64",
    "best96",
    "progressive",
    "hires",
)
TRAINING_IMAGES = 45_000
IMAGES = 2048
"""Images that a turn has; fewer with --limit, but two batches of the largest size."""
TIMED = 1024
"""Images of a turn that are timed in fine-tuning; while frozen, all epochs are."""

Speeds = dict[str, Callable[[], float]]
"""By name of a phase: trains some steps of it and returns images a second."""


class StepClock(L.Callback):
    """Time the steps after the first ones, but for each epoch's first, which has the epoch's start in it.

    Args:
        setting: To wait for the device.

    Attributes:
        images: Of the steps that are timed.
        seconds: From the end of a step to the end of the next one, together.
    """

    def __init__(self, setting: Setting) -> None:
        self.images = 0
        self.seconds = 0.0
        self._setting = setting
        self._steps = 0
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Add a step."""
        self._steps += 1
        done = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if batch_idx == 0 or self._steps == WARM_UP or done:  # where timing starts or ends
            self._setting.synchronize()
        now = time.perf_counter()
        if self._steps > WARM_UP and batch_idx > 0:
            self.images += len(batch[0])
            self.seconds += now - self._last
        self._last = now


class Timed(BackboneFeatures):
    """Time the computation of features, that of validation images among them, where there are any.

    Attributes:
        setting: To wait for the device.
        seconds_per_view: Of one image's, or mirror image's, features.
    """

    setting: Setting
    seconds_per_view = 0.0

    def _get(self, trainer: L.Trainer, backbone: nn.Module) -> dict[str, Tensor]:
        self.setting.synchronize()
        start = time.perf_counter()
        features = super()._get(trainer, backbone)
        self.setting.synchronize()
        self.seconds_per_view = (time.perf_counter() - start) / self._count()
        return features

    def seconds_per_image(self) -> float:
        """Return the time for all views of a training image."""
        return self.views * self.seconds_per_view


class TimedFeatures(Timed, FeatureCache):
    """Those of the frozen phase."""


class TimedTeacher(Timed, FeatureDistillation):
    """Those that fine-tuning imitates, with the fitting of the map to them."""

    def seconds_per_image(self) -> float:
        """Return the time for all views of a training image, one of which the network itself sees, too."""
        return (self.views + 1) * self.seconds_per_view


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return images a second of each recipe's phases, and the minutes that its training takes, validation left out."""
    phases: dict[str, list[Phase]] = {r: build_schedule(compose("train", [f"experiment={r}"])).phases for r in RECIPES}
    candidates = {
        f"{recipe}: {phase}": speed
        for recipe in RECIPES
        for phase, speed in speeds(setting, [f"experiment={recipe}"]).items()
    }
    figures = take_turns(candidates, setting.rounds, warm_up=0)  # each turn has its own
    return [row(recipe, phases[recipe], figures) for recipe in RECIPES]


def row(recipe: str, phases: Sequence[Phase], figures: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return a recipe's row.

    Args:
        recipe: Its name.
        phases: Its phases.
        figures: Images a second by `RECIPE: PHASE`, one per round.
    """
    its = {phase.name: figures[f"{recipe}: {phase.name}"] for phase in phases}
    epochs = [phase.end - phase.start for phase in phases]

    def minutes(rates: Sequence[float]) -> float:
        return sum(TRAINING_IMAGES * n / rate for n, rate in zip(epochs, rates, strict=True)) / 60

    medians = {name: statistics.median(values) for name, values in its.items()}
    (total,) = summary({"minutes": [minutes(rates) for rates in zip(*its.values(), strict=True)]}, "min")
    return {
        "what": recipe,
        **{f"{name}{RATE}": rate for name, rate in medians.items()},
        "minutes": minutes(list(medians.values())),
        "low": total["low"],
        "high": total["high"],
        "n": total["n"],
    }


def publish_speed(result: Mapping[str, Any], setting: Setting) -> list[Path]:
    """Take the rows over into this checkout's speed.csv, fill its READMEs and draw its picture.

    Args:
        result: What was measured, by the name of the benchmark, with device, date and commit.
        setting: Where and on what.

    Returns:
        What was written.
    """
    commit = (result["git_commit"] or "none")[:7] + (" with changes" if result["git_dirty"] else "")
    weights = setting.weights and Path(setting.weights)
    named = f"{weights.name} ({file_sha256(weights)[:12]})" if weights and weights.is_file() else setting.weights
    origin = {
        "device": result["device"],
        "date": result["date"][:10],
        "commit": commit,
        "weights": named or "random",
        "filters": "as each recipe has them",
        "precision": setting.precision,
    }
    rows = []
    for row in result["recipes"]:
        rates = {key.removesuffix(RATE): f"{value:,.0f}" for key, value in row.items() if key.endswith(RATE)}
        frozen = rates.pop("frozen", "-")
        tuned = ", ".join(f"{rate}{name.removeprefix('fine-tune')}" for name, rate in rates.items()) or "-"
        minutes = f"{row['minutes']:.3g}", f"{row['low']:.3g} to {row['high']:.3g}", str(row["n"])
        rows.append([row["what"], frozen, tuned, *minutes, *(origin[name] for name in PROVENANCE)])
    head = ["config", "frozen, images/s", "fine-tune, images/s", MINUTES, "range", "n", *PROVENANCE]
    path = setting.folder / SPEED.name
    Table("Speed", head, rows).write_csv(path)
    return [*publish([path], checkout()), *draw_frontier(checkout())]


def checkout() -> Path:
    """Return the folder that what is measured is published in."""
    return conf_folder().parent


def images_of(setting: Setting) -> int:
    """Return how many training images a turn has."""
    return max(512, min(IMAGES, setting.limit or IMAGES))


def data_config(setting: Setting, *overrides: str) -> DictConfig:
    """Compose conf/train.yaml with as many images as a turn has, and few to validate, whose features count little."""
    return replace(setting, limit=images_of(setting)).config("data.val_size=256", *overrides)


def speeds(setting: Setting, recipe: Sequence[str]) -> Speeds:
    """Return the speed of each phase of a recipe, in Lightning with the callbacks that freeze, cache and check.

    The frozen phase has all its epochs, on features that are computed first: its images a second are those of the
    epochs, with the time for the features, as they come out for any number of images. So are those of fine-tuning that
    is taught, with the time for the teacher's features.

    Args:
        setting: Where and on what.
        recipe: Overrides.
    """
    composed = compose("train", recipe)
    batch_size = composed.data.batch_size  # generated images come with another one
    schedule = build_schedule(composed)
    epochs = {True: schedule.max_epochs - schedule.unfreeze_at_epoch, False: schedule.unfreeze_at_epoch}
    return {
        phase.name: partial(
            _speed, setting, phase, epochs[bool(phase.stages)], *_prepared(setting, recipe, phase, batch_size)
        )
        for phase in schedule.phases
    }


def _prepared(
    setting: Setting, recipe: Sequence[str], phase: Phase, batch_size: int
) -> tuple[DictConfig, CIFAR10DataModule]:
    given = [f"data.batch_size={batch_size}"]
    if phase.stages:  # from the first epoch on
        resizing = "null" if phase.upscale is None else f"[{phase.upscale}]"
        given += ["finetune.unfreeze_at_epoch=0", "finetune.stage_epochs=0"]
        given += [f"finetune.stages=[{','.join(phase.stages)}]", f"finetune.progressive_resizing={resizing}"]
    config = data_config(setting, *recipe, *given)
    datamodule = build_datamodule(config)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return config, datamodule


def _speed(setting: Setting, phase: Phase, epochs: int, config: DictConfig, datamodule: CIFAR10DataModule) -> float:
    clock = StepClock(setting)
    callbacks = [EpochSeed(0), build_unfreeze(config), build_guard(config), clock]
    steps = WARM_UP + max(2, TIMED // config.data.batch_size)
    features: Timed | None = None
    if not phase.stages:
        features = TimedFeatures(datamodule, epochs, "true", None)
        steps = epochs * len(datamodule.train_dataloader())
    elif config.finetune.distill_upscale is not None:
        upscales = config.finetune.distill_upscale, phase.upscale or config.model.upscale
        features = TimedTeacher(datamodule, 0, *upscales, nn.Identity, None)
    if features is not None:
        features.setting = setting
        callbacks.append(features)
    module = build_module(config, datamodule.classes)
    prepare_for(setting.device, module)
    trainer = L.Trainer(**fit_options(setting, steps), callbacks=callbacks, benchmark=setting.is_gpu)
    trainer.fit(module, datamodule=datamodule)
    features_s = 0.0 if features is None else features.seconds_per_image() / epochs
    return 1 / (clock.seconds / clock.images + features_s)
