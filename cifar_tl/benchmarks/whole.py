"""Whole commands, as people type them: from the command to the first phase, and to the test result."""

import json
import subprocess
import sys
import time
from typing import Any

from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.errors import UserError

TRAIN = ("-m", "cifar_tl.train")
"""Arguments of Python that run the command."""


def startup(setting: Setting) -> list[dict[str, Any]]:
    """Return the seconds from the command to the first step, without features to compute, and of --help."""

    def first_phase() -> float:
        folder = setting.folder / f"startup{time.monotonic_ns()}"
        arguments = [*setting.overrides(), "finetune.cache_features=false", f"hydra.run.dir='{folder}'"]
        start = time.perf_counter()
        command = [sys.executable, "-u", *TRAIN, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("Phase '"):
                    break
            else:
                raise UserError(failed("cifar_tl.train", process.wait()))
            taken = time.perf_counter() - start
            process.kill()
        return taken

    def help_text() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *TRAIN, "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return summary(take_turns({"to the first step": first_phase, "--help": help_text}, setting.rounds), "s")


def failed(what: str, code: int) -> str:
    """Return what to say of a command that has printed its error itself."""
    return f"{what} ended with exit code {code}; what it printed says why."


def runs(setting: Setting) -> list[dict[str, Any]]:
    """Return the seconds from command to test result of whole 10 + 10 epoch runs, once each, with peak memory."""
    rows = []
    for experiment in ("default", "hires") if setting.is_gpu else ("default",):
        folder = setting.folder / f"run_{experiment}"
        arguments = [f"experiment={experiment}", *setting.overrides(), f"hydra.run.dir='{folder}'"]
        arguments.append("finetune.features_folder=null")  # a first run, which finds no features
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *TRAIN, *arguments])
        if done.returncode != 0:
            raise UserError(failed(f"experiment={experiment}", done.returncode))
        taken = time.perf_counter() - start
        metrics = json.loads((folder / "metrics.json").read_text())
        row = {"what": f"experiment={experiment}", "median": taken, "unit": "s", "low": taken, "high": taken, "n": 1}
        row |= {"test/acc": metrics["test/acc"]}
        row |= {f"{where} GiB": amount for where, amount in metrics["peak_memory_gib"].items()}
        row |= {f"{phase['name']} images/s": phase["images_per_s"] for phase in metrics["phases"]}
        rows.append(row)
    return rows
