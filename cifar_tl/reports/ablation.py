"""Ablation: the recipe without each of its ingredients, beside the whole recipe."""

from collections.abc import Sequence
from statistics import fmean

from cifar_tl.reports.comparison import Group, seed_of
from cifar_tl.runs.formatting import percent_range, points
from cifar_tl.runs.table import Table

KEY, NOTHING = "ablate", "none"
"""The override that removes an ingredient, and its value that removes none."""


def ablation(groups: Sequence[Group]) -> Table | None:
    """Return the validation accuracy without each ingredient, and its distance to the whole recipe, paired by seed.

    Args:
        groups: Of runs with an override `ablate=...`; others are left out.

    Returns:
        The table, the most useful ingredient first; None where no group removes nothing, or where
            something else was swept, too.
    """
    removing = [group for group in groups if KEY in group.overrides]
    by_name = {group.overrides[KEY]: _by_seed(group) for group in removing}
    whole = by_name.get(NOTHING)
    others = {tuple(sorted((k, v) for k, v in group.overrides.items() if k != KEY)) for group in removing}
    if not whole or len(by_name) < len(removing) or len(others) > 1:
        return None
    rows = []
    for name, accuracies in by_name.items():
        values = list(accuracies.values())
        pairs = [accuracies[seed] - whole[seed] for seed in accuracies if seed in whole]
        if values:
            spread = percent_range(min(values), max(values))
            # the whole recipe has no distance to itself
            distance = ["", ""] if name == NOTHING or not pairs else [points(fmean(pairs)), _span(pairs)]
            order = fmean(pairs) if pairs else 0.0
            rows.append((order, [name, f"{100 * fmean(values):.2f}", spread, str(len(values)), *distance]))
    rows.sort(key=lambda row: (row[1][0] != NOTHING, row[0]))
    return Table(
        "Ablation",
        ["removed", "val acc, %, mean", "range", "n", "points against none", "per seed"],
        [cells for _, cells in rows],
        "Best validation accuracy of a run; n runs differ in their seed alone. Differences are paired by seed.",
    )


def _by_seed(group: Group) -> dict[int | None, float]:
    runs = [run for run in group.runs if run.finished and "best/val/acc" in run.metrics]
    return {seed_of(run): run.metrics["best/val/acc"] for run in runs}


def _span(values: Sequence[float]) -> str:
    return f"{points(min(values))} to {points(max(values))}"
