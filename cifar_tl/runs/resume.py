"""Continuing a run: the same command in the same folder, from its last checkpoint."""

from pathlib import Path

import yaml

from cifar_tl.errors import UserError

LAST = Path("checkpoints") / "last.ckpt"


def with_overrides_of_resumed_run(arguments: list[str], outputs: Path = Path("outputs")) -> list[str]:
    """Return the arguments that continue a run, if they say `resume=...`; as they are otherwise.

    The run's own overrides come first and may be overridden again; its folder is kept.

    Args:
        arguments: Command line of cifar_tl.train.
        outputs: Where `resume=last` looks for the newest checkpoint.

    Raises:
        UserError: No such run, nothing to resume in it, or a sweep.
    """
    given = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if not given or given[-1] in ("", "null"):
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise UserError("resume= continues one run and does not go with -m. Resume the jobs of a sweep one by one.")
    folder = _newest_run(outputs) if given[-1] == "last" else Path(given[-1].strip("'\""))
    saved = folder / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        raise UserError(f"resume={given[-1]}: {folder} is no run's folder: it has no .hydra/overrides.yaml.")
    if not (folder / LAST).is_file():
        raise UserError(
            f"resume={given[-1]}: {folder} has no {LAST}: the run ended before its first epoch did. Start it anew."
        )
    theirs = [a for a in yaml.safe_load(saved.read_text(encoding="utf-8")) if not a.startswith("resume=")]
    ours = [a for a in arguments if not a.startswith("resume=")]
    return [*theirs, *ours, f"resume='{folder}'", f"hydra.run.dir='{folder}'"]


def _newest_run(outputs: Path) -> Path:
    checkpoints = sorted(outputs.glob(f"**/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise UserError(f"resume=last: no run under {outputs.resolve()} has a {LAST}.")
    return checkpoints[-1].parents[1]
