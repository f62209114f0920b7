"""Predictions as a file: CSV, JSON or Parquet, the same columns in each."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cifar_tl.errors import UserError, check_choice
from cifar_tl.files import written_in_one_step

Row = dict[str, Any]
"""A value for each of `columns`; None where there is none."""


def columns(top_k: int) -> list[str]:
    """Return the names of the columns: path, the classes with their probabilities, best first, note and error."""
    ranked = [f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("class", "probability")]
    return ["path", *ranked, "note", "error"]


def path_text(path: str) -> str:
    """Return a path as UTF-8 text; bytes that are not UTF-8 show as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def choose_format(format: str | None, output: str | None) -> str:
    """Return the format that a file should have: `format`, or what the ending of `output` says, or csv.

    Raises:
        UserError: An unknown format, or pyarrow is needed and not there.
    """
    if format is None:
        format = "csv" if output is None else Path(output).suffix.removeprefix(".").lower()
        if format not in WRITERS:
            raise UserError(
                f"output={output} does not end in .{', .'.join(WRITERS)}: give it such an ending, or say format=."
            )
    check_choice("format", format, WRITERS)
    if format == "parquet" and find_spec("pyarrow") is None:
        raise UserError(
            "format=parquet needs pyarrow, which is not installed: `pip install pyarrow`, or take format=csv or json."
        )
    return format


def write_table(rows: Sequence[Row], top_k: int, path: Path, format: str) -> None:
    """Write predictions in one step.

    Args:
        rows: In the order of the file.
        top_k: Classes per row.
        path: Of the file; replaced if there is one.
        format: A key of WRITERS.

    Raises:
        UserError: It cannot be written there.
    """
    with written_in_one_step(path) as partial:
        WRITERS[format](rows, columns(top_k), partial)


def _write_csv(rows: Sequence[Row], names: list[str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_json(rows: Sequence[Row], names: list[str], path: Path) -> None:
    records = (json.dumps({name: row[name] for name in names}) for row in rows)
    path.write_text("[\n" + ",\n".join(records) + "\n]\n", encoding="utf-8")


def _write_parquet(rows: Sequence[Row], names: list[str], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [(n, pyarrow.float64() if n.startswith("probability_") else pyarrow.string()) for n in names]
    )
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), path)


WRITERS: dict[str, Callable[[Sequence[Row], list[str], Path], None]] = {
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}
