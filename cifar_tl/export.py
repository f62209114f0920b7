"""python -m cifar_tl.export checkpoint=CHECKPOINT format=onnx|torch_export: the model as a file."""

import sys

from cifar_tl import cli

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(cli.run("cifar_tl.export:main", "export", sys.argv[1:]))

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from cifar_tl import __version__
from cifar_tl.build import build_datamodule
from cifar_tl.checkpoints import Trained, find_checkpoint, load_trained
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.data.splits import make_generator
from cifar_tl.errors import UserError, check_choice, check_int, check_number, check_path, first_line
from cifar_tl.files import check_writable, replacing, writing_for
from cifar_tl.model.classifier import INPUTS

log = logging.getLogger(__name__)

BATCH_SIZE = 250
OPSETS = range(18, 26)
"""What torch can write; to anything older it would have to convert, which fails for most operators."""
PATH_KINDS = (PurePosixPath, PureWindowsPath)

Metadata = dict[str, str]
Run = Callable[[Tensor], Tensor]
"""From images to logits."""

METADATA = ("classes", "input", "output", "normalization", "provenance")
"""The keys in every file; torch's readers give only what they are asked for by name."""

INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def main(cfg: DictConfig) -> None:
    """Export into the output folder of this call."""
    export(cfg, Path(HydraConfig.get().runtime.output_dir))


def export(cfg: DictConfig, folder: Path) -> Path:
    """Write a model in another format, read it back and compare it with its checkpoint.

    Args:
        cfg: As composed from conf/export.yaml.
        folder: Gets the file if `cfg.output` is null.

    Returns:
        Where the file is.

    Raises:
        UserError: A wrong key, a package that is missing, or logits that differ by more than `cfg.tolerance`; no file
            is left then.
    """
    exporter = EXPORTERS[check_choice("format", cfg.format, EXPORTERS)]
    check_choice("input", cfg.input, INPUTS)
    tolerance = check_number("tolerance", cfg.tolerance, 0)
    exporter.check_packages()
    opset = check_opset(cfg.opset, cfg.format)
    checkpoint = find_checkpoint(check_path("checkpoint", cfg.checkpoint))
    output = folder / f"{checkpoint.stem}{exporter.ending}"
    if cfg.output is not None:
        output = check_path("output", cfg.output)
    if output.suffix != exporter.ending:
        raise UserError(f"output={output} should end in {exporter.ending}: readers go by it.")
    check_writable(output)
    trained = load_trained(checkpoint)
    root = None if cfg.data.root is None else check_path("data.root", cfg.data.root)
    images, what = parity_images(trained, root, check_int("parity_images", cfg.parity_images, 1))
    given = images if cfg.input == "uint8" else images.float() / 255
    with writing_for(output), replacing(output) as partial:
        with quiet():
            example = given.new_zeros((2, *given.shape[1:]))  # it ends up in the file: no image of the data
            exporter.write(trained.classifier(cfg.input), example, metadata(trained, cfg.input), opset, partial)
            run, _ = exporter.load(partial)
            difference, agreeing = compare(trained, images, given, run)
        if not difference <= tolerance:  # not >, which a NaN would pass
            raise UserError(
                f"not exported: logits of the {cfg.format} file differ from the checkpoint's by up to {difference:.2g} "
                f"on {what}, more than tolerance={tolerance:g}. Try another format=, or raise tolerance= knowingly."
            )
    log.info(
        "parity      largest difference of a logit %.2g (tolerance %g), same class for %d of %d: %s",
        difference,
        tolerance,
        agreeing,
        len(images),
        what,
    )
    log.info("input       images: %s; normalized inside", INPUTS[cfg.input])
    log.info("output      logits: float32, (batch, %d); their softmax is the probabilities", len(trained.classes))
    log.info("model       %s (%.1f MB)", output, output.stat().st_size / 1e6)
    return output


def compare(trained: Trained, images: Tensor, given: Tensor, run: Run) -> tuple[float, int]:
    """Compare an exported model with its checkpoint, in batches and as a single image.

    The checkpoint's side is computed as its test was, but in float32: batches of ArrayLoader, normalized there,
    through the module.

    Args:
        trained: The checkpoint.
        images: (images, 3, 32, 32), uint8.
        given: The same as the exported model takes them.
        run: The exported model.

    Returns:
        The largest absolute difference of a logit, and for how many images the highest logit is the same class's.
    """
    normalization = trained.facts["normalization"]
    loader = ArrayLoader(
        images, torch.zeros(len(images), dtype=torch.int64), BATCH_SIZE, normalization["mean"], normalization["std"]
    )
    with torch.no_grad():
        expected = torch.cat([trained.module(batch) for batch, _ in loader])
        got = torch.cat([run(batch) for batch in torch.split(given, BATCH_SIZE)])
        alone = run(given[:1])
    differences = [(got - expected).abs().max(), (alone - expected[:1]).abs().max()]
    agreeing = int((got.argmax(dim=1) == expected.argmax(dim=1)).sum())
    return float(torch.stack(differences).max()), agreeing


def check_opset(opset: object, format: str) -> int | None:
    """Return a version of ONNX's operators, or None for the exporter's own.

    Raises:
        UserError: It is none that the exporter writes, or the format has none.
    """
    if opset is None:
        return None
    if format != "onnx":
        raise UserError(f"opset={opset} is for format=onnx; format={format} has none. Drop it.")
    if (version := check_int("opset", opset, 1)) not in OPSETS:
        raise UserError(f"opset={opset} is not allowed: torch writes {OPSETS.start} to {OPSETS.stop - 1}.")
    return version


def parity_images(trained: Trained, root: Path | None, limit: int) -> tuple[Tensor, str]:
    """Return images to compare on, (images, 3, 32, 32), uint8, and what they are.

    They are the run's validation images; random ones if these cannot be read. Nothing is downloaded.

    Raises:
        UserError: A `root` without them, or for a run that needs none.
    """
    if root is not None and "root" not in trained.config.data:
        raise UserError(f"data.root={root} would have no effect: the run's images are generated.")
    config = trained.config.copy()
    config.data.update({"download": False} | ({"root": str(root)} if root is not None else {}))
    try:
        datamodule = build_datamodule(config)
        datamodule.prepare_data()
        datamodule.setup("validate")
    except UserError as error:
        if root is not None:
            raise  # somebody said where
        images = torch.randint(0, 256, (limit, 3, 32, 32), dtype=torch.uint8, generator=make_generator(0))
        reason = first_line(error).rstrip(":.")
        return images, f"{limit:,} random images, data.root= saying where the run's are: {reason}"
    images = datamodule.images("val", torch.arange(min(limit, datamodule.sizes["val"])))
    which = "of the run" if trained.facts["split_sha256"] == datamodule.split_sha256 else "that are not the run's"
    return images, f"{len(images):,} validation images {which}"


def metadata(trained: Trained, input: str) -> dict[str, str]:
    """Return what travels in the file: strings, JSON where it has structure."""
    provenance = {
        "cifar_tl": __version__,
        "checkpoint_sha256": trained.sha256,
        "epoch": trained.epoch,
        "facts": trained.facts,
        # where a run was logged says nothing of the model, and may be somebody's server, with a password
        "config": {group: values for group, values in trained.saved_config.items() if group != "logger"},
    }
    values = (
        json.dumps(trained.classes),
        INPUTS[input],
        "logits, float32, (batch, classes); their softmax is the probabilities",
        json.dumps({**trained.facts["normalization"], "where": "inside the model"}),
        json.dumps(without_folders(provenance)),
    )
    return dict(zip(METADATA, values, strict=True))


def without_folders(value: Any) -> Any:
    """Return plain values with absolute paths cut to their last part: where somebody keeps files is not for others."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith("~") or any(kind(value).is_absolute() for kind in PATH_KINDS)):
        return PureWindowsPath(value).name  # it knows / as well
    return value


@dataclass(frozen=True)
class Exporter:
    """A file format.

    Attributes:
        ending: Of its files.
        packages: That it needs beyond this program's own.
        write: Writes a model, given an example of its input, what to put into the file beside it, and a version of
            ONNX's operators, if that is asked for.
        load: Reads a file and returns what runs it and the metadata in it.
    """

    ending: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Metadata, int | None, Path], None]
    load: Callable[[Path], tuple[Run, Metadata]]

    def check_packages(self) -> None:
        """Raise UserError if a package is not installed."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise UserError(
                f"format=onnx needs what is not installed: `pip install {' '.join(missing)}`, or take "
                f"format=torch_export."
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


def _write_onnx(model: nn.Module, example: Tensor, metadata: Metadata, opset: int | None, path: Path) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=_dynamic_batch(),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=opset,
        verbose=False,
    )
    assert program is not None  # it is, with dynamo
    if opset is not None and program.model.opset_imports[""] != opset:
        raise UserError(
            f"opset={opset}: torch could not convert the model to it, only to {program.model.opset_imports['']}. Take "
            f"that one, or leave it out."
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
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


def _write_torch_export(model: nn.Module, example: Tensor, metadata: Metadata, opset: int | None, path: Path) -> None:
    assert opset is None
    program = torch.export.export(model, (example,), dynamic_shapes=_dynamic_batch())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the paths of this machine
    content = io.BytesIO()  # torch's own writer has no word for a full disk
    torch.export.save(program, content, extra_files=metadata)
    path.write_bytes(content.getbuffer())


def _load_torch_export(path: Path) -> tuple[Run, Metadata]:
    metadata = dict.fromkeys(METADATA, "")
    return torch.export.load(path, extra_files=metadata).module(), metadata


EXPORTERS = {
    "onnx": Exporter(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "torch_export": Exporter(".pt2", (), _write_torch_export, _load_torch_export),
}
