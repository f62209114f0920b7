"""The table at the end of a sweep."""

import logging
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from cifar_tl.cli import Failure, SweepCallback
from cifar_tl.runs.record import faults, read_metrics
from cifar_tl.runs.resume import resume_command
from cifar_tl.runs.table import write_csv

log = logging.getLogger(__name__)

COLUMNS = ("job", "overrides", "best val/acc", "test/acc", "minutes", "state")


class SweepTable(SweepCallback):
    """Collect the jobs of a multirun: sweep.csv after each job, in its folder; after the last, a table and a page.

    A job that failed, or was kept from an earlier start of the sweep, has its line, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[dict[str, Any]] = []
        self._overrides: list[list[str]] = []
        self._folder = Path()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Add a job of a sweep to the table."""
        assert job_return.hydra_cfg is not None
        hydra = job_return.hydra_cfg.hydra
        if hydra.mode.name != "MULTIRUN":
            return
        folder = Path(hydra.runtime.output_dir)
        self._folder = folder.parents[len(Path(hydra.sweep.subdir).parts) - 1]  # sweep.dir has the time of each look
        try:
            metrics = read_metrics(folder)
        except (OSError, ValueError):  # the job failed early, or left half a file
            metrics = {}
        metrics = {key: value for key, value in metrics.items() if key not in faults(metrics)}
        failure = job_return._return_value
        done = job_return.status is JobStatus.COMPLETED and not isinstance(failure, Failure)
        self._overrides.append(list(job_return.overrides or []))
        self._rows.append(
            {
                "job": hydra.job.num,
                "overrides": " ".join(self._overrides[-1]),
                "best val/acc": metrics.get("best/val/acc"),
                "test/acc": metrics.get("test/acc"),
                "minutes": sum(metrics.get("seconds", [])) / 60,
                "state": metrics.get("status", "?") if done else f"failed: {getattr(failure, 'message', failure)}",
            }
        )
        write_csv(self._folder / "sweep.csv", [COLUMNS, *([row[name] for name in COLUMNS] for row in self._rows)])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and draw the page."""
        self.finish()

    def resume_argument(self) -> str:
        """Return the override that goes on with the sweep, as a shell takes it."""
        return resume_command(self._folder).rpartition("cifar_tl.train ")[2]

    def finish(self) -> None:
        """Print the table of the jobs so far, without what all of them share, and draw the page."""
        if not self._rows:
            return
        table = Table(*COLUMNS, title=str(self._folder))
        shared = set.intersection(*(set(overrides) for overrides in self._overrides)) if len(self._rows) > 1 else set()
        for row, overrides in zip(self._rows, self._overrides, strict=True):
            shown = {**row, "overrides": " ".join(o for o in overrides if o not in shared)}
            table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in shown.values()))
        Console().print(table)
        self._draw_report()

    def _draw_report(self) -> None:
        """Draw the page that compares the jobs and print its path; a failure does not fail the sweep."""
        from cifar_tl.reports.__main__ import report  # late: every command imports this file, also `--help`

        try:
            print(f"report  {next(path for path in report([self._folder]) if path.parent == self._folder)}")
        except Exception as error:
            print(f"The report was not drawn ({error}). Again: python -m cifar_tl.reports {self._folder}")
