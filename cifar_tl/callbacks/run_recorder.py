"""metrics.json: what a run did and everything needed to repeat it."""

import dataclasses
import hashlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L

from cifar_tl.hardware import peak_memory
from cifar_tl.schedule import FinetuneSchedule


class RunRecorder(L.Callback):
    """Write metrics.json after every epoch and at the end; keep the history in checkpoints, for resumed runs.

    Times are wall-clock seconds. An epoch's `seconds` include its validation; `images_per_s` counts training only.

    Args:
        folder: The run's.
        plan: Names the phases.
        facts: What is known before training: config, seed, hashes, versions, device.
    """

    def __init__(self, folder: Path, plan: FinetuneSchedule, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        self.facts = dict(facts)
        self.epochs: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}
        self.status = "running"
        self._validation_seconds = 0.0

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Keep what happens inside out of `images_per_s`, like validation; an epoch's `seconds` have it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._validation_seconds += time.perf_counter() - start

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._validation_seconds = 0.0
        self._images = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += len(batch[0]) * trainer.world_size

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the validation's clock."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the validation's clock."""
        self._validation_seconds += time.perf_counter() - self._validation_start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch to the history and write it."""
        seconds = time.perf_counter() - self._start
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        names = ("train/loss", "train/acc", "val/loss", "val/acc", "val/ece", "lr/head", "lr/backbone")
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "phase": self.plan.phase(trainer.current_epoch).name,
                **{name: metrics[name] for name in names},
                "seconds": seconds,
                "images": self._images,
                "train_seconds": seconds - self._validation_seconds,
            }
        )
        self.write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Record how the run ended."""
        self.status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self.write(trainer)

    def finish(self, trainer: L.Trainer, result: Mapping[str, Any]) -> None:
        """Add the test result and write the file for the last time."""
        memory = peak_memory(trainer.strategy.root_device.type)
        self.result = {**result, "peak_memory_gib": {where: round(amount, 2) for where, amount in memory.items()}}
        self.status = "finished"
        self.write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, as plain values."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of the run that is resumed."""
        self.epochs = list(state_dict["epochs"])

    @property
    def best(self) -> dict[str, Any]:
        """The epoch with the highest validation accuracy, the first of equals."""
        return max(self.epochs, key=lambda e: e["val/acc"])

    def phase_speeds(self) -> list[dict[str, Any]]:
        """Return per phase its epochs so far, wall-clock seconds and training images per second."""
        speeds = []
        for phase in self.plan.phases:
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
        columns = [k for k in (self.epochs[0] if self.epochs else {}) if k not in ("images", "train_seconds")]
        best = {"best/epoch": self.best["epoch"], "best/val/acc": self.best["val/acc"]} if self.epochs else {}
        return {
            "status": self.status,
            **self.result,
            **best,
            "plan": [
                {**dataclasses.asdict(phase), "peak_lr": self.plan.peak_learning_rates(phase)}
                for phase in self.plan.phases
            ],
            "phases": self.phase_speeds(),
            **{name: [epoch[name] for epoch in self.epochs] for name in columns},
            **self.facts,
        }

    def write(self, trainer: L.Trainer) -> None:
        """Write metrics.json, replacing the old one in one step."""
        if not trainer.is_global_zero:
            return
        partial = self.folder / "metrics.json.partial"
        partial.write_text(json.dumps(self.content(), indent=1) + "\n")
        partial.replace(self.folder / "metrics.json")


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return a hash of a config's values that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def git_state() -> dict[str, Any]:
    """Return the commit of the checkout that this code runs from and whether it has changes; None if installed."""
    here = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != here:
            return {"git_commit": None, "git_dirty": None}  # installed somewhere inside another project's checkout
        return {
            "git_commit": git("rev-parse", "HEAD").strip(),
            "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no").strip()),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
