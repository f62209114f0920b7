"""Checkpoints: their names, writing them without holding up a run, and loading a trained model from one."""

import errno
import pickle
import time
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from cifar_tl.cli import compose
from cifar_tl.errors import UserError, first_line
from cifar_tl.files import check_intact, replacing
from cifar_tl.model.classifier import ImageClassifier
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.model.weights import file_sha256

BEST, LAST = "best.ckpt", "last.ckpt"
FORMAT = 1
"""Of what a checkpoint holds under `cifar_tl`, raised when a key changes its name or its meaning."""

COMPLETED = ("data", "augment", "model", "finetune", "trainer")
"""Groups of the config in which keys that an older checkpoint does not have get today's defaults."""


class PacedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints when due: at once as long as that takes a fiftieth of the time, else the newest ones later.

    What is not written yet is held in the host's memory. `teardown` writes it: at the end of a run, after an error and
    after Ctrl-C. So a run with long epochs writes after each, one with epochs of a second writes every few seconds, and
    only a killed process, or a lost GPU, loses what came since the last write: the epoch it was in, or LONGEST seconds.
    The checkpoints of one epoch are written together.

    Args:
        folder: That of the run's own checkpoints, BEST and LAST; others may have any names elsewhere.
    """

    SHARE = 0.02
    """Of a run's time, at most, spent on writing."""
    LONGEST = 60.0
    """Seconds between two writes, at most, whatever they take."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path_of_best = (folder / BEST).resolve()
        self._pending: dict[str, dict[str, Any]] = {}
        self._best: dict[str, dict[str, Any]] = {}
        """Of an epoch whose last checkpoint is still to come: not written if the run ends before."""
        self._due = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Hold a copy of a checkpoint; with an epoch's last one, write whatever is held if that is due."""
        held = {str(path): _copy_to_host(checkpoint)}
        if Path(path).resolve() == self._path_of_best:
            self._best = held
            return
        self._pending |= self._best | held
        self._best = {}
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what is held.

        Raises:
            OSError: It cannot be written; the checkpoints that were there before are then still whole.
        """
        start = time.monotonic()
        if self._pending and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # the copies are made
        _write(self._pending)
        self._pending.clear()
        end = time.monotonic()
        self._due = end + min((end - start) / self.SHARE, self.LONGEST)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as it was saved last."""
        self.flush()
        return super().load_checkpoint(path, map_location, weights_only)

    def teardown(self) -> None:
        """Write what is held, when the Trainer ends, after an error and Ctrl-C, too."""
        self.flush()

    def remove_checkpoint(self, path: Any) -> None:
        """Forget a checkpoint and delete its file."""
        for held in (self._pending, self._best):
            held.pop(str(path), None)
        super().remove_checkpoint(path)


def _copy_to_host(value: Any) -> Any:
    """Return a copy of nested dicts and lists with their tensors on the CPU, which training will not change."""
    if isinstance(value, Tensor) and value.is_cuda:
        # into page-locked memory, which the next copies use again: nothing waits, as the GPU copies before it goes on
        # to train; whoever reads the copies waits first
        there = torch.empty_like(value, device="cpu", pin_memory=True)
        return there.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy_to_host(item) for item in value]
    return value


def _write(checkpoints: dict[str, dict[str, Any]]) -> None:
    """Write checkpoints by path, and then replace the old ones, the one to resume from last.

    It says which epoch is the best. Where the process is killed between the two, the run trains that epoch again, on a
    CPU to the same weights; the other way round, the best epoch's weights would be lost.
    """
    with ExitStack() as replacements:  # from the last one to the first
        for path in sorted(checkpoints, key=lambda path: Path(path).name == BEST):
            partial = replacements.enter_context(replacing(Path(path)))
            try:
                torch.save(checkpoints[path], partial)
            except RuntimeError as error:  # how torch.save says that the disk is full
                raise OSError(errno.ENOSPC, "cannot be written, probably because the disk is full", path) from error


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, but it remembers its best score in a folder that was moved or copied (Lightning issue 15705).

    An epoch before the first validation, which some keys of the Trainer put off, is no mistake: it is not the best one.
    """

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the epoch if it is due."""
        if self.monitor is None or self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Save averaged weights if there are any, which Lightning leaves out of a checkpoint of weights alone."""
        callbacks = trainer.callbacks if self.save_weights_only else []  # type: ignore[attr-defined]  # Lightning's
        averages = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
        for average in averages:
            average._swap_models(trainer.lightning_module)
        try:
            super()._save_checkpoint(trainer, filepath)
        finally:
            for average in averages:
                average._swap_models(trainer.lightning_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state with its paths as they are now."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})


def checkpoint_callbacks(folder: Path) -> list[ModelCheckpoint]:
    """Return the callbacks that keep the best epoch's weights and the state to resume from, in this order.

    Args:
        folder: Gets `best.ckpt` (weights only, highest `val/acc`, the first of equals) and `last.ckpt` (all that a
            resumed run needs, after every epoch).
    """
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": True}
    best = BestCheckpoint(
        filename=Path(BEST).stem, monitor="val/acc", mode="max", save_top_k=1, save_weights_only=True, **common
    )
    return [best, BestCheckpoint(filename=Path(LAST).stem, save_top_k=1, **common)]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: the file itself, or `best.ckpt` of a run's folder.

    Raises:
        UserError: There is none.
    """
    if path.is_dir():
        for candidate in (path / "checkpoints" / BEST, path / BEST):
            if candidate.is_file():
                return candidate
        found = sorted(path.glob(f"*/checkpoints/{BEST}"))
        there = f" There is {found[0]}" + (f" and {len(found) - 1} more." if len(found) > 1 else ".") if found else ""
        raise UserError(f"checkpoint {path}: there is no {BEST} in this folder, nor in its folder checkpoints.{there}")
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file. A run keeps its checkpoints in RUN/checkpoints/.")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program with weights_only=True, which runs no code from the file.

    Raises:
        UserError: No such file, a damaged one, somebody else's, or one of another format.
    """
    path = find_checkpoint(path)
    not_ours = f"checkpoint {path} was not written by cifar_tl.train. Plain weights go into model.weights=."
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols, for instance
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_intact(path)
    except Exception as error:  # about anything, for a file that is no checkpoint
        # torch's own text advises weights_only=False, which runs code from the file
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise UserError(f"{not_ours} It holds more than tensors and plain values and is not loaded.") from error
        advice = f"Take a copy, or {LAST} in its folder."
        if (path.parent / "checkpoints").is_dir():
            advice = f"Give the run's folder, {path.parent}."
        elif path.name == LAST:
            advice = f"Take a copy; {BEST} in its folder can be measured and exported, but no run resumes from it."
        raise UserError(
            f"checkpoint {path} cannot be read: it is damaged or no checkpoint ({path.stat().st_size:,} bytes). "
            f"{advice}"
        ) from error
    if not isinstance(checkpoint, dict) or "cifar_tl" not in checkpoint:
        raise UserError(not_ours)
    if (format := checkpoint["cifar_tl"].get("format")) != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {format}, this version of cifar_tl reads {FORMAT}. Use the version that "
            f"wrote it."
        )
    return checkpoint


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds.

    Attributes:
        path: The checkpoint.
        sha256: Of the file, from just before it was read: a run that goes on replaces it.
        module: In eval mode, on the CPU.
        config: Of its run; keys that it does not have, being older, have today's defaults.
        saved_config: The same as it was saved.
        facts: Of its run: classes, normalization, hashes, versions, device, commit.
        epoch: Of its run, from 0, after which it was saved.
    """

    path: Path
    sha256: str
    module: ResNet50Classifier
    config: DictConfig
    saved_config: dict[str, Any]
    facts: dict[str, Any]
    epoch: int

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of their indices."""
        return tuple(self.facts["classes"])

    def classifier(self, input: str = "uint8") -> ImageClassifier:
        """Return the model with its normalization inside; see ImageClassifier."""
        normalization = self.facts["normalization"]
        classifier = ImageClassifier(
            self.module.backbone, self.module.head, normalization["mean"], normalization["std"], input
        )
        return classifier.eval()


def load_trained(path: Path) -> Trained:
    """Read a checkpoint of cifar_tl.train and rebuild its model.

    Args:
        path: Of a checkpoint or of a run's folder, whose best one it then is.

    Raises:
        UserError: No such file, a broken one, somebody else's, or one of a version with another model.
    """
    path = find_checkpoint(path)
    sha256 = file_sha256(path)
    checkpoint = read_checkpoint(path)
    try:
        saved_config = checkpoint["cifar_tl"]["config"]
        facts = checkpoint["cifar_tl"]["facts"]
        if missing := {"classes", "normalization"} - facts.keys():
            raise ValueError(f"it says nothing of {' and '.join(sorted(missing))}")
        if len(facts["classes"]) != len(checkpoint["hyper_parameters"]["classes"]):
            raise ValueError("it names another number of classes than it tells apart")
        config = completed(saved_config)
        if facts.get("own_network"):
            raise UserError(
                f"checkpoint {path} is of {config.model._target_}, whose network is another one than "
                f"ResNet50Classifier's, for which alone this is: read it by the class's own load_from_checkpoint."
            )
        module = ResNet50Classifier(**_of_its_own(checkpoint["hyper_parameters"], config.model._target_))
        module.load_state_dict(checkpoint["state_dict"])
        epoch = int(checkpoint["epoch"])
    except (KeyError, TypeError, ValueError, RuntimeError, OmegaConfBaseException) as error:
        raise UserError(
            f"checkpoint {path} does not fit this version of cifar_tl "
            f"({type(error).__name__}: {first_line(error)}). Use the version that wrote it, or train again; a model of "
            f"your own that has other tensors is read by its own load_from_checkpoint."
        ) from error
    return Trained(path, sha256, module.eval(), config, saved_config, facts, epoch)


def _of_its_own(values: dict[str, Any], target: str) -> dict[str, Any]:
    """Return the arguments of ResNet50Classifier among those of a class that is derived from it."""
    if target == f"{ResNet50Classifier.__module__}.{ResNet50Classifier.__qualname__}":
        return values
    return {key: value for key, value in values.items() if key in signature(ResNet50Classifier).parameters}


def completed(saved: dict[str, Any]) -> DictConfig:
    """Return a run's config with today's defaults for keys that it does not have."""
    config = OmegaConf.create(saved)
    defaults = compose("train", [f"data={config.data.name}"])
    OmegaConf.set_struct(defaults, False)
    for group in COMPLETED:
        config[group] = OmegaConf.merge(defaults[group], config.get(group, {}))
    config.setdefault("seed", defaults.seed)
    return config
