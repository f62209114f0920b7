"""10 + 10 epochs by the original Keras program, by the loop of a Lightning tutorial, and by ours."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cifar_tl.benchmarks.frozen import EPOCHS
from cifar_tl.benchmarks.recipes import TIMED, TRAINING_IMAGES, Speeds, StepClock, data_config, speeds
from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.benchmarks.step import WARM_UP, fit_options
from cifar_tl.benchmarks.torchvision_way import Classifier, dataloader
from cifar_tl.build import build_datamodule
from cifar_tl.errors import UserError

PHASES = ("frozen", "fine-tune")
KERAS = "Keras, the original program"
TUTORIAL = "Lightning as a tutorial has it"
RECIPES = {
    "cifar_tl, seed_baseline": ["experiment=seed_baseline"],
    "cifar_tl, best32": ["experiment=best32"],
    "cifar_tl, best32 with AdamW": ["experiment=best32", "ablate=adamw"],
}
BATCH_SIZE = 64
"""The original's, for Keras and the tutorial; ours have their recipes'."""

TENSORFLOW = "tensorflow-cpu==2.21.0"
ENVIRONMENT = Path("outputs/bench/keras-env")
PROGRAM = Path(__file__).with_name("keras_program.py")

Speed = Callable[[str], float]
"""Trains some steps of a phase and returns images a second."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return images a second of each program in both phases, and what 10 + 10 epochs take.

    Raises:
        UserError: Not on a CPU, no environment for Keras, or Keras failed.
    """
    if setting.device != "cpu":
        raise UserError(f"--only peers is not measured with --device {setting.device}: give --device cpu.")
    with keras(keras_python(), setting.folder / "keras.log") as original:
        theirs = {KERAS: original, TUTORIAL: tutorial(setting)}
        candidates: Speeds = {f"{name}: {p}": partial(speed, p) for name, speed in theirs.items() for p in PHASES}
        for name, recipe in RECIPES.items():
            candidates |= {f"{name}: {p}": speed for p, speed in speeds(setting, recipe).items()}
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
        both = [figures[f"{name}: {phase}"] for phase in PHASES]
        ratios = [theirs / its for theirs, its in zip(keras_rounds, map(seconds, *both), strict=True)]
        frozen, finetune, times = summary({"frozen": both[0], "fine-tune": both[1], "times": ratios}, "")
        row: dict[str, Any] = {"what": name}
        for column, of in (("frozen images/s", frozen), ("fine-tune images/s", finetune)):
            row |= {column: of["median"], f"{of['what']} low": of["low"], f"{of['what']} high": of["high"]}
        row["s of 10 + 10 epochs, computed"] = seconds(frozen["median"], finetune["median"])
        row |= {"times as fast as Keras": times["median"], "times low": times["low"], "times high": times["high"]}
        result.append({**row, "n": len(ratios)})
    return result


def tutorial(setting: Setting) -> Speed:
    """Return the speed of the tutorial's loop, whose frozen phase sends the images through the backbone every epoch."""
    datamodule = build_datamodule(data_config(setting))
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = dataloader(datamodule.images("train"), datamodule.targets("train"), BATCH_SIZE, 2, setting.is_gpu)

    def speed(phase: str) -> float:
        clock = StepClock(setting)
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
