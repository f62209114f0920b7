"""The table at the end of a sweep."""

import json
import logging
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from cifar_tl.cli import Failure, SweepCallback
from cifar_tl.files import write_text
from cifar_tl.runs.record import faults, read_metrics
from cifar_tl.runs.resume import is_first_process, resume_command
from cifar_tl.runs.table import write_csv

log = logging.getLogger(__name__)

COLUMNS = ("job", "overrides", "best val/acc", "test/acc", "minutes", "state")
ROW = "job.json"
"""A job's line of the table, in its folder: the process that ran the job writes it, which may be on another machine."""


class SweepTable(SweepCallback):
    """Collect the jobs of a multirun: sweep.csv after each job, in its folder; after the last, a table and a page.

    A job that failed, or was kept from an earlier start of the sweep, has its line, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note where the sweep is."""
        self._folder = Path(config.hydra.sweep.dir).absolute()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Add a job of a sweep to the table."""
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
        row = {
            "job": hydra.job.num,
            "overrides": list(job_return.overrides or []),
            "best val/acc": metrics.get("best/val/acc"),
            "test/acc": metrics.get("test/acc"),
            "minutes": sum(metrics.get("seconds", [])) / 60,
            "state": metrics.get("status", "?") if done else "failed",
            "failure": None if done else str(getattr(failure, "message", failure)),
        }
        write_text(folder / ROW, json.dumps(row))
        self._write(self._rows())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and draw the page."""
        self.finish()

    def resume_argument(self) -> str:
        """Return the override that goes on with the sweep, as a shell takes it."""
        assert self._folder is not None
        return resume_command(self._folder).rpartition("cifar_tl.train ")[2]

    def failures(self) -> list[str]:
        """Return what was wrong with the jobs that failed, wherever they ran."""
        failed = [row for row in self._rows() if row["failure"] is not None]
        return [f"job {row['job']} ({' '.join(row['overrides'])}): {row['failure']}" for row in failed]

    def jobs(self) -> int:
        """Return how many jobs came to an end."""
        return len(self._rows())

    def finish(self) -> None:
        """Print the table of the jobs so far, without what all of them share, and draw the page."""
        rows = self._rows()
        if not rows:
            return
        self._write(rows)
        table = Table(*COLUMNS, title=str(self._folder))
        shared = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
        for row in rows:
            shown = {**row, "overrides": [o for o in row["overrides"] if o not in shared]}
            table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in _cells(shown)))
        Console().print(table)
        self._draw_report()

    def _rows(self) -> list[dict[str, Any]]:
        """Return the lines of all jobs that came to an end, by number."""
        found = [] if self._folder is None else self._folder.rglob(ROW)
        return sorted((json.loads(path.read_text(encoding="utf-8")) for path in found), key=lambda row: int(row["job"]))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        assert self._folder is not None
        write_csv(self._folder / "sweep.csv", [COLUMNS, *map(_cells, rows)])

    def _draw_report(self) -> None:
        """Draw the page that compares the jobs and print its path; a failure does not fail the sweep."""
        from cifar_tl.reports.__main__ import report  # late: every command imports this file, also `--help`

        assert self._folder is not None
        try:
            print(f"report  {next(path for path in report([self._folder]) if path.parent == self._folder)}")
        except Exception as error:
            print(f"The report was not drawn ({error}). Again: python -m cifar_tl.reports {self._folder}")


def _cells(row: dict[str, Any]) -> list[Any]:
    """Return a job's line in the order of COLUMNS."""
    state = "failed: " + row["failure"] if row["failure"] is not None else row["state"]
    shown = {**row, "overrides": " ".join(row["overrides"]), "state": state}
    return [shown[name] for name in COLUMNS]
