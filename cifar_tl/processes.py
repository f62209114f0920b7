"""The processes that Lightning starts to train together with this one, as those of one job."""

import os
import sys
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
from cifar_tl.runs.resume import CONFIG_DIR, quoted

LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
"""Environment variables that Lightning sets for the processes that it starts, and for this one."""
PATIENCE_S = 60
"""How long a process may take to end after the last thing that they do together."""


@contextmanager
def own_processes(trainer: L.Trainer, folder: Path, goes_on: bool) -> Iterator[None]:
    """End the processes that Lightning starts with what is done inside, and leave nothing of them to another job.

    Lightning gives them this process' command line, which of a sweep has all jobs: meanwhile, it is that of one run.

    Args:
        trainer: Not started yet.
        folder: Of the run.
        goes_on: The run is one that goes on.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size == 1 or not isinstance(launcher, _SubprocessScriptLauncher):
        yield
        return
    variables, threads = {name: os.environ.get(name) for name in LAUNCHED}, torch.get_num_threads()
    started: list[Popen[bytes]] = []
    try:
        with _command_of_one_run(folder, goes_on):
            yield
        started = launcher.procs
        _wait(started)
    except BaseException:
        started = list(launcher.procs)
        launcher.procs.clear()  # whose end Lightning would otherwise have this process follow
        for process in started:  # they may wait for this one for ever
            process.kill()
        _wait(started)
        raise
    finally:
        if started:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            torch.set_num_threads(threads)
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _wait(processes: list[Popen[bytes]]) -> None:
    for process in processes:
        try:
            process.wait(PATIENCE_S)
        except TimeoutExpired:
            process.kill()


@contextmanager
def _command_of_one_run(folder: Path, goes_on: bool) -> Iterator[None]:
    """Make the command line, and what Hydra says of the run's folder, those of a sweep's job alone, if this is one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        yield
        return
    hydra: Any = HydraConfig.get()
    arguments, run_folder = sys.argv, hydra.run.dir
    flags = [argument for argument in arguments[1:] if argument.startswith(CONFIG_DIR)]
    task = [a for a in hydra.overrides.task if not a.startswith(("sweep=", "resume="))]
    resume = [f"resume={quoted(folder)}"] if goes_on else []
    sys.argv = [arguments[0], *flags, *task, *resume, f"hydra.run.dir={quoted(folder)}"]
    with read_write(hydra):
        hydra.run.dir = str(folder)
    try:
        yield
    finally:
        sys.argv = arguments
        with read_write(hydra):
            hydra.run.dir = run_folder


def check_sweep(trainer: L.Trainer) -> None:
    """Refuse jobs of several processes in sweeps whose command line cannot be repeated for each of them.

    Raises:
        UserError: Lightning would start the others, and they would not do the same job.
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
