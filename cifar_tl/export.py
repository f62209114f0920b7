"""python -m cifar_tl.export checkpoint=CHECKPOINT format=onnx|torchscript|torch_export: the model as a file."""

import sys

from cifar_tl import cli

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(cli.run("cifar_tl.export:main", "export", sys.argv[1:]))

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from cifar_tl import __version__
from cifar_tl.build import build_datamodule
from cifar_tl.checkpoints import Trained, load_trained
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.data.splits import make_generator
from cifar_tl.errors import UserError, check_choice, check_int, check_number
from cifar_tl.files import check_writable, replacing, writing_for
from cifar_tl.model.classifier import INPUTS

log = logging.getLogger(__name__)

BATCH_SIZE = 250
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
    checkpoint = Path(cfg.checkpoint)
    output = Path(cfg.output) if cfg.output is not None else folder / f"{checkpoint.stem}{exporter.ending}"
    if output.suffix != exporter.ending:
        raise UserError(f"output={output} should end in {exporter.ending}: readers go by it.")
    check_writable(output)
    trained = load_trained(checkpoint)
    images, what = parity_images(trained, cfg.data.root, check_int("parity_images", cfg.parity_images, 1))
    given = images if cfg.input == "uint8" else images.float() / 255
    with writing_for(output), replacing(output) as partial:
        with quiet():
            example = given.new_zeros((2, *given.shape[1:]))  # it ends up in the file: no image of the data
            exporter.write(trained.classifier(cfg.input), example, metadata(trained, cfg.input), partial)
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
    """Compare an exported model with its checkpoint, in whole batches, a last one that is shorter, and a single image.

    The checkpoint's side is computed as its test was: batches of ArrayLoader, normalized there, through the module.

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


def parity_images(trained: Trained, root: str | None, limit: int) -> tuple[Tensor, str]:
    """Return images to compare on, (images, 3, 32, 32), uint8, and what they are.

    They are the run's validation images; random ones if its data is not there. Nothing is downloaded.
    """
    config = trained.config.copy()
    config.data.update({"download": False} | ({"root": root} if root is not None else {}))
    try:
        datamodule = build_datamodule(config)
        datamodule.prepare_data()
        datamodule.setup("validate")
    except UserError:
        if root is not None:
            raise  # somebody said where
        images = torch.randint(0, 256, (limit, 3, 32, 32), dtype=torch.uint8, generator=make_generator(0))
        return (
            images,
            f"{limit:,} random images: the run's data is not at {config.data.get('root')}, data.root= says where",
        )
    images = datamodule.images("val")[:limit]
    return images, f"{len(images):,} validation images of the run"


def metadata(trained: Trained, input: str) -> dict[str, str]:
    """Return what travels in the file: strings, JSON where it has structure."""
    with trained.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "cifar_tl": __version__,
        "checkpoint_sha256": sha256,
        "epoch": trained.epoch,
        "facts": trained.facts,
        "config": OmegaConf.to_container(trained.config, resolve=True),
    }
    values = (
        json.dumps(trained.classes),
        INPUTS[input],
        "logits, float32, (batch, classes); their softmax is the probabilities",
        json.dumps({**trained.facts["normalization"], "where": "inside the model"}),
        json.dumps(provenance),
    )
    return dict(zip(METADATA, values, strict=True))


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
