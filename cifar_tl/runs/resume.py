"""Continuing a run or a sweep: the same command in the same folder, from its last checkpoint."""

import fcntl
import os
import re
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cifar_tl import slurm
from cifar_tl.errors import UserError, check_path
from cifar_tl.files import replacing
from cifar_tl.runs.record import read_metrics

LAST = Path("checkpoints") / "last.ckpt"
LOCK = ".lock"
SWEEP_FOLDER = "hydra.sweep.dir="
CONFIG_DIR = "--config-dir="
MULTIRUN = "multirun.yaml"
"""Of a sweep, in its folder: what Hydra was given."""
JOURNAL = "study.journal"
"""Of a search, in the sweep's folder: Optuna's study."""
CHANGEABLE_ON_RESUME = ("hydra/launcher=", "hydra.launcher.", "hydra.sweeper.n_trials=", "hydra.sweeper.n_jobs=")
"""Beginnings of what may be changed when a sweep goes on: where its jobs run, and how many trials a search has."""


OF_A_CHOICE = {
    "callbacks": ("callbacks.",),
    "logger": ("logger.",),
    "trainer": ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
}
"""Beginnings of the keys that mean nothing once another choice of their group is given."""
PRUNING = "callbacks.pruning."
"""Of keys that a search brings, not a choice of callbacks."""


def is_first_process() -> bool:
    """Return whether this is the first, or the only, of the processes that train together."""
    return all(os.environ.get(variable, "0") == "0" for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def resume_command(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Return the command that continues a run, as a shell takes it."""
    plain = re.fullmatch(r"[A-Za-z0-9/._-]+", str(folder))
    arguments = [f"resume={folder if plain else quoted(folder)}", *overrides]
    return f"python -m cifar_tl.train {' '.join(map(shlex.quote, arguments))}"


def with_folder_of_slurm_job(arguments: list[str]) -> list[str]:
    """Return the arguments with the folder that a requeued job finds again, if SLURM runs this and none is given.

    Raises:
        UserError: torchrun started several processes elsewhere, each of which would have one of its own.
    """
    key = SWEEP_FOLDER if _is_multirun(arguments) else "hydra.run.dir="
    folder = slurm.folder_of_job(arguments)
    if any(a.startswith((key, "resume=")) for a in arguments):
        return arguments
    if folder is not None:
        return [*arguments, f"{key}{quoted(folder)}"]
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"torchrun started {os.environ['WORLD_SIZE']} processes, of one folder: give {key}FOLDER.")
    return arguments


def _is_multirun(arguments: list[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def with_overrides_of_resumed_run(arguments: list[str], outputs: Path = Path("outputs")) -> list[str]:
    """Return the arguments that continue a run or a sweep, if they say `resume=...`; as they are otherwise.

    The run's own overrides come first and may be overridden again; its folder is kept.

    Args:
        arguments: Command line of cifar_tl.train.
        outputs: Where `resume=last` looks for the newest checkpoint.

    Raises:
        UserError: No such run, nothing to resume in it, a sweep without -m, or a folder that holds another run.
    """
    given = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    multirun = _is_multirun(arguments)
    if not given or given[-1] in ("", "null"):
        return _unless_used_folder(arguments, multirun)
    if multirun:
        return _sweep_arguments(arguments, _unquoted("resume", given[-1]))
    ours = [a for a in arguments if not a.startswith("resume=")]
    folder = _newest_run(outputs, bool(ours)) if given[-1] == "last" else _unquoted("resume", given[-1])
    saved = folder / ".hydra" / "overrides.yaml"
    if (folder / MULTIRUN).is_file():
        raise UserError(f"resume={given[-1]}: {folder} is a sweep's folder. Add -m to go on with all its jobs.")
    if not saved.is_file():
        run = next((path.parent for path in (folder, folder.parent) if path.name == LAST.parent.name), None)
        inside = f" Give the run's folder, {run}." if run else ""
        if found := sorted(folder.glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime):
            newest = f", the newest of {len(found)}" if len(found) > 1 else ""
            inside = f" There is {found[-1].parents[1]}{newest}."
        raise UserError(f"resume={given[-1]}: {folder} is no run's folder: it has no .hydra/overrides.yaml.{inside}")
    if not (folder / LAST).is_file():
        raise UserError(
            f"resume={given[-1]}: {folder} has no {LAST}: the run ended before its first epoch did. Start it anew."
        )
    for other in (a for a in ours if a.startswith("hydra.run.dir=")):
        if _unquoted("hydra.run.dir", other.partition("=")[2]).resolve() != folder.resolve():
            raise UserError(
                f"resume={given[-1]} goes on in the run's own folder, and {other} is for a run that starts. Leave it "
                f"out; to keep the run as it is, copy its folder and resume the copy."
            )
    theirs = [a for a in _saved_overrides(saved) if not a.startswith("resume=")]
    for group, keys in OF_A_CHOICE.items():
        if any(_is_about((f"{group}=",), a) for a in ours):
            theirs = [a for a in theirs if not _is_about((f"{group}=", *keys), a) or _is_about((PRUNING,), a)]
    # Hydra would save its config and overrides before anything is checked: see save_overrides
    how = ["hydra.output_subdir=null", f"hydra.run.dir={quoted(folder)}"]
    return [*_config_folder(folder, ours), *theirs, *ours, f"resume={quoted(folder)}", *how]


def unsaved_overrides(folder: Path) -> list[str]:
    """Return what this start of a run was given that its folder does not have yet: see save_overrides."""
    saved = folder / ".hydra" / "overrides.yaml"
    if not HydraConfig.initialized() or not saved.is_file():
        return []
    known, given = (  # the last one of a key counts
        {a.lstrip("+~").partition("=")[0]: a for a in overrides}
        for overrides in (_saved_overrides(saved), HydraConfig.get().overrides.task)
    )
    return [a for key, a in given.items() if known.get(key) != a and key != "resume"]


def save_overrides(cfg: DictConfig, folder: Path) -> None:
    """Save in a run's folder what Hydra saves of a run that starts.

    A run that goes on has its config there, which stays as it is until nothing is refused any more. Of two that start
    there at once, both have had Hydra save theirs; this one trains.
    """
    if not HydraConfig.initialized() or not is_first_process():
        return
    saved = {"config": cfg, "overrides": HydraConfig.get().overrides.task}
    for name, values in saved.items():
        with replacing(folder / ".hydra" / f"{name}.yaml") as partial:
            OmegaConf.save(values, partial)


def _sweep_arguments(arguments: list[str], folder: Path) -> list[str]:
    """Return the arguments that go on with a sweep: each job is kept, continued or run, as its folder says."""
    if not (folder / MULTIRUN).is_file():
        raise UserError(f"-m resume={folder}: {folder} is no sweep's folder: it has no {MULTIRUN}.")
    ours = [a for a in arguments if not a.startswith("resume=")]
    flags = [a for a in ours if a.startswith("-")]
    how = [a for a in ours if _is_about(CHANGEABLE_ON_RESUME, a)]
    if changed := [a for a in ours if a not in flags + how]:
        raise UserError(
            f"-m resume={folder} goes on with the sweep as it was started; {' '.join(changed)} would make it another "
            f"one. Start a new sweep for that."
        )
    theirs, theirs_of_hydra = _sweep_overrides(folder)
    if any(_is_about(("hydra/launcher=",), a) for a in how):  # its keys are not those of the one before
        launcher = ("hydra/launcher=", "hydra.launcher.")
        theirs_of_hydra = [a for a in theirs_of_hydra if not _is_about(launcher, a)]
    return [
        *_config_folder(folder, flags),
        *flags,
        *theirs,
        *theirs_of_hydra,
        *how,
        "hydra.output_subdir=null",  # jobs that are kept keep their configs; see save_overrides
        f"resume={quoted(folder)}",
        f"{SWEEP_FOLDER}{quoted(folder)}",
    ]


def _sweep_overrides(folder: Path) -> tuple[list[str], list[str]]:
    """Return the overrides that a sweep was started with: those of its jobs, and Hydra's own but for the folder."""
    task = [a for a in _saved_overrides(folder / MULTIRUN, "hydra", "overrides", "task") if not a.startswith("resume=")]
    of_a_start = ("hydra.mode=", SWEEP_FOLDER, "hydra.run.", "hydra.output_subdir=")
    hydra = _saved_overrides(folder / MULTIRUN, "hydra", "overrides", "hydra")
    return task, [a for a in hydra if not a.startswith(of_a_start)]


def config_flags(folder: Path) -> list[str]:
    """Return the `--config-dir` that a run, a sweep or its job was started with; none if that is not recorded."""
    for path in (folder / ".hydra" / "hydra.yaml", folder / MULTIRUN, folder.parent / MULTIRUN):
        try:
            sources = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["runtime"]["config_sources"]
            return [f"{CONFIG_DIR}{source['path']}" for source in sources if source["provider"] == "command-line"]
        except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
            continue  # not there, or damaged
    return []


def _config_folder(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return what `config_flags` returns, unless the arguments have another one.

    Raises:
        UserError: It is not there any more.
    """
    if any(a.startswith(CONFIG_DIR) for a in arguments):
        return []
    flags = config_flags(folder)
    for flag in flags:
        if not Path(flag.removeprefix(CONFIG_DIR)).is_dir():
            raise UserError(
                f"{folder} was started with {flag}, which is not there any more. Give {CONFIG_DIR}FOLDER, where it is."
            )
    return flags


def _saved_overrides(path: Path, *keys: str) -> list[str]:
    """Return the overrides that Hydra has saved in a file, there under some keys.

    Raises:
        UserError: The file is damaged.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        if not isinstance(found, list) or not all(isinstance(override, str) for override in found):
            raise TypeError("no list of overrides")
        return found
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: what it was started with cannot be read. Restore the file, or start it anew."
        ) from error


def _is_about(keys: tuple[str, ...], override: str) -> bool:
    """Return whether an override begins with one of some keys, set, added with + or taken out with ~."""
    return override.lstrip("+~").startswith(keys)


def longer_text(metrics: dict[str, Any]) -> str:
    """Return how a finished run can be trained longer, as the beginning of a sentence; nothing if it cannot be."""
    if not metrics.get("epoch") or not metrics.get("plan"):  # damaged
        return ""
    if metrics["epoch"][-1] + 1 < metrics["plan"][-1]["end"]:
        return (
            "More patience, callbacks=none (callbacks=ema for a run that averages weights) or another trainer.max_time "
            "lets it train longer; "
        )
    if any(phase.get("upscale") is not None for phase in metrics["plan"]):
        return ""  # its epochs are shared out among sizes
    return "trainer.max_epochs= lets it train longer, at rates of the longer schedule; "


def kept_result(folder: Path, pruned: bool = True) -> float | None:
    """Return the best validation accuracy of a run that is finished, or pruned if that counts; None of another one."""
    metrics = _metrics(folder)
    kept = ("finished", "pruned") if pruned else ("finished",)
    return float(metrics["best/val/acc"]) if metrics.get("status") in kept else None


def _metrics(folder: Path) -> dict[str, Any]:
    """Return what is recorded of a run; nothing if its record is missing or damaged."""
    try:
        return read_metrics(folder)
    except (OSError, ValueError):
        return {}


def _unless_used_folder(arguments: list[str], multirun: bool) -> list[str]:
    """Refuse to start a run where another one is; a job that SLURM starts again goes on there instead.

    For a run, see cifar_tl.train.main. Folders that are not written out are known when the config is composed.
    """
    key = SWEEP_FOLDER if multirun else "hydra.run.dir="
    given = [a.removeprefix(key) for a in arguments if a.startswith(key)]
    if not given or "${" in given[-1]:
        return arguments
    folder = _unquoted(key.removesuffix("="), given[-1])
    ours = [a for a in arguments if not a.startswith("-") and not _is_about(("hydra.", "hydra/"), a)]
    if multirun and slurm.restarted() and _holds_another(folder, ours, multirun):
        return [*arguments, f"resume={quoted(folder)}"]
    refuse_used_folder(folder, ours, multirun)
    return arguments


def refuse_used_folder(folder: Path, overrides: Sequence[str], multirun: bool) -> None:
    """Refuse to start a run where another one is, before Hydra writes its config there.

    Args:
        folder: The run's or the sweep's.
        overrides: Without Hydra's own.
        multirun: Whether it is a sweep's.

    Raises:
        UserError: Another one is there, or trains there now.
    """
    if not _holds_another(folder, overrides, multirun) or slurm.restarted():
        return
    key, what, flag = (SWEEP_FOLDER, "a sweep", "-m ") if multirun else ("hydra.run.dir=", "a run", "")
    argument = resume_command(folder).rpartition("cifar_tl.train ")[2]
    raise UserError(
        f"{folder} holds {what} already. Choose another folder ({key}FOLDER), go on with it by {flag}{argument}, or "
        f"delete it first."
    )


def _holds_another(folder: Path, overrides: Sequence[str], multirun: bool) -> bool:
    """Return whether a run that starts would find another one, finished or begun, in its folder."""
    if not is_first_process():
        return False  # the processes of a run share its folder
    if multirun and (folder / JOURNAL).is_file() and (folder / MULTIRUN).is_file():
        theirs, _ = _sweep_overrides(folder)
        if sorted(a.replace("'", "") for a in overrides) == sorted(a.replace("'", "") for a in theirs):
            return False  # a search goes on, or is shared, by the same command
    if (folder / LOCK).is_file():
        with run_lock(folder):  # nobody trains there
            pass
    # else nothing, or what was killed before it could save
    return any((folder / name).is_file() for name in (LAST, MULTIRUN)) or kept_result(folder) is not None


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder: no other process trains in it. A process that dies lets go of it.

    Raises:
        UserError: Another process trains in it.
    """
    if not is_first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder}: {holder} trains there now. Wait for it, or choose another folder.") from error
        except OSError as error:
            raise UserError(
                f"{folder}: no file can be locked there ({error.strerror}), so that nothing would keep two processes "
                f"from training there at once. Give a folder on another file system: hydra.run.dir=, for a sweep "
                f"hydra.sweep.dir=."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def quoted(path: Path | str) -> str:
    """Return a path as a quoted value of Hydra's grammar, in which only backslashes before a quote are special."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), str(path)) + "'"


def _unquoted(key: str, value: str) -> Path:
    """Return a path given as the value of an override, with or without quotes."""
    for quote in ("'", '"'):
        if len(value) > 1 and value[0] == value[-1] == quote:
            inner = re.sub(rf"(\\+)({quote}|$)", lambda match: match[1][: len(match[1]) // 2] + match[2], value[1:-1])
            return check_path(key, inner)
    return check_path(key, value)


def _newest_run(outputs: Path, changed: bool) -> Path:
    """Return the folder of the run that saved last.

    Args:
        outputs: Where to look for it.
        changed: It goes on with other settings.

    Raises:
        UserError: There is none, it is finished and would go on as it was, or a later one has saved nothing: which of
            the two is meant, nobody can know.
    """
    checkpoints = sorted(outputs.glob(f"**/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise UserError(f"resume=last: no run under {outputs.resolve()} has a {LAST}.")
    folder, saved = checkpoints[-1].parents[1], checkpoints[-1].stat().st_mtime
    finished = _metrics(folder).get("status") == "finished"
    logs = ((log, log.stat()) for log in outputs.glob("**/train.log"))
    begun = [log.parent for log, stat in logs if stat.st_size and stat.st_mtime > saved]  # empty: refused at the start
    if unsaved := [run for run in begun if not (run / LAST).is_file() and _metrics(run).get("status") != "finished"]:
        older = "The older one is finished." if finished else f"{resume_command(folder)} goes on with the older one."
        raise UserError(
            f"resume=last: {unsaved[0]} is newer than {folder} and has no {LAST}: it ended before its first epoch did, "
            f"or trains now. {older}"
        )
    if finished and not changed:
        raise UserError(
            f"resume=last: {folder}, the newest run, is finished, and there is nothing to go on with. "
            f"{longer_text(_metrics(folder))}python -m cifar_tl.evaluate checkpoint={folder} measures it again."
        )
    return folder
