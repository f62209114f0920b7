"""The frozen phase: on images, on features that are computed first, and on features that were kept."""

import shutil
import statistics
from pathlib import Path
from typing import Any

from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.run import train

EPOCHS = 10


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return the seconds of a frozen phase of 10 epochs, for either kind of augmentation that can be cached.

    On images, an epoch is measured and counted ten times: it is the same work in each.
    """
    rows = []
    for augment in ("none", "flip"):
        kept = setting.folder / f"features_{augment}"

        def phase(epochs: int, cached: bool, keep: bool, name: str, augment: str = augment, kept: Path = kept) -> float:
            config = setting.config(
                "finetune.unfreeze_at_epoch=null",
                f"trainer.max_epochs={epochs}",
                f"finetune.cache_features={str(cached).lower()}",
                f"finetune.features_folder='{kept}'" if keep else "finetune.features_folder=null",
                f"finetune.frozen_augment={augment}",
            )
            folder = setting.folder / f"{name}_{augment}"
            shutil.rmtree(folder, ignore_errors=True)
            metrics = train(config, folder, "benchmark")
            return float(metrics["phases"][0]["seconds"])

        candidates = {
            f"{augment}: images": lambda: EPOCHS * phase(1, False, False, "images"),
            f"{augment}: features computed first": lambda: phase(EPOCHS, True, False, "computed"),
            f"{augment}: features kept by an earlier run": lambda: phase(EPOCHS, True, True, "kept"),
        }
        figures = take_turns(candidates, setting.rounds)
        reference = f"{augment}: images"
        new = summary(figures, f"s for {EPOCHS} epochs")
        for row in new:
            row["times as fast"] = statistics.median(figures[reference]) / row["median"]
        rows += new
        shutil.rmtree(kept, ignore_errors=True)
    return rows
