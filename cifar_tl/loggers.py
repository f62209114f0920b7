"""Lightning's MLFlowLogger, for class names that MLflow does not take."""

import re
from collections.abc import Mapping

from lightning.pytorch import loggers


class MLFlowLogger(loggers.MLFlowLogger):
    """Spell out what MLflow refuses in a metric's name, as `C_2b_2b` for `C++`.

    Lightning's leaves such characters out: classes named C, C++ and C# become one metric, and a name without any other
    character ends the run.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics by their spelled-out names."""
        super().log_metrics({spelled_out(name): value for name, value in metrics.items()}, step)


def spelled_out(name: str) -> str:
    """Return a metric's name with a character's code, in hexadecimal, for each that MLflow refuses."""
    return re.sub(r"[^A-Za-z0-9_/. -]", lambda match: f"_{ord(match[0]):x}", name)
