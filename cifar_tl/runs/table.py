"""A table of text, as Markdown and CSV; reports/templates draw it as HTML."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_tl.files import replacing


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        title: What the table shows.
        head: Names of the columns.
        rows: One cell per column.
        note: How to read it.
        words: Columns that hold words; the others hold numbers and are aligned to the right.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    words: Sequence[int] = (0,)

    def markdown(self) -> str:
        """Return title, cells and note as Markdown."""
        return f"## {self.title}\n\n{markdown(self.head, self.rows, self.words)}\n\n{self.note}"

    def write_csv(self, path: Path) -> None:
        """Write the cells as CSV."""
        write_csv(path, [self.head, *self.rows])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """Return cells as a Markdown table, its lines joined by newlines.

    Args:
        head: Names of the columns.
        rows: One cell per column.
        words: Columns that hold words; the others are aligned to the right.
    """
    alignment = ["---" if column in words else "---:" for column in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, alignment, *rows)
    )


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV in one step, as UTF-8 whatever the locale; None becomes an empty cell.

    Raises:
        OSError: It cannot be written there.
    """
    with (
        replacing(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows(rows)
