"""The sections of a run's page on its training: schedule, curves, times, and what it takes to repeat it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cifar_tl.reports import figures
from cifar_tl.reports.page import FigureFolder
from cifar_tl.runs.folder import Run
from cifar_tl.runs.formatting import duration_text, percent, percent_or_dash, points
from cifar_tl.runs.record import START_KEYS
from cifar_tl.runs.table import Table
from cifar_tl.schedule import Phase, epochs_text, stages_text

RUN_FILES = ("metrics.json", "predictions.npz", "train.log", ".hydra/config.yaml", "checkpoints/best.ckpt")

CURVES: tuple[tuple[str, str, dict[str, str], dict[str, bool]], ...] = (
    ("accuracy", "Accuracy", {"training": "train/acc", "validation": "val/acc"}, {"percent": True}),
    ("loss", "Loss", {"training": "train/loss", "validation": "val/loss"}, {}),
    ("calibration_error", "Expected calibration error, validation", {"ECE": "val/ece"}, {}),
    (
        "learning_rates",
        "Learning rate, last step of the epoch",
        {"head": "lr/head", "backbone": "lr/backbone"},
        {"log_scale": True},
    ),
)
"""Name of the file, title, keys of metrics.json by label, and options of `figures.curves`."""

FACTS = {
    "started": "started",
    "seed": "seed",
    "weights": "weights",
    "weights_sha256": "SHA-256 of the weights",
    "model_sha256": "SHA-256 of the model's file",
    "config_sha256": "SHA-256 of the config",
    "split_sha256": "SHA-256 of the split",
    "test_sha256": "SHA-256 of the test set",
    "device": "device",
    "precision": "precision",
    "threads": "threads",
}
"""Keys of metrics.json that are shown as they are, and their names."""


def schedule(run: Run) -> dict[str, Any]:
    """Return what was planned per phase beside what happened, and what the first epoch after each unfreeze did."""
    metrics = run.metrics
    done = {phase["name"]: phase["epochs"] for phase in metrics["phases"]}
    loss, accuracy = (dict(zip(metrics["epoch"], metrics[key], strict=True)) for key in ("train/loss", "val/acc"))
    rows = []
    for planned in metrics["plan"]:
        phase = Phase(planned["name"], planned["start"], planned["end"], tuple(planned["stages"]))
        peak = planned["peak_lr"]
        epochs = done.get(phase.name, [])
        measured = [accuracy[epoch] for epoch in epochs if accuracy[epoch] is not None]
        rows.append(
            [
                phase.name,
                epochs_text(phase),
                stages_text(phase.stages),
                f"{peak['head']:.3g}",
                f"{peak['backbone']:.3g}" if phase.stages else "frozen",
                f"{len(epochs)} of {phase.end - phase.start}",
                f"{_number(loss[epochs[0]])} → {_number(loss[epochs[-1]])}" if epochs else "-",
                f"{percent_or_dash(accuracy[epochs[0]])} → {percent_or_dash(accuracy[epochs[-1]])}" if epochs else "-",
                percent_or_dash(max(measured)) if measured else "-",
            ]
        )
    unfreezes = []
    for first, second in zip(metrics["plan"], metrics["plan"][1:], strict=False):
        before, after = accuracy.get(first["end"] - 1), accuracy.get(second["start"])
        if before is not None and after is not None:
            change = {"before": percent(before), "after": percent(after), "points": points(after - before)}
            unfreezes.append({"phase": second["name"], **change})
    head = ["phase", "epochs", "trains", "peak LR, head", "peak LR, backbone", "epochs done"]
    head += ["train loss, first → last", "val acc %, first → last", "best"]
    return {"table": Table("Phases, planned and done", head, rows, words=(0, 1, 2)), "unfreezes": unfreezes}


def curves(run: Run, folder: FigureFolder) -> dict[str, Any]:
    """Return accuracy, loss, calibration error and learning rates over the epochs, as figures and as a table."""
    metrics = run.metrics
    epochs = metrics["epoch"]
    phases = [(phase["name"], phase["epochs"][0]) for phase in metrics["phases"]]
    drawn = []
    for name, title, series, options in CURVES:
        values = {label: metrics[key] for label, key in series.items()}
        ends = "; ".join(f"{label} from {_number(v[0], 'g')} to {_number(v[-1], 'g')}" for label, v in values.items())
        figure = partial(figures.curves, title, epochs, values, phases, metrics.get("best/epoch"), **options)
        drawn.append(folder.draw(name, figure, alt_text=f"{title} over the epochs: {ends}."))
    keys = {"train loss": "train/loss", "train acc": "train/acc", "val loss": "val/loss", "val acc": "val/acc"}
    keys["val ECE"] = "val/ece"
    columns = zip(epochs, metrics["phase"], *(metrics[key] for key in keys.values()), strict=True)
    rows = [[str(epoch), phase, *map(_number, values)] for epoch, phase, *values in columns]
    return {"figures": drawn, "table": Table("Epochs", ["epoch", "phase", *keys], rows, words=(0, 1))}


def time(run: Run) -> dict[str, Any]:
    """Return wall-clock time per phase and per epoch, and the speed of training."""
    metrics = run.metrics
    seconds = dict(zip(metrics["epoch"], metrics["seconds"], strict=True))
    rows = []
    for phase in metrics["phases"]:
        each = [seconds[epoch] for epoch in phase["epochs"]]
        rows.append([phase["name"], *_times(each), f"{phase['images_per_s']:,.0f}"])
    rows.append(["all", *_times(metrics["seconds"]), ""])
    head = ["phase", "epochs", "time", "per epoch, with validation", "training images/s"]
    where = dict.fromkeys(f"{s['device']}, {s['precision']}, threads: {s['threads']}" for s in run.training_starts)
    return {"table": Table("Time per phase", head, rows, note="; then ".join(where))}


def repeat(run: Run) -> dict[str, Any]:
    """Return the command and everything else that is needed to repeat the run."""
    metrics = run.metrics
    rows: list[tuple[str, Any]] = []
    resumed = len(run.starts) > 1
    if not resumed and "git_commit" in metrics:
        rows.append(("commit", _commit(metrics)))
    facts = {key: name for key, name in FACTS.items() if key in metrics and not (resumed and key in START_KEYS)}
    rows += [(name, "none" if metrics[key] is None else metrics[key]) for key, name in facts.items()]
    for number, start in enumerate(run.starts if resumed else ()):
        text = f"{start['started']}, commit {_commit(start)}, {start['device']}, {start['precision']}"
        if number:
            changes = ", ".join(f"{key}={value}" for key, value in (start["changed"] or {}).items())
            text += f"; changed: {changes or 'nothing'}"
        again = f"resumed at epoch {start['epoch']}" if start in run.training_starts else "resumed to be tested"
        rows.append((again if number else "started", text))
    images = dict(metrics.get("images", {}))
    if images and run.test_confusion is not None:
        images["test"] = int(run.test_confusion.sum())
    for name, values in (
        ("images", {key: f"{count:,}" for key, count in images.items()}),
        ("versions", metrics.get("versions", {})),
        ("normalization", metrics.get("normalization", {})),
    ):
        if values:
            rows.append((name, ", ".join(f"{key} {value}" for key, value in values.items())))
    if run.sweep:
        rows.append(("job of", f"sweep={run.sweep}; what its file sets besides the keys above is not in the command"))
    files = [name for name in RUN_FILES if (run.folder / name).is_file()]
    return {"command": run.command, "facts": rows, "files": files}


def _commit(facts: Mapping[str, Any]) -> str:
    dirty = " with uncommitted changes" if facts.get("git_dirty") else ""
    return f"{facts['git_commit'] or 'not run from a checkout'}{dirty}"


def _times(seconds: Sequence[float]) -> list[str]:
    """Return the number of epochs, their whole time and their mean time."""
    return [str(len(seconds)), duration_text(sum(seconds)), duration_text(sum(seconds) / len(seconds))]


def _number(value: float | None, kind: str = "f") -> str:
    """Return a number with 4 decimals, or 4 digits for kind `g`; null as a dash."""
    return "-" if value is None else f"{value:.4{kind}}"
