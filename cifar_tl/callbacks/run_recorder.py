"""The callback that writes metrics.json: what a run did, with what, and on what."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from cifar_tl.callbacks.epoch_timer import EpochTimer
from cifar_tl.errors import Pruned
from cifar_tl.hardware import peak_memory
from cifar_tl.runs.record import (
    PER_EPOCH,
    START_KEYS,
    best_epoch,
    collapse_warnings,
    metrics_of_test,
    read_metrics,
    write_metrics,
)
from cifar_tl.schedule import FinetuneSchedule

log = logging.getLogger(__name__)


class RunRecorder(EpochTimer):
    """Write metrics.json after every epoch and after the test; keep the history in checkpoints, for resumed runs.

    Times are wall-clock seconds. An epoch's `seconds` include its validation; `images_per_s` counts training only.

    Args:
        folder: The run's.
        schedule: Names the phases.
        facts: What is known before training: seed, versions, device, hashes of config, data and weights.
        batchnorm: `finetune.batchnorm`, for what a warning says.
    """

    def __init__(
        self, folder: Path, schedule: FinetuneSchedule, facts: Mapping[str, Any], batchnorm: str = "frozen"
    ) -> None:
        super().__init__()
        self.batchnorm = batchnorm
        self.folder = folder
        self.schedule = schedule
        self.facts = dict(facts)
        self.epochs: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}
        self.status = "running"
        self.warnings: list[str] = []
        self.peaks: dict[int, dict[str, float]] = {}
        """Peak learning rates of the phases that have begun, by first epoch: a resume may have other ones."""
        self._training = False
        self._early_end: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what this run is started with, beside what it was started with before."""
        self._training = True
        self.facts["threads"] = torch.get_num_threads()  # of which Lightning gives each of several processes its share
        self._note_start(trainer.current_epoch)
        if self.epochs and not self.complete:
            self.warnings.append(
                f"Epoch {self.epochs[-1]['epoch']} was cut short, and the run went on with the one after it."
            )
        super().on_train_start(trainer, pl_module)

    def _note_start(self, epoch: int) -> None:
        self.starts = [start for start in self.starts if start["epoch"] < epoch]  # others have left nothing
        own = {key: self.facts[key] for key in ("model_sha256",) if key in self.facts}
        self.starts.append({"epoch": epoch, **{key: self.facts.get(key) for key in START_KEYS}, **own})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch to the history, write it, and warn of a training that has collapsed."""
        metrics = self.epoch_metrics(trainer)
        phase = self.schedule.phase(trainer.current_epoch)
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "phase": phase.name,
                **{name: metrics.get(name) for name in PER_EPOCH},
                "seconds": self.epoch_seconds(),
                "images": self.images,
                "train_seconds": self.train_seconds,
            }
        )
        self.peaks.setdefault(phase.start, self.schedule.peak_learning_rates(phase))
        before = self._collapse_warnings(self.epochs[:-1])
        for warning in self._collapse_warnings(self.epochs):
            if warning not in before:
                self.warnings.append(warning)
                if trainer.is_global_zero:
                    log.warning("warning: %s", warning)
        if not phase.stages or not self.facts.get("features"):  # a later start says nothing of the frozen phase
            self.facts["features"] = getattr(trainer.datamodule, "caching", "")  # type: ignore[attr-defined]  # Lightning's
        self.write(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say why a training ends before its last epoch is over."""
        last, of = self.epochs[-1]["epoch"], self.schedule.max_epochs
        if self._early_end or (self.complete and last + 1 >= of):
            return
        self._early_end = [f"The training ended in epoch {last} of 0..{of - 1}: {_reason_of_early_end(trainer)}."]
        if best_epoch(self.epochs) is None:
            self.status = "failed"
        if trainer.is_global_zero:
            log.warning("warning: %s", self._early_end[0])
        if self._training:  # else it is only tested again, and its result stands until there is another one
            self.write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file anew if it is gone or damaged where nothing was left to train: the checkpoint has it all."""
        try:
            read_metrics(self.folder)
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            if self.epochs:
                self.write(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note a start and its end where a run was resumed with nothing left to train: Lightning starts none there."""
        if not self._training:
            self._note_start(self.epochs[-1]["epoch"] + 1)
        self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Record how the run ended; where one that goes on has not come to train, its record stays as it is."""
        if self.facts.get("changed") is not None and not self._training:
            return
        self.status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        if isinstance(exception, Pruned):
            self.status, self.result = "pruned", {"pruned": str(exception)}
        self.write(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the test's metrics and write the file for the last time."""
        details: Any = pl_module.test_details
        scalars = {name: float(value) for name, value in trainer.callback_metrics.items()}
        memory = peak_memory(trainer.strategy.root_device.type)
        self.result = {
            **metrics_of_test(scalars, details, images=sum(map(sum, details["test/confusion"]))),
            "peak_memory_gib": {where: round(amount, 2) for where, amount in memory.items()},
        }
        self.status = "finished"
        self.write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, as plain values."""
        return {
            **{name: getattr(self, name) for name in ("epochs", "starts", "complete", "warnings", "peaks")},
            "features": self.facts.get("features", ""),
        }

    def _collapse_warnings(self, epochs: list[dict[str, Any]]) -> list[str]:
        return collapse_warnings(epochs, self.schedule, self.facts["images"]["val"], self.batchnorm)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of the run that is resumed."""
        self.epochs = list(state_dict["epochs"])
        self.starts = list(state_dict["starts"])
        self.complete = state_dict["complete"]
        self.warnings = list(state_dict["warnings"])
        self.peaks = dict(state_dict["peaks"])
        self.facts["features"] = state_dict["features"]

    def phase_speeds(self) -> list[dict[str, Any]]:
        """Return per phase its epochs so far, wall-clock seconds and training images per second."""
        speeds = []
        for phase in self.schedule.phases:
            rows = [e for e in self.epochs if phase.start <= e["epoch"] < phase.end]
            if rows:
                images, seconds = sum(e["images"] for e in rows), sum(e["train_seconds"] for e in rows)
                speeds.append(
                    {
                        "name": phase.name,
                        "epochs": [e["epoch"] for e in rows],
                        "seconds": round(sum(e["seconds"] for e in rows), 3),
                        "images_per_s": round(images / seconds, 1),
                    }
                )
        return speeds

    def content(self) -> dict[str, Any]:
        """Return what metrics.json holds; lists have one value per epoch."""
        columns = ("epoch", "phase", *PER_EPOCH, "seconds")
        best = best_epoch(self.epochs)
        return {
            "status": self.status,
            "warnings": self.warnings + self._early_end,
            **self.result,
            **({} if best is None else {"best/epoch": best["epoch"], "best/val/acc": best["val/acc"]}),
            "plan": [
                {
                    **dataclasses.asdict(phase),
                    "peak_lr": self.peaks.get(phase.start) or self.schedule.peak_learning_rates(phase),
                }
                for phase in self.schedule.phases
            ],
            "phases": self.phase_speeds(),
            **{name: [epoch[name] for epoch in self.epochs] for name in columns if self.epochs},
            **{key: value for key, value in self.facts.items() if key != "changed"},
            "starts": self.starts,
        }

    def write(self, trainer: L.Trainer) -> None:
        """Write metrics.json."""
        if trainer.is_global_zero:
            write_metrics(self.folder, self.content())


def _reason_of_early_end(trainer: L.Trainer) -> str:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning adds it
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "trainer.max_time is over"
        if isinstance(callback, EarlyStopping):
            if callback.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED:
                return f"EarlyStopping saw {callback.monitor} not improve for {callback.patience} validations"
            if callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
                return f"EarlyStopping: {str(callback.stopping_reason_message).rstrip('.')}"
    return "a callback stopped it"
