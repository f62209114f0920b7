"""The published tables, from the runs that cifar_tl.reproduce made: tables.md, a CSV per table, and two figures."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, harmonic_mean

import numpy as np

from cifar_tl.files import write_text
from cifar_tl.reports import figures, svg
from cifar_tl.reports.ablation import KEY, ablation
from cifar_tl.reports.comparison import Group
from cifar_tl.reports.original import PUBLISHED
from cifar_tl.reproduce.jobs import Job, differing
from cifar_tl.reproduce.publish import PROVENANCE, distinct
from cifar_tl.runs.folder import Run, read_run
from cifar_tl.runs.formatting import percent, percent_range, points
from cifar_tl.runs.table import Table

CLIFF, FRONTIER = "cliff", "frontier"


def write_tables(jobs: Sequence[Job], folder: Path) -> list[Path]:
    """Write the tables of the runs that are finished.

    Args:
        jobs: All that the tables are for.
        folder: Gets tables.md, a CSV per table, and the figures CLIFF and FRONTIER as SVG and PNG.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = {job.name: _read(job) for job in jobs}
    written, texts = [folder / "tables.md"], ["# Tables"]
    for part in dict.fromkeys(part for job in jobs for part, *_ in job.uses):
        groups = {
            scale: [group for group in _groups(jobs, runs, part, scale) if group.runs]
            for scale in sorted({scale for job in jobs for its, scale, _ in job.uses if its == part})
        }
        tables = _tables(part, groups)
        for name, (table, its) in tables.items():
            with_provenance(table, its).write_csv(folder / f"{name}.csv")
            written.append(folder / f"{name}.csv")
            texts.append(table.markdown())
        if not tables:
            texts += [f"## {part.capitalize()}", "No table: too few of its runs are finished."]
        texts += _provenance(part, [job for job in jobs if part in {use[0] for use in job.uses}], runs)
        curves = {_label(group, scale, groups): _mean_curve(group) for scale in groups for group in groups[scale]}
        drawn = {label: curve for label, curve in curves.items() if curve is not None}
        if part == "results" and drawn:
            jumps = "; ".join(f"{label} {points(v[at] - v[at - 1], 1)} points" for label, (_, v, at) in drawn.items())
            figure = figures.cliff("Validation accuracy around the unfreeze", drawn)
            svg.save(figure, folder, CLIFF, f"Validation accuracy per epoch. One epoch after the unfreeze: {jumps}.")
            written += [folder / f"{CLIFF}.{ending}" for ending in ("svg", "png")]
            texts.append(f"![Validation accuracy around the unfreeze: {jumps}]({CLIFF}.png)")
        if part == "results" and (timed := timed_results(groups)):
            title = "Test accuracy against time"
            alt_text = f"{title}: {in_words(timed)}"
            figure = figures.frontier(title, "minutes of all epochs", timed, PUBLISHED)
            svg.save(figure, folder, FRONTIER, alt_text)
            written += [folder / f"{FRONTIER}.{ending}" for ending in ("svg", "png")]
            texts.append(f"![{alt_text}]({FRONTIER}.png)")
    write_text(written[0], "\n\n".join(texts) + "\n")
    return written


def _tables(part: str, groups: dict[str, list[Group]]) -> dict[str, tuple[Table, dict[str, list[Group]]]]:
    """Return the tables of a part, with the groups that each is of, by the name of their file; of what has runs."""
    if part == "ladder":
        table = ladder(groups)
        return {part: (table, groups)} if table.rows else {}
    make = {"results": results, "ablation": ablation, "scale": equal_images}[part]
    made = {scale: make(those) for scale, those in groups.items()}
    names = {scale: f"{part}-{scale}" if len(groups) > 1 else part for scale in groups}
    return {names[s]: (table, {s: groups[s]}) for s, table in made.items() if table is not None and table.rows}


def _label(group: Group, scale: str, groups: dict[str, list[Group]]) -> str:
    return group.label if len(groups) == 1 else f"{group.label} {scale}"


def results(groups: Sequence[Group]) -> Table:
    """Return what each recipe came to, with the cliff, if there is one."""
    beside = {"flip TTA": "test/flip/acc", "CIFAR-10.1 v6": "cifar10.1_v6/acc", "CIFAR-10.1 v4": "cifar10.1_v4/acc"}
    beside = {name: key for name, key in beside.items() if any(group.values(key) for group in groups)}
    rows = []
    for group in groups:
        around = [_around_unfreeze(run) for run in group.runs]
        levels = [_mean([pair[side] for pair in around if pair is not None]) for side in (0, 1)]
        test = group.values("test/acc")
        low, high = _range(group)
        measured = [group.values(key) for key in beside.values()]
        rows.append(
            [
                group.label,
                str(len(test)),
                *levels,
                _mean(group.values("best/val/acc")),
                _mean(test),
                f"{100 * low:.2f} to {100 * high:.2f}",
                *(_mean(values) if len(values) == len(test) else "-" for values in measured),
                f"{_minutes(group):.1f}",
            ]
        )
    head = ["config", "n", "frozen", "+1 epoch", "best val", "test acc", "range", *beside, "minutes"]
    note = (
        "In %. Frozen: validation accuracy in the last epoch before the unfreeze; +1 epoch: in the first after it. "
        "Means over n seeds; the range is over the seeds, with one seed it is the 95% interval for other test images. "
        "Minutes are those of the epochs, on average."
    )
    return Table("Results", head, rows, note)


def timed_results(groups: dict[str, list[Group]]) -> list[figures.Result]:
    """Return the test accuracy and the minutes of each recipe, by scale, on each device that it was run on.

    Of files of conf/experiment alone: what has another name is a variation of one, to show something else.
    """
    found = []
    for scale, group in ((scale, group) for scale, those in groups.items() for group in those):
        its_own = [run for run in group.runs if run.metrics.get("experiment") == group.label]
        tested = [run for run in its_own if "test/acc" in run.metrics]
        for device in dict.fromkeys(map(_device, tested)):
            its = Group(group.label, group.overrides, [run for run in tested if _device(run) == device])
            tuned = [run for run in its.runs if any(phase["stages"] for phase in run.metrics.get("plan", [])[-1:])]
            label = _label(group, scale, groups) + (f", {_images_per_s(tuned):,.0f} images/s" if tuned else "")
            accuracy = fmean(its.values("test/acc"))
            found.append(figures.Result(label, _minutes(its), accuracy, *_range(its), device))
    return found


def in_words(results: Sequence[figures.Result]) -> str:
    """Return what figures.frontier shows of minutes, as text."""
    said, fronts = [], []
    for device in dict.fromkeys(result.device for result in results):
        its = [result for result in results if result.device == device]
        said += [
            f"{r.label}: {percent(r.accuracy)} ({percent_range(r.low, r.high)}) in {r.cost:.1f} minutes on {device}"
            for r in its
        ]
        fronts.append(f"{', '.join(r.label.split(',')[0] for r in figures.pareto_front(its))} on {device}")
    lines = [f"{name.replace('*', ' (epoch chosen on the test set)')}: {100 * y:g}%" for name, y in PUBLISHED.items()]
    return f"{'; '.join(said)}. On the Pareto front: {'; '.join(fronts)}. To compare with: {'; '.join(lines)}."


def ladder(groups: dict[str, list[Group]]) -> Table:
    """Return the validation accuracies of recipes on several scales, and how far the scales agree on their order."""
    means = {
        scale: {group.label: fmean(group.values("best/val/acc")) for group in those} for scale, those in groups.items()
    }
    first, *others = means
    recipes = [label for label in means[first] if all(label in means[scale] for scale in others)]
    recipes.sort(key=lambda label: -means[first][label])
    rows = [[label, *(f"{100 * means[scale][label]:.2f}" for scale in means)] for label in recipes]
    agreement = [
        f"Spearman's rank correlation of {first} and {scale}: "
        f"{spearman([means[first][label] for label in recipes], [means[scale][label] for label in recipes]):.2f} "
        f"(n = {len(recipes)} recipes)."
        for scale in others
        if len(recipes) > 1
    ]
    note = " ".join(["Best validation accuracy in %, mean over the seeds, of recipes run on every scale.", *agreement])
    return Table("Ladder", ["recipe", *means], rows, note)


def equal_images(groups: Sequence[Group]) -> Table:
    """Return the accuracy of recipes that saw equally many images."""
    rows = [
        [
            group.label,
            str(len(group.runs)),
            distinct(f"{run.metrics['images']['train']:,} x {len(run.metrics['epoch'])}" for run in group.runs),
            _mean(group.values("best/val/acc")),
            _mean(group.values("test/acc")),
        ]
        for group in groups
    ]
    head = ["recipe", "n", "images x epochs", "val acc", "test acc"]
    return Table("Scale", head, rows, "Accuracies in %, means over n seeds.")


def with_provenance(table: Table, groups: dict[str, list[Group]]) -> Table:
    """Return a table with the columns that say which runs each row comes from.

    Args:
        table: Its rows start with a group's label.
        groups: By scale.
    """
    runs: dict[str, list[Run]] = {}
    for group in (group for those in groups.values() for group in those):
        runs.setdefault(group.label, []).extend(group.runs)
    what = {
        "device": _device,
        "date": _date,
        "commit": _commit,
        "weights": _weights,
        "filters": _filters,
        "precision": _precision,
    }
    rows = [[*row, *(distinct(what[name](run) for run in runs[row[0]]) for name in PROVENANCE)] for row in table.rows]
    return Table(table.title, [*table.head, *PROVENANCE], rows, table.note)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their ranks. NaN if all of `a` or `b` are."""
    ranks = [[np.less(x, v).sum() + (np.equal(x, v).sum() - 1) / 2 for v in x] for x in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _read(job: Job) -> Run:
    """Read a job's run, with the metrics that cifar_tl.evaluate added to its own, of the same test images."""
    run = read_run(job.folder)
    if job.evaluate and job.evaluation.is_file():
        evaluation = json.loads(job.evaluation.read_text())
        if evaluation.get("test_sha256") == run.metrics.get("test_sha256"):
            run.metrics = {**evaluation, **run.metrics}
    return run


def _groups(jobs: Sequence[Job], runs: dict[str, Run], part: str, scale: str) -> list[Group]:
    """Return the finished runs of a part on a scale by recipe."""
    groups: dict[str, Group] = {}
    for job in jobs:
        for its, on, recipe in job.uses:
            if (its, on) == (part, scale):
                group = groups.setdefault(recipe, Group(recipe, {KEY: recipe}, []))
                group.runs += [runs[job.name]] if runs[job.name].finished else []
    return list(groups.values())


def _range(group: Group) -> tuple[float, float]:
    """Return the lowest and the highest test accuracy; with one seed the 95% interval."""
    test = group.values("test/acc")
    low, high = (min(test), max(test)) if len(test) > 1 else group.runs[0].metrics.get("test/acc_interval", (0, 1))
    return low, high


def _minutes(group: Group) -> float:
    """Return the minutes of all epochs, on average."""
    return fmean(sum(run.metrics["seconds"]) for run in group.runs) / 60


def _images_per_s(runs: Sequence[Run]) -> float:
    """Return the images per second of fine-tuning, over all its phases, or of frozen epochs alone; on average."""
    rates = []
    for run in runs:
        phases = [phase for phase in run.metrics["phases"] if phase["name"] != "frozen"] or run.metrics["phases"]
        epochs = [len(phase["epochs"]) for phase in phases]
        rates.append(harmonic_mean([phase["images_per_s"] for phase in phases], weights=epochs))
    return fmean(rates)


def _around_unfreeze(run: Run) -> tuple[float, float] | None:
    """Return the validation accuracies of the last frozen epoch and of the one after it."""
    curve = _curve(run)
    return None if curve is None else (curve[1][curve[2] - 1], curve[1][curve[2]])


def _curve(run: Run) -> tuple[list[int], list[float], int] | None:
    """Return epochs, validation accuracies and the first unfrozen epoch; None without it, or validation around it."""
    unfreeze = min((phase["start"] for phase in run.metrics.get("plan", []) if phase["stages"]), default=0)
    values = run.metrics.get("val/acc", [])
    if not 0 < unfreeze < len(values) or None in values[unfreeze - 1 : unfreeze + 1]:
        return None
    return run.metrics["epoch"], values, unfreeze


def _mean_curve(group: Group) -> tuple[list[int], list[float], int] | None:
    """Return the mean of a group's curves, as far as the shortest goes; None where none has an unfreeze in it."""
    curves = [curve for curve in map(_curve, group.runs) if curve is not None]
    if not curves:
        return None
    epochs, _, unfreeze = min(curves, key=lambda curve: len(curve[0]))
    together = zip(*(values[: len(epochs)] for _, values, _ in curves), strict=True)
    return epochs, [math.nan if None in values else fmean(values) for values in together], unfreeze


def _provenance(part: str, jobs: Sequence[Job], runs: dict[str, Run]) -> list[str]:
    """Return where a part's numbers come from, and what is missing or differs."""
    done = [job for job in jobs if runs[job.name].finished]
    missing = [job.name for job in jobs if job not in done]
    unfinished = [f"Not finished: {', '.join(missing)}."] if missing else []
    if not done:
        return unfinished
    passed = dict.fromkeys(o for job in done for o in runs[job.name].overrides or [] if o not in job.overrides)
    command = shlex.join(["python", "-m", "cifar_tl.reproduce", f"only=[{part}]", *passed])
    device, date, commit, weights, precision = (
        distinct(what(runs[job.name]) for job in done) for what in (_device, _date, _commit, _weights, _precision)
    )
    lines = [f"`{command}`; {device}; {date}; commit {commit}; weights {weights}; {precision}."]
    lines += [text for job in done for text in differing(job)]
    return lines + unfinished


def _device(run: Run) -> str:
    return distinct(str(start.get("device")) for start in run.training_starts)


def _precision(run: Run) -> str:
    return distinct(str(start.get("precision")) for start in run.training_starts)


def _weights(run: Run) -> str:
    name, sha256 = run.metrics.get("weights"), run.metrics.get("weights_sha256")
    return f"{Path(name).name} ({sha256[:12]})" if name and sha256 else "random"


def _filters(run: Run) -> str:
    """Return the scale of the pretrained filters."""
    if not run.metrics.get("weights_sha256"):
        return "random"
    if "filter_rms" not in run.metrics:
        return "before model.filter_rms"
    rms = run.metrics["filter_rms"]
    return f"at RMS {rms:g}" if rms else "as in the file"


def _commit(run: Run) -> str:
    return distinct(
        str(start.get("git_commit"))[:7] + (" with changes" if start.get("git_dirty") else "") for start in run.starts
    )


def _date(run: Run) -> str:
    return distinct(str(start.get("started"))[:10] for start in run.starts)


def _mean(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.2f}" if values else "-"
