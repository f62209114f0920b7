"""The page that compares several runs: sweep_report.html, with the same tables as CSV and Markdown."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

from cifar_tl.files import write_text
from cifar_tl.reports import figures
from cifar_tl.reports.ablation import ablation
from cifar_tl.reports.comparison import (
    Group,
    common_overrides,
    effects,
    group_runs,
    paired_difference,
    pairs_of_runs,
    reference,
    seed_of,
)
from cifar_tl.reports.page import DrawnFigure, FigureFolder, Section, write_page
from cifar_tl.reports.run_page import REPORT, leaks
from cifar_tl.reports.search_history import search_section
from cifar_tl.runs.folder import Run, read_runs
from cifar_tl.runs.formatting import duration_text, percent, percent_range, points
from cifar_tl.runs.table import Table, write_csv

NAME = "sweep_report"
ENDED = ("finished", "pruned")
"""What a run is when nothing more will come of it."""
RUNS_AND_MEANS = "Thin lines are runs, thick ones means; vertical ones: a phase starts."


def write_sweep_report(folders: Sequence[Path], output: Path, sweep: Path | None = None) -> list[Path]:
    """Compare runs.

    Args:
        folders: Of the runs.
        output: Gets sweep_report.html, .csv, .md and the folder sweep_figures.
        sweep: The folder that holds these runs and no others; if it is a hyperparameter search, this is shown, too.

    Returns:
        The three files' paths.

    Raises:
        OSError: One of them cannot be written.
    """
    runs = read_runs(folders)
    groups = group_runs(runs)
    drawing = FigureFolder(output / "sweep_figures")
    search = search_section(sweep, drawing) if sweep is not None else None
    # no value of a search is tried twice: its own section says which parameter mattered
    given = (ablation(groups), _settings(groups), _paired(groups), None if search else _effects(groups))
    tables = [table for table in given if table is not None and table.rows]
    done = sum(run.finished for run in runs)
    shared = " ".join(common_overrides(groups)) or "nothing"
    summary = f"{done} of {len(runs)} runs finished, {len(groups)} settings. All of them were given: {shared}"
    title = f"Comparison of {len(runs)} runs, {output.resolve().name}"
    # a trial's values are too long for a legend
    shown = [replace(group, label=f"trial {group.runs[0].folder.name}") for group in groups] if search else groups
    drawn = Section("Figures", "drawn", {"figures": _figures(shown, drawing)})
    sections = [Section(table.title, "results", {"table": table}) for table in tables]
    sections[1:1] = [drawn]  # below the first table
    sections[0:0] = [search] if search else []
    sections.append(Section("Runs", "runs", {"runs": _runs(groups, output)}))
    lines = [f"{run.folder}: {line}" for run in runs for line in (*run.metrics.get("warnings", []), *run.problems)]
    unfinished = [run for run in runs if run.status not in ENDED]
    lines += [f"{run.folder} has not finished ({run.status}); the tables are without it." for run in unfinished]
    lines += [*_warnings(groups), *drawing.problems]

    html, csv, markdown = (output / f"{NAME}.{ending}" for ending in ("html", "csv", "md"))
    page = {"title": title, "summary": summary, "sections": sections, "lines": lines, "best": _best(groups)}
    write_page(html, "comparison.html.j2", **page)
    write_csv(csv, _csv(groups))
    parts = [f"# {title}", summary, *(f"> {line}" for line in lines), *(table.markdown() for table in tables)]
    write_text(markdown, "\n\n".join(parts) + "\n")
    return [html, csv, markdown]


def _settings(groups: Sequence[Group]) -> Table:
    """Return every group's mean and range over its seeds."""
    rows = []
    for group in sorted(groups, key=lambda g: -fmean(g.values("best/val/acc") or [-1])):
        test, val = group.values("test/acc"), group.values("best/val/acc")
        if test and val:
            seconds = [sum(run.metrics["seconds"]) for run in group.runs if run.finished and "seconds" in run.metrics]
            rows.append(
                [
                    group.label,
                    str(len(test)),
                    percent(fmean(test)),
                    _deviation(test),
                    _range(test),
                    percent(fmean(val)),
                    _deviation(val),
                    _range(val),
                    *(_mean(group.values(metric)) for metric in ("test/loss", "test/ece")),
                    duration_text(fmean(seconds)) if seconds else "-",
                ]
            )
    return Table(
        "Settings",
        [
            *("setting", "n", "test acc, mean", "SD", "range", "val acc, mean", "SD", "range"),
            *("test loss", "test ECE", "time"),
        ],
        rows,
        "n runs differ in their seed alone; SD is the standard deviation over them (n - 1). "
        "Best validation accuracy first: choose by it, then read the test column.",
    )


def _deviation(values: Sequence[float]) -> str:
    """Return the standard deviation of shares, in points; `-` for a single one."""
    return f"{100 * stdev(values):.2f}" if len(values) > 1 else "-"


def _range(values: Sequence[float]) -> str:
    """Return the lowest and the highest of some shares; `-` for a single one."""
    return percent_range(min(values), max(values)) if len(values) > 1 else "-"


def _paired(groups: Sequence[Group]) -> Table:
    """Return every other group's distance to the one that validation chooses."""
    best = reference(groups)
    rows = []
    for group in groups if best is not None else ():
        if group is best or best is None or (difference := paired_difference(group, best)) is None:
            continue
        sure = difference.low > 0 or difference.high < 0
        rows.append(
            [
                group.label,
                f"{points(difference.mean)}",
                f"{points(difference.low)} to {points(difference.high)}",
                "no" if sure else "yes",
                f"{points(min(difference.per_seed))} to {points(max(difference.per_seed))}",
                f"{difference.only_a:.0f} / {difference.only_b:.0f}",
                ", ".join(map(str, difference.seeds)),
            ]
        )
    label = best.label if best is not None else ""
    return Table(
        "Compared with the best",
        ["setting", "test acc, points", "95% interval", "holds 0", "per seed", "right alone / wrong alone", "seeds"],
        rows,
        f"Paired over the same test images and seeds, against {label}, the best on validation. "
        "The interval is for another draw of test images with these trained models; how much seeds matter is the span "
        "of differences per seed. 'Right alone': images that only this setting gets right, averaged over the seeds.",
    )


def _effects(groups: Sequence[Group]) -> Table:
    """Return what each value of an override does to the test accuracy."""
    rows = [
        [f"{effect.key}={value}", str(count), percent(mean), _range([low, high][:count]), f"{100 * effect.spread:.2f}"]
        for effect in effects(groups, "test/acc")
        for value, (mean, count, low, high) in effect.values.items()
    ]
    return Table(
        "Which override mattered",
        ["override", "n", "test acc, mean", "range", "points between best and worst value"],
        rows,
        "Means over those settings of everything else that have a result with every value of the override; the "
        "override with the largest effect first. Those for which there is no such setting are left out.",
    )


def _warnings(groups: Sequence[Group]) -> list[str]:
    """Return what makes a comparison unfair, and which settings are not paired with the best, and why."""
    warnings = []
    runs = [run for group in groups for run in group.runs if run.metrics]
    for key, what in (
        ("split_sha256", "train/validation splits"),
        ("weights_sha256", "ImageNet weights"),
    ):
        if len({str(run.metrics.get(key)) for run in runs}) > 1:
            warnings.append(f"The runs are of different {what}.")
    if len({run.metrics["test_sha256"] for run in runs if "test_sha256" in run.metrics}) > 1:  # older ones have none
        warnings.append("The runs are of different test sets.")
    if len({str(start.get("git_commit")) for run in runs for start in run.starts}) > 1:
        warnings.append("The runs are of different commits.")
    if dirty := sum(any(start.get("git_dirty") for start in run.starts) for run in runs):
        warnings.append(f"{dirty} of {len(runs)} runs are of a checkout with changes, which commits do not name.")
    for key, what in (("device", "devices"), ("precision", "precisions")):
        if len({str(start.get(key)) for run in runs for start in run.training_starts}) > 1:
            warnings.append(f"The runs are of different {what}.")
    files: dict[str, set[str]] = {}
    for run in runs:
        for start in run.training_starts:
            if sha256 := start.get("model_sha256"):
                files.setdefault(str(run.config.get("model._target_")), set()).add(sha256)
    for name in (name for name, hashes in files.items() if len(hashes) > 1):
        warnings.append(f"The file of {name} is not the same in all runs and resumes.")
    leaking: dict[str, list[str]] = {}
    for run in runs:
        for sentence in leaks(run):
            leaking.setdefault(sentence, []).append(str(run.folder))
    for sentence, names in leaking.items():
        warnings.append(f"{'All runs' if len(names) == len(runs) else ', '.join(names)}: {sentence}")
    if len({tuple(run.classes) for run in runs if run.classes}) > 1:
        warnings.append("The runs are of different classes.")
    for group in groups:
        seeds = [seed_of(run) for run in group.runs if run.metrics]
        if len(set(seeds)) < len(seeds):
            warnings.append(f"'{group.label}' has a seed twice: its range says less than n suggests.")
    for run in runs:
        for start in run.starts:
            if changed := start.get("changed"):
                values = " ".join(f"{key}={value}" for key, value in changed.items())
                since = f"from its epoch {start['epoch']} on" if start in run.training_starts else "in its test"
                warnings.append(f"{run.folder.name} had {values} {since} alone.")
    best = reference(groups)
    unpaired: dict[str, list[str]] = {}
    for group in groups:
        if best is not None and group is not best and group.values("test/acc"):
            pairs, reason = pairs_of_runs(group, best)
            if not pairs:
                unpaired.setdefault(reason, []).append(f"'{group.label}'")
    warnings += [f"{', '.join(these)}: not paired with the best, {reason}." for reason, these in unpaired.items()]
    return warnings


def _best(groups: Sequence[Group]) -> dict[str, str] | None:
    """Return the setting that validation chooses and what it has on the test set."""
    best = reference(groups)
    test = best.values("test/acc") if best is not None else []
    if best is None or not test:
        return None
    seeds = f"{percent_range(min(test), max(test))}% over {len(test)} seeds" if len(test) > 1 else "one run"
    return {"accuracy": percent(fmean(test)), "label": best.label, "seeds": seeds}


def _figures(groups: Sequence[Group], folder: FigureFolder) -> list[DrawnFigure | None]:
    """Return results as points, and curves over each other."""
    tested = {group.label: group.values("test/acc") for group in groups if group.values("test/acc")}
    drawn = []
    if tested:
        title = "Test accuracy per setting"
        means = "; ".join(f"{label}: mean {percent(fmean(values))}" for label, values in tested.items())
        figure = partial(figures.points, title, tested)
        drawn.append(folder.draw("test_accuracy", figure, f"{title}. {means}.", "Points are runs, ticks means."))
    starts = sorted({p["epochs"][0] for g in groups for run in g.runs for p in run.metrics.get("phases", [])} - {0})
    for key, quantity in (("val/acc", "Validation accuracy"), ("train/acc", "Training accuracy")):
        drawable = {group.label: [run for run in group.runs if run.metrics.get(key)] for group in groups}
        # a run that was cut short would cut its group's mean short
        over = {label: [run for run in runs if run.status in ENDED] or runs for label, runs in drawable.items()}
        curves = {name: [(r.metrics["epoch"], r.metrics[key]) for r in runs] for name, runs in over.items() if runs}
        if curves:
            figure = partial(figures.runs_over_each_other, f"{quantity} per setting", curves, starts)
            alt_text = f"{quantity} over the epochs, per setting."
            drawn.append(folder.draw(key.replace("/", "_"), figure, alt_text, RUNS_AND_MEANS))
    return drawn


def _runs(groups: Sequence[Group], output: Path) -> list[dict[str, Any]]:
    """Return the runs with links to their pages and their results."""
    rows = []
    for group in groups:
        for run in group.runs:
            where = Path(os.path.relpath(run.folder, output))
            page = quote(os.fsencode(where / REPORT)) if (run.folder / REPORT).is_file() else ""
            seed = "" if seed_of(run) is None else seed_of(run)
            row = {"page": page, "name": str(where), "setting": group.label, "seed": seed, "status": run.status}
            rows.append({**row, "results": _result(run)})
    return rows


def _result(run: Run) -> list[str]:
    metrics = run.metrics
    accuracies = [percent(metrics[k]) if k in metrics else "-" for k in ("test/acc", "best/val/acc")]
    return [*accuracies, str(metrics.get("best/epoch", "-"))]


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" if values else "-"


def _csv(groups: Sequence[Group]) -> list[list[str | int | float]]:
    """Return one line per setting, unrounded, with a column per override."""
    keys = list(dict.fromkeys(key for group in groups for key in group.overrides))
    metrics = ("test/acc", "best/val/acc", "test/loss", "test/ece")
    lines: list[list[str | int | float]] = [
        ["setting", *keys, "n", *(f"{metric} {what}" for metric in metrics for what in ("mean", "std", "min", "max"))]
    ]
    for group in groups:
        numbers: list[str | int | float] = []
        for metric in metrics:
            values = group.values(metric)
            deviation = stdev(values) if len(values) > 1 else ""
            numbers += [fmean(values), deviation, min(values), max(values)] if values else [""] * 4
        overrides = [group.overrides.get(key, "") for key in keys]
        lines.append([group.label, *overrides, len(group.values("test/acc")), *numbers])
    return lines
