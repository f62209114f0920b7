"""The processes that Lightning starts to train together with this one, as those of one job."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from omegaconf import read_write

from cifar_tl.errors import UserError
from cifar_tl.runs.resume import quoted, unsaved_overrides

log = logging.getLogger(__name__)

LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
"""Environment variables that Lightning sets for the processes that it starts, and for this one."""
PATIENCE_S = 60.0
"""How long processes may take to exit after the last thing that they do together."""
OF_A_SWEEP = (
    *("hydra.mode=", "hydra.run.", "hydra.sweep.", "hydra.sweeper.", "hydra.launcher.", "hydra.output_subdir="),
    *("hydra/launcher=", "hydra/sweeper="),
)
"""Beginnings of Hydra's overrides that are not for one run alone."""


@contextmanager
def own_processes(trainer: L.Trainer, folder: Path, goes_on: bool) -> Iterator[None]:
    """End the processes that Lightning starts when the block ends, and leave nothing of them to the next job.

    Lightning starts them with this process's command line. That of a sweep names all jobs, so that it is replaced by
    this job's meanwhile.

    Args:
        trainer: Not started yet.
        folder: Of the run.
        goes_on: Whether the run is resumed.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size == 1 or not isinstance(launcher, _SubprocessScriptLauncher):
        yield
        return
    variables, threads = {name: os.environ.get(name) for name in LAUNCHED}, torch.get_num_threads()
    failed = True
    try:
        with _command_of_one_run(folder, goes_on):
            yield
        failed = False
    finally:
        started = list(launcher.procs)
        launcher.procs.clear()  # Lightning would kill this process, too, once it saw one of them end with an error
        for process in started if failed else ():  # they may wait for this one for ever
            process.kill()
        _wait(started)
        torch.set_num_threads(threads)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if started and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _wait(processes: list[Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutExpired:
            log.warning("warning: process %d has not ended with the run, and is killed.", process.pid)
            process.kill()
            process.wait()


@contextmanager
def _command_of_one_run(folder: Path, goes_on: bool) -> Iterator[None]:
    """Make the command line, and what Hydra says of the run's folder, those of this job alone.

    A run that starts by itself has them already. One that goes on has more: its own overrides, which `resume=` brings.
    """
    if not HydraConfig.initialized() or not (goes_on or HydraConfig.get().mode is RunMode.MULTIRUN):
        yield
        return
    hydra: Any = HydraConfig.get()
    arguments, run_folder = sys.argv, hydra.run.dir
    flags = [a for a in arguments[1:] if a.startswith("-") and a not in ("-m", "--multirun")]
    task = unsaved_overrides(folder) if goes_on else [a for a in hydra.overrides.task if not a.startswith("resume=")]
    of_hydra = [a for a in hydra.overrides.hydra if not a.lstrip("+~").startswith(OF_A_SWEEP)]
    resume = [f"resume={quoted(folder)}"] if goes_on else []
    sys.argv = [arguments[0], *flags, *task, *of_hydra, *resume, f"hydra.run.dir={quoted(folder)}"]
    with read_write(hydra):
        hydra.run.dir = str(folder)
    try:
        yield
    finally:
        sys.argv = arguments
        with read_write(hydra):
            hydra.run.dir = run_folder


def check_sweep(trainer: L.Trainer) -> None:
    """Refuse jobs of several processes in sweeps whose jobs are in processes of their own, or share a study.

    Raises:
        UserError: Lightning would start the others, which know of neither.
    """
    if trainer.world_size == 1 or trainer.strategy.launcher is None or not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    single = (
        ("hydra/launcher=local", hydra.launcher._target_.endswith(".JoblibLauncher")),
        ("sweep=optuna", hydra.sweeper._target_.endswith(".OptunaSweeper")),
    )
    for choice, chosen in single:
        if chosen and hydra.mode is RunMode.MULTIRUN:
            raise UserError(
                f"{choice} is for jobs of one process, and trainer.devices={trainer.num_devices} on "
                f"{trainer.num_nodes} node(s) makes {trainer.world_size}. Give trainer.devices=1 (with "
                f"hydra/launcher=local, jobs take GPUs in turn), or hydra/launcher=slurm, whose jobs may have several."
            )
