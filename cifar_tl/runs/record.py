"""metrics.json: its keys and types, written and read here and nowhere else."""

import hashlib
import json
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cifar_tl.files import write_text
from cifar_tl.runs.metrics import wilson_interval
from cifar_tl.schedule import FinetuneSchedule

METRICS = "metrics.json"
FORMAT = 1
"""Of metrics.json; raised when a key changes its name or its meaning."""

PER_EPOCH = ("train/loss", "train/acc", "val/loss", "val/acc", "val/ece", "lr/head", "lr/backbone")
"""Lists with one value per epoch; null where there is none, or where it is not a finite number."""

TEST_KEYS = ("acc", "acc_interval", "loss", "ece", "precision", "recall", "f1", "confusion")
"""Metrics of the test, under `test/`; the per-class ones are lists in the order of the classes."""

IGNORED_KEYS = (
    "resume",
    "logger",
    "data.root",
    "data.download",
    "finetune.features_folder",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.profiler",
)
"""Keys of the config, or groups of keys, that change no result."""

START_KEYS = ("started", "git_commit", "git_dirty", "device", "threads", "precision", "changed")
"""Facts of each start of a run, by the epoch from which on they hold; a run has one more with every resume."""

COLLAPSE = 0.05
"""Validation accuracy lost in the first epoch of a phase that is worth a warning, if so many images can tell it."""


def write_metrics(folder: Path, content: Mapping[str, Any]) -> None:
    """Write metrics.json in one step, as strict JSON.

    Raises:
        OSError: It cannot be written.
    """
    write_text(folder / METRICS, json.dumps({"format": FORMAT, **finite(content)}, indent=1, allow_nan=False) + "\n")


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read metrics.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of a later version of this program.
    """
    text = (folder / METRICS).read_text(encoding="utf-8")
    metrics = json.loads(text)
    if not isinstance(metrics, dict):
        raise json.JSONDecodeError("it holds no object", text, 0)
    written = metrics.get("format", FORMAT)
    if not isinstance(written, int) or written > FORMAT:
        raise ValueError(f"format {written}, this version reads up to {FORMAT}")
    return metrics


class _Kind(NamedTuple):
    """What the value of a key is: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def list(self) -> "_Kind":
        return _Kind(f"a list, each item {self.words}", lambda v: isinstance(v, list) and all(map(self.holds, v)))


def _object(**items: _Kind) -> _Kind:
    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(key in value and kind.holds(value[key]) for key, kind in items.items())

    return _Kind(f"an object with {', '.join(items)}" if items else "an object", holds)


_TEXT = _Kind("text", lambda v: isinstance(v, str))
_INTEGER = _Kind("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool))
_NUMBER = _Kind("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v))
_NUMBER_OR_NULL = _Kind("a number or null", lambda v: v is None or (isinstance(v, int | float) and v is not True))
_EPOCHS = _Kind("a list of epochs", lambda v: isinstance(v, list) and bool(v) and all(map(_INTEGER.holds, v)))

KINDS: dict[str, _Kind] = {
    "status": _TEXT,
    "warnings": _TEXT.list(),
    "classes": _TEXT.list(),
    "seed": _INTEGER,
    **dict.fromkeys(("test/acc", "test/loss", "test/ece", "best/val/acc"), _NUMBER),
    "test/acc_interval": _Kind("two numbers", lambda v: _NUMBER.list().holds(v) and len(v) == 2),
    **dict.fromkeys(("test/precision", "test/recall", "test/f1"), _NUMBER.list()),
    "test/confusion": _INTEGER.list().list(),
    "best/epoch": _INTEGER,
    "plan": _object(name=_TEXT, start=_INTEGER, end=_INTEGER, stages=_TEXT.list()).list(),
    "starts": _object(epoch=_INTEGER).list(),
    "phases": _object(name=_TEXT, epochs=_EPOCHS, seconds=_NUMBER, images_per_s=_NUMBER).list(),
    "epoch": _INTEGER.list(),
    "phase": _TEXT.list(),
    "seconds": _NUMBER.list(),
    **dict.fromkeys(PER_EPOCH, _NUMBER_OR_NULL.list()),
    "duplicates": _object(test=_INTEGER, val=_INTEGER),
    **dict.fromkeys(("images", "versions", "normalization"), _object()),
}
"""The keys of metrics.json that reports calculate with. The other ones are only shown."""


def faults(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong with the values of some keys of metrics.json, in words, by key.

    A list per epoch that has not one value for each of `epoch` is at fault, too.
    """
    there = {key: kind for key, kind in KINDS.items() if key in metrics}
    found = {key: f"{key} is not {kind.words}" for key, kind in there.items() if not kind.holds(metrics[key])}
    epochs = "epochs that are not known" if "epoch" in found else f"{len(metrics.get('epoch', []))} epochs"
    for key in ("phase", "seconds", *PER_EPOCH):
        if key in metrics and key not in found and epochs != f"{len(metrics[key])} epochs":
            found[key] = f"{key} has {len(metrics[key])} values for {epochs}"
    return found


def finite(value: Any) -> Any:
    """Return a value with null for every number that is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shortest(value: float) -> float:
    """Return a 32-bit number as the shortest decimal that stands for it: 0.448, where Python says 0.4480000138."""
    return float(str(np.float32(value)))


def metrics_of_test(scalars: Mapping[str, float], details: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Return what metrics.json and evaluation.json hold of a test.

    Args:
        scalars: `test/acc`, `test/loss` and `test/ece`, of whatever else there is.
        details: Per-class metrics and the confusion matrix, as lists.
        images: Test images.
    """
    scalar = {key: shortest(scalars[key]) for key in ("test/acc", "test/loss", "test/ece")}
    per_class = {key: [shortest(v) for v in details[key]] for key in ("test/precision", "test/recall", "test/f1")}
    return {
        "test/acc": scalar["test/acc"],
        "test/acc_interval": list(wilson_interval(scalar["test/acc"], images)),
        "test/loss": scalar["test/loss"],
        "test/ece": scalar["test/ece"],
        **details,
        **per_class,
    }


def best_epoch(epochs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the epoch with the highest validation accuracy, the first of equals; None if none was validated."""
    validated = [epoch for epoch in epochs if epoch["val/acc"] is not None]
    return max(validated, key=lambda epoch: epoch["val/acc"], default=None)


def collapse_warnings(
    epochs: Sequence[Mapping[str, Any]], schedule: FinetuneSchedule, images: int, batchnorm: str
) -> list[str]:
    """Return what went wrong with a training, with the likely reasons and the keys to change; nothing if all is well.

    Args:
        epochs: One row per epoch, with `epoch` and PER_EPOCH.
        schedule: Of the run.
        images: That validation accuracies are of. A fall within two standard errors is none.
        batchnorm: What BatchNorm does in what trains, `finetune.batchnorm`.
    """
    reasons = (
        f"finetune.backbone_lr={schedule.backbone_lr:g} or finetune.head_lr_unfrozen={schedule.head_lr_unfrozen:g} is "
        f"too high for these weights (model.filter_rms brings all files to one scale)"
    )
    if batchnorm != "frozen":
        reasons = (
            f"finetune.batchnorm={batchnorm} leaves the statistics of pretraining (frozen keeps them), or {reasons}"
        )
    warnings = []
    for epoch in epochs:
        losses = [epoch[key] for key in ("train/loss", "val/loss") if epoch[key] is not None]
        if not all(math.isfinite(loss) for loss in losses):
            frozen = epoch["epoch"] < schedule.unfreeze_at_epoch
            reason = f"finetune.head_lr={schedule.head_lr:g} is too high" if frozen else reasons
            warnings.append(
                f"The loss is not a finite number from epoch {epoch['epoch']} on. Likely: {reason}, or "
                f"trainer.precision overflows (bf16-mixed and 32-true do not)."
            )
            break
    by_epoch = {epoch["epoch"]: epoch["val/acc"] for epoch in epochs}
    for phase in schedule.phases[1:]:
        before, after = by_epoch.get(phase.start - 1), by_epoch.get(phase.start)
        if before is None or after is None:
            continue
        standard_error = math.sqrt((before * (1 - before) + after * (1 - after)) / images)
        if before - after <= max(COLLAPSE, 2 * standard_error):
            continue
        at_unfreeze = phase.start == schedule.unfreeze_at_epoch
        warnings.append(
            f"Validation accuracy fell from {100 * before:.2f}% to {100 * after:.2f}% in the first epoch "
            f"{'after the unfreeze' if at_unfreeze else f'of {phase.name!r}'}. Likely: {reasons}."
        )
    return warnings


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested config by dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def matters(key: str) -> bool:
    """Return whether a key of the config can change a result; see IGNORED_KEYS."""
    return not f"{key}.".startswith(tuple(f"{ignored}." for ignored in IGNORED_KEYS))


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return a hash of a config's values that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def git_state() -> dict[str, Any]:
    """Return the commit of the checkout that this code runs from and whether it has changes; None if installed.

    New files count where they can change a run, in `conf` and `cifar_tl`.
    """
    here = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        # in a container, the checkout often is somebody else's, and git would refuse to read it
        command = ["git", "-c", f"safe.directory={here}", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != here:
            return {"git_commit": None, "git_dirty": None}  # installed somewhere inside another project's checkout
        return {
            "git_commit": git("rev-parse", "HEAD").strip(),
            "git_dirty": bool(
                git("status", "--porcelain", "--untracked-files=no").strip()
                or git("ls-files", "--others", "--exclude-standard", "conf", "cifar_tl").strip()
            ),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
