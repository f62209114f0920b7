"""python -m cifar_tl.export checkpoint=CHECKPOINT format=onnx|torchscript|torch_export: the model as a file."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cifar_tl import __version__, cli
from cifar_tl.errors import UserError, check_choice, check_int, check_number
from cifar_tl.files import check_writable, written_in_one_step

if TYPE_CHECKING:
    from torch import Tensor

    from cifar_tl.exporters import Run
    from cifar_tl.trained import Trained

log = logging.getLogger(__name__)

BATCH_SIZE = 250


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
    from cifar_tl.exporters import EXPORTERS, quiet  # late, as what follows: `--help` should not wait for torch
    from cifar_tl.model.classifier import INPUTS
    from cifar_tl.trained import restore

    exporter = EXPORTERS[check_choice("format", cfg.format, EXPORTERS)]
    check_choice("input", cfg.input, INPUTS)
    tolerance = check_number("tolerance", cfg.tolerance, 0)
    exporter.check_packages()
    checkpoint = Path(cfg.checkpoint)
    output = Path(cfg.output) if cfg.output is not None else folder / f"{checkpoint.stem}{exporter.ending}"
    if output.suffix != exporter.ending:
        raise UserError(f"output={output} should end in {exporter.ending}: readers go by it.")
    check_writable(output)
    trained = restore(checkpoint)
    images, what = parity_images(trained, cfg.data.root, check_int("parity_images", cfg.parity_images, 1))
    given = images if cfg.input == "uint8" else images.float() / 255
    with written_in_one_step(output) as partial:
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


def compare(trained: "Trained", images: "Tensor", given: "Tensor", run: "Run") -> tuple[float, int]:
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
    import torch

    from cifar_tl.data.loader import ArrayLoader

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


def parity_images(trained: "Trained", root: str | None, limit: int) -> tuple["Tensor", str]:
    """Return images to compare on, (images, 3, 32, 32), uint8, and what they are.

    They are the run's validation images; random ones if its data is not there. Nothing is downloaded.
    """
    import torch

    from cifar_tl.data.datamodule import build_datamodule
    from cifar_tl.data.splits import make_generator
    from cifar_tl.run import build_augment

    data = trained.config.data.copy()
    data.update({"download": False} | ({"root": root} if root is not None else {}))
    try:
        datamodule = build_datamodule(data, build_augment(trained.config), seed=0)
        datamodule.prepare_data()
        datamodule.setup("validate")
    except UserError:
        if root is not None:
            raise  # somebody said where
        images = torch.randint(0, 256, (limit, 3, 32, 32), dtype=torch.uint8, generator=make_generator(0))
        return images, f"{limit:,} random images: the run's data is not at {data.get('root')}, data.root= says where"
    images = datamodule.images("val")[:limit]
    return images, f"{len(images):,} validation images of the run"


def metadata(trained: "Trained", input: str) -> dict[str, str]:
    """Return what travels in the file: strings, JSON where it has structure."""
    from cifar_tl.exporters import METADATA
    from cifar_tl.model.classifier import INPUTS

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


if __name__ == "__main__":
    sys.exit(cli.run(main, "export", sys.argv[1:]))
