"""The Keras study that `experiment=seed_baseline` re-creates: what its notebook measured, beside a run of ours.

And what others have published of a ResNet-50 on CIFAR-10.
"""

from functools import partial
from typing import Any

from cifar_tl.reports import figures
from cifar_tl.reports.page import FigureFolder
from cifar_tl.runs.folder import Run
from cifar_tl.runs.formatting import percent_or_dash
from cifar_tl.runs.table import Table

EXPERIMENT = "seed_baseline"
MEASURED = 0.693
"""Accuracy on the test set after the last epoch, from its notebook."""
ORIGINAL: tuple[float | None, ...] = (
    *(0.634, None, None, None, None, None, None, None, None, 0.6536),
    *(0.4464, 0.526, 0.575, 0.608, 0.628, 0.652, 0.669, 0.680, 0.685, MEASURED),
)
"""Validation accuracy (on its test set) per epoch, from the outputs of its notebook, hgabrali/CIFAR-10-Image-
Classification-A-Transfer-Learning-Approach-with-ResNet50; of the frozen epochs it names the first, the best (0.663) and
the last."""
DIFFERENCES = (
    "Keras' ResNet50 strides in the first 1x1 convolution of a block, torchvision's in the 3x3: it drops more pixels.",
    "Its weights are Keras' own, trained with the Caffe normalization (mean subtraction, BGR).",
    "It trains on 50,000 images and validates on the test set; here 45,000 train, in a tenth fewer steps an epoch.",
)
"""What torch and an honest protocol cannot copy."""
IMAGES = {"train": 45_000, "val": 5_000}
"""Of a run that can stand beside it."""
PUBLISHED = {
    "original, measured": MEASURED,
    "best public, 32x32*": 0.886,
    "original, claimed": 0.92,
    "public, 224x224*": 0.9725,
}
"""Test accuracies to compare with; those with * chose their epoch on the test set. The claim is from the report of the
study. Best found at 32x32 with the unmodified stem: torchvision's V2 weights, 30 epochs, layer3 and layer4,
aksharasoman/resnet50-cifar10-fastapi. At 224x224: V2 weights, 12 epochs, so-hamaguchi/cifar10-resnet50-assignment."""


def beside_original(run: Run, folder: FigureFolder) -> dict[str, Any] | None:
    """Return both validation curves as a figure and as a table; None for a run of other data or length."""
    metrics = run.metrics
    same_data = "airplane" in run.classes and IMAGES.items() <= metrics.get("images", {}).items()
    if metrics.get("experiment") != EXPERIMENT or not same_data or metrics["epoch"] != list(range(len(ORIGINAL))):
        return None
    series = {"this run": metrics["val/acc"], "original": ORIGINAL}
    phases = [(phase["name"], phase["epochs"][0]) for phase in metrics["phases"]]
    title, last = "Validation accuracy, beside the original", percent_or_dash(metrics["val/acc"][-1])
    drawn = folder.draw(
        "original",
        partial(figures.curves, title, metrics["epoch"], series, phases, None, percent=True),
        alt_text=f"{title}: after the last epoch {last} and {percent_or_dash(ORIGINAL[-1])}%.",
    )
    rows = [
        [str(epoch), phase, percent_or_dash(ours), percent_or_dash(theirs)]
        for epoch, phase, ours, theirs in zip(
            metrics["epoch"], metrics["phase"], metrics["val/acc"], ORIGINAL, strict=True
        )
    ]
    table = Table("Validation accuracy, %", ["epoch", "phase", "this run", "original"], rows, words=(0, 1))
    return {"figures": [drawn], "table": table, "differences": DIFFERENCES}
