"""Texts beside points, where they can be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from random import Random

import numpy as np
from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.transforms import Bbox

NEAR, POINT = 6, 3.5
"""Distance of a label beside its point, half a point's size; in pt."""
WAYS = (
    *((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)),
    *((0.4, 0.9), (-0.4, 0.9), (0.4, -0.9), (-0.4, -0.9)),
)
"""From a point to the nearest corner of its label, or to the middle of the nearest side; the best first."""
PER_LINE, PER_LEADER, PER_TEXT = 30, 100, 1000
"""What crossing a line, crossing the line that leads to a label, and hiding something cost, in pt of distance."""
ATTEMPTS, ROUNDS = 20, 3
"""Orders in which labels are placed, until nothing is hidden; how often each label is placed in one."""


@dataclass(frozen=True)
class _Spot:
    """A place for a label, in pixels; `leader` joins it to the point, and is empty beside it."""

    cost: float
    box: Bbox
    leader: Path
    way: tuple[float, float]

    def clash(self, other: "_Spot") -> float:
        """Return what it costs to use both."""
        cut = _crosses(self.leader, other.box) + _crosses(other.leader, self.box)
        return PER_TEXT * self.box.overlaps(other.box) + PER_LEADER * cut


def label_points(axes: Axes, labels: Sequence[tuple[str, float, float]], size: float, color: str) -> None:
    """Write a text beside each point: clear of points and other texts, near, and off lines where that is not far.

    Args:
        axes: With all else that is in it, its limits and its layout final.
        labels: Text, x and y of each.
        size: Of the letters, in pt.
        color: Of the line from a point to a label that is not beside it.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    pt = figure.dpi / 72
    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]
    lines = [line.get_transform().transform_path(line.get_path()) for line in drawn]
    places = axes.transData.transform([(x, y) for _, x, y in labels])
    points = [Bbox([place - POINT * pt, place + POINT * pt]) for place in places]
    spots: list[list[_Spot]] = []
    for (text, _, _), place in zip(labels, places, strict=True):
        measured = figure.text(0, 0, text, fontsize=size)
        half = np.array(measured.get_window_extent().size) / 2 + pt
        measured.remove()
        spots.append([])
        for distance, way in product(range(NEAR, 60, 6), WAYS):
            start, end = (place + length * pt * np.array(way) for length in (NEAR, distance))
            center = end + half * np.sign(way)
            box, leader = Bbox([center - half, center + half]), Path([start, end])
            hidden = sum(box.overlaps(point) for point in points) + (axes.bbox.count_contains(box.corners()) < 4)
            cost = distance + PER_TEXT * hidden + PER_LINE * sum(_crosses(line, box) for line in lines)
            cost += PER_LEADER * sum(_crosses(leader, point) for point in points)
            spots[-1].append(_Spot(float(cost), box, leader, way))
    for (text, x, y), place, spot in zip(labels, places, _choose(spots), strict=True):
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": POINT}
        beside = not np.ptp(spot.leader.vertices, axis=0).any()
        axes.annotate(
            text,
            (x, y),
            tuple(((spot.box.p0 + spot.box.p1) / 2 - place) / pt),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            arrowprops=None if beside else {**line, "relpos": tuple((1 - np.sign(spot.way)) / 2)},
        )


def _choose(spots: Sequence[Sequence[_Spot]]) -> list[_Spot]:
    """Return one of the spots of each label, so that together they cost little."""
    random = Random(0)
    best: list[_Spot] = []
    lowest = float("inf")
    order = list(range(len(spots)))
    for _ in range(ATTEMPTS):
        chosen: dict[int, _Spot] = {}
        for _, number in product(range(ROUNDS), order):  # from the second round on, each makes room for later ones
            others = [spot for other, spot in chosen.items() if other != number]
            costs = [spot.cost + sum(spot.clash(other) for other in others) for spot in spots[number]]
            chosen[number] = spots[number][int(np.argmin(costs))]
        cost = sum(a.cost for a in chosen.values()) + sum(a.clash(b) for a, b in combinations(chosen.values(), 2))
        if cost < lowest:
            best, lowest = [chosen[number] for number in range(len(spots))], cost
        if lowest < PER_TEXT:
            break
        random.shuffle(order)
    return best


def _crosses(line: Path, box: Bbox) -> bool:
    return line.intersects_bbox(box, filled=False)
