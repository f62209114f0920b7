"""The parts of a run's page that show single test images."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_tl.reports import figures, html, svg
from cifar_tl.reports.html import Markup
from cifar_tl.runs.formatting import percent
from cifar_tl.runs.metrics import (
    Floats,
    Ints,
    confused_pairs,
    confusion_matrix,
    least_certain,
    mistaken,
    most_certain,
    softmax,
    top_mistakes,
)
from cifar_tl.runs.predictions import CERTAIN, CONFUSED_PAIRS, MISTAKES, PAIR_EXAMPLES, UNCERTAIN, Predictions

Images = dict[int, NDArray[np.uint8]]


def confused(predictions: Predictions, images: Images) -> str:
    """Return the pairs of classes that are most often taken for each other, with examples."""
    test, names = predictions.test, predictions.classes
    probabilities = softmax(test.logits)
    matrix = confusion_matrix(test.predicted, test.targets, len(names))
    mistakes = int((~test.right).sum())
    rows = []
    for pair in confused_pairs(matrix, CONFUSED_PAIRS):
        cells: list[object] = [Markup(f"{escape(names[pair.first])} ⇄ {escape(names[pair.second])}")]
        for true, said, count in (
            (pair.first, pair.second, pair.first_as_second),
            (pair.second, pair.first, pair.second_as_first),
        ):
            share = count / max(1, int(matrix[true].sum()))
            examples = mistaken(probabilities, test.targets, true, said, PAIR_EXAMPLES)
            strip = "".join(_image(predictions, images, probabilities, int(at)) for at in examples)
            words = f"{escape(names[true])} said to be {escape(names[said])}: <b>{count}</b> ({percent(share, 1)})"
            cells.append(Markup(f'{words}<div class="strip">{strip}</div>'))
        rows.append([*cells, percent((pair.first_as_second + pair.second_as_first) / max(1, mistakes), 1)])
    if not rows:
        return "<p>No test image was taken for another class.</p>"
    shown = sum(pair.first_as_second + pair.second_as_first for pair in confused_pairs(matrix, CONFUSED_PAIRS))
    intro = (
        f"<p>{shown:,} of the {mistakes:,} mistakes are between these pairs. In brackets: share of the true class.</p>"
    )
    head = ["pair", "one way", "the other way", "share of all mistakes"]
    return intro + html.table(head, rows, "Most confused pairs of classes", words=(0, 1, 2))


def image_sections(predictions: Predictions, images: Images, out: Path) -> list[tuple[str, Callable[[], str]]]:
    """Return the headings of the galleries and the functions that draw them; they write their figures into `out`."""
    test = predictions.test
    probabilities = softmax(test.logits)
    mistakes = top_mistakes(probabilities, test.targets, MISTAKES)
    certain = most_certain(probabilities, CERTAIN)
    uncertain = least_certain(probabilities, UNCERTAIN)

    def draw_mistakes() -> str:
        if not len(mistakes):
            return "<p>There are none.</p>"
        _save_gallery(
            "Most confident mistakes, test set", predictions, images, probabilities, mistakes, out, "mistakes"
        )
        return "<p>Wrong, and most sure of it.</p>" + _gallery(predictions, images, probabilities, mistakes)

    def draw_certainty() -> str:
        _save_gallery("Least certain, test set", predictions, images, probabilities, uncertain, out, "least_certain")
        _save_gallery("Most certain, test set", predictions, images, probabilities, certain, out, "most_certain")
        return (
            f"<h3>Least certain</h3>{_gallery(predictions, images, probabilities, uncertain)}"
            f"<h3>Most certain</h3>{_gallery(predictions, images, probabilities, certain)}"
        )

    return [("Mistakes", draw_mistakes), ("Most and least certain", draw_certainty)]


def _alt(predictions: Predictions, probabilities: Floats, at: int) -> str:
    test, names = predictions.test, predictions.classes
    said = int(probabilities[at].argmax())
    verdict = "rightly" if said == test.targets[at] else f"but is {names[test.targets[at]]}"
    return f"test image {test.indices[at]}: predicted {names[said]} {probabilities[at, said]:.2f}, {verdict}"


def _image(predictions: Predictions, images: Images, probabilities: Floats, at: int) -> Markup:
    alt = _alt(predictions, probabilities, at)
    shown = html.thumbnail(images.get(int(predictions.test.indices[at])), alt)
    return Markup(shown.replace("<img ", f'<img title="{escape(alt)}" ', 1))


def _gallery(predictions: Predictions, images: Images, probabilities: Floats, chosen: Ints) -> str:
    test, names = predictions.test, predictions.classes
    items = []
    for at in chosen.tolist():
        said = int(probabilities[at].argmax())
        right = said == test.targets[at]
        verdict = "" if right else f"<br>is {escape(names[test.targets[at]])}"
        caption = (
            f'<span class="{"right" if right else "wrong"}">{escape(names[said])}</span> {probabilities[at, said]:.2f}'
        )
        items.append((_image(predictions, images, probabilities, at), Markup(caption + verdict)))
    return html.gallery(items)


def captions(names: Sequence[str], probabilities: Floats, targets: Ints) -> list[str]:
    """Return `predicted cat 0.97,` `is dog` on two lines, per image."""
    return [
        f"{'' if said == target else 'predicted '}{names[said]} {row[said]:.2f}"
        + ("" if said == target else f"\nis {names[target]}")
        for row, said, target in zip(probabilities, probabilities.argmax(axis=1), targets, strict=True)
    ]


def _save_gallery(
    title: str, predictions: Predictions, images: Images, probabilities: Floats, chosen: Ints, out: Path, name: str
) -> None:
    test = predictions.test
    there = [at for at in chosen.tolist() if int(test.indices[at]) in images]
    if there:
        figure = figures.gallery(
            title,
            [images[int(test.indices[at])] for at in there],
            captions(predictions.classes, probabilities[there], test.targets[there]),
        )
        svg.save(figure, out, name, title)
