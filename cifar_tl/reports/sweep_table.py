"""The table at the end of a sweep."""

import csv
import logging
import os
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cifar_tl.cli import Failure, SweepCallback
from cifar_tl.files import lock, say
from cifar_tl.runs.folder import read_overrides
from cifar_tl.runs.record import faults, read_metrics
from cifar_tl.runs.resume import JOURNAL, MULTIRUN, is_first_process, resume_command
from cifar_tl.runs.table import write_csv
from cifar_tl.search import open_study

log = logging.getLogger(__name__)

COLUMNS = ("job", "overrides", "best val/acc", "test/acc", "minutes", "state")
TABLE = "sweep.csv"
FAILED = "failed: "


class SweepTable(SweepCallback):
    """Collect the jobs of a multirun: sweep.csv after each job, in its folder; after the last, a table and a page.

    A job that failed, or was kept from an earlier start of the sweep, has its line, too. The lines are in the file and
    nowhere else: jobs may run in other processes, which have a copy of this object, and sweeps may be shared.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path()
        self._failed_before: set[str] = set()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the sweep's folder."""
        super().on_multirun_start(config, **kwargs)
        # as Hydra makes those of its jobs, links not followed
        self._folder = Path(os.path.abspath(config.hydra.sweep.dir))  # noqa: PTH100
        if (self._folder / JOURNAL).is_file():  # a search never runs again what it knows to have failed
            trials = open_study(self._folder).trials
            self._failed_before = {str(trial.number) for trial in trials if trial.state.name == "FAIL"}

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Add a job of a sweep to the table, or replace its line."""
        assert job_return.hydra_cfg is not None
        hydra = job_return.hydra_cfg.hydra
        if hydra.mode.name != "MULTIRUN" or not is_first_process():
            return
        folder = Path(hydra.runtime.output_dir)
        try:
            metrics = read_metrics(folder)
        except (OSError, ValueError):  # the job failed early, or left half a file
            metrics = {}
        metrics = {key: value for key, value in metrics.items() if key not in faults(metrics)}
        failure = job_return._return_value
        done = job_return.status is JobStatus.COMPLETED and not isinstance(failure, Failure)
        line = {
            "job": str(folder.relative_to(self._folder)),
            "overrides": " ".join(read_overrides(folder) or []),
            "best val/acc": metrics.get("best/val/acc"),
            "test/acc": metrics.get("test/acc"),
            "minutes": sum(metrics.get("seconds", [])) / 60,
            "state": metrics.get("status", "?") if done else f"{FAILED}{getattr(failure, 'message', failure)}",
        }
        with lock(self._folder / ".lock"):
            lines = {**{row["job"]: row for row in self._lines()}, line["job"]: line}
            ordered = sorted(lines.values(), key=lambda row: (row["job"].zfill(9), row["job"]))
            write_csv(self._folder / TABLE, [COLUMNS, *([row[name] for name in COLUMNS] for row in ordered)])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and draw the page."""
        self.finish()

    def resume_argument(self) -> str:
        """Return the override that goes on with the sweep, as a shell takes it."""
        return resume_command(self._folder).rpartition("cifar_tl.train ")[2]

    def failures(self) -> tuple[list[str], int]:
        """Return what was wrong with the jobs that failed, and the number of all; without what a search replaces."""
        lines = [line for line in self._lines() if line["job"] not in self._failed_before]
        return [
            f"job {line['job']} ({line['overrides']}): {line['state'].removeprefix(FAILED)}"
            for line in lines
            if line["state"].startswith(FAILED)
        ], len(lines)

    def finish(self) -> None:
        """Print the table of the jobs so far, without what all of them share, and draw the page."""
        lines = self._lines()
        if not lines:
            return
        given = [read_overrides(self._folder / line["job"]) or [] for line in lines]
        shared = set.intersection(*map(set, given)) if len(given) > 1 else set()
        table = Table(title=Text(str(self._folder)))  # as Text, for what is in brackets would be taken for markup
        for name in COLUMNS:
            table.add_column(name, overflow="fold")
        for line, overrides in zip(lines, given, strict=True):
            line["overrides"] = " ".join(o for o in overrides if o not in shared)
            for name in ("best val/acc", "test/acc", "minutes"):
                line[name] = f"{float(line[name]):.4f}" if line[name] else "-"
            table.add_row(*(Text(line[name]) for name in COLUMNS))
        console = Console()
        with console.capture() as captured:
            console.print(table)
        say(captured.get().removesuffix("\n"))
        self._draw_report()

    def withdraw(self) -> None:
        """Delete what Hydra has saved for a sweep none of whose jobs began: the corrected one may have its folder."""
        if is_first_process() and {path.name for path in self._folder.glob("*")} == {MULTIRUN}:
            (self._folder / MULTIRUN).unlink()
            self._folder.rmdir()

    def _lines(self) -> list[dict[str, str]]:
        """Return the lines of the table as they are in the file."""
        path = self._folder / TABLE
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return list(csv.DictReader(file))

    def _draw_report(self) -> None:
        """Draw the page that compares the jobs and print its path; a failure does not fail the sweep."""
        from cifar_tl.reports.__main__ import report  # late: every command imports this file, also `--help`

        try:
            say(f"report  {next(path for path in report([self._folder])[0] if path.parent == self._folder)}")
        except Exception as error:
            say(f"The report was not drawn ({error}). Again: python -m cifar_tl.reports {self._folder}")
