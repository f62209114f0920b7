"""What an evaluation reports beside the single view on the test set: other views, a temperature, other test sets."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from cifar_tl.data import robustness
from cifar_tl.model.temperature import fit_temperature
from cifar_tl.model.tta import AUGMENTED, SINGLE, View
from cifar_tl.runs.metrics import wilson_interval

log = logging.getLogger(__name__)

VIEW_TEXT = {"flip": "flip, 2 views", "flip_shift": "flip and 1-pixel shifts, 6 views"}


class Evaluation:
    """Collects figures by name, `<set>/<what>`, and says them as they come.

    Args:
        network: From images (batch, 3, 32, 32), uint8, to logits; in eval mode.
        device: Of the network.
        precision: Makes the context that a forward pass runs in, so that other views compute as the single one did.
        batch_size: Images per forward pass; figures do not depend on it.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
        batch_size: int,
    ) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.batch_size = batch_size
        self.temperature: float | None = None
        self.result: dict[str, Any] = {}

    def logits(self, images: Tensor, views: Mapping[View, float] = SINGLE) -> Tensor:
        """Return the weighted mean of the views' logits, (images, classes), float32, on the CPU."""
        parts = []
        with torch.inference_mode(), self.precision():
            for batch in torch.split(images, self.batch_size):
                batch = batch.to(self.device)
                parts.append(sum(weight * self.network(view(batch)).float() for view, weight in views.items()))
        return torch.cat([part.cpu() for part in parts if isinstance(part, Tensor)])

    def fit_temperature(self, images: Tensor, targets: Tensor) -> None:
        """Fit the temperature on validation images; every set measured later is reported with it, too."""
        logits = self.logits(images)
        self.temperature = self.result["temperature"] = fit_temperature(logits, targets)
        log.info("\nTemperature %.4f, fitted on %s validation images", self.temperature, f"{len(targets):,}")
        self.result |= named("val", scores(logits, targets))
        self._calibrate("val", logits, targets)

    def measure(self, name: str, images: Tensor, targets: Tensor, tta: bool) -> None:
        """Measure a further test set in a single view and, if asked for, in several."""
        logits = self.logits(images)
        figures = scores(logits, targets)
        log.info("\n%s: %s", name, figures_text(figures))
        self.result |= named(name, figures)
        self.measure_beside(name, logits, images, targets, tta)

    def measure_beside(self, name: str, logits: Tensor, images: Tensor, targets: Tensor, tta: bool) -> None:
        """Measure what is reported beside the single view, whose logits are given."""
        if self.temperature is not None:
            self._calibrate(name, logits, targets)
        for view in AUGMENTED if tta else ():
            figures = scores(self.logits(images, AUGMENTED[view]), targets)
            log.info("  %-38s %s", VIEW_TEXT[view], figures_text(figures))
            self.result |= named(f"{name}/{view}", figures)

    def measure_corruptions(self, root: Path, corruptions: list[str]) -> None:
        """Measure corruptions of CIFAR-10-C, single view, each severity by itself, and the mean over all given ones."""
        log.info("\nCIFAR-10-C, accuracy by severity 1 to 5, and their mean")
        table = []
        for corruption in corruptions:
            by_severity, targets = robustness.cifar10_c(root, corruption)
            accuracies = [scores(self.logits(robustness.as_tensor(part)), targets)["acc"] for part in by_severity]
            self.result[f"cifar10_c/{corruption}/acc"] = accuracies
            table.append(accuracies)
            columns = " ".join(f"{100 * accuracy:6.2f}" for accuracy in [*accuracies, np.mean(accuracies)])
            log.info("  %-18s %s %%", corruption, columns)
        self.result["cifar10_c/acc"] = float(np.mean(table))
        whose = "all 15" if corruptions == list(robustness.CORRUPTIONS) else f"these {len(corruptions)}"
        log.info("  mean accuracy over %s corruptions: %.2f %%", whose, 100 * self.result["cifar10_c/acc"])

    def _calibrate(self, name: str, logits: Tensor, targets: Tensor) -> None:
        """Add loss and ECE with the temperature; accuracy is the same with and without."""
        assert self.temperature is not None
        before, after = scores(logits, targets), scores(logits / self.temperature, targets)
        self.result |= named(f"{name}/calibrated", {key: after[key] for key in ("loss", "ece")})
        log.info(
            "  %-38s loss %.4f -> %.4f, ECE %.4f -> %.4f",
            f"temperature, {name}",
            before["loss"],
            after["loss"],
            before["ece"],
            after["ece"],
        )


def scores(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return accuracy with its 95 % interval, mean cross-entropy, and expected calibration error in 15 bins."""
    accuracy = float((logits.argmax(dim=1) == targets).double().mean())
    ece = multiclass_calibration_error(logits.softmax(dim=1), targets, num_classes=logits.shape[1], n_bins=15)
    return {
        "acc": accuracy,
        "acc_interval": list(wilson_interval(accuracy, len(targets))),
        "loss": float(cross_entropy(logits, targets)),
        "ece": float(ece),
    }


def named(prefix: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures under names that begin with `prefix/`."""
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def figures_text(figures: Mapping[str, Any]) -> str:
    """Return what `scores` returned, for people."""
    low, high = figures["acc_interval"]
    return (
        f"accuracy {100 * figures['acc']:.2f} % ({100 * low:.2f} to {100 * high:.2f} %), "
        f"loss {figures['loss']:.4f}, ECE {figures['ece']:.4f}"
    )
