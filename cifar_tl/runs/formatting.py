"""Figures as people read them."""


def percent(share: float, digits: int = 2) -> str:
    """Return a share as `86.23 %`."""
    return f"{100 * share:.{digits}f} %"


def points(difference: float, digits: int = 2) -> str:
    """Return a difference of shares in percentage points, with its sign: `+1.20`."""
    return f"{100 * difference:+.{digits}f}"


def duration_text(seconds: float) -> str:
    """Return a duration as people read it: `41 s`, `3 min 05 s`, `1 h 36 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
