"""python -m cifar_tl.benchmarks.predict: images per second of cifar_tl.predict on a folder of PNGs that it makes."""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image

from cifar_tl.build import build_module
from cifar_tl.cli import compose
from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD
from cifar_tl.data.decode import default_threads
from cifar_tl.data.inputs import open_inputs
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.hardware import device_name, resolve_accelerator
from cifar_tl.predict import attempts, predict


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print one line per figure."""
    parser = argparse.ArgumentParser(prog="python -m cifar_tl.benchmarks.predict", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="PNGs of 32x32 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="that decode (default: as cifar_tl.predict)")
    parser.add_argument("--accelerator", default="auto", help="as trainer.accelerator (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    device = resolve_accelerator(options.accelerator)
    threads = options.threads or default_threads()
    with tempfile.TemporaryDirectory() as folder:
        pngs, checkpoint = Path(folder, "pngs"), Path(folder, "model.ckpt")
        write_pngs(pngs, options.images)
        write_checkpoint(checkpoint)
        overrides = [f"checkpoint='{checkpoint}'", f"input='{pngs}'", f"threads={threads}"]
        cfg = compose("predict", [*overrides, f"trainer.accelerator={options.accelerator}"])

        def decode_all() -> None:
            with open_inputs(pngs) as inputs:
                for _ in attempts(inputs.files, threads):
                    pass

        print(f"device      {device_name(device)}; threads: {torch.get_num_threads()} compute, {threads} decode")
        print(f"decode      {text(measure(decode_all, options.images, options.repeats))}")
        print(f"predict     {text(measure(lambda: predict(cfg, Path(folder)), options.images, options.repeats))}")
    return 0


def measure(task: Callable[[], object], images: int, repeats: int) -> list[float]:
    """Return images per second of each repeat, start-up of the task included."""
    speeds = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        speeds.append(images / (time.perf_counter() - start))
    return speeds


def text(speeds: list[float]) -> str:
    """Return the median with the lowest and highest."""
    low, high = min(speeds), max(speeds)
    return f"{statistics.median(speeds):,.0f} images/s, median of {len(speeds)} ({low:,.0f} to {high:,.0f})"


def write_pngs(folder: Path, images: int) -> None:
    """Write generated images of 32x32."""
    folder.mkdir()
    for number, pixels in enumerate(Synthetic(10, max(images, 10)).test()[0][:images]):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number:05}.png")


def write_checkpoint(path: Path) -> None:
    """Write a checkpoint with random weights: speed does not depend on them."""
    cfg = compose("train", ["experiment=demo"])
    facts = {
        "classes": list(Synthetic.classes),
        "normalization": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    }
    module = build_module(cfg, Synthetic.classes)
    provenance = {"config": OmegaConf.to_container(cfg, resolve=True), "facts": facts}
    parts = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 0}
    torch.save({**parts, "cifar_tl": provenance}, path)


if __name__ == "__main__":
    sys.exit(main())
