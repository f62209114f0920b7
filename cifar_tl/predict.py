"""python -m cifar_tl.predict checkpoint=CHECKPOINT input=IMAGE|FOLDER|ARCHIVE|@LIST: a table of classes."""

import sys

from cifar_tl import cli

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(cli.run("cifar_tl.predict:main", "predict", sys.argv[1:]))

import csv
import io
import itertools
import json
import logging
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cifar_tl.checkpoints import load_trained
from cifar_tl.data.decode import Decoded, UnreadableImage, decode, default_threads
from cifar_tl.data.inputs import InputFile, UnreadableFile, open_inputs
from cifar_tl.data.walk import skipped_text
from cifar_tl.errors import UserError, check_choice, check_flag, check_int, check_number, check_path
from cifar_tl.files import check_writable, replacing, writing_for
from cifar_tl.hardware import advice_when_out_of_memory, prepare_for, resolve_accelerator
from cifar_tl.model.tta import AUGMENTED, SINGLE, mean_logits

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""A value for each of `columns`; None where there is none."""

SHOWN_ERRORS = 5
"""So many are printed; the table has them all."""

Attempt = tuple[str, Decoded | str]
"""The path of a file, and its image or what is wrong with it."""


def main(cfg: DictConfig) -> None:
    """Predict into the output folder of this call."""
    predict(cfg, Path(HydraConfig.get().runtime.output_dir))


def predict(cfg: DictConfig, folder: Path) -> Path:
    """Classify the images of an input and write a table, one row per file, sorted by path.

    Args:
        cfg: As composed from conf/predict.yaml.
        folder: Gets the table if `cfg.output` is null.

    Returns:
        Where the table is.

    Raises:
        UserError: The checkpoint, the input or a key is wrong, or none of the files is an image (the table, which says
            why for each, is written nevertheless).
    """
    output = check_path("output", cfg.output) if cfg.output is not None else None
    format = choose_format(cfg.format, output)
    output = output or folder / f"predictions.{format}"
    source = check_path("input", cfg.input)
    check_writable(output)  # not after an hour's work
    with open_inputs(source) as inputs:
        rows, resized = classify(cfg, inputs.total, inputs.files)
    rows.sort(key=lambda row: str(row["path"]))  # a tar's come in its own order
    errors = [row for row in rows if row["error"] is not None]
    for row in rows:
        row |= {"path": path_text(row["path"]), "error": row["error"] and path_text(row["error"])}  # names others
    write_table(rows, output, format)

    predicted = len(rows) - len(errors)
    log.info("input       %s: files %d, predicted %d, errors %d", cfg.input, len(rows), predicted, len(errors))
    if inputs.skipped:
        log.info("skipped     %s", skipped_text(inputs.skipped))
    if resized:
        log.info("resized     %d to 32x32, bicubic, antialiased, whatever their shape", resized)
    for row in errors[:SHOWN_ERRORS]:
        log.info("error       %r: %s", row["path"], row["error"])
    if len(errors) > SHOWN_ERRORS:
        log.info("            and %d more, in the column `error`", len(errors) - SHOWN_ERRORS)
    log.info("table       %s", output)
    if predicted == 0:
        raise UserError(f"input={cfg.input}: no file could be predicted; {output} says why for each file.")
    return output


def classify(cfg: DictConfig, total: int | None, files: Iterable[InputFile]) -> tuple[list[Row], int]:
    """Return a row for each file, in their order, and how many images were resized.

    Args:
        cfg: As composed from conf/predict.yaml.
        total: Files, for the progress bar; None if it is not known.
        files: From `open_inputs`.

    Raises:
        UserError: The checkpoint or a key is wrong.
    """
    batch_size = check_int("batch_size", cfg.batch_size, 1)
    threads = default_threads() if cfg.threads is None else check_int("threads", cfg.threads, 1)
    device = resolve_accelerator(cfg.trainer.accelerator)
    trained = load_trained(check_path("checkpoint", cfg.checkpoint))
    top_k = min(3, len(trained.classes)) if cfg.top_k is None else check_int("top_k", cfg.top_k, 1)
    if top_k > len(trained.classes):
        raise UserError(f"top_k={top_k} is not allowed: {cfg.checkpoint} knows {len(trained.classes)} classes.")
    views = AUGMENTED["flip_shift"] if check_flag("tta", cfg.tta) else SINGLE
    temperature = check_number("temperature", cfg.temperature, 0)
    if temperature == 0:
        raise UserError("temperature=0 is not allowed: give a number above 0.")
    if views is not SINGLE and temperature != 1:
        log.info("note        temperature= is fitted on a single view: with tta=true probabilities are calibrated less")
    prepare_for(device, trained.module)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a file stands in its row
    resized = 0
    rows: list[Row] = []
    with progress(total) as advance, advice_when_out_of_memory(f"Lower batch_size={batch_size}."):
        network = trained.classifier().to(device)

        def probabilities_of(images: Tensor) -> Tensor:
            return (mean_logits(network, images, views) / temperature).softmax(dim=1)

        for batch in batches(attempts(files, threads), batch_size):
            resized += sum(not isinstance(image, str) and image.resized for _, image in batch)
            rows += predict_batch(probabilities_of, trained.classes, top_k, batch, device)
            advance(len(batch))
    return rows, resized


def attempts(files: Iterable[InputFile], threads: int) -> Iterator[Attempt]:
    """Read and decode files in a pool of threads, giving them in order; only a few are in memory at a time."""
    waiting: deque[tuple[str, Future[Decoded | str]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for file in files:
            waiting.append((file.path, pool.submit(attempt, file)))
            if len(waiting) > 2 * threads:
                path, future = waiting.popleft()
                yield path, future.result()
        for path, future in waiting:
            yield path, future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # of a caller who stops early


def attempt(file: InputFile) -> Decoded | str:
    """Return the image of a file, or what is wrong with it."""
    try:
        return decode(io.BytesIO(file.read()))
    except (UnreadableFile, UnreadableImage) as error:
        return str(error)
    except MemoryError:
        return "too large for the memory of this machine"


def batches(items: Iterator[Attempt], size: int) -> Iterator[list[Attempt]]:
    """Yield the items in lists of `size`, the last one with what is left."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def predict_batch(
    probabilities_of: Callable[[Tensor], Tensor], classes: Iterable[str], top_k: int, batch: list[Attempt], device: str
) -> list[Row]:
    """Return a row for each file of a batch.

    Args:
        probabilities_of: From images (batch, 3, 32, 32), uint8, to probabilities (batch, classes), of which six digits
            are kept.
        classes: Their names.
        top_k: Of them in a row.
        batch: Files with their images, or what is wrong with them.
        device: Of `probabilities_of`.
    """
    names = list(classes)
    rows: list[Row] = [dict.fromkeys(columns(top_k)) | {"path": path} for path, _ in batch]
    good = [(row, image) for row, (_, image) in zip(rows, batch, strict=True) if not isinstance(image, str)]
    for row, (_, image) in zip(rows, batch, strict=True):
        if isinstance(image, str):
            row["error"] = image
        else:
            size = [f"resized from {image.size[0]}x{image.size[1]}"] if image.resized else []
            row["note"] = "; ".join([*image.notes, *size]) or None
    if not good:
        return rows
    with torch.inference_mode():
        images = torch.from_numpy(np.stack([image.pixels for _, image in good])).to(device)
        best = probabilities_of(images).topk(top_k)
    for (row, _), probabilities, indices in zip(good, best.values.tolist(), best.indices.tolist(), strict=True):
        if not math.isfinite(sum(probabilities)):
            row["error"] = "the model's logits are not finite numbers: its training has diverged"
            continue
        for rank, (probability, index) in enumerate(zip(probabilities, indices, strict=True), start=1):
            row[f"class_{rank}"] = names[index]
            row[f"probability_{rank}"] = round(probability, 6)
    return rows


@contextmanager
def progress(total: int | None) -> Iterator[Any]:
    """Yield a function that moves a progress bar on by so many files; no bar where nobody sees one."""
    console = Console(stderr=True)
    columns = (TextColumn("files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda files: bar.advance(task, files)


def columns(top_k: int) -> list[str]:
    """Return the names of the columns: path, the classes with their probabilities, best first, note and error."""
    ranked = [f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("class", "probability")]
    return ["path", *ranked, "note", "error"]


def path_text(path: str) -> str:
    """Return a path as UTF-8 text; bytes that are not UTF-8 show as `\\xe9`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def choose_format(format: str | None, output: Path | None) -> str:
    """Return the format that a file should have: `format`, or what the ending of `output` says, or csv.

    Raises:
        UserError: An unknown format or ending, one that contradicts the other, or pyarrow is needed and not there.
    """
    if format is None:
        format = "csv" if output is None else output.suffix.removeprefix(".").lower()
        if format not in WRITERS:
            raise UserError(
                f"output={output} does not end in .{', .'.join(WRITERS)}: give it such an ending, or say format=."
            )
    check_choice("format", format, WRITERS)
    ending = "" if output is None else output.suffix.removeprefix(".").lower()
    if ending in WRITERS and ending != format:
        raise UserError(f"output={output} and format={format} contradict each other: readers go by the ending.")
    if format == "parquet" and find_spec("pyarrow") is None:
        raise UserError(
            "format=parquet needs pyarrow, which is not installed: `pip install pyarrow`, or take format=csv or json."
        )
    return format


def write_table(rows: Sequence[Row], path: Path, format: str) -> None:
    """Write predictions in one step.

    Args:
        rows: In the order of the file, one or more.
        path: Of the file; replaced if there is one.
        format: A key of WRITERS.

    Raises:
        UserError: It cannot be written there.
    """
    with writing_for(path), replacing(path) as partial:
        WRITERS[format](rows, list(rows[0]), partial)


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
