"""Figures of a run, the same in TensorBoard and in reports. Without pyplot: no global state, no display."""

import functools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from cifar_tl.runs.metrics import BINS, Floats, Ints, Reliability

STYLE: Any = matplotlib.rc_params_from_file(Path(__file__).with_name("style.mplstyle"), use_default_template=False)
INK: str = STYLE["text.color"]
"""Text and axes. Nothing else has this colour, so that a page can replace it by its own text's colour."""
FAINT: str = STYLE["axes.edgecolor"]
COLORS = ("#3b82f6", "#e8853a", "#2da44e", "#8b6fd6", "#d1453b", "#17a2b0", "#b58900", "#d857a6")
"""Readable on white and on black."""
LINES = ("-", "--", "-.", ":")
"""Of curves, once all colours are taken."""
MARKERS = "os^D"
"""Of points, one per device."""
RIGHT, WRONG = "#2563c9", "#bf3328"
"""Cells; white letters on them can be read."""
WIDTH = 5.2
"""Inches; a phone shows such a figure with letters that can still be read."""
FALLBACK_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Hiragino Sans"),
    *("Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Noto Sans", "Arial Unicode MS"),
)
"""Of names in other scripts than Latin, Greek and Cyrillic, as far as they are installed."""

P = ParamSpec("P")


@functools.cache
def _fonts() -> list[str]:
    """Return the font families to draw with; matplotlib warns of each one in the list that is not installed."""
    installed = set(get_font_names())
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with STYLE."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context({**STYLE, "font.family": _fonts()}):
            return draw(*args, **kwargs)

    return styled


@contextmanager
def quiet_about_glyphs() -> Iterator[None]:
    """Save a figure without a warning for each character that no installed font has: it is drawn as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def _axes(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _title_above(figure: Figure, title: str) -> None:
    """Write a title above all else in a figure, what its axes have above them among it."""
    weight, size = STYLE["axes.titleweight"], STYLE["axes.titlesize"]
    figure.suptitle(title, fontsize=size, fontweight=weight, x=0.01, ha="left")


def _looks() -> Iterator[dict[str, Any]]:
    """Yield the colour and the style of lines; 32 of them differ."""
    return cycle({"color": color, "linestyle": style} for style in LINES for color in COLORS)


@_styled
def curves(
    title: str,
    epochs: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    phases: Sequence[tuple[str, int]],
    best: int | None,
    percent: bool = False,
    log_scale: bool = False,
) -> Figure:
    """Draw quantities over the epochs, with the starts of the phases marked.

    Args:
        title: Of the figure.
        epochs: From 0.
        series: One value per epoch by name; None is a gap, and so is 0 on a logarithmic scale.
        phases: Name and first epoch of each.
        best: The epoch whose weights were tested, None if there is none yet.
        percent: Values are shares.
        log_scale: Of the values.
    """
    figure, axes = _axes(3.1)
    peaks = []
    for color, (name, values) in zip(COLORS, series.items(), strict=False):
        shown = np.array(values, dtype=float)  # None becomes NaN
        if log_scale:
            shown[shown <= 0] = np.nan
            peaks += [np.nanmax(shown)] if np.isfinite(shown).any() else []
        width = 3.5 if log_scale and color == COLORS[0] else 1.7  # the two learning rates are often the same
        axes.plot(epochs, shown, marker="o", markersize=3, color=color, label=name, linewidth=width)
    if log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers of ten as formulas
        axes.yaxis.set_minor_formatter(NullFormatter())
        if peaks:  # a cosine ends near zero, which would squeeze all the rest
            axes.set_ylim(min(peaks) / 500, max(peaks) * 2)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    mark_phases(axes, phases)
    if best is not None:
        axes.axvline(best, color=COLORS[2], linewidth=1, linestyle=":", label="best epoch")
    _title_above(figure, title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return figure


def mark_phases(axes: Axes, phases: Sequence[tuple[str, int]]) -> None:
    """Draw a line where a phase starts, half an epoch before its first value, with the phase's name above."""
    starts = [max(start - 0.5, 0) for _, start in phases]
    for start in starts:
        if start > 0:
            axes.axvline(start, color=INK, linewidth=0.9, linestyle="--", alpha=0.7)
    top = axes.secondary_xaxis("top")
    slant = 30 if len(phases) > 2 else 0  # phases of an epoch or two are narrower than their names
    top.set_xticks(
        starts, [name for name, _ in phases], fontsize=7.5, ha="left", rotation=slant, rotation_mode="anchor"
    )
    top.tick_params(length=0, pad=2, labelcolor=INK)
    top.spines["top"].set_visible(False)


@_styled
def confusion(title: str, counts: Ints, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix: shares of each true class, right ones blue, wrong ones red on a scale of their own."""
    n = len(classes)
    figure, axes = _axes(4.9)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    wrong = np.where(np.eye(n, dtype=bool), 0, shares)
    strength = np.where(np.eye(n, dtype=bool), shares, wrong / max(wrong.max(), 1e-9)) * 0.9
    colors = np.zeros((n, n, 4))
    colors[..., :3] = matplotlib.colors.to_rgb(WRONG)
    colors[np.eye(n, dtype=bool), :3] = matplotlib.colors.to_rgb(RIGHT)
    colors[..., 3] = strength
    axes.grid(False)
    axes.pcolormesh(np.arange(n + 1), np.arange(n + 1), colors, rasterized=n > 30)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    if n <= 20:
        size = 8 if n <= 12 else 5.5
        for i in range(n):
            for j in range(n):
                if counts[i, j]:
                    color = "#ffffff" if strength[i, j] > 0.5 else INK
                    axes.text(j + 0.5, i + 0.5, f"{counts[i, j]}", ha="center", va="center", fontsize=size, color=color)
    ticks = np.arange(n) + 0.5
    named = n <= 40
    axes.set_xticks(ticks if named else [], classes if named else [], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks if named else [], classes if named else [])
    axes.tick_params(length=0, labelsize=8 if n <= 20 else 5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    return figure


@_styled
def reliability(title: str, given: Mapping[str, Reliability]) -> Figure:
    """Draw the accuracy of predictions over their confidence; on the diagonal, the two are equal.

    Args:
        title: Of the figure.
        given: By name; the first gets bars, its counts are drawn below.
    """
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.6, 1))
    edges = np.linspace(0, 1, BINS + 1)
    first = next(iter(given.values()))
    filled = first.counts > 0
    upper.bar(
        edges[:-1][filled], first.accuracy[filled], 1 / BINS, align="edge", color=COLORS[0], alpha=0.3, linewidth=0
    )
    upper.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
    for color, (name, bins) in zip(COLORS, given.items(), strict=False):
        there = bins.counts > 0
        upper.plot(
            bins.confidence[there], bins.accuracy[there], marker="o", color=color, label=f"{name}: ECE {bins.ece:.4f}"
        )
    upper.set_ylabel("share that is right")
    upper.set_ylim(0, 1.02)
    upper.legend(loc="upper left", fontsize=8)
    upper.set_title(title)
    lower.bar(edges[:-1], first.counts / max(1, first.counts.sum()), 1 / BINS, align="edge", color=COLORS[0], alpha=0.6)
    lower.set_ylabel("share of\nimages")
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.set_xlabel("confidence")
    lower.set_xlim(0, 1)
    return figure


@_styled
def intervals(title: str, labels: Sequence[str], values: Sequence[tuple[float, float, float]]) -> Figure:
    """Draw shares with their intervals, one per line.

    Args:
        title: Of the figure.
        labels: One per line, from the top.
        values: Value, lower and upper end.
    """
    figure, axes = _axes(0.9 + 0.27 * len(labels))
    for y, (value, low, high) in enumerate(values):
        axes.plot([low, high], [y, y], color=COLORS[0], linewidth=3, alpha=0.35, solid_capstyle="round")
        axes.plot([value], [y], "o", color=COLORS[0], markersize=5)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.tick_params(axis="y", length=0)
    axes.set_title(title)
    return figure


@_styled
def changes(title: str, labels: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    """Draw an arrow from each share before to the share after, one per line.

    Args:
        title: Of the figure.
        labels: One per line, from the top.
        values: Before and after.
    """
    figure, axes = _axes(0.9 + 0.27 * len(labels))
    for y, (before, after) in enumerate(values):
        color = COLORS[2] if after >= before else WRONG
        axes.annotate(
            "", (after, y), (before, y), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0}
        )
        axes.plot([before], [y], "o", color=FAINT, markersize=5)
        axes.plot([after], [y], "o", color=color, markersize=0)  # for the limits of the axis
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.tick_params(axis="y", length=0)
    axes.set_title(title)
    return figure


def captions(names: Sequence[str], probabilities: Floats, targets: Ints) -> list[str]:
    """Return the captions of a gallery: `dog 0.97`, or `predicted cat 0.97` and `is dog` on two lines.

    Args:
        names: Of the classes.
        probabilities: (images, classes).
        targets: (images,), class indices.
    """
    return [
        f"{'' if predicted == target else 'predicted '}{names[predicted]} {row[predicted]:.2f}"
        + ("" if predicted == target else f"\nis {names[target]}")
        for row, predicted, target in zip(probabilities, probabilities.argmax(axis=1), targets, strict=True)
    ]


@_styled
def gallery(title: str, images: Sequence[NDArray[np.uint8]], captions: Sequence[str], columns: int = 6) -> Figure:
    """Draw images with captions.

    Args:
        title: Of the figure.
        images: (height, width, 3), uint8, each.
        captions: One per image.
        columns: Images in a row.
    """
    rows = max(1, -(-len(images) // columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    longest = max((len(line) for caption in captions for line in caption.split("\n")), default=0)
    width = max(1.1, 0.058 * longest)  # inches: captions of neighbours must not touch
    figure = Figure(figsize=(width * columns, (1.0 + 0.16 * lines) * rows + 0.35), layout="constrained")
    _title_above(figure, title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=7, fontweight="normal", loc="center", pad=2)
    return figure


@_styled
def runs_over_each_other(
    title: str, groups: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float | None]]]], starts: Sequence[int]
) -> Figure:
    """Draw one quantity of several groups of runs over the epochs: runs thin, their mean thick.

    Args:
        title: Of the figure.
        groups: Epochs and values of every run, by the group's name; None is a gap, in the mean, too.
        starts: Epochs at which phases of the runs start.
    """
    labels = [textwrap.fill(f"{name} (n={len(runs)})", 75) for name, runs in groups.items()]
    figure, axes = _axes(3.4 + 0.15 * sum(label.count("\n") + 1 for label in labels), width=6.2)
    for look, label, runs in zip(_looks(), labels, groups.values(), strict=False):
        for epochs, values in runs:
            axes.plot(epochs, np.array(values, dtype=float), color=look["color"], linewidth=0.8, alpha=0.45, marker=".")
        shortest = min((epochs for epochs, _ in runs), key=len, default=[])
        if len(shortest):
            mean = np.mean([np.array(values[: len(shortest)], dtype=float) for _, values in runs], axis=0)
            axes.plot(shortest, mean, **look, linewidth=2.2, marker=".", label=label)
    for start in starts:
        axes.axvline(start - 0.5, color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_title(title)
    axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.17), borderaxespad=0)
    return figure


@_styled
def cliff(title: str, recipes: Mapping[str, tuple[Sequence[int], Sequence[float], int]]) -> Figure:
    """Draw validation accuracies over each other, each with its level before the unfreeze and what one epoch then did.

    Args:
        title: Of the figure.
        recipes: Epochs, shares, and the first epoch after the unfreeze, by name.
    """
    figure, axes = _axes(3.2 + 0.2 * len(recipes), width=4.4)  # it stands in half a page
    for look, (name, (epochs, values, unfreeze)) in zip(_looks(), recipes.items(), strict=False):
        step = f"{100 * (values[unfreeze] - values[unfreeze - 1]):+.1f}"
        axes.plot(epochs, np.array(values, dtype=float), **look, marker="o", label=f"{name}  {step}")
        axes.plot(
            [unfreeze - 1, epochs[-1]], [values[unfreeze - 1]] * 2, color=look["color"], linewidth=1, linestyle=":"
        )
    for start in sorted({unfreeze for *_, unfreeze in recipes.values()}):
        mark_phases(axes, [("unfreeze", start)])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    _title_above(figure, title)
    # below the axes, where it covers no curve
    head = "points at the unfreeze"
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.17), borderaxespad=0, title=head, alignment="left")
    return figure


@dataclass(frozen=True)
class Result:
    """What a recipe came to, and what it took.

    Attributes:
        label: Of the recipe.
        cost: In the unit of the figure's axis.
        accuracy: A share.
        low: Lower end of its range.
        high: Upper end.
        device: That the cost is of.
    """

    label: str
    cost: float
    accuracy: float
    low: float
    high: float
    device: str


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Return, by cost, the results that are better than all that cost as much or less; of equal ones the first."""
    front: list[Result] = []
    for result in sorted(results, key=lambda result: (result.cost, -result.accuracy)):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front


@_styled
def frontier(title: str, cost: str, results: Sequence[Result], references: Mapping[str, float]) -> Figure:
    """Draw accuracies over what they cost, with a line along each device's Pareto front.

    Args:
        title: Of the figure.
        cost: Label of the horizontal axis, with the unit.
        results: One or more.
        references: Shares to compare with, by name; a * marks those whose epoch was chosen on the test set.
    """
    figure, axes = _axes(4.2, width=7)
    for name, share in references.items():
        axes.axhline(share, color=FAINT, linewidth=0.8, linestyle="--")
        axes.annotate(
            f"{100 * share:g}%  {name}",
            (1, share),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=7,
            alpha=0.75,
        )
    devices = list(dict.fromkeys(r.device for r in results))
    for color, r in zip(cycle(COLORS), results, strict=False):
        axes.plot([r.cost] * 2, [r.low, r.high], color=color, linewidth=1.2)
        marker = MARKERS[devices.index(r.device) % len(MARKERS)]
        label = r.label if len(devices) == 1 else f"{r.label}, {r.device}"
        axes.plot([r.cost], [r.accuracy], marker, color=color, markersize=6, label=label)
    for device in devices:
        front = pareto_front([r for r in results if r.device == device])
        axes.plot([r.cost for r in front], [r.accuracy for r in front], color=INK, linewidth=0.8, alpha=0.5, zorder=1)
    shares = [*references.values(), *(share for r in results for share in (r.accuracy, r.low, r.high))]
    axes.set_ylim(min(shares) - 0.02, max(shares) + 0.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xscale("log")
    first, last = min(r.cost for r in results) / 2, max(r.cost for r in results) * 2
    axes.set_xlim(first, last)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if last < 1000 * first else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.set_xlabel(f"{cost} on {devices[0]}" if len(devices) == 1 else cost)
    note = "Mean over the seeds and their range; with one seed, 95% interval. * Epoch chosen on the test set."
    figure.supxlabel(note, fontsize=7, x=0.99, ha="right", alpha=0.75)
    axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.17), borderaxespad=0, ncols=2)
    return figure


@_styled
def points(title: str, groups: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the values of every group of runs as points on a line, with their mean as a tick."""
    labels = [textwrap.fill(name, 40) for name in groups]
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    figure, axes = _axes(0.9 + (0.2 + 0.13 * lines) * len(groups), width=6.2)
    for y, values in enumerate(groups.values()):
        color = COLORS[y % len(COLORS)]
        if len(values) > 0:
            axes.plot([min(values), max(values)], [y, y], color=color, linewidth=3, alpha=0.25)
            axes.plot([np.mean(values)], [y], "|", color=color, markersize=15, markeredgewidth=2.2)
        axes.plot(values, [y] * len(values), "o", color=color, markersize=5, alpha=0.75, markeredgewidth=0)
    axes.set_yticks(range(len(groups)), labels)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_title(title)
    return figure


@_styled
def trials(
    title: str,
    label: str,
    points: Mapping[str, Sequence[tuple[Any, float]]],
    line: Sequence[tuple[int, float]] = (),
    log_scale: bool = False,
) -> Figure:
    """Draw the results of a search's trials over their number, or over the values of a parameter.

    Args:
        title: Of the figure.
        label: Of the horizontal axis.
        points: Value or choice, and share, of every trial, by name: `finished`, `pruned`, `best`.
        line: Trial and share, as steps.
        log_scale: Of the horizontal axis.
    """
    figure, axes = _axes(2.9)
    every = [x for values in points.values() for x, _ in values]
    choices = sorted({x for x in every if isinstance(x, str)}, key=_natural)
    markers = {"finished": ("o", COLORS[0]), "pruned": ("x", COLORS[1]), "best": ("*", COLORS[2])}
    for name, values in points.items():
        marker, color = markers[name]
        xs = [choices.index(x) if choices else x for x, _ in values]
        size = 11 if name == "best" else 5
        axes.plot(xs, [y for _, y in values], marker, color=color, markersize=size, label=name, linestyle="")
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=COLORS[2], linewidth=1.2, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if choices:
        axes.set_xticks(range(len(choices)), choices)
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif log_scale:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel(label)
    axes.set_title(title)
    axes.legend(fontsize=8)
    return figure


def _natural(text: str) -> tuple[float, str]:
    """Return what sorts numbers by size, and other texts by the alphabet behind them."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as (height, width, 3), uint8, on white."""
    canvas: Any = FigureCanvasAgg(figure)
    with quiet_about_glyphs():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
