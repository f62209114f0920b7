"""metrics.json: its keys and types, written and read here and nowhere else."""

import hashlib
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_tl.files import write_text
from cifar_tl.runs.metrics import wilson_interval
from cifar_tl.schedule import FinetuneSchedule

METRICS = "metrics.json"
FORMAT = 1
"""Of metrics.json; raised when a key changes its name or its meaning."""

PER_EPOCH = ("train/loss", "train/acc", "val/loss", "val/acc", "val/ece", "lr/head", "lr/backbone")
"""Lists with one value per epoch; null where there is none, or where it is not a finite number."""

COLLAPSE = 0.05
"""Validation accuracy lost in the first unfrozen epoch that is worth a warning."""


def write_metrics(folder: Path, content: Mapping[str, Any]) -> None:
    """Write metrics.json in one step, as strict JSON.

    Raises:
        OSError: It cannot be written.
    """
    write_text(folder / METRICS, json.dumps({"format": FORMAT, **_finite(content)}, indent=1, allow_nan=False) + "\n")


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read metrics.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of a later version of this program.
    """
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    if not isinstance(metrics, dict):
        raise ValueError("it holds no object")
    if metrics.get("format", FORMAT) > FORMAT:
        raise ValueError(f"format {metrics['format']}, this version reads up to {FORMAT}")
    return metrics


def _finite(value: Any) -> Any:
    """Return a value with null for every number that is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_of_test(scalars: Mapping[str, float], details: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Return what metrics.json and evaluation.json hold of a test.

    Args:
        scalars: `test/acc`, `test/loss` and `test/ece`, of whatever else there is.
        details: Per-class metrics and the confusion matrix, as lists.
        images: Test images.
    """
    scalar = {key: float(scalars[key]) for key in ("test/acc", "test/loss", "test/ece")}
    return {
        "test/acc": scalar["test/acc"],
        "test/acc_interval": list(wilson_interval(scalar["test/acc"], images)),
        "test/loss": scalar["test/loss"],
        "test/ece": scalar["test/ece"],
        **details,
    }


def best_epoch(epochs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the epoch with the highest validation accuracy, the first of equals; None if none was validated."""
    validated = [epoch for epoch in epochs if epoch["val/acc"] is not None]
    return max(validated, key=lambda epoch: epoch["val/acc"], default=None)


def collapse_warnings(epochs: Sequence[Mapping[str, Any]], schedule: FinetuneSchedule) -> list[str]:
    """Return what went wrong with a training, with the likely reasons and the keys to change; nothing if all is well.

    Args:
        epochs: One row per epoch, with `epoch` and PER_EPOCH.
        schedule: Of the run.
    """
    rates = (
        f"finetune.backbone_lr={schedule.backbone_lr:g} or finetune.head_lr_unfrozen={schedule.head_lr_unfrozen:g} is "
        f"too high for these weights (model.filter_rms brings all files to one scale), or finetune.batchnorm=train or "
        f"adapt loses the statistics of pretraining (frozen keeps them)"
    )
    warnings = []
    for epoch in epochs:
        losses = [epoch[key] for key in ("train/loss", "val/loss") if epoch[key] is not None]
        if not all(math.isfinite(loss) for loss in losses):
            frozen = epoch["epoch"] < schedule.unfreeze_at_epoch
            reason = f"finetune.head_lr={schedule.head_lr:g} is too high" if frozen else rates
            warnings.append(
                f"The loss is not a finite number from epoch {epoch['epoch']} on. Likely: {reason}, or "
                f"trainer.precision overflows (bf16-mixed and 32-true do not)."
            )
            break
    by_epoch = {epoch["epoch"]: epoch["val/acc"] for epoch in epochs}
    before, after = by_epoch.get(schedule.unfreeze_at_epoch - 1), by_epoch.get(schedule.unfreeze_at_epoch)
    if before is not None and after is not None and before - after > COLLAPSE:
        warnings.append(
            f"Validation accuracy fell from {100 * before:.2f}% to {100 * after:.2f}% in the first epoch after the "
            f"unfreeze. Likely: {rates}."
        )
    return warnings


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
