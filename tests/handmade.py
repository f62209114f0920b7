"""Run folders made by hand."""

import json

import numpy as np

from cifar_tl.runs.metrics import confusion_matrix, negative_log_likelihood, reliability, softmax
from cifar_tl.runs.predictions import Predictions, SplitPredictions, worth_showing, write_images, write_predictions
from cifar_tl.runs.record import shortest

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]


def scored(seed, examples, strength):
    """Logits that are right more often the stronger they are, and sure of themselves beyond that."""
    rng = np.random.default_rng(seed)
    targets = np.arange(examples) % len(CLASSES)
    logits = rng.normal(size=(examples, len(CLASSES)))
    logits[np.arange(examples), targets] += strength
    logits[targets == 3, 4] += 0.8  # cats are taken for deer
    return SplitPredictions(
        (3 * logits).astype(np.float32), targets.astype(np.int64), np.arange(examples, dtype=np.int64) * 2
    )


def make_run(folder, overrides=(), seed=0, strength=1.5, status="finished", classes=CLASSES, **metrics):
    """Write the folder of a run of 2 + 2 epochs; `metrics` replace those of metrics.json."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([*overrides, f"seed={seed}"]), encoding="utf-8")
    val, test = scored(seed + 100, 300, strength), scored(seed, 400, strength)
    if status == "finished":
        write_predictions(folder, Predictions(list(classes), val, test, scored(seed + 100, 300, strength / 2)))
        chosen = worth_showing(test)
        images = np.random.default_rng(0).integers(0, 256, (len(chosen), 3, 32, 32), dtype=np.uint8)
        write_images(folder, test.indices[chosen], images)
        confusion = confusion_matrix(test.predicted, test.targets, len(CLASSES)).tolist()
        results = {
            "test/acc": test.accuracy,
            "test/loss": shortest(negative_log_likelihood(test.logits, test.targets)),
            "test/ece": shortest(reliability(softmax(test.logits), test.targets).ece),
            "test/confusion": confusion,
        }
        metrics = {"classes": list(classes), **results, **metrics}
    rates = {"head": 1e-3, "backbone": 1e-4}
    content = {
        "status": status,
        "experiment": "handmade",
        "started": "2026-01-02T03:04:05+00:00",
        "seed": seed,
        "best/epoch": 3,
        "best/val/acc": val.accuracy,
        "plan": [
            {"name": "frozen", "start": 0, "end": 2, "stages": [], "peak_lr": {**rates, "backbone": 0}},
            {"name": "fine-tune", "start": 2, "end": 4, "stages": ["layer4"], "peak_lr": rates},
        ],
        "phases": [
            {"name": "frozen", "epochs": [0, 1], "seconds": 20.0, "images_per_s": 900.0},
            {"name": "fine-tune", "epochs": [2, 3], "seconds": 80.0, "images_per_s": 200.0},
        ],
        "epoch": [0, 1, 2, 3],
        "phase": ["frozen", "frozen", "fine-tune", "fine-tune"],
        "train/loss": [2.0, 1.5, 1.4, 1.0],
        "train/acc": [0.2, 0.4, 0.5, 0.6],
        "val/loss": [1.9, 1.6, 1.5, 1.2],
        "val/acc": [0.3, 0.4, 0.5, 0.6],
        "val/ece": [0.1, 0.1, 0.05, 0.04],
        "lr/head": [1e-3, 1e-4, 1e-3, 1e-4],
        "lr/backbone": [0.0, 0.0, 1e-4, 1e-5],
        "seconds": [10.0, 10.0, 40.0, 40.0],
        "device": "a device",
        "precision": "32-true",
        "threads": 1,
        "git_commit": "0123abcd",
        "versions": {"torch": "2.x"},
        **metrics,
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder
