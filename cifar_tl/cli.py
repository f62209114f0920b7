"""What the commands share: finding `conf`, resuming by command line, and errors that people can read."""

import errno
import importlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cifar_tl import slurm
from cifar_tl.errors import GpuLostError, Interrupted, UserError, check_path, suggest
from cifar_tl.files import say
from cifar_tl.runs.resume import (
    is_first_process,
    quoted,
    refuse_used_folder,
    with_folder_of_slurm_job,
    with_overrides_of_resumed_run,
)
from cifar_tl.search import OptunaSweeper

log = logging.getLogger(__name__)

EXTENSIBLE = ("trainer.", "callbacks.", "logger.", "model.options.", "hydra.", "hydra/")
"""Where `+key=value` may add keys of a run; the other commands have Hydra's alone, and evaluation the Trainer's."""
TRAINER_KEYS = {
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm", "benchmark", "deterministic"),
    *("max_epochs", "max_time", "limit_train_batches", "check_val_every_n_epoch"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("log_every_n_steps", "enable_progress_bar", "enable_model_summary", "profiler", "detect_anomaly"),
}
"""What a run can honour of Lightning's Trainer, without a difference between its record and what was done."""
TRAINER_ALTERNATIVES = {
    "fast_dev_run": "It keeps no checkpoint, so that there is nothing to test. experiment=demo goes through everything "
    "in a minute; data.limit=100 trainer.max_epochs=2 finetune.unfreeze_at_epoch=1 shortens a run.",
    **dict.fromkeys(
        ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"),
        "data.limit=100 takes 100 images of every split, and the record says so.",
    ),
    "max_steps": "trainer.max_epochs counts epochs, and +trainer.limit_train_batches shortens each of "
    "them. A run that was started with it goes on with resume=RUN '~trainer.max_steps'.",
    "val_check_interval": "trainer.check_val_every_n_epoch counts whole epochs.",
    "callbacks": "Callbacks are a group of their own: +callbacks.NAME._target_=CLASS.",
    "logger": "Loggers are a group of their own: logger=csv, or +logger.NAME._target_=CLASS.",
    "default_root_dir": "hydra.run.dir=FOLDER is the run's folder.",
}
"""What to give instead of some other keys of the Trainer."""
ALTERNATIVES = {
    **dict.fromkeys(("lr", "learning_rate"), " The learning rates are finetune.head_lr and finetune.backbone_lr."),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), " Did you mean trainer.max_epochs?"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus"), " Did you mean trainer.devices?"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), " Did you mean finetune.schedule?"),
    **dict.fromkeys(("model", "backbone", "arch"), " The backbone is ResNet-50; CONTRIBUTING says how to replace it."),
    "data": " Images of other classes: data=folder.",
}
"""What to say of some keys that there are not, by their last part, and of choices of a group that there are not."""
RECIPES = ("experiment", "ablate", "sweep")
"""Groups whose files have keys of all groups."""
DISK_ERRORS = (errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST, errno.EDQUOT)
READING_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE)
"""What reading meets, too."""
SHORT_FLAGS = {"-c": "--cfg", "-p": "--package", "-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir"}
FLAGS = {
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun"),
}
"""All long ones of Hydra's."""
FLAGS_WITH_VALUE = (*SHORT_FLAGS.values(), "--experimental-rerun")
"""Of Hydra's; that of `--info` may be left out."""
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
PRINTING = ("--cfg", "--info", "--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc")
"""Flags that print something instead of running."""
PATH_KEYS = {
    *("checkpoint", "input", "output", "data.root", "model.weights", "finetune.features_folder", "resume"),
    *("hydra.run.dir", "hydra.sweep.dir"),
}
"""Keys of all commands whose values are text, whatever they look like."""


class StdoutHandler(logging.Handler):
    """Print log lines to what stdout is at that moment, so that a live progress bar can move out of their way.

    Args:
        stream: Ignored; Hydra's logging config gives one to its console handler.
    """

    def __init__(self, stream: object = None) -> None:
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; a console that is gone, or has no such letters, never ends a run."""
        try:
            say(self.format(record))
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # for the rest of the process


@dataclass(frozen=True)
class Failure:
    """What a job returns instead of its result: Hydra notes it, and the sweep goes on.

    Attributes:
        message: What was wrong, for the person at the keyboard.
    """

    message: str


class Refused(BaseException):
    """A UserError, its cause, on the way out of a callback, whose exceptions are mere warnings to Hydra."""


class SweepCallback(Callback):
    """What the command line asks of a sweep's callback, which Hydra does not call after an interrupt.

    Before Hydra writes anything, it refuses a folder that another run or sweep has, wherever the config has it from.
    """

    current: ClassVar["SweepCallback | None"] = None
    """The one of this process."""

    def __init__(self) -> None:
        SweepCallback.current = self

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a run's folder."""
        HydraConfig.instance().set_config(config)  # as Hydra does next; `${hydra:...}` may be in the folder's name
        self._refuse_used_folder(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a sweep's folder."""
        self._refuse_used_folder(config, "sweep")

    def _refuse_used_folder(self, config: DictConfig, kind: str) -> None:
        if config.get("resume") is not None:
            return
        try:
            refuse_used_folder(Path(config.hydra[kind].dir), config.hydra.overrides.task, multirun=kind == "sweep")
        except UserError as error:
            raise Refused from error

    def finish(self) -> None:
        """Leave what there is to see of the jobs so far."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Take back what a sweep has left that was refused before its first job."""
        raise NotImplementedError

    def failures(self) -> tuple[list[str], int]:
        """Return what was wrong with the jobs that failed, and the number of all jobs, in whatever process they ran."""
        raise NotImplementedError

    def resume_argument(self) -> str:
        """Return the override that goes on with the sweep, as a shell takes it."""
        raise NotImplementedError


def conf_folder() -> Path:
    """Return the folder of the configs: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a config of `conf` as the command line does, inside of a command or outside.

    Args:
        config_name: A file of `conf`, without its ending.
        overrides: As on a command line.

    Raises:
        HydraException: A mistake in the overrides; see `explain`.
    """
    if GlobalHydra.instance().is_initialized():  # by the command that this is a part of
        return hydra.compose(config_name, list(overrides))
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def _of_several(arguments: Sequence[str]) -> set[str]:
    """Return the groups for sweeps among some arguments that start a run, rather than print or resume something."""
    if any(a.startswith("resume=") or a.partition("=")[0] in PRINTING for a in arguments):
        return set()  # a sweep's job has the sweep's overrides
    groups = ("sweep", "hydra/launcher", "hydra/sweeper")
    return {argument.lstrip("+").partition("=")[0] for argument in arguments}.intersection(groups)


def run(task: str | Callable[[DictConfig], Any], config_name: str, arguments: list[str]) -> int:
    """Compose a config from command-line arguments, run a task with it and return the exit code.

    Args:
        task: Gets the composed config; once per job of a multirun. As `module:function` it is imported when it is
            called: `--help`, `--cfg job` and mistyped keys then do without what takes seconds to import.
        config_name: A file of `conf`, without its ending.
        arguments: As a shell gives them, without the program's name.

    Returns:
        0; 1 after a mistake, whose explanation is then on stderr; 130 after Ctrl-C.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and what to print is decided here
    function = _imported_when_called(task) if isinstance(task, str) else task
    arguments = flags_joined(arguments)
    multirun = bool({"-m", "--multirun"} & set(arguments))
    failures: list[str] = []
    jobs = 0

    def job(cfg: DictConfig) -> Any:
        nonlocal jobs
        jobs += 1
        multirun = HydraConfig.get().mode is RunMode.MULTIRUN
        try:
            if config_name == "train":
                _refuse_unread_keys(cfg)
            # a launcher may have brought this to another process
            return function(cfg) if StopSignals.current is not None else _end_on_signals(function, cfg)
        except Interrupted as stop:
            _note_in_log(str(stop))
            raise
        except Exception as error:
            message = _explained(error, config_name)
            if message is not None:
                _note_in_log(f"error: {message}")
            else:
                if not multirun:
                    _note_in_log("".join(traceback.format_exception(error)))
                    raise
                log.exception("Unexpected error")  # the other jobs and the table are still worth having
                message = f"{type(error).__name__}: {error}"
                if type(error).__name__ == "AcceleratorError":  # of torch, which may not be imported here
                    raise GpuLostError(
                        f"{message}\nThe GPU fails this process from here on: no further job."
                    ) from error
            overrides = " ".join(HydraConfig.get().overrides.task)
            failures.append(f"job {HydraConfig.get().job.num} ({overrides}): {message}" if multirun else message)
            return Failure(message)

    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(job)
    before = sys.argv
    SweepCallback.current = None
    # Hydra instantiates plugins whose name is in hydra_plugins, and that it has found there or was told of
    Plugins.instance().class_name_to_class["hydra_plugins.OptunaSweeper"] = OptunaSweeper
    with StopSignals() as signals:
        try:
            if multirun and any(argument.startswith("--cfg") for argument in arguments):
                raise UserError("--cfg prints the config of one run, and -m is for several: leave one of them out.")
            if not multirun and is_first_process() and (alone := sorted(_of_several(arguments))):
                raise UserError(f"{alone[0]}= is for several runs, and without -m this would be one: put -m before it.")
            _refuse_dashed_keys(arguments, config_name)
            _refuse_added_keys(arguments, config_name)
            _refuse_several_choices(arguments)
            arguments = [set_or_add(argument, config_name) for argument in arguments]
            if config_name == "train":
                arguments = with_folder_of_slurm_job(arguments)
            sys.argv = [before[0], *map(_path_as_text, _flags_first(with_overrides_of_resumed_run(arguments)))]
            main()
            if multirun and (sweep := SweepCallback.current) is not None:
                told, count = sweep.failures()
                failures, jobs = (told, count) if count else (failures, jobs)  # no table where none could be written
        except BrokenPipeError:
            if jobs:
                raise
            # `--help | head`: who reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
            return 1
        except BaseException as caught:
            error = caught.__cause__ if isinstance(caught, Refused) and caught.__cause__ is not None else caught
            if signals.stopped(error):
                if not signals.end(error) and multirun:
                    _end_interrupted_sweep()
                return 130
            if (message := _explained(error, config_name)) is None:
                raise
            failures.append(message)
            if isinstance(error, BrokenExecutor | GpuLostError) or type(error).__module__.startswith("submitit"):
                _end_interrupted_sweep()
            elif not jobs and SweepCallback.current is not None:
                SweepCallback.current.withdraw()
        finally:
            sys.argv = before
            HydraConfig.instance().cfg = None  # whoever calls train() next in this process is no command
    for message in failures:
        print(f"error: {message}", file=sys.stderr)
    if failures and jobs > 1:
        print(f"{len(failures)} of {jobs} jobs failed", file=sys.stderr)
    return 1 if failures else 0


class StopSignals:
    """SIGTERM and SIGUSR1 end a command as Ctrl-C does, with what there is saved; SLURM then starts the job again.

    Nobody else handles these signals meanwhile. Lightning's handlers would save in mid-step, and with several processes
    wait for each other there; `callbacks.OwnSignals` puts these back. submitit's, in the jobs of its sweeps, would
    ignore SIGTERM, and on SIGUSR2 start the job again with nothing saved; the latter is called here after saving.

    Of the processes that train together, the first one stops, and the others end with it: it may be waiting for them.
    """

    current: ClassVar["StopSignals | None"] = None
    """The one of this process."""

    def __enter__(self) -> Self:
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
            self._before = {number: signal.getsignal(number) for number in numbers}
            if not callable(self._before[signal.SIGUSR2]):
                del self._before[signal.SIGUSR2]
        for number in self._before:
            signal.signal(number, self._stop)
        if self._before and not is_first_process():
            # Ctrl-C reaches all processes of a terminal; if one ended now, Lightning would kill the one that saves
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        StopSignals.current = self
        return self

    def __exit__(self, *error: object) -> None:
        StopSignals.current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self._received = number
        first = is_first_process()
        for each in self._before:
            signal.signal(each, signal.SIG_IGN if first else signal.SIG_DFL)  # a second one cannot disturb the saving
        # nor can the end of a DataLoader's workers, which the same signal may have killed: torch's handler would raise
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        if first:
            raise KeyboardInterrupt

    @classmethod
    def received(cls) -> bool:
        """Return whether a signal has come; Ctrl-C is none of these."""
        return cls.current is not None and cls.current._received is not None

    def stopped(self, error: BaseException) -> bool:
        """Return whether an error is the end that a signal, or Ctrl-C, has asked for."""
        if self._received is not None:
            workers = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)  # they may have died first
            ours = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
            return ours or workers or not is_first_process()
        return isinstance(error, Interrupted | KeyboardInterrupt)

    def end(self, error: BaseException) -> bool:
        """Say what is saved, after `stopped`; have SLURM start the job again, and return whether it does."""
        if not is_first_process():
            return False
        text = str(error) if isinstance(error, Interrupted) and str(error) else "Interrupted."
        if self._received == signal.SIGUSR2:
            print(f"\n{text.splitlines()[0]}", file=sys.stderr, flush=True)
            self._before[signal.SIGUSR2](self._received, None)  # starts the job again, if it may, and exits
        again = self._received is not None and slurm.requeue(preempted_only=self._received == signal.SIGTERM)
        if again:
            text = f"{text.splitlines()[0]} SLURM starts the job again, and it goes on by itself."
        print(f"\n{text}", file=sys.stderr, flush=True)
        return again


def _end_on_signals(function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Call a job where no command does, in a process of submitit's."""
    with StopSignals() as signals:
        try:
            return function(cfg)
        except BaseException as error:
            if not signals.stopped(error):
                raise
            signals.end(error)
            sys.exit(130)  # with no result, so that submitit waits for one


def _note_in_log(text: str) -> None:
    """Write what stderr gets into the job's log, too, unless it is empty: it then is of a start that was refused."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            record = logging.makeLogRecord({"msg": text, "levelname": "ERROR", "levelno": logging.ERROR})
            path = Path(handler.baseFilename)
            with suppress(OSError):  # the handler itself would print a traceback where the disk is full
                if path.stat().st_size:
                    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                        file.write(f"{handler.format(record)}\n")


def _end_interrupted_sweep() -> None:
    """Leave the table and the page of a sweep that was interrupted, and say how to go on."""
    if (sweep := SweepCallback.current) is not None:
        sweep.finish()
        print(f"Go on with the whole sweep: python -m cifar_tl.train -m {sweep.resume_argument()}", file=sys.stderr)


def flags_joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with each of Hydra's flags and its value as one, `--cfg=job`; whatever else is as it was."""
    joined: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        flag = SHORT_FLAGS.get(argument, argument)
        if flag in ("--info", "-i"):
            argument = f"--info={left.pop(0) if left and left[0] in INFO else 'all'}"
        elif flag in FLAGS_WITH_VALUE and left:
            argument = f"{flag}={left.pop(0)}"
        joined.append(argument)
    return joined


def _flags_first(arguments: list[str]) -> list[str]:
    """Return the arguments with Hydra's flags before the overrides, which argparse wants together."""
    return sorted(arguments, key=lambda argument: not argument.startswith("-"))


def set_or_add(argument: str, config_name: str) -> str:
    """Return `key=value` for `++key=value` where keys cannot be added: Hydra then refuses one that is not there.

    Keys of Lightning's Trainer that conf/trainer/auto.yaml does not have are added, or set where a run has them, with
    a + or without.
    """
    key = argument.lstrip("+").partition("=")[0]
    group, _, name = key.partition(".")
    of_trainer = config_name == "train" and group == "trainer" and name in TRAINER_KEYS
    if of_trainer and name not in OmegaConf.load(conf_folder() / "trainer" / "auto.yaml"):
        return f"++{argument.lstrip('+')}"
    return argument.removeprefix("++") if not key.startswith(EXTENSIBLE) else argument


def _explained(error: BaseException, config_name: str) -> str | None:
    """Return what to tell the person about an error; None if it is none that they can put right."""
    if isinstance(error, UserError | GpuLostError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, config_name)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: no valid YAML: {error.problem}."
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        groups = ", ".join(sorted(_groups()))
        return (
            f"A config group cannot be null; the groups are {groups}. logger=none and callbacks=none choose nothing; "
            f"--help lists the choices of each."
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Unknown plugin class"):
        package = str(error).split("'")[1].split(".")[1]
        return f"{package} is not installed: pip install {package.replace('_', '-')}."
    if isinstance(error, BrokenExecutor):
        return (
            "The process of a job was killed, most likely for lack of memory. Jobs at the same time share it: lower "
            "hydra.launcher.n_jobs."
        )
    if isinstance(error, RuntimeError) and "Could not detect" in str(error) and "slurm" in str(error):  # submitit's
        return (
            "hydra/launcher=slurm starts jobs by srun, which is not here. Start the sweep on a machine of the cluster."
        )
    if type(error).__module__.startswith("submitit"):
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return (
            f"A job of the sweep cannot be started, or left no result: {text}. What squeue shows goes on nonetheless."
        )
    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):  # the log file's handler cannot be made
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in (*DISK_ERRORS, *READING_ERRORS):
        is_input = "If it is to be read, give a path that can be. " if error.errno in READING_ERRORS else ""
        return (
            f"{error.filename or 'output'}: {error.strerror}. {is_input}Runs are written under ./outputs; "
            f"choose another place with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for -m), or make room there."
        )
    return None


def _imported_when_called(target: str) -> Callable[[DictConfig], Any]:
    module, _, function = target.partition(":")
    return lambda cfg: getattr(importlib.import_module(module), function)(cfg)


def _path_as_text(argument: str) -> str:
    """Quote the value of a path's key where Hydra would take it for a number or a truth value, or cannot parse it.

    Without that, `input=2024_05` would be the number 202405, and `input=photo (1).png` a syntax error.
    """
    key, equals, value = argument.partition("=")
    if not equals or key not in PATH_KEYS:
        return argument
    if key.startswith("hydra.") and value.startswith("~"):  # the other ones are expanded where they are read
        value = str(check_path(key, value))
        argument = f"{key}={value}"
    try:
        override = OverridesParser.create().parse_override(argument)
        if override.is_sweep_override() or not isinstance(override.value(), bool | int | float):
            return argument
    except HydraException:
        pass
    return f"{key}={quoted(value)}"


def _refuse_added_keys(arguments: list[str], config_name: str) -> None:
    """Refuse `+key=value` where nothing would read the key."""
    places = {"train": EXTENSIBLE, "evaluate": ("trainer.", "hydra.", "hydra/")}.get(config_name, ("hydra.", "hydra/"))
    added = {
        "train": "; additional ones go to Lightning's Trainer (+trainer.KEY=VALUE), callbacks and loggers "
        "(+callbacks.NAME._target_=CLASS), and a model class of your own (+model.options.NAME=VALUE)",
        "evaluate": "; additional ones go to Lightning's Trainer (+trainer.KEY=VALUE)",
    }
    for argument in arguments:
        key = argument.lstrip("+").partition("=")[0]
        # sets a key, if there is one: see set_or_add
        twice = argument.startswith("++") and not key.startswith(EXTENSIBLE)
        if argument.startswith("+") and not twice and not key.startswith(places):
            raise UserError(
                f"{argument} adds a config key that nothing reads. Drop the + to set an existing key"
                f"{added.get(config_name, '')}."
            )


def _refuse_several_choices(arguments: list[str]) -> None:
    """Refuse `group=[a,b]`, which Hydra would merge, where the record of a run names one choice, and `group=[]`."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if group in ("logger", "callbacks") and value.replace(" ", "") == "[]":
            raise UserError(f"{argument}: give {group}=none, which chooses nothing.")
        if group in {*_groups()} - {"logger", "callbacks"} and value.startswith("["):
            several = f" With -m, {group}={value.strip('[]')} runs each." if group != "sweep" else ""
            raise UserError(f"{argument}: {group} takes one choice.{several}")


def _refuse_dashed_keys(arguments: list[str], config_name: str) -> None:
    """Refuse `--key`, which Hydra may take for an abbreviation of a flag: --experiment for --experimental-rerun."""
    known = {*_groups(), *map(str, OmegaConf.load(conf_folder() / f"{config_name}.yaml"))}
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if not flag.startswith("--") or flag in {*FLAGS, "--"}:
            continue
        key = flag.removeprefix("--")
        if key in known:
            raise UserError(f"{argument}: keys have no dashes. Give {key}={value or 'VALUE'}.")
        close = suggest(key, [flag.removeprefix("--") for flag in FLAGS]).replace("mean ", "mean --")
        meant = close or _closest_key(key, [*_keys(compose(config_name)), *_groups()])
        raise UserError(f"{argument}: keys have no dashes, as in KEY=VALUE.{meant}")


@cache
def _known_keys(data: str, conf: Path) -> list[str]:
    """Return the keys of a run on a choice of data; a sweep's jobs share them."""
    return _keys(compose("train", [f"data={data}"]))


def _refuse_unread_keys(cfg: DictConfig) -> None:
    """Refuse keys that a file of `conf` has brought, most likely mistyped: Hydra merges them without a word."""
    choices = HydraConfig.get().runtime.choices
    for group in _groups():
        if cfg.get(group) is not None and not OmegaConf.is_dict(cfg[group]):
            raise UserError(
                f"{group}: {cfg[group]} in a file of conf would put a value in the place of a group's keys. Choose "
                f"from a group in the file's defaults: '- override /{group}: {cfg[group]}'."
            )
    named = (conf_folder() / "data" / f"{cfg.data.get('name')}.yaml").is_file()
    known = _known_keys(cfg.data.name if named else choices["data"], conf_folder())
    unread = [key for key in _keys(cfg) if key not in known and not key.startswith(EXTENSIBLE)]
    if not unread:
        return
    recipe = unread[0].partition(".")[0]
    if recipe in RECIPES and not cfg[recipe]:
        raise UserError(f"{recipe}={choices[recipe]}: its file is empty.")
    if recipe in RECIPES:
        raise UserError(
            f"{recipe}={choices[recipe]}: nothing reads the keys of its file, {', '.join(cfg[recipe])}, as long as its "
            f"first line is not '# @package _global_'."
        )
    chosen = ", ".join(f"{group}={choices[group]}" for group in _groups() if choices.get(group))
    raise UserError(
        f"{', '.join(unread)}: nothing reads {'it' if len(unread) == 1 else 'them'}.{suggest(unread[0], known)} "
        f"Correct the file of conf that has {'it' if len(unread) == 1 else 'them'}, one of {chosen}."
    )


def explain(error: HydraException | OmegaConfBaseException, config_name: str) -> str:
    """Say what a config error is about, with the closest existing key for a mistyped one."""
    text = str(error)
    if text.startswith("Could not override '"):
        given = text.split("'")[1]
        known = _keys(compose(config_name)) + _groups()
        if given not in known:
            return f"Unknown config key {given}.{_closest_key(given, known)} --cfg job prints all keys."
        return (
            f"{given} is no key of what is chosen for {given.partition('.')[0]}: drop it, or choose another one. --cfg "
            f"job prints the keys that there are."
        )
    if missing := re.search(r"Could not (?:find|load) '(?!hydra/)(\w+)/([^'/]+)'", text):
        group, given = missing[1], missing[2]
        there = re.search(r"Available options in '\w+':\n(.*?)\nConfig search", text, re.S)  # none for lists of choices
        choices = there[1].split() if there else sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        more = (suggest(given, choices) if len(choices) > 1 else "") + ALTERNATIVES.get(group, "")
        return f"{group}={given}: there is no such choice. Choose {', '.join(choices)}.{more}"
    if missing := re.search(r"In '([^']+)': Could not find '(?!hydra/)\w+/(\w+)/([^']+)'", text):
        return (
            f"conf/{missing[1]}.yaml: {missing[2]}: {missing[3]} in its defaults is looked for in its own folder. "
            f"Choose from a group with '- override /{missing[2]}: {missing[3]}'."
        )
    if text.startswith("Ambiguous value"):
        key, _, values = text.split("'", 1)[1].split("'\n")[0].partition("=")
        groups = {*_groups()} - {"logger", "callbacks"}
        taken = "" if key in groups else f" '{key}=[{values}]' is a list of them."
        return f"{key}={values}: several values are several runs, with -m before them.{taken}"
    if missing := re.match(r"Cannot find primary config '([^']+)'", text):
        return f"{missing[1]} is no config of a command. A recipe is experiment=NAME; --help lists them."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}= is missing: give it."
    if missing := re.search(r"Could not find 'hydra/(launcher|sweeper)/([^']+)'", text):
        choices = sorted(path.stem for path in (conf_folder() / "hydra" / missing[1]).glob("*.yaml"))
        return (
            f"hydra/{missing[1]}={missing[2]}: there is no such choice. Choose {', '.join(choices)}, or install "
            f"Hydra's plugin for it (for ray: pip install -e '.[ray]')."
        )
    if missing := re.search(r"Could not load 'hydra/(launcher|sweeper)/", text):
        return (
            f"hydra/{missing[1]}= needs a plugin of Hydra that is not installed. The files of "
            f"{conf_folder() / 'hydra' / missing[1]} say which, and how to install it."
        )
    if isinstance(error, OverrideParseException):
        key, equals, _ = error.override.partition("=")
        if not equals:
            return f"{key} is no key=value.{_meant(key, config_name)}"
        return (
            f"{error.override} cannot be parsed: quote values with spaces or special characters, twice on a command "
            f"line: '{key}=\"...\"'."
        )
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f" {error.__cause__}"
    return "\n".join(line for line in text.splitlines() if line.strip() and "object_type=" not in line)


def _closest_key(given: str, known: Sequence[str]) -> str:
    """Return what somebody may have meant by a key that there is not: ` Did you mean X?`, advice, or nothing.

    Args:
        given: The key.
        known: Those of the command, and its groups.
    """
    group, _, rest = given.partition(".")
    name, last = rest.partition(".")[0], given.rsplit(".", 1)[-1].lower()
    if "finetune.head_lr" in known:  # of a run
        added = group in ("callbacks", "logger") and f"{group}.{name}" not in known
        if added and (conf_folder() / group / f"{name}.yaml").is_file():
            return f" Choose {group}={name} first; its keys are in conf/{group}/{name}.yaml."
        if group == "trainer" and last in TRAINER_ALTERNATIVES:
            return f" {TRAINER_ALTERNATIVES[last]}"
        if last in ALTERNATIVES:
            return ALTERNATIVES[last]
        known = [*known, *(f"trainer.{key}" for key in sorted(TRAINER_KEYS))]
    choosable = [key for key in known if key != given and ("." in key or not rest)]
    same = {key for key in choosable if key.rsplit(".", 1)[-1] == last}
    return f" Did you mean {same.pop()}?" if len(same) == 1 else suggest(given, choosable)


def _meant(value: str, config_name: str) -> str:
    """Return what somebody may have meant who gave a value without its key."""
    if config_name == "train":
        found = [group for group in _groups() if (conf_folder() / group / f"{value}.yaml").is_file()]
        return f" Did you mean {' or '.join(f'{group}={value}' for group in sorted(found))}?" if found else ""
    keys = [key for key in ("checkpoint", "input") if key in list(compose(config_name))]
    return f" Did you mean {' or '.join(f'{key}={value}' for key in keys)}?" if keys else ""


def _groups() -> list[str]:
    return sorted(path.name for path in conf_folder().iterdir() if path.is_dir() and path.name != "hydra")


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return all keys of a config with dots, groups included."""
    keys = []
    for key, value in config.items_ex(resolve=False):
        keys.append(f"{prefix}{key!s}")
        if isinstance(value, DictConfig):
            keys += _keys(value, f"{keys[-1]}.")
    return keys
