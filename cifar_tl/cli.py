"""What the commands share: finding `conf`, resuming by command line, and errors that people can read."""

import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cifar_tl.errors import Interrupted, UserError, suggest
from cifar_tl.runs.resume import with_overrides_of_resumed_run

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
        """Print a record."""
        print(self.format(record), flush=True)


def conf_folder() -> Path:
    """Return the folder of the configs: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


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
    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(
        _imported_when_called(task) if isinstance(task, str) else task
    )
    before = sys.argv
    try:
        _refuse_added_keys(arguments)
        sys.argv = [before[0], *map(_path_as_text, with_overrides_of_resumed_run(arguments))]
        main()
    except Interrupted as interrupted:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except UserError as error:
        return _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(explain(error, config_name))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST, errno.EDQUOT):
            raise
        return _fail(
            f"{error.filename or 'output'}: {error.strerror}. Runs are written under ./outputs; "
            f"choose another place with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for -m), or make room there."
        )
    finally:
        sys.argv = before
    return 0


def _imported_when_called(target: str) -> Callable[[DictConfig], Any]:
    module, _, function = target.partition(":")
    return lambda cfg: getattr(importlib.import_module(module), function)(cfg)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _path_as_text(argument: str) -> str:
    """Quote the value of a path's key where Hydra would take it for a number or a truth value, or cannot parse it.

    Without that, `input=2024_05` would be the number 202405, and `input=photo (1).png` a syntax error.
    """
    key, equals, value = argument.partition("=")
    if not equals or key not in PATH_KEYS:
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
        if override.is_sweep_override() or not isinstance(override.value(), bool | int | float):
            return argument
    except HydraException:
        pass
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def _refuse_added_keys(arguments: list[str]) -> None:
    """Refuse `+key=value` where nothing would read the key."""
    for argument in arguments:
        key = argument.lstrip("+").partition("=")[0]
        if argument.startswith("+") and not key.startswith(("trainer.", "hydra.", "hydra/")):
            raise UserError(
                f"{argument} adds a config key that nothing reads. Drop the + to set an existing key; "
                f"+trainer.KEY=VALUE, for Lightning's Trainer, is the only place for additional ones."
            )


def explain(error: HydraException | OmegaConfBaseException, config_name: str) -> str:
    """Say what a config error is about, with the closest existing key for a mistyped one."""
    text = str(error)
    if text.startswith("Could not override '"):
        given = text.split("'")[1]
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            known = _keys(hydra.compose(config_name)) + [path.name for path in conf_folder().iterdir() if path.is_dir()]
        if given not in known:
            return f"Unknown config key {given}.{suggest(given, known)} --cfg job prints all keys."
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return (
            f"{error.override} cannot be parsed: quote values with spaces or special characters, twice on a command "
            f"line: '{key}=\"...\"'."
        )
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f" {error.__cause__}"
    return "\n".join(line for line in text.splitlines() if line.strip() and "object_type=" not in line)


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return all keys of a config with dots, groups included."""
    keys = []
    for key, value in config.items_ex(resolve=False):
        keys.append(f"{prefix}{key!s}")
        if isinstance(value, DictConfig):
            keys += _keys(value, f"{keys[-1]}.")
    return keys
