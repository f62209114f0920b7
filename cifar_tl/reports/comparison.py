"""Several runs beside each other: groups over seeds, paired differences, and which override mattered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from cifar_tl.runs.folder import Run
from cifar_tl.runs.metrics import Z95


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: The overrides in which the groups differ, without the part before the last dot where that is clear.
        overrides: Values by key, without the seed.
        runs: The runs, by seed.
    """

    label: str
    overrides: dict[str, str]
    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        """Return a figure of every finished run that has it."""
        return [float(run.metrics[metric]) for run in self.runs if run.finished and metric in run.metrics]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs whose overrides differ in the seed alone together; groups are in the order of their first runs."""
    given = [_by_key(run.overrides or [f"folder={run.folder}"]) for run in runs]
    keys = dict.fromkeys(key for overrides in given for key in overrides if key != "seed")
    differing = [key for key in keys if len({overrides.get(key) for overrides in given}) > 1]
    last = [key.rsplit(".", 1)[-1] for key in differing]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(differing, last, strict=True)}
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for run, overrides in zip(runs, given, strict=True):
        settings = {key: value for key, value in overrides.items() if key != "seed"}
        label = " ".join(f"{short[key]}={settings[key]}" for key in differing if key in settings) or "as it stands"
        group = groups.setdefault(tuple(sorted(settings.items())), Group(label, settings, []))
        group.runs.append(run)
    if len(groups) == 1 and not differing:
        next(iter(groups.values())).label = "all runs"
    return list(groups.values())


def common_overrides(groups: Sequence[Group]) -> list[str]:
    """Return the overrides that all groups share."""
    first = groups[0].overrides
    return [f"{key}={value}" for key, value in first.items() if all(g.overrides.get(key) == value for g in groups)]


def seed_of(run: Run) -> int | None:
    """Return the seed of a run, None if nothing says."""
    seed = run.metrics.get("seed")
    return seed if isinstance(seed, int) else None


@dataclass(frozen=True)
class Difference:
    """How much more often `a` is right than `b`, on the same test images.

    Attributes:
        mean: Difference of the accuracies.
        low: Lower end of its 95 % interval.
        high: Upper end.
        only_a: Images that only `a` gets right, on average over its seeds.
        only_b: Images that only `b` gets right.
        images: Test images.
        seeds: Seeds that both have.
        per_seed: Difference of the accuracies for each of them.
    """

    mean: float
    low: float
    high: float
    only_a: float
    only_b: float
    images: int
    seeds: list[int]
    per_seed: list[float]


def paired_difference(a: Group, b: Group) -> Difference | None:
    """Compare two groups over the seeds and test images that both have.

    The interval is the normal one of the mean per-image difference, (right by `a`) - (right by `b`), averaged over the
    seeds: it says how much another draw of test images would change the difference between *these* trained models. It
    says nothing about other seeds; the range over seeds does.

    Returns:
        None if they have no seed in common, no predictions, or other test images.
    """
    ours, theirs = (
        {seed_of(run): run.predictions.test for run in group.runs if run.finished and run.predictions}
        for group in (a, b)
    )
    seeds = sorted(seed for seed in ours if seed is not None and seed in theirs)
    if not seeds:
        return None
    images = ours[seeds[0]].indices
    if any(not np.array_equal(split[seed].indices, images) for split in (ours, theirs) for seed in seeds):
        return None
    right_a = np.array([ours[seed].right for seed in seeds], dtype=float)
    right_b = np.array([theirs[seed].right for seed in seeds], dtype=float)
    difference = (right_a - right_b).mean(axis=0)
    mean, n = float(difference.mean()), len(difference)
    half = Z95 * float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    return Difference(
        mean,
        mean - half,
        mean + half,
        only_a=float((right_a * (1 - right_b)).sum(axis=1).mean()),
        only_b=float((right_b * (1 - right_a)).sum(axis=1).mean()),
        images=n,
        seeds=seeds,
        per_seed=(right_a - right_b).mean(axis=1).tolist(),
    )


def reference(groups: Sequence[Group]) -> Group | None:
    """Return the group with the highest mean validation accuracy, which is how a choice may be made."""
    tested = [group for group in groups if group.values("best/val/acc")]
    return max(tested, key=lambda group: fmean(group.values("best/val/acc")), default=None)


@dataclass(frozen=True)
class Effect:
    """What the values of one override do to a figure.

    Attributes:
        key: Of the config.
        values: Per value: the figure's mean over the groups that have it (each group's mean counts once), the number of
            runs, the lowest and the highest run.
    """

    key: str
    values: dict[str, tuple[float, int, float, float]]

    @property
    def spread(self) -> float:
        """Distance of the best and the worst value's mean."""
        means = [mean for mean, *_ in self.values.values()]
        return max(means) - min(means)


def effects(groups: Sequence[Group], metric: str) -> list[Effect]:
    """Return the effect of every override with several values, the largest first.

    Means are over whatever else was swept: they are fair where every value met the same others, as in a grid.
    """
    tested = [group for group in groups if group.values(metric)]
    found = []
    for key in dict.fromkeys(key for group in tested for key in group.overrides):
        by_value: dict[str, list[list[float]]] = {}
        for group in tested:
            by_value.setdefault(group.overrides.get(key, "(not given)"), []).append(group.values(metric))
        if len(by_value) > 1:
            rows = {}
            for value, results in by_value.items():
                single = [x for result in results for x in result]
                rows[value] = (
                    fmean(fmean(r) for r in results),
                    len(single),
                    min(single),
                    max(single),
                )
            found.append(Effect(key, rows))
    return sorted(found, key=lambda effect: -effect.spread)


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
