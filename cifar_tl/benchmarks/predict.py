"""cifar_tl.predict on a folder of PNGs that is made for it."""

import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image

from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.build import build_module
from cifar_tl.checkpoints import FORMAT
from cifar_tl.cli import compose
from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD
from cifar_tl.data.decode import default_threads
from cifar_tl.data.inputs import open_inputs
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.predict import attempts, predict
from cifar_tl.runs.resume import quoted

IMAGES = 10_000


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return images a second of decoding alone, and of predicting, the command's start-up left out."""
    count = setting.limit or IMAGES
    pngs, checkpoint = setting.folder / "pngs", setting.folder / "model.ckpt"
    write_pngs(pngs, count)
    write_checkpoint(checkpoint)
    given = [f"checkpoint={quoted(checkpoint)}", f"input={quoted(pngs)}", f"trainer.accelerator={setting.device}"]
    cfg = compose("predict", given)

    def decode_all() -> float:
        start = time.perf_counter()
        with open_inputs(pngs) as inputs:
            for _ in attempts(inputs.files, default_threads()):
                pass
        return count / (time.perf_counter() - start)

    def predict_all() -> float:
        start = time.perf_counter()
        predict(cfg, setting.folder)
        return count / (time.perf_counter() - start)

    return summary(take_turns({"decode": decode_all, "predict": predict_all}, setting.rounds), "images/s")


def write_pngs(folder: Path, images: int) -> None:
    """Write generated images of 32x32."""
    folder.mkdir()
    for number, pixels in enumerate(Synthetic(10, max(images, 10)).read(["test"])["test"][0][:images]):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number:05}.png")


def write_checkpoint(path: Path) -> None:
    """Write a checkpoint with random weights: speed does not depend on them."""
    cfg = compose("train", ["experiment=demo"])
    facts = {
        "classes": list(Synthetic.classes),
        "normalization": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    }
    module = build_module(cfg, Synthetic.classes)
    provenance = {"format": FORMAT, "config": OmegaConf.to_container(cfg, resolve=True), "facts": facts}
    parts = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 0}
    torch.save({**parts, "cifar_tl": provenance}, path)
