"""python -m cifar_tl.reports RUN_OR_SWEEP [...]: a page per run, and one that compares several."""

import argparse
import os
import signal
import sys
from pathlib import Path

from cifar_tl.errors import UserError
from cifar_tl.files import say
from cifar_tl.runs.folder import find_runs
from cifar_tl.runs.record import METRICS
from cifar_tl.runs.resume import MULTIRUN


def main(arguments: list[str]) -> int:
    """Write the reports of some folders and print where they are; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_tl.reports",
        description="Draw reports from the files of finished and unfinished runs: RUN/report.html with RUN/figures for "
        "a run; for a sweep, or several folders, also sweep_report.html, .csv and .md, which compare the runs.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="RUN_OR_SWEEP",
        help="outputs/EXPERIMENT/TIME, outputs/sweeps/TIME[/JOB]",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of the comparison, or of one run's page; without it, beside what is drawn",
    )
    given = parser.parse_args(arguments)
    try:
        written, undrawn = report(given.folders, given.output)
        for path in written:
            say(str(path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command draws the pages that are missing.", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"error: {error.filename or 'report'}: {error.strerror}. Make room there, or use --output.", file=sys.stderr
        )
        return 1
    return 1 if undrawn and given.output is None else 0  # of protected runs, a comparison elsewhere is all there can be


def report(folders: list[Path], output: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Write the page of every run, and their comparison where there are several or the folder is a sweep's.

    A run's page in a sweep is drawn anew only if its metrics.json is newer.

    Args:
        folders: Of runs or sweeps.
        output: Where the comparison goes, or the page of a single run; None for the sweep's or the run's own folder, or
            the one that all runs have in common.

    Returns:
        What was written, and the pages of several runs that could not be.

    Raises:
        UserError: A folder that is no run and holds none; `output` is missing where the comparison would replace that
            of a whole sweep.
    """
    folders = _each_once(folders)
    runs = _each_once([run for folder in folders for run in find_runs(folder)])
    from cifar_tl.reports.run_page import REPORT, write_run_report  # late: `--help` should not wait for matplotlib

    written, undrawn = [], []
    comparing = runs != folders or len(runs) > 1
    sweep = folders[0] if len(folders) == 1 and comparing else None
    together = sweep or Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if output is None and sweep is None and comparing and (together / MULTIRUN).is_file():
        raise UserError(
            f"{together} has the comparison of all of its sweep's runs: give --output FOLDER for that of some."
        )
    for run in runs:
        page, metrics = run / REPORT, run / METRICS
        fresh = page.is_file() and metrics.is_file() and page.stat().st_mtime >= metrics.stat().st_mtime
        if run in folders or not fresh:
            try:
                written.append(write_run_report(run, None if comparing else output))
            except OSError as error:
                if not comparing:
                    raise
                print(f"{page} was not drawn: {error.strerror or error}", file=sys.stderr)
                undrawn.append(page)
    if comparing:
        from cifar_tl.reports.comparison_page import write_sweep_report

        written += write_sweep_report(runs, output or together, sweep)
    return written, undrawn


def _each_once(folders: list[Path]) -> list[Path]:
    """Return folders as they were given first: the same one may be given in several ways."""
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(folder.resolve(), folder)
    return list(once.values())


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main(sys.argv[1:]))
