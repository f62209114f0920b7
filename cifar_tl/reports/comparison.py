"""Several runs beside each other: groups over seeds, paired differences, and which override mattered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from cifar_tl.runs.folder import Run
from cifar_tl.runs.metrics import paired_interval
from cifar_tl.runs.record import matters

DATA_HASHES = ("split_sha256", "test_sha256")
"""In a run's metrics: of the images that it was trained and validated on, and tested on."""


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: The overrides in which the groups differ, without the part before the last dot where that is clear.
        overrides: Values by key, without the seed.
        runs: The runs, in the order in which they were given.
    """

    label: str
    overrides: dict[str, str]
    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        """Return a metric of every finished run that has it."""
        return [float(run.metrics[metric]) for run in self.runs if run.finished and metric in run.metrics]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs whose overrides differ in the seed alone together; groups are in the order of their first runs.

    What was changed in files of `conf` between two such runs is an override, too; so is the place of their data, where
    these are others. Numbers are equal however they were typed.
    """
    given = [_typed(run) for run in runs]
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for at, overrides in enumerate(given):
        alike.setdefault(_settings(overrides), []).append(at)
    for at, key in [(at, key) for same in alike.values() for key in _edited(runs, same) for at in same]:
        value = runs[at].config.get(key) if runs[at].config else "not recorded"
        given[at][key] = "null" if value is None else str(value)
    if any(_of_several_data([runs[at] for at in same]) for same in alike.values()):
        for run, overrides in zip(runs, given, strict=True):
            digests = [str(run.metrics.get(key, "-"))[:8] for key in DATA_HASHES]
            overrides["data.root"] = f"{run.config.get('data.root')} ({' '.join(digests)})"
    keys = dict.fromkeys(key for overrides in given for key in overrides if key != "seed")
    differing = [key for key in keys if len({overrides.get(key) for overrides in given}) > 1]
    last = [key.rsplit(".", 1)[-1] for key in differing]
    clear = [last.count(name) == 1 and not name.startswith("_") for name in last]  # _target_ would be in no legend
    short = {key: name if alone else key for key, name, alone in zip(differing, last, clear, strict=True)}
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for run, overrides in zip(runs, given, strict=True):
        settings = dict(_settings(overrides))
        label = " ".join(f"{short[key]}={settings[key]}" for key in differing if key in settings) or "as it stands"
        group = groups.setdefault(_settings(overrides), Group(label, settings, []))
        group.runs.append(run)
    if len(groups) == 1 and not differing:
        next(iter(groups.values())).label = "all runs"
    return list(groups.values())


def common_overrides(groups: Sequence[Group]) -> list[str]:
    """Return the overrides that all groups share."""
    first = groups[0].overrides
    return [f"{key}={value}" for key, value in first.items() if all(g.overrides.get(key) == value for g in groups)]


def seed_of(run: Run) -> int | None:
    """Return the seed of a run, None if it is not recorded."""
    return run.metrics.get("seed")


@dataclass(frozen=True)
class Difference:
    """How much more often `a` is right than `b`, on the same test images.

    Attributes:
        mean: Difference of the accuracies.
        low: Lower end of its 95% interval.
        high: Upper end.
        only_a: Images that only `a` gets right, on average over its seeds.
        only_b: Images that only `b` gets right.
        seeds: Seeds that both have.
        per_seed: Difference of the accuracies for each of them.
    """

    mean: float
    low: float
    high: float
    only_a: float
    only_b: float
    seeds: list[int]
    per_seed: list[float]


def differing_data(a: Run, b: Run) -> list[str]:
    """Return what says that two runs were not tested on the same images; nothing if all that is recorded agrees.

    Indices alone say little: image 7 of one data set is not image 7 of another one.
    """
    found = []
    if a.classes != b.classes:
        found.append(f"class names ({_only(a.classes, b.classes)})")
    # older records have no hash of the test set; that of the split says at least whether the data are the same
    known = "test_sha256" in a.metrics.keys() | b.metrics.keys()
    key, what = ("test_sha256", "test set") if known else ("split_sha256", "split")
    if a.metrics.get(key) != b.metrics.get(key):
        found.append(f"the SHA-256 of the {what}")
    if a.predictions is not None and b.predictions is not None:
        ours, theirs = a.predictions.test, b.predictions.test
        if not np.array_equal(ours.indices, theirs.indices):
            found.append(f"test images ({len(ours.indices):,} and {len(theirs.indices):,})")
        elif not np.array_equal(ours.targets, theirs.targets):
            found.append("the classes of the test images")
    return found


def pairs_of_runs(a: Group, b: Group) -> tuple[list[tuple[Run, Run]], str]:
    """Return the runs of two groups that have a seed in common and were tested on the same images.

    Returns:
        Pairs, by seed. If there are none, the reason.
    """
    ours, theirs = (
        {seed_of(run): run for run in group.runs if run.finished and run.predictions is not None} for group in (a, b)
    )
    if not ours or not theirs:
        return [], "since predictions.npz is missing"
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(s for s in ours if s is not None and s in theirs)]
    if not pairs:
        return [], "since they have no seed in common"
    # one run stands for all: averaging over seeds needs the same images in every run
    differing = {what: None for pair in pairs for run in pair for what in differing_data(pairs[0][0], run)}
    return ([], f"since they differ in {' and '.join(differing)}") if differing else (pairs, "")


def _only(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Return an example of how two lists of class names differ."""
    mine, others = ([n for n in x if n not in y][:3] for x, y in ((ours, theirs), (theirs, ours)))
    return f"{', '.join(mine) or 'none'} against {', '.join(others) or 'none'}" if mine or others else "their order"


def paired_difference(a: Group, b: Group) -> Difference | None:
    """Compare two groups over the seeds that both have, image by image.

    The interval is that of the mean per-image difference, (right by `a`) - (right by `b`), averaged over the seeds: it
    says how much another draw of test images would change the difference between *these* trained models. It says
    nothing about other seeds; the range over seeds does.

    Returns:
        None if `pairs_of_runs` finds no pairs.
    """
    pairs, _ = pairs_of_runs(a, b)
    if not pairs:
        return None
    right_a, right_b = (
        np.array([run.predictions.test.right for run in side if run.predictions is not None], dtype=float)
        for side in zip(*pairs, strict=True)
    )
    difference = (right_a - right_b).mean(axis=0)
    return Difference(
        float(difference.mean()),
        *paired_interval(difference),
        only_a=float((right_a * (1 - right_b)).sum(axis=1).mean()),
        only_b=float((right_b * (1 - right_a)).sum(axis=1).mean()),
        seeds=[run.metrics["seed"] for run, _ in pairs],
        per_seed=(right_a - right_b).mean(axis=1).tolist(),
    )


def reference(groups: Sequence[Group]) -> Group | None:
    """Return the group with the highest mean validation accuracy, which is how a choice may be made."""
    tested = [group for group in groups if group.values("best/val/acc")]
    return max(tested, key=lambda group: fmean(group.values("best/val/acc")), default=None)


@dataclass(frozen=True)
class Effect:
    """What the values of one override do to a metric.

    Attributes:
        key: Of the config.
        values: Per value: the metric's mean over the groups that have it (each group's mean counts once), the number of
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
    """Return the effect of every override that was tried with all of its values in one setting of all else.

    The largest is the first. Means are over such settings alone: one that a value lacks, because its job failed, for
    instance, would count for the others.
    """
    tested = [group for group in groups if group.values(metric)]
    found = []
    for key in dict.fromkeys(key for group in tested for key in group.overrides):
        by_value: dict[str, list[list[float]]] = {}
        for group in _with_every_value(key, tested):
            by_value.setdefault(group.overrides.get(key, "(not given)"), []).append(group.values(metric))
        if not by_value:
            continue
        rows = {}
        for value, results in by_value.items():
            single = [x for result in results for x in result]
            rows[value] = (fmean(fmean(r) for r in results), len(single), min(single), max(single))
        found.append(Effect(key, rows))
    return sorted(found, key=lambda effect: -effect.spread)


def _with_every_value(key: str, groups: Sequence[Group]) -> list[Group]:
    """Return those groups that differ from others in this override alone, where each of its values has such a group."""
    equal_else: dict[tuple[tuple[str, str], ...], dict[str | None, Group]] = {}
    for group in groups:
        others = {name: value for name, value in group.overrides.items() if name != key}
        equal_else.setdefault(_settings(others), {})[group.overrides.get(key)] = group
    compared = [alike for alike in equal_else.values() if len(alike) > 1]
    values = {value for alike in compared for value in alike}
    return [group for alike in compared if alike.keys() == values for group in alike.values()]


def _of_several_data(runs: Sequence[Run]) -> bool:
    """Return whether runs have other images; what an older record does not say counts as the same."""
    return any(len({run.metrics.get(key) for run in runs} - {None}) > 1 for key in DATA_HASHES)


def _settings(overrides: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value) for key, value in overrides.items() if key != "seed"))


def _edited(runs: Sequence[Run], same: Sequence[int]) -> list[str]:
    """Return the keys of the config whose values differ although the same was typed, and not because jobs take turns.

    A key that some runs lack counts in `trainer` and `callbacks`, to which files may add keys; elsewhere it is another
    version's, and all have its default.
    """
    configs = [runs[at].config for at in same if runs[at].config]
    found = {key for config in configs for key in config} - {"seed", "trainer.devices"}
    return sorted(
        key
        for key in found
        if matters(key)
        and (key.startswith(("trainer.", "callbacks.")) or all(key in config for config in configs))
        and any(config.get(key) != configs[0].get(key) for config in configs)
    )


def _typed(run: Run) -> dict[str, str]:
    """Return a run's overrides by key, numbers as its config has them; without them, its folder stands for them."""
    overrides = _by_key([f"folder={run.folder}"] if run.overrides is None else run.overrides)
    numbers = {key: value for key, value in run.config.items() if type(value) in (int, float)}
    return {key: str(numbers.get(key, text)) for key, text in overrides.items()}


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides by key, without those that change no result."""
    pairs = (
        (key.lstrip("+~"), "removed" if key.startswith("~") else value)
        for key, _, value in (override.partition("=") for override in overrides)
    )
    return {key: value for key, value in pairs if matters(key) and key != "sweep"}  # what that sets has its own key
