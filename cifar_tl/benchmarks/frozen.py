"""The frozen phase: on images, on features that are computed first, and on features that an earlier run has kept."""

import shutil
from typing import Any

from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.train import train

EPOCHS = 10


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return the seconds of a frozen phase of 10 epochs on images as they are (finetune.frozen_augment=none).

    On images, one epoch is measured and counted ten times: it is the same work in each. Runs keep the features of
    weights from a file, no others.
    """
    kept = setting.folder / "features"

    def phase(epochs: int, cached: bool) -> float:
        folder = setting.folder / "frozen"
        shutil.rmtree(folder, ignore_errors=True)
        config = setting.config(
            "finetune.unfreeze_at_epoch=null",
            f"trainer.max_epochs={epochs}",
            f"finetune.cache_features={str(cached).lower()}",
            f"finetune.features_folder='{kept}'",
            "finetune.frozen_augment=none",
        )
        return float(train(config, folder, "benchmark")["phases"][0]["seconds"])

    def computed() -> float:
        shutil.rmtree(kept, ignore_errors=True)
        return phase(EPOCHS, cached=True)

    candidates = {"images": lambda: EPOCHS * phase(1, cached=False), "features, computed": computed}
    if setting.weights is not None:
        candidates["features, kept by an earlier run"] = lambda: phase(EPOCHS, cached=True)
    # runs of minutes need no turn to warm up; on a GPU they take seconds, the first of which load kernels
    rows = summary(take_turns(candidates, setting.rounds, warm_up=int(setting.is_gpu)), f"s for {EPOCHS} epochs")
    for row in rows:
        row["times as fast"] = rows[0]["median"] / row["median"]
    return rows
