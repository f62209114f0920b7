"""The file formats of a model that leaves this program: how each is written, and how it is run from its file."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar_tl.errors import UserError

Metadata = dict[str, str]
Run = Callable[[Tensor], Tensor]
"""From images to logits."""

METADATA = ("classes", "input", "output", "normalization", "provenance")
"""The keys in every file; torch's readers give only what they are asked for by name."""

INPUT, OUTPUT, BATCH = "images", "logits", "batch"


@dataclass(frozen=True)
class Exporter:
    """A file format.

    Attributes:
        ending: Of its files.
        packages: That it needs beyond this program's own.
        write: Writes a model, given an example of its input and what to put into the file beside it.
        load: Reads a file and returns what runs it and the metadata in it.
    """

    ending: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Metadata, Path], None]
    load: Callable[[Path], tuple[Run, Metadata]]

    def check_packages(self) -> None:
        """Raise UserError if a package is not installed."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise UserError(
                f"format=onnx needs what is not installed: `pip install {' '.join(missing)}`, or take "
                f"format=torchscript or torch_export."
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters: what they warn of is deprecations and their own internals. What counts is the parity check."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dynamic_batch() -> dict[str, dict[int, torch.export.Dim]]:
    return {INPUT: {0: torch.export.Dim(BATCH)}}


def _write_onnx(model: nn.Module, example: Tensor, metadata: Metadata, path: Path) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=_dynamic_batch(),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None  # it is, with dynamo
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> tuple[Run, Metadata]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run, dict(session.get_modelmeta().custom_metadata_map)


def _write_torchscript(model: nn.Module, example: Tensor, metadata: Metadata, path: Path) -> None:
    traced = torch.jit.trace(model, (example,))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, path, _extra_files=metadata)


def _load_torchscript(path: Path) -> tuple[Run, Metadata]:
    metadata = dict.fromkeys(METADATA, b"")
    run = torch.jit.load(path, map_location="cpu", _extra_files=metadata)  # type: ignore[no-untyped-call]
    return run, {key: value.decode() for key, value in metadata.items()}


def _write_torch_export(model: nn.Module, example: Tensor, metadata: Metadata, path: Path) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=_dynamic_batch())
    torch.export.save(program, path, extra_files=metadata)


def _load_torch_export(path: Path) -> tuple[Run, Metadata]:
    metadata = dict.fromkeys(METADATA, "")
    return torch.export.load(path, extra_files=metadata).module(), metadata


EXPORTERS = {
    "onnx": Exporter(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "torchscript": Exporter(".pt", (), _write_torchscript, _load_torchscript),
    "torch_export": Exporter(".pt2", (), _write_torch_export, _load_torch_export),
}
