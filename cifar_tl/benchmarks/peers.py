"""10 + 10 epochs by the original Keras program, by the loop of a Lightning tutorial, and by ours."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from cifar_tl.benchmarks.frozen import EPOCHS
from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.benchmarks.step import WARM_UP, fit_options
from cifar_tl.benchmarks.torchvision_way import Classifier, dataloader
from cifar_tl.build import build_datamodule, build_module, build_unfreeze
from cifar_tl.callbacks.epoch_seed import EpochSeed
from cifar_tl.callbacks.feature_cache import FeatureCache
from cifar_tl.callbacks.freeze_guard import FreezeGuard
from cifar_tl.cli import compose
from cifar_tl.errors import UserError
from cifar_tl.hardware import flush_denormals, prepare_for

PHASES = ("frozen", "fine-tune")
KERAS = "Keras, the original program"
TUTORIAL = "Lightning as a tutorial has it"
RECIPES = {
    "cifar_tl, seed_baseline": ["experiment=seed_baseline"],
    "cifar_tl, best32": ["experiment=best32"],
    "cifar_tl, best32 with AdamW": ["experiment=best32", "ablate=adamw"],
}
TRAINING_IMAGES = 45_000
IMAGES = 2048
"""Images that a turn has; fewer with --limit, but two batches of the largest size."""
TIMED = 1024
"""Images of a turn that are timed."""
BATCH_SIZE = 64
"""The original's, for Keras and the tutorial; ours have their recipes'."""

TENSORFLOW = "tensorflow-cpu==2.21.0"
ENVIRONMENT = Path("outputs/bench/keras-env")
PROGRAM = Path(__file__).with_name("keras_program.py")

Speed = Callable[[str], float]
"""Trains some steps of a phase and returns images a second."""


class Clock(L.Callback):
    """Time the steps after the first ones, but for each epoch's first, which has the epoch's start in it.

    Attributes:
        images: Of the steps that are timed.
        seconds: From the end of a step to the end of the next one, together.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._steps = 0
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Add a step."""
        now = time.perf_counter()
        self._steps += 1
        if self._steps > WARM_UP and batch_idx > 0:
            self.images += len(batch[0])
            self.seconds += now - self._last
        self._last = now


class TimedFeatures(FeatureCache):
    """Time the computation of the features, that of validation images among them.

    Attributes:
        seconds_per_view: Of one image's, or mirror image's, features.
    """

    seconds_per_view = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the features, if this is the first epoch."""
        features = self.datamodule.features
        start = None if features else time.perf_counter()
        super().on_train_epoch_start(trainer, pl_module)
        if start is not None:
            computed = sum(values.shape[0] * values.shape[1] for values in features.values())
            self.seconds_per_view = (time.perf_counter() - start) / computed


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return images a second of each program in both phases, and what 10 + 10 epochs take.

    Raises:
        UserError: Not on a CPU, no environment for Keras, or Keras failed.
    """
    if setting.device != "cpu":
        raise UserError(f"--only peers is not measured with --device {setting.device}: give --device cpu.")
    flush_denormals()
    with keras(keras_python(), setting.folder / "keras.log") as original:
        speeds = {KERAS: original, TUTORIAL: tutorial(setting)}
        speeds |= {name: ours(setting, recipe) for name, recipe in RECIPES.items()}
        candidates = {f"{name}: {p}": partial(speed, p) for name, speed in speeds.items() for p in PHASES}
        # the first round has Keras' compilation
        return rows(take_turns(candidates, setting.rounds, warm_up=1))


def rows(figures: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row per program.

    Args:
        figures: Images a second by `NAME: PHASE`, one per round.
    """

    def seconds(frozen: float, finetune: float) -> float:
        return EPOCHS * TRAINING_IMAGES * (1 / frozen + 1 / finetune)

    result = []
    keras_rounds = list(map(seconds, *(figures[f"{KERAS}: {phase}"] for phase in PHASES)))
    for name in dict.fromkeys(key.rpartition(": ")[0] for key in figures):
        speeds = [figures[f"{name}: {phase}"] for phase in PHASES]
        ratios = [theirs / its for theirs, its in zip(keras_rounds, map(seconds, *speeds), strict=True)]
        frozen, finetune, times = summary({"frozen": speeds[0], "fine-tune": speeds[1], "times": ratios}, "")
        row: dict[str, Any] = {"what": name}
        for column, of in (("frozen images/s", frozen), ("fine-tune images/s", finetune)):
            row |= {column: of["median"], f"{of['what']} low": of["low"], f"{of['what']} high": of["high"]}
        row["s of 10 + 10 epochs, computed"] = seconds(frozen["median"], finetune["median"])
        row |= {"times as fast as Keras": times["median"], "times low": times["low"], "times high": times["high"]}
        result.append({**row, "n": len(ratios)})
    return result


def images_of(setting: Setting) -> int:
    """Return how many training images a turn has."""
    return max(512, min(IMAGES, setting.limit or IMAGES))


def data_config(setting: Setting, *overrides: str) -> DictConfig:
    """Compose conf/train.yaml with as many images as a turn has, and few to validate, whose features count little."""
    return replace(setting, limit=images_of(setting)).config("data.val_size=256", *overrides)


def ours(setting: Setting, recipe: Sequence[str]) -> Speed:
    """Return the speed of a recipe, in Lightning with the callbacks that freeze, cache and check.

    The frozen phase is 10 epochs on features that are computed first: its images a second are those of the epochs, with
    the time for the features, as they come out for any number of images.
    """
    batch_size = compose("train", recipe).data.batch_size  # generated images come with another one

    def phase(unfreeze_at_epoch: int) -> tuple[DictConfig, Any]:
        given = (f"data.batch_size={batch_size}", f"finetune.unfreeze_at_epoch={unfreeze_at_epoch}")
        config = data_config(setting, *recipe, *given)
        datamodule = build_datamodule(config)
        datamodule.prepare_data()
        datamodule.setup("fit")
        return config, datamodule

    phases = {name: phase(epoch) for name, epoch in zip(PHASES, (EPOCHS, 0), strict=True)}

    def speed(name: str) -> float:
        config, datamodule = phases[name]
        epoch, batchnorm = config.finetune.unfreeze_at_epoch, config.finetune.batchnorm
        guard = FreezeGuard(epoch, batchnorm=batchnorm, max_epochs=config.trainer.max_epochs)
        features, clock = TimedFeatures(datamodule, epoch, "true", None), Clock()
        callbacks = [EpochSeed(0), build_unfreeze(config), guard, clock]
        steps = WARM_UP + TIMED // batch_size
        if name == "frozen":
            callbacks.append(features)
            steps = EPOCHS * math.ceil(images_of(setting) / batch_size)
        module = build_module(config, datamodule.classes)
        prepare_for(setting.device, module)
        L.Trainer(**fit_options(setting, steps), callbacks=callbacks).fit(module, datamodule=datamodule)
        return 1 / (clock.seconds / clock.images + features.views * features.seconds_per_view / EPOCHS)

    return speed


def tutorial(setting: Setting) -> Speed:
    """Return the speed of the tutorial's loop, whose frozen phase sends the images through the backbone every epoch."""
    datamodule = build_datamodule(data_config(setting))
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = dataloader(datamodule.images("train"), datamodule.targets("train"), BATCH_SIZE, 2, setting.is_gpu)

    def speed(phase: str) -> float:
        clock = Clock()
        module = Classifier(len(datamodule.classes), 1e-3, frozen=phase == "frozen")
        L.Trainer(**fit_options(setting, WARM_UP + TIMED // BATCH_SIZE), callbacks=[clock]).fit(module, loader)
        return clock.images / clock.seconds

    return speed


def keras_python() -> Path:
    """Return the Python of an environment with TensorFlow, which is made the first time.

    Raises:
        UserError: It cannot be made.
    """
    python, made = ENVIRONMENT / "bin" / "python", ENVIRONMENT / f"{TENSORFLOW}.installed"
    if made.is_file():
        return python
    if sys.version_info >= (3, 14):
        raise UserError(f"{TENSORFLOW}, which --only peers needs, is not built for Python 3.14: use 3.11 to 3.13.")
    print(f"Installing {TENSORFLOW} for Keras into {ENVIRONMENT}: once, some minutes, 1.6 GB of disk.", flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TENSORFLOW],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise UserError(
                f"{TENSORFLOW} cannot be installed into {ENVIRONMENT}, which --only peers needs; is there a network? "
                f"`{' '.join(command)}` says: {last_line(done.stderr + done.stdout)}"
            )
    made.touch()
    return python


@contextmanager
def keras(python: Path, log: Path) -> Iterator[Speed]:
    """Start the Keras program in a process of its own, give its speed, and kill it at the end.

    Args:
        python: Of an environment with TensorFlow.
        log: Gets what the program prints beside its answers.
    """
    numbers = (torch.get_num_threads(), WARM_UP, TIMED // BATCH_SIZE)
    command = [str(python), "-I", str(PROGRAM), *map(str, numbers)]  # -I: without this process' PYTHONPATH
    pipe = subprocess.PIPE
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=errors) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        to_program, answers = process.stdin, process.stdout

        def speed(phase: str) -> float:
            try:
                to_program.write(f"{phase}\n".encode())
                answer = answers.readline()
            except BrokenPipeError:
                answer = b""
            if not answer:
                said = last_line(log.read_text(errors="replace"))
                raise UserError(f"Keras ended with exit code {process.wait()} in its phase {phase}: {said}")
            return float(json.loads(answer)["images_per_s"])

        try:
            yield speed
        finally:
            process.kill()


def last_line(text: str) -> str:
    """Return the last line of what a program said."""
    return (text.strip() or "nothing").splitlines()[-1]
