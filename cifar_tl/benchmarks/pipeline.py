"""Input pipeline: images a second, ours and torchvision's transforms in a DataLoader, with the same augmentation."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.benchmarks.torchvision_way import dataloader
from cifar_tl.build import build_source
from cifar_tl.data.augment import Augment
from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD
from cifar_tl.data.loader import ArrayLoader

IMAGES = 4000
"""A DataLoader's share of a turn; ours takes its turns on ten times as many, to be measurable."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return images a second of each way to make batches of 128."""
    config = setting.config()
    source = build_source(config.data)
    source.prepare()
    images, targets = source.read(["train"])["train"]
    assert isinstance(images, torch.Tensor)
    at_most = max(512, setting.limit or len(images))  # some batches, at least
    few, many = slice(0, min(IMAGES, at_most)), slice(0, min(10 * IMAGES, at_most))
    augment = Augment(**config.augment)
    epochs = iter(range(1_000_000))
    ours = ArrayLoader(
        images[many],
        targets[many],
        128,
        IMAGENET_MEAN,
        IMAGENET_STD,
        augment=lambda epoch: augment,
        epoch=lambda: next(epochs),
        device=setting.device,
    )
    theirs = {f"DataLoader, {w} workers": dataloader(images[few], targets[few], 128, w, setting.is_gpu) for w in (0, 2)}

    def rate(batches: Iterable[Any]) -> Callable[[], float]:
        def measure() -> float:
            iterator = iter(batches)
            next(iterator)  # a first batch waits for the workers to have started
            count = 0
            setting.synchronize()
            start = time.perf_counter()
            for images, _ in iterator:
                count += len(images.to(setting.device))
            setting.synchronize()
            return count / (time.perf_counter() - start)

        return measure

    ways: dict[str, Iterable[Any]] = {"cifar_tl": ours, **theirs}
    rates = {name: rate(batches) for name, batches in ways.items()}
    return summary(take_turns(rates, setting.rounds), "images/s", "DataLoader, 2 workers")
