"""The section on a hyperparameter search: its history, what the best trial has, and a figure per parameter."""

from collections import Counter
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from cifar_tl.errors import UserError
from cifar_tl.reports import figures
from cifar_tl.reports.page import FigureFolder, Section
from cifar_tl.runs.formatting import percent
from cifar_tl.runs.resume import JOURNAL
from cifar_tl.runs.table import Table
from cifar_tl.search import open_study

STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def search_section(folder: Path, drawing: FigureFolder) -> Section | None:
    """Draw a search from its study; None where there is none that can be read, or no trial has finished.

    Args:
        folder: Of the sweep.
        drawing: Takes the figures, and the reason why there is nothing.
    """
    if not (folder / JOURNAL).is_file():
        return None
    try:
        study = open_study(folder)
    except UserError as error:
        drawing.problems.append(f"The search is not shown: {error}")
        return None
    trials: list[Any] = [trial for trial in study.trials if trial.value is not None]
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not finished:
        drawing.problems.append(f"The search is not shown: no trial of {len(study.trials)} has finished.")
        return None
    best: Any = study.best_trial
    marked = {"finished": finished, "pruned": [t for t in trials if t.state.name == "PRUNED"], "best": [best]}
    so_far = list(zip([t.number for t in finished], accumulate((t.value for t in finished), max), strict=True))
    title, words = "Best validation accuracy by trial", "Line: the best so far. Pruned trials are where they ended."
    points: dict[str, Any] = {name: [(t.number, t.value) for t in these] for name, these in marked.items()}
    text = f"{title}. The best is trial {best.number} with {percent(best.value)}."
    draw = partial(figures.trials, title, "trial", points, so_far)
    drawn = [drawing.draw("search_history", draw, text, words)]
    for key, distribution in best.distributions.items():
        points = {name: [(t.params[key], t.value) for t in these if key in t.params] for name, these in marked.items()}
        draw = partial(figures.trials, key, key, points, log_scale=getattr(distribution, "log", False))
        text = f"Best validation accuracy over {key}; the best trial has {_text(best.params[key])}."
        drawn.append(drawing.draw(f"search_{key}", draw, text))
    counts = Counter(STATES[trial.state.name] for trial in study.trials)
    note = (
        f"Trial {best.number} has the highest validation accuracy, {percent(best.value)}, of {len(study.trials)}: "
        f"{', '.join(f'{count} {state}' for state, count in counts.most_common())}. Importance is the share of the "
        "differences between good trials and all that a parameter explains (PED-ANOVA, Watanabe et al. 2023)."
    )
    importances = _importances(study)
    rows = [
        [key, _searched(distribution), _text(best.params[key]), importances.get(key, "-")]
        for key, distribution in best.distributions.items()
    ]
    head = ["parameter", "searched", f"trial {best.number}, the best", "importance"]
    return Section("Search", "search", {"figures": drawn, "table": Table("Search", head, rows, note, words=(0, 1))})


def _importances(study: Any) -> dict[str, str]:
    """Return the importance of each parameter, nothing where there are too few trials, or all are equal."""
    from optuna.importance import get_param_importances

    try:
        return {key: f"{value:.2f}" for key, value in get_param_importances(study).items()}
    except (ValueError, RuntimeError):
        return {}


def _searched(distribution: Any) -> str:
    """Return what a parameter was drawn from, in words."""
    if choices := getattr(distribution, "choices", None):
        return ", ".join(map(str, choices))
    scale = ", logarithmic" if distribution.log else ""
    return f"{_text(distribution.low)} to {_text(distribution.high)}{scale}"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
