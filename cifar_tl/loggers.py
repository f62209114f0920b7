"""Lightning's MLFlowLogger, for class names that MLflow does not take, and for several jobs at once."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers

from cifar_tl.files import lock

SQLITE = "sqlite:///"


class MLFlowLogger(loggers.MLFlowLogger):
    """Spell out what MLflow refuses in a metric's name, as `C_2b_2b` for `C++`; one process at a time makes its tables.

    Lightning's leaves such characters out: classes named C, C++ and C# become one metric, and a name without any other
    character ends the run. MLflow makes the tables of a new SQLite file, and the experiment in it, without a lock, so
    that all but one of the jobs that start together would fail.

    Args:
        tracking_uri: Of the database.
        kwargs: Lightning's.
    """

    def __init__(self, tracking_uri: str, **kwargs: Any) -> None:
        self._database = Path(tracking_uri.removeprefix(SQLITE)) if tracking_uri.startswith(SQLITE) else None
        with self._alone():
            super().__init__(tracking_uri=tracking_uri, **kwargs)

    @property
    def experiment(self) -> Any:
        """MLflow's client, once the experiment and the run are made."""
        with self._alone():
            return super().experiment

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._database is None or getattr(self, "_initialized", False):  # made already
            yield
            return
        self._database.parent.mkdir(parents=True, exist_ok=True)
        with lock(self._database.with_name(f".{self._database.name}.lock")):
            yield

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics by their spelled-out names."""
        super().log_metrics({spelled_out(name): value for name, value in metrics.items()}, step)


def spelled_out(name: str) -> str:
    """Return a metric's name with a character's code, in hexadecimal, for each that MLflow refuses."""
    return re.sub(r"[^A-Za-z0-9_/. -]", lambda match: f"_{ord(match[0]):x}", name)
