"""The published accuracies against the minutes that training takes on one device, from speed.csv of a benchmark."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from cifar_tl.files import replacing
from cifar_tl.reports import figures
from cifar_tl.reports.original import PUBLISHED
from cifar_tl.reproduce.publish import RESULTS, read

PICTURE = Path(".github/images/frontier.png")
SPEED = RESULTS / "speed.csv"
MINUTES = "minutes of training"
"""Its column."""


def draw_frontier(checkout: Path) -> list[Path]:
    """Draw PICTURE from results.csv and speed.csv of a checkout, and return its path; none without a recipe in both."""
    results = list(published_results(checkout))
    if not results:
        return []
    figure = figures.frontier("Test accuracy against time", MINUTES, results, PUBLISHED)
    with replacing(checkout / PICTURE) as partial:
        figure.savefig(partial, dpi=150, facecolor="white", metadata={"Description": description(results)})
    return [checkout / PICTURE]


def description(results: Iterable[figures.Result]) -> str:
    """Return what the picture shows, which stands in its file, too."""
    return "; ".join(
        f"{r.label} on {r.device}: {100 * r.accuracy:.2f}% ({100 * r.low:.2f} to {100 * r.high:.2f})" for r in results
    )


def published_results(checkout: Path) -> Iterator[figures.Result]:
    """Yield the published accuracies of the recipes whose speed is published, too, by the minutes of training them."""
    accuracies, speeds = (_rows(checkout / path) for path in (RESULTS / "results.csv", SPEED))
    shared = [recipe for recipe in accuracies if recipe in speeds]
    for recipe in sorted(shared, key=lambda recipe: float(speeds[recipe][MINUTES])):
        row, its = accuracies[recipe], speeds[recipe]
        accuracy, low, high = (float(text) / 100 for text in (row["test acc"], *row["range"].split(" to ")))
        minutes, device = float(its[MINUTES]), f"{its['device']}, {its['precision']}"
        yield figures.Result(f"{recipe}, {minutes:.3g} min", minutes, accuracy, low, high, device)


def _rows(path: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a CSV by their first cell; none without it."""
    if not path.is_file():
        return {}
    head, rows = read(path)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}
