"""A table as people read it, in a page, in Markdown and in CSV."""

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        title: What it is about.
        head: Of the columns; the first is of words.
        rows: Cells as text.
        note: How to read it.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str

    def markdown(self) -> str:
        """Return title, cells and note as Markdown."""
        rows = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        return f"## {self.title}\n\n{body}\n\n{self.note}"

    def write_csv(self, path: Path) -> None:
        """Write the cells as CSV."""
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([self.head, *self.rows])
