"""Numbers as text."""

from collections.abc import Mapping
from typing import Any


def percent(share: float, digits: int = 2) -> str:
    """Return a share as `86.23%`."""
    return f"{100 * share:.{digits}f}%"


def percent_or_dash(share: float | None) -> str:
    """Return a share in percent, without the sign; None as a dash."""
    return "-" if share is None else f"{100 * share:.2f}"


def percent_range(low: float, high: float, digits: int = 2) -> str:
    """Return two shares as `86.20 to 86.31`, in percent."""
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"


def points(difference: float, digits: int = 2) -> str:
    """Return a difference of shares in percentage points, with its sign: `+1.20`."""
    return f"{100 * difference:+.{digits}f}"


def duration_text(seconds: float) -> str:
    """Return a duration as text: `41 s`, `3 min 05 s`, `1 h 36 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if (whole := round(seconds)) < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def result_text(metrics: Mapping[str, Any], images: int) -> str:
    """Return a test's metrics in a line."""
    loss, ece = ("-" if metrics[key] is None else f"{metrics[key]:.4f}" for key in ("test/loss", "test/ece"))
    return (
        f"Test accuracy {percent(metrics['test/acc'])} (95% interval {percent_range(*metrics['test/acc_interval'])}% "
        f"for {images:,} images), loss {loss}, ECE {ece}"
    )
