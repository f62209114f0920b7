"""The page that compares several runs: sweep_report.html, with the same tables as CSV and Markdown."""

import csv
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from cifar_tl.reports import figures, html, svg
from cifar_tl.reports.ablation import ablation
from cifar_tl.reports.comparison import (
    Group,
    common_overrides,
    effects,
    group_runs,
    paired_difference,
    reference,
    seed_of,
)
from cifar_tl.reports.html import Markup
from cifar_tl.reports.run_page import REPORT
from cifar_tl.runs.folder import Run, read_runs
from cifar_tl.runs.formatting import duration_text, percent, points
from cifar_tl.runs.table import Table

NAME = "sweep_report"
RUNS_AND_MEANS = "Thin lines are runs, thick ones means; dashed: a phase starts."


def write_sweep_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Compare runs.

    Args:
        folders: Of the runs.
        output: Gets sweep_report.html, .csv, .md and the folder sweep_figures.

    Returns:
        The three files' paths.
    """
    runs = read_runs(folders)
    groups = group_runs(runs)
    output.mkdir(parents=True, exist_ok=True)
    given = (ablation(groups), _settings(groups), _paired(groups), _effects(groups))
    tables = [table for table in given if table is not None and table.rows]
    shared = " ".join(common_overrides(groups)) or "nothing"
    done = sum(run.finished for run in runs)
    head = f"{done} of {len(runs)} runs finished, {len(groups)} settings. All of them were given: {shared}"
    title = f"Comparison of {len(runs)} runs, {output.resolve().name}"

    paths = [output / f"{NAME}.{ending}" for ending in ("html", "csv", "md")]
    sections = [("Figures", _figures(groups, output / "sweep_figures"))]
    for number, table in enumerate(tables):
        drawn = html.table(table.head, table.rows, table.title) + f'<p class="soft">{escape(table.note)}</p>'
        sections.insert(number if number == 0 else len(sections), (table.title, drawn))
    sections.append(("Runs", _runs(groups, output)))
    lines = [f"{run.folder}: {problem}" for run in runs for problem in run.problems]
    lines += [f"{run.folder} has not finished ({run.status}); it is left out." for run in runs if not run.finished]
    lines += _warnings(groups)
    top = f"<h1>{escape(title)}</h1><p>{escape(head)}</p>{_headline(groups)}{html.notes(lines)}"
    foot = "Drawn by python -m cifar_tl.reports from files alone."
    paths[0].write_text(html.page(title, sections, top, foot))
    with paths[1].open("w", newline="") as file:
        csv.writer(file).writerows(_csv(groups))
    paths[2].write_text(_markdown(title, head, tables, lines))
    return paths


def _settings(groups: Sequence[Group]) -> Table:
    """Return every group's mean and range over its seeds."""
    rows = []
    for group in sorted(groups, key=lambda g: -fmean(g.values("best/val/acc") or [-1])):
        test, val = group.values("test/acc"), group.values("best/val/acc")
        if test and val:
            rows.append(
                [
                    group.label,
                    str(len(test)),
                    percent(fmean(test)),
                    f"{100 * min(test):.2f} to {100 * max(test):.2f}",
                    percent(fmean(val)),
                    f"{100 * min(val):.2f} to {100 * max(val):.2f}",
                    f"{fmean(group.values('test/loss')):.4f}",
                    f"{fmean(group.values('test/ece')):.4f}",
                    duration_text(fmean(sum(run.metrics["seconds"]) for run in group.runs if run.finished)),
                ]
            )
    return Table(
        "Settings",
        ["setting", "n", "test acc, mean", "range", "val acc, mean", "range", "test loss", "test ECE", "time"],
        rows,
        "n runs differ in their seed alone. Best validation accuracy first: choose by it, then read the test column.",
    )


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
        ["setting", "test acc, points", "95 % interval", "holds 0", "per seed", "right alone / wrong alone", "seeds"],
        rows,
        f"Paired over the same test images and seeds, against {label}, the best on validation. "
        "The interval is for another draw of test images with these trained models; how much seeds matter is the span "
        "of differences per seed. 'Right alone': images that only this setting gets right, averaged over the seeds.",
    )


def _effects(groups: Sequence[Group]) -> Table:
    """Return what each value of each override does to the test accuracy."""
    rows = []
    for effect in effects(groups, "test/acc"):
        for value, (mean, count, low, high) in effect.values.items():
            spread = f"{100 * effect.spread:.2f}"
            rows.append(
                [f"{effect.key}={value}", str(count), percent(mean), f"{100 * low:.2f} to {100 * high:.2f}", spread]
            )
    return Table(
        "Which override mattered",
        ["override", "n", "test acc, mean", "range", "points between best and worst value"],
        rows,
        "Means over everything else that was swept; the override with the largest effect first.",
    )


def _warnings(groups: Sequence[Group]) -> list[str]:
    """Return what makes a comparison unfair."""
    warnings = []
    for key, what in (
        ("split_sha256", "train/validation splits"),
        ("weights_sha256", "ImageNet weights"),
        ("git_commit", "commits"),
    ):
        if len({run.metrics.get(key) for group in groups for run in group.runs if run.metrics}) > 1:
            warnings.append(f"The runs are of different {what}.")
    for group in groups:
        seeds = [seed_of(run) for run in group.runs if run.metrics]
        if len(set(seeds)) < len(seeds):
            warnings.append(f"'{group.label}' has a seed twice: its range says less than n suggests.")
    return warnings


def _headline(groups: Sequence[Group]) -> str:
    """Return the setting that validation chooses and what it has on the test set."""
    best = reference(groups)
    if best is None:
        return "<p>No run has finished yet.</p>"
    test = best.values("test/acc")
    spread = f", {100 * min(test):.2f} to {percent(max(test))} over {len(test)} seeds" if len(test) > 1 else ", one run"
    return (
        f'<div class="headline"><strong>{percent(fmean(test))}</strong><span>mean test accuracy of '
        f"<code>{escape(best.label)}</code>,<br>which validation chooses{spread}</span></div>"
    )


def _figures(groups: Sequence[Group], out: Path) -> str:
    """Return results as points, and validation curves over each other."""
    tested = {group.label: group.values("test/acc") for group in groups if group.values("test/acc")}
    drawn = []
    if tested:
        said = "; ".join(f"{label}: mean {percent(fmean(values))}" for label, values in tested.items())
        figure = figures.points("Test accuracy per setting", tested)
        drawn.append(
            html.figure(
                svg.save(figure, out, "test_accuracy", f"Test accuracy per setting. {said}."),
                "Points are runs, ticks means.",
            )
        )
    for key, title in (("val/acc", "Validation accuracy"), ("train/acc", "Training accuracy")):
        curves = {
            group.label: [(run.metrics["epoch"], run.metrics[key]) for run in group.runs if run.metrics.get(key)]
            for group in groups
        }
        curves = {label: runs for label, runs in curves.items() if runs}
        starts = {p["epochs"][0] for g in groups for r in g.runs for p in r.metrics.get("phases", [])} - {0}
        if curves:
            figure = figures.runs_over_each_other(f"{title} per setting", curves, sorted(starts))
            name = key.replace("/", "_")
            drawn.append(
                html.figure(svg.save(figure, out, name, f"{title} over the epochs, per setting."), RUNS_AND_MEANS)
            )
    return html.figures(*drawn) if drawn else "<p>No run has finished an epoch.</p>"


def _runs(groups: Sequence[Group], output: Path) -> str:
    """Return a table of the runs with links to their pages."""
    rows = []
    for group in groups:
        for run in group.runs:
            where = Path(os.path.relpath(run.folder, output))
            name = escape(str(where))
            link = (
                Markup(f'<a href="{escape(str(where / REPORT))}">{name}</a>')
                if (run.folder / REPORT).is_file()
                else name
            )
            rows.append(
                [link, group.label, seed_of(run) if seed_of(run) is not None else "", run.status, *_result(run)]
            )
    return html.table(
        ["run", "setting", "seed", "state", "test acc", "val acc", "best epoch"], rows, "Runs", words=(0, 1, 3)
    )


def _result(run: Run) -> list[str]:
    metrics = run.metrics
    accuracies = [percent(metrics[k]) if k in metrics else "-" for k in ("test/acc", "best/val/acc")]
    return [*accuracies, str(metrics.get("best/epoch", "-"))]


def _csv(groups: Sequence[Group]) -> list[list[str | int | float]]:
    """Return one line per setting, unrounded, with a column per override."""
    keys = list(dict.fromkeys(key for group in groups for key in group.overrides))
    metrics = ("test/acc", "best/val/acc", "test/loss", "test/ece")
    lines: list[list[str | int | float]] = [
        ["setting", *keys, "n", *(f"{metric} {what}" for metric in metrics for what in ("mean", "min", "max"))]
    ]
    for group in groups:
        figures_of: list[str | int | float] = []
        for metric in metrics:
            values = group.values(metric)
            figures_of += [fmean(values), min(values), max(values)] if values else ["", "", ""]
        overrides = [group.overrides.get(key, "") for key in keys]
        lines.append([group.label, *overrides, len(group.values("test/acc")), *figures_of])
    return lines


def _markdown(title: str, head: str, tables: Sequence[Table], lines: Sequence[str]) -> str:
    """Return the tables as Markdown."""
    parts = [f"# {title}", head, *(f"> {line}" for line in lines), *(table.markdown() for table in tables)]
    return "\n\n".join(parts) + "\n"
