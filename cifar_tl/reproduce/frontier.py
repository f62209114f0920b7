"""The published accuracies against the arithmetic of training, which is the same on every device."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from cifar_tl import cli
from cifar_tl.arithmetic import training_flops
from cifar_tl.files import replacing
from cifar_tl.reports import figures
from cifar_tl.reports.original import IMAGES, PUBLISHED
from cifar_tl.reproduce.publish import RESULTS, read

PICTURE = Path(".github/images/frontier.png")


def draw_frontier(checkout: Path) -> Path:
    """Draw PICTURE from results.csv of a checkout, and return its path."""
    title, cost = "Test accuracy against the arithmetic of training", "PFLOP of all epochs"
    results = list(published_results(checkout))
    figure = figures.frontier(title, cost, results, PUBLISHED)
    with replacing(checkout / PICTURE) as partial:
        figure.savefig(partial, dpi=150, facecolor="white", metadata={"Description": description(results)})
    return checkout / PICTURE


def description(results: Iterable[figures.Result]) -> str:
    """Return what the picture shows, which stands in its file, too."""
    return "; ".join(f"{r.label}: {100 * r.accuracy:.2f}% ({100 * r.low:.2f} to {100 * r.high:.2f})" for r in results)


def published_results(checkout: Path) -> Iterator[figures.Result]:
    """Yield the published accuracy of each recipe of conf/experiment, with the PFLOP (10^15) of training it."""
    head, rows = read(checkout / RESULTS / "results.csv")
    for row in (dict(zip(head, cells, strict=True)) for cells in rows):
        recipe = row["config"]
        if (checkout / "conf" / "experiment" / f"{recipe}.yaml").is_file():
            pflop = training_flops(cli.compose("train", [f"experiment={recipe}"]), IMAGES["train"]) / 1e15
            accuracy, low, high = (float(text) / 100 for text in (row["test acc"], *row["range"].split(" to ")))
            yield figures.Result(f"{recipe}, {pflop:.2f} PFLOP", pflop, accuracy, low, high)
