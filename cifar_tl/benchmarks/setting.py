"""What every measurement shares: where it runs, on which data, and how candidates take turns."""

import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cifar_tl.cli import compose
from cifar_tl.runs.resume import quoted


@dataclass(frozen=True)
class Setting:
    """Where and on what to measure.

    Attributes:
        device: `cpu` or `cuda`.
        precision: Lightning's, such as `bf16-mixed`.
        data_root: A folder with CIFAR-10, or None for generated images.
        weights: As in model.weights, or None for random ones.
        rounds: Turns of every candidate.
        limit: Images to use at most; None for all.
        batch_sizes: For the fine-tune step.
        folder: Gets the runs that are measured.
    """

    device: str
    precision: str
    data_root: str | None
    weights: str | None
    rounds: int
    limit: int | None
    batch_sizes: tuple[int, ...]
    folder: Path

    @property
    def is_gpu(self) -> bool:
        """Whether this is about a GPU."""
        return self.device == "cuda"

    def overrides(self) -> list[str]:
        """Return the overrides that make the command line measure what the benchmarks do."""
        data = ["data=synthetic"] if self.data_root is None else [f"data.root={quoted(self.data_root)}"]
        weights = "null" if self.weights is None else quoted(self.weights)
        return [
            *data,
            f"model.weights={weights}",
            f"data.limit={'null' if self.limit is None else self.limit}",
            f"trainer.accelerator={self.device}",
            f"trainer.precision={self.precision}",
            "logger=csv",
        ]

    def config(self, *overrides: str) -> DictConfig:
        """Compose conf/train.yaml for this setting."""
        return compose("train", [*self.overrides(), *overrides])

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which Lightning runs a forward pass; the scaling of 16-mixed's loss is not in it."""
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device, dtype=dtype)


def take_turns(candidates: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call each candidate once per round, one after the other, so that what slows the machine slows all of them.

    Args:
        candidates: Each measures itself and returns a figure.
        rounds: Turns of each.
        warm_up: Turns of each that come first and do not count.

    Returns:
        The figures of each candidate.
    """
    figures: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, measure in candidates.items():
            os.sync()  # what the last one wrote goes to the disk now, not during this one's turn
            figure = measure()
            if turn >= warm_up:
                figures[name].append(figure)
    return figures


def summary(figures: Mapping[str, list[float]], unit: str, reference: str | None = None) -> list[dict[str, Any]]:
    """Return a row per candidate: median, range, number, and the ratio of its median to that of a reference."""
    rows = []
    for name, values in figures.items():
        row: dict[str, Any] = {"what": name, "median": statistics.median(values), "unit": unit}
        row |= {"low": min(values), "high": max(values), "n": len(values)}
        if reference is not None:
            row["ratio"] = row["median"] / statistics.median(figures[reference])
        rows.append(row)
    return rows
