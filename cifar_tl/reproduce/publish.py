"""Measured tables in the READMEs of the checkout, from CSVs that are committed beside them.

A README marks the place of a table, and is filled between the marks:

    <!-- table: results -->
    <!-- /table -->

stands for conf/experiment/results/results.csv. `<!-- table: results | best32, best64 | config, n, test acc -->` takes
these rows, named by their first cell, and these columns. The columns of PROVENANCE become the line below the table, but
for what rows differ in, such as the device, which is a column.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from cifar_tl.errors import UserError, check_choice
from cifar_tl.files import write_text
from cifar_tl.runs.table import Table

DOCUMENTS = ("README.md", "conf/experiment/README.md")
RESULTS = Path("conf/experiment/results")
PROVENANCE = ("device", "date", "commit", "weights", "filters", "precision")
"""Columns of every table that say where its numbers come from."""

UNPUBLISHED = ("minutes",)
"""Columns that are left out: how long a run takes depends on what else its machine did. Benchmarks measure speed."""

RELATED = ("ablation", "speed")
"""Tables whose rows are compared with each other alone, so that those of two measurements do not mix."""

Cells = tuple[list[str], list[list[str]]]
"""Head and rows of a table."""

MARKED = re.compile(r"(?P<start><!-- table: (?P<what>[^>\n]+) -->\n).*?(?P<end><!-- /table -->)", re.DOTALL)


def publish(tables: Sequence[Path], checkout: Path) -> list[Path]:
    """Take rows over into the CSVs that are committed, and fill the READMEs from these.

    Args:
        tables: CSVs with the columns of PROVENANCE. A row replaces the committed one with the same first cell; rows of
            recipes that were not run stay. One of RELATED replaces the committed table.
        checkout: Folder of README.md and conf.

    Returns:
        What was written.

    Raises:
        UserError: `checkout` is none, or a README asks for what a table has no more. Then nothing is written.
    """
    check_checkout(checkout)
    texts, new = {}, {}
    for table in tables:
        path = checkout / RESULTS / table.name
        head, rows = without(UNPUBLISHED, *read(table))
        if path.is_file() and table.stem not in RELATED:
            head, rows = merged(*read(path), head, rows)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *rows])
        texts[path], new[table.stem] = text.getvalue(), (head, rows)
    for document in (checkout / name for name in DOCUMENTS):
        texts[document] = filled(document.read_text(encoding="utf-8"), checkout / RESULTS, new)
    for path, content in texts.items():
        write_text(path, content)
    return list(texts)


def check_checkout(folder: Path) -> None:
    """Refuse a folder that is no checkout of cifar_tl, such as that of an installed copy.

    Raises:
        UserError: It is none.
    """
    if not all((folder / name).is_file() for name in ("pyproject.toml", *DOCUMENTS)):
        raise UserError(f"what is published goes into a checkout of cifar_tl, and {folder} is none.")


def filled(text: str, folder: Path, new: Mapping[str, Cells] = MappingProxyType({})) -> str:
    """Return a README's text with every marked table as its CSV in `folder` has it, or as `new` has it, by name.

    Raises:
        UserError: A mark names a table, a row or a column that is not there.
    """

    def table(match: re.Match[str]) -> str:
        name, *chosen = (part.strip() for part in match["what"].split("|"))
        rows, columns = ([word.strip() for word in part.split(",") if word] for part in [*chosen, "", ""][:2])
        tables = {path.stem: read(path) for path in folder.glob("*.csv")} | dict(new)
        head, cells = tables[check_choice("table", name, tuple(tables))]
        return match["start"] + markdown(head, cells, rows, columns) + match["end"]

    return MARKED.sub(table, text)


def markdown(head: list[str], rows: list[list[str]], labels: Sequence[str], columns: Sequence[str]) -> str:
    """Return a table as Markdown, and below it where its numbers come from.

    Args:
        head: Of the columns, those of PROVENANCE among them.
        rows: Cells as text.
        labels: First cells of the rows to take, in their order; none for all.
        columns: To take, in their order; none for all but those of PROVENANCE.

    Raises:
        UserError: No such row or column.
    """
    by_label = {row[0]: row for row in rows}
    taken = [by_label[check_choice("row", label, tuple(by_label))] for label in labels or by_label]
    names = [check_choice("column", name, tuple(head)) for name in columns] or [n for n in head if n not in PROVENANCE]
    origin = {name: [row[head.index(name)] for row in taken] for name in PROVENANCE}
    differing = [name for name in PROVENANCE if name != "commit" and len(set(origin[name])) > 1]
    cells = [[row[head.index(name)] for name in [*names, *differing]] for row in taken]
    _, body, _ = Table("", [*names, *differing], cells, "").markdown().split("\n\n")
    words = {"commit": "commit ", "weights": "weights ", "filters": "filters: "}
    origin["commit"] = ", ".join(origin["commit"]).split(", ")  # a cell may have several; a device's name has commas
    below = [words.get(name, "") + distinct(origin[name]) for name in PROVENANCE if name not in differing]
    return f"\n{body}\n\n{'; '.join(below)}.\n\n"


def merged(old_head: list[str], old_rows: list[list[str]], head: list[str], rows: list[list[str]]) -> Cells:
    """Return the old table with the new one's rows in the place of those with the same first cell, and others last.

    A column of the old one goes with the last row that it is for; `-` is where a row has no value.
    """
    new = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    old = {row[0]: dict(zip(old_head, row, strict=True)) for row in old_rows}
    lost = [name for name in old_head if name not in head] if old.keys() - new.keys() else []
    first = next((at for at, name in enumerate(head) if name in PROVENANCE), len(head))
    together = [*head[:first], *lost, *head[first:]]
    return together, [[row.get(name, "-") for name in together] for row in {**old, **new}.values()]


def without(names: Sequence[str], head: list[str], rows: list[list[str]]) -> Cells:
    """Return a table without the columns that have these names."""
    kept = [at for at, name in enumerate(head) if name not in names]
    return [head[at] for at in kept], [[row[at] for at in kept] for row in rows]


def read(path: Path) -> Cells:
    """Return the head and the rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return head, rows


def distinct(values: Iterable[str]) -> str:
    """Return the different ones of some texts, separated by commas."""
    return ", ".join(dict.fromkeys(values))
