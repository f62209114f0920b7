"""The page of one run: RUN/report.html, and its figures in RUN/figures."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from cifar_tl.reports import figures, html, svg
from cifar_tl.reports.html import Markup
from cifar_tl.reports.run_images import confused, image_sections
from cifar_tl.reports.run_unfreeze import unfreeze
from cifar_tl.runs.folder import Run, read_run
from cifar_tl.runs.formatting import duration_text, percent, points
from cifar_tl.runs.metrics import (
    Ints,
    class_scores,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    softmax,
    wilson_interval,
)
from cifar_tl.runs.predictions import Predictions
from cifar_tl.schedule import Phase, epochs_text, stages_text

REPORT, FIGURES = "report.html", "figures"


def write_run_report(folder: Path) -> Path:
    """Draw what a run left; an unfinished or damaged run gets what can be drawn, and the page says what cannot.

    Returns:
        The page's path.
    """
    run = read_run(folder)
    sections: list[tuple[str, str]] = []
    missing: list[str] = []

    def attempt(heading: str, draw: Callable[[], str]) -> None:
        """Add a section if there is something in it; a damaged file must not cost the rest of the page."""
        try:
            if content := draw():
                sections.append((heading, content))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            reason = f"metrics.json has no {error}" if isinstance(error, KeyError) else f"metrics.json is odd: {error}"
            missing.append(f"'{heading}' could not be drawn: {reason}.")

    out = folder / FIGURES
    if run.metrics:
        attempt("FinetuneSchedule, and what happened", lambda: _plan(run))
        attempt("Curves", lambda: _curves(run, out))
    if run.test_confusion is not None:
        matrix = run.test_confusion
        attempt("Classes", lambda: _classes(matrix, run.classes, out))
    if run.predictions is not None:
        predictions = run.predictions
        attempt("What the unfreeze changed", lambda: unfreeze(predictions, run.metrics, out))
        attempt("Most confused pairs", lambda: confused(predictions, run.images))
        attempt("Calibration", lambda: _calibration(predictions, out))
        for heading, draw in image_sections(predictions, run.images, out):
            attempt(heading, draw)
    if run.metrics:
        attempt("Time", lambda: _time(run))
    attempt("Repeat it", lambda: _repeat(run))
    page = html.page(
        _title(run), sections, _head(run, missing), "Drawn by python -m cifar_tl.reports from files alone."
    )
    path = folder / REPORT
    path.write_text(page)
    return path


def _title(run: Run) -> str:
    folder = run.folder.resolve()
    started = str(run.metrics.get("started", folder.name))
    return f"{run.metrics.get('experiment', folder.parent.name)}, {started[:10]} {started[11:16]}"


def _head(run: Run, missing: list[str]) -> str:
    """Return title, what is wrong, and the run's result."""
    metrics, lines = run.metrics, [*run.problems, *missing]
    if not run.finished:
        done, planned = len(metrics.get("epoch", [])), _planned_epochs(metrics)
        epochs = f"{done} of {planned} epochs are recorded" if planned else f"{done} epochs are recorded"
        lines.insert(
            0, f"This run has not finished (its record says: {run.status}). {epochs}; there is no test result."
        )
    parts = [f"<h1>{escape(_title(run))}</h1>"]
    if run.overrides:
        parts.append(f'<p class="soft"><code>{escape(" ".join(run.overrides))}</code></p>')
    parts.append(html.notes(lines))
    tiles = []
    if run.test_confusion is not None:
        images = int(run.test_confusion.sum())
        accuracy = int(run.test_confusion.trace()) / images
        low, high = wilson_interval(accuracy, images)
        parts.append(
            f'<div class="headline"><strong>{percent(accuracy)}</strong><span>test accuracy on '
            f"{images:,} images<br>95 % interval {100 * low:.2f} to {percent(high)}</span></div>"
        )
    if run.predictions is not None:
        test = run.predictions.test
        ece = reliability(softmax(test.logits), test.targets).ece
        tiles += [
            (f"{negative_log_likelihood(test.logits, test.targets):.4f}", "test loss (cross-entropy)"),
            (f"{ece:.4f}", "test ECE, 15 bins"),
        ]
    if "best/val/acc" in metrics and "best/epoch" in metrics:
        tiles.insert(0, (percent(metrics["best/val/acc"]), f"validation accuracy, best epoch {metrics['best/epoch']}"))
    for phase in metrics.get("phases", []) if isinstance(metrics.get("phases"), list) else []:
        if isinstance(phase, dict) and {"name", "seconds", "images_per_s"} <= phase.keys():
            tiles.append(
                (duration_text(phase["seconds"]), f"{phase['name']}, {phase['images_per_s']:,.0f} images/s trained")
            )
    return "".join(parts) + (html.tiles(tiles) if tiles else "")


def _planned_epochs(metrics: dict[str, Any]) -> int:
    plan = metrics.get("plan")
    return max((int(phase.get("end", 0)) for phase in plan), default=0) if isinstance(plan, list) else 0


def _plan(run: Run) -> str:
    """Return what was to happen per phase beside what did."""
    metrics = run.metrics
    done = {phase["name"]: phase for phase in metrics["phases"]}
    by_epoch = dict(zip(metrics["epoch"], zip(metrics["train/loss"], metrics["val/acc"], strict=True), strict=True))
    rows = []
    for planned in metrics["plan"]:
        phase = Phase(planned["name"], planned["start"], planned["end"], tuple(planned["stages"]))
        rates = planned["peak_lr"]
        happened = [by_epoch[epoch] for epoch in done.get(phase.name, {"epochs": []})["epochs"]]
        rows.append(
            [
                phase.name,
                epochs_text(phase),
                stages_text(phase.stages),
                f"{rates['head']:g}",
                f"{rates['backbone']:g}" if phase.stages else "frozen",
                f"{len(happened)} of {phase.end - phase.start}",
                f"{happened[0][0]:.4f} → {happened[-1][0]:.4f}" if happened else "-",
                f"{100 * happened[0][1]:.2f} → {100 * happened[-1][1]:.2f}" if happened else "-",
                f"{100 * max(acc for _, acc in happened):.2f}" if happened else "-",
            ]
        )
    head = ["phase", "epochs", "trains", "peak rate head", "backbone", "epochs done", "train loss, first → last"]
    head += ["val acc %, first → last", "best"]
    unfreezes = []
    for before, after in zip(metrics["plan"], metrics["plan"][1:], strict=False):
        last, first = by_epoch.get(before["end"] - 1), by_epoch.get(after["start"])
        if last and first:
            unfreezes.append(
                f"One epoch into '{escape(after['name'])}', validation accuracy went from {100 * last[1]:.2f} to "
                f"{percent(first[1])} ({points(first[1] - last[1])} points)."
            )
    return html.table(head, rows, "Phases, planned and done", words=(0, 1, 2)) + "".join(
        f"<p>{t}</p>" for t in unfreezes
    )


def _curves(run: Run, out: Path) -> str:
    """Return accuracy, loss and learning rates over the epochs."""
    metrics = run.metrics
    epochs = metrics["epoch"]
    if not epochs:
        raise KeyError("epoch")
    phases = [(phase["name"], phase["epochs"][0]) for phase in metrics["phases"]]
    best = metrics["best/epoch"]
    drawn = []
    for name, title, series, percentages, log_scale in (
        ("accuracy", "Accuracy", {"training (augmented)": "train/acc", "validation": "val/acc"}, True, False),
        ("loss", "Loss", {"training (augmented)": "train/loss", "validation": "val/loss"}, False, False),
        ("calibration_error", "Expected calibration error, validation", {"ECE": "val/ece"}, False, False),
        (
            "learning_rates",
            "Learning rate, last step of the epoch",
            {"head": "lr/head", "backbone": "lr/backbone"},
            False,
            True,
        ),
    ):
        values = {label: metrics[key] for label, key in series.items()}
        figure = figures.curves(title, epochs, values, phases, best, percentages, log_scale)
        said = "; ".join(f"{label} from {v[0]:.4g} to {v[-1]:.4g}" for label, v in values.items())
        drawn.append(html.figure(svg.save(figure, out, name, f"{title} over the epochs: {said}.")))
    rows = [
        [e, p, *(f"{metrics[key][i]:.4f}" for key in ("train/loss", "train/acc", "val/loss", "val/acc", "val/ece"))]
        for i, (e, p) in enumerate(zip(epochs, metrics["phase"], strict=True))
    ]
    figures_as_table = html.table(
        ["epoch", "phase", "train loss", "train acc", "val loss", "val acc", "val ECE"], rows, "Epochs", words=(0, 1)
    )
    return html.figures(*drawn) + f"<details><summary>The figures as a table</summary>{figures_as_table}</details>"


def _classes(matrix: Ints, names: list[str], out: Path) -> str:
    """Return the confusion matrix and every class' scores on the test set, with intervals."""
    classes = class_scores(matrix)
    rows = []
    for name, c in zip(names, classes, strict=True):
        cells: list[object] = [name, f"{c.examples:,}"]
        for share, count in ((c.recall, c.examples), (c.precision, c.predicted)):
            low, high = wilson_interval(share, count)
            cells += [f"{100 * share:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        rows.append([*cells, f"{100 * c.f1:.1f}"])
    mean = [sum(getattr(c, key) for c in classes) / len(classes) for key in ("recall", "precision", "f1")]
    rows.append(
        [
            "mean",
            f"{matrix.sum():,}",
            f"{100 * mean[0]:.1f}",
            "",
            f"{100 * mean[1]:.1f}",
            "",
            f"{100 * mean[2]:.1f}",
        ]
    )
    order = sorted(range(len(names)), key=lambda i: -classes[i].recall)
    shown = [(classes[i].recall, *wilson_interval(classes[i].recall, classes[i].examples)) for i in order]
    best, worst = names[order[0]], names[order[-1]]
    drawn = [
        html.figure(
            svg.save(
                figures.confusion("Confusion, test set", matrix, names),
                out,
                "confusion",
                f"Confusion matrix: {matrix.trace():,} of {matrix.sum():,} images are on the diagonal.",
            ),
            "Images by true class (row) and prediction (column). Blue: right. Red: wrong, on a scale of its own.",
        ),
        html.figure(
            svg.save(
                figures.intervals("Recall per class with 95 % interval", [names[i] for i in order], shown),
                out,
                "per_class",
                f"Recall per class, from {best} ({percent(classes[order[0]].recall, 1)}) down to {worst} "
                f"({percent(classes[order[-1]].recall, 1)}).",
            ),
            "Share of each class that is found.",
        ),
    ]
    head = ["class", "images", "recall %", "95 % interval", "precision %", "95 % interval", "F1 %"]
    return html.figures(*drawn) + html.table(head, rows, "Scores per class")


def _calibration(predictions: Predictions, out: Path) -> str:
    """Return how honest the confidences are, before and after temperature scaling."""
    val, test = predictions.val, predictions.test
    before = reliability(softmax(test.logits), test.targets)
    temperature = fit_temperature(val.logits, val.targets)
    after = reliability(softmax(test.logits, temperature), test.targets)
    drawn = figures.reliability(
        "Reliability, test set", {"as trained": before, f"temperature {temperature:.3f}": after}
    )
    rows: list[list[str]] = []
    for name, split in (("validation", val), ("test", test)):
        columns = []
        for t in (1.0, temperature):
            probabilities = softmax(split.logits, t)
            columns.append(
                [
                    f"{negative_log_likelihood(split.logits, split.targets, t):.4f}",
                    f"{reliability(probabilities, split.targets).ece:.4f}",
                    percent(probabilities.max(axis=1).mean()),
                    percent(split.accuracy),
                ]
            )
        names = ("negative log-likelihood", "ECE", "mean confidence", "accuracy")
        rows += [[f"{name}: {what}", *both] for what, *both in zip(names, *columns, strict=True)]
    head = ["", "as trained", f"temperature {temperature:.3f}"]
    tone = "more" if temperature > 1 else "less"
    return html.figures(
        html.figure(
            svg.save(
                drawn,
                out,
                "reliability",
                f"Reliability diagram: ECE {before.ece:.4f} as trained, {after.ece:.4f} after temperature scaling.",
            ),
            "On the dashed line, predictions of a confidence are right as often as it says.",
        ),
        "<div><p>One number, the temperature, divides all logits; it is fitted on the validation images alone and "
        f"changes no prediction. It is {temperature:.3f} here: the network is {tone} sure than it should be.</p>"
        + html.table(head, rows, "Calibration before and after")
        + "</div>",
    )


def _time(run: Run) -> str:
    """Return where the time went."""
    metrics = run.metrics
    rows = []
    for phase in metrics["phases"]:
        seconds = [s for e, s in zip(metrics["epoch"], metrics["seconds"], strict=True) if e in phase["epochs"]]
        rows.append(
            [
                phase["name"],
                len(seconds),
                duration_text(phase["seconds"]),
                duration_text(sum(seconds) / len(seconds)),
                f"{phase['images_per_s']:,.0f}",
            ]
        )
    total = sum(metrics["seconds"])
    rows.append(["all", len(metrics["epoch"]), duration_text(total), duration_text(total / len(metrics["epoch"])), ""])
    head = ["phase", "epochs", "time", "per epoch, with validation", "training images/s"]
    device = f"{metrics['device']}, {metrics['precision']}, threads: {metrics['threads']}"
    return html.table(head, rows, "Time per phase") + f'<p class="soft">{escape(device)}</p>'


def _repeat(run: Run) -> str:
    """Return everything needed to repeat the run."""
    metrics, rows = run.metrics, []
    dirty = " with uncommitted changes" if metrics.get("git_dirty") else ""
    for name, key in (
        ("started", "started"),
        ("seed", "seed"),
        ("weights", "weights"),
        ("SHA-256 of the weights", "weights_sha256"),
        ("SHA-256 of the config", "config_sha256"),
        ("SHA-256 of the split", "split_sha256"),
        ("device", "device"),
        ("precision", "precision"),
        ("threads", "threads"),
    ):
        if key in metrics:
            rows.append((name, metrics[key] if metrics[key] is not None else "none"))
    if "git_commit" in metrics:
        rows.insert(0, ("commit", f"{metrics['git_commit'] or 'not run from a checkout'}{dirty}"))
    if isinstance(metrics.get("images"), dict):
        counts = dict(metrics["images"])
        if run.predictions is not None:
            counts["test"] = len(run.predictions.test.targets)
        rows.append(("images", ", ".join(f"{name} {count:,}" for name, count in counts.items())))
    if isinstance(metrics.get("versions"), dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())))
    if isinstance(metrics.get("normalization"), dict):
        rows.append(("normalization", ", ".join(f"{k} {v}" for k, v in metrics["normalization"].items())))
    command = f"<pre><code>{escape(run.command)}</code></pre>" if run.command else ""
    files = [
        name
        for name in ("metrics.json", "predictions.npz", "train.log", ".hydra/config.yaml", "checkpoints/best.ckpt")
        if (run.folder / name).is_file()
    ]
    links = Markup(", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in files))
    return command + html.facts([*rows, ("files of this run", links)], "What it takes to repeat the run")
