"""python -m cifar_tl.evaluate checkpoint=RUN: the run's test metrics, from its checkpoint."""

import sys

from cifar_tl import cli

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(cli.run("cifar_tl.evaluate:main", "evaluate", sys.argv[1:]))

import json
import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from cifar_tl.build import build_datamodule, check_root
from cifar_tl.checkpoints import Trained, find_checkpoint, load_trained
from cifar_tl.data import robustness
from cifar_tl.data.cifar10 import Cifar10
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.errors import Interrupted, UserError, check_flag, check_int, check_path
from cifar_tl.files import write_text, writing_for
from cifar_tl.hardware import (
    advice_when_out_of_memory,
    environment,
    prepare_for,
    resolve_accelerator,
    resolve_precision,
    select_gpu,
)
from cifar_tl.model.tta import AUGMENTED, SINGLE, View, mean_logits
from cifar_tl.runs.formatting import percent, percent_range, result_text
from cifar_tl.runs.metrics import Ints, fit_temperature, scores
from cifar_tl.runs.record import finite, git_state, metrics_of_test
from cifar_tl.trainer import build_trainer, quieten_lightning

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Evaluate, and leave the metrics as evaluation.json in the output folder of this call."""
    result = evaluate(cfg)
    path = Path(HydraConfig.get().runtime.output_dir) / "evaluation.json"
    with writing_for(path, "hydra.run.dir"):
        write_text(
            path, json.dumps(finite({"checkpoint": str(cfg.checkpoint), **result}), indent=1, allow_nan=False) + "\n"
        )
    log.info("\nresults     %s", path)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure a checkpoint on the test set of the data that its run used, and on what else `cfg` asks for.

    Args:
        cfg: As composed from conf/evaluate.yaml; values that are null there are the run's.

    Returns:
        `test/acc`, `test/acc_interval`, `test/loss`, `test/ece` and the per-class metrics of the single view, as the
        run had them, `test_sha256`, the run's where the images are the run's, and what was measured on what:
        `checkpoint_epoch` and `checkpoint_sha256`, `data`, `test_images`, `precision`, device and commit. Then, if
        asked for: `test/flip/*` and `test/flip_shift/*`; `temperature`, `val/*` and `*/calibrated/*`;
        `cifar10.1_v6/*`; `cifar10_c/*`, its mean `cifar10_c/acc` of all fifteen corruptions alone.

    Raises:
        UserError: The checkpoint or the data is missing or broken.
    """
    quieten_lightning()
    checkpoint = find_checkpoint(check_path("checkpoint", cfg.checkpoint))
    trained = load_trained(checkpoint)
    data = trained.config.data
    if cfg.data.root is not None:
        data.root = str(check_path("data.root", cfg.data.root))
        if "download" in data:
            data.download = False  # a folder that is mistyped is not to be filled
    else:
        check_root(data)
    if cfg.data.eval_batch_size is not None:
        data.eval_batch_size = cfg.data.eval_batch_size
    accelerator = resolve_accelerator(cfg.trainer.accelerator)
    select_gpu(cfg.trainer.devices, accelerator)
    precision = cfg.trainer.precision or trained.facts["precision"]
    keys = {"deterministic": trained.config.trainer.get("deterministic"), **cfg.trainer, "precision": precision}
    trainer = build_trainer(keys, logger=False, enable_checkpointing=False)
    if trainer.world_size > 1:  # each would measure images of its own
        raise UserError(
            f"an evaluation is one process, and trainer.devices={cfg.trainer.devices} makes {trainer.world_size} here: "
            f"give 1, or [2] for one of several GPUs, and start it without torchrun or srun."
        )
    prepare_for(accelerator, trained.module)
    extra = ExtraEvaluations(cfg, trained)
    datamodule = build_datamodule(trained.config)
    check_classes(trained, datamodule)
    if cfg.data.limit == "all":
        datamodule.test_limit = None
    elif cfg.data.limit is not None:
        datamodule.test_limit = check_int("data.limit", cfg.data.limit, 1)
    if data.name == "synthetic" and cfg.data.root is not None and not (cfg.cifar10_1 or cfg.cifar10_c):
        raise UserError(f"data.root={cfg.data.root} would have no effect: the run's images are generated.")
    datamodule.prepare_data()
    datamodule.setup("test")  # so that Lightning does not fetch it again
    if extra.temperature:
        extra.make_validation_split(datamodule)  # before the test, not after it
    with advice_when_out_of_memory(f"Lower data.eval_batch_size={data.eval_batch_size}."):
        try:
            (scalars,) = trainer.test(trained.module, datamodule=datamodule, verbose=False)
        except SystemExit as stop:  # how Lightning ends after Ctrl-C
            raise Interrupted from stop
        examples = datamodule.sizes["test"]
        result = metrics_of_test(scalars, trained.module.test_details, examples)
        log.info("%s", result_text(result, examples))
        result["test_sha256"] = again = datamodule.test_sha256
        if again != (theirs := trained.facts.get("test_sha256", again)):
            log.info("note        not the run's own test images (SHA-256 %s, the run's %s)", again[:12], theirs[:12])
        counts = datamodule.targets("test").bincount(minlength=len(trained.classes)).tolist()
        for name, count, *values in zip(
            trained.classes, counts, result["test/precision"], result["test/recall"], result["test/f1"], strict=True
        ):
            log.info("  %-12s %s", name, class_text(*values) if count else "no test images")
        origin = {
            "checkpoint_sha256": trained.sha256,
            "checkpoint_epoch": trained.epoch,
            "data": data.name if data.name == "synthetic" else str(Path(data.root).expanduser().absolute()),
            "test_images": examples,
            "precision": resolve_precision(precision, accelerator),
            **environment(accelerator),
            **git_state(),
        }
        return result | origin | extra.evaluate(trainer, datamodule)


def class_text(precision: float, recall: float, f1: float) -> str:
    """Return a class's scores as they are printed."""
    return f"precision {precision:.4f}  recall {recall:.4f}  F1 {f1:.4f}"


def check_classes(trained: Trained, datamodule: CIFAR10DataModule) -> None:
    """Refuse data whose classes are not those that a model was trained for, in their order.

    Raises:
        UserError: With both lists.
    """
    theirs, ours = _normalized(trained.classes), _normalized(datamodule.classes)
    if theirs != ours:
        raise UserError(
            f"the data has other classes than checkpoint {trained.path}: measuring it would mean nothing.\n"
            f"  checkpoint ({len(theirs)}): {', '.join(theirs)}\n"
            f"  data ({len(ours)}): {', '.join(ours)}\n"
            f"data.root= says where data with the checkpoint's classes is."
        )


def _normalized(names: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", name) for name in names]


class ExtraEvaluations:
    """The evaluations that are asked for beside that of the single view on the test set.

    Args:
        cfg: As composed from conf/evaluate.yaml.
        trained: The checkpoint, with the data group as `cfg` has changed it.

    Raises:
        UserError: A wrong key, or files of another test set that are missing; before anything is computed.
    """

    def __init__(self, cfg: DictConfig, trained: Trained) -> None:
        self.trained = trained
        self.tta = check_flag("tta", cfg.tta)
        self.temperature = check_flag("temperature", cfg.temperature)
        self.version = cfg.cifar10_1
        self.corruptions = robustness.chosen_corruptions(cfg.cifar10_c) if cfg.cifar10_c is not None else []
        self.root = check_path("data.root", trained.config.data.get("root") or "data")  # generated images have no root
        if (self.version is not None or self.corruptions) and trained.classes != Cifar10.classes:
            raise UserError(
                f"cifar10_1= and cifar10_c= are for models with CIFAR-10's classes; those of {cfg.checkpoint} are "
                f"{', '.join(trained.classes)}."
            )
        if self.version is not None:
            self.new_images = robustness.cifar10_1(self.root, self.version)
        for corruption in self.corruptions:
            robustness.cifar10_c(self.root, corruption)

    def make_validation_split(self, datamodule: CIFAR10DataModule) -> None:
        """Load the run's validation split, on which the temperature is fitted.

        Raises:
            UserError: It cannot be made again: the data, or a key of it, has changed.
        """
        datamodule.setup("validate")
        again, before = datamodule.split_sha256, self.trained.facts["split_sha256"]
        if again != before:
            raise UserError(
                f"temperature=true: the run's validation split cannot be made again (SHA-256 {again[:12]}, the run's "
                f"was {before[:12]}): its images, their classes or data.split_seed have changed. data.root= says where "
                f"the run's data is."
            )

    def evaluate(self, trainer: L.Trainer, datamodule: CIFAR10DataModule) -> dict[str, Any]:
        """Evaluate and log it; return the metrics by name.

        Args:
            trainer: Has tested the single view; its device and precision are used.
            datamodule: Of the run, with the test set loaded, and for a temperature the validation split.
        """
        device = trainer.strategy.root_device
        classifier = self.trained.classifier().to(device)
        batch_size = self.trained.config.data.eval_batch_size
        evaluation = Evaluation(classifier, device, trainer.precision_plugin.forward_context, batch_size)
        if self.temperature:
            evaluation.fit_temperature(datamodule.images("val").cpu(), datamodule.targets("val").cpu().numpy())
        if self.tta or self.temperature:
            log.info("\ntest, beside the single view above")
            images, targets = datamodule.images("test"), datamodule.targets("test").cpu().numpy()
            evaluation.measure_beside("test", evaluation.logits(images), images, targets, self.tta)
        if self.version is not None:
            new_images, new_targets = self.new_images
            evaluation.measure(f"cifar10.1_{self.version}", new_images, new_targets.numpy(), self.tta)
        if self.corruptions:
            evaluation.measure_corruptions(self.root, self.corruptions)
        return evaluation.result


VIEW_TEXT = {"flip": "flip, 2 views", "flip_shift": "flip and 1-pixel shifts, 6 views"}


class Evaluation:
    """Collects metrics by name, `<set>/<metric>`, and logs them as they come.

    Args:
        network: From images (batch, 3, 32, 32), uint8, to logits; in eval mode.
        device: Of the network.
        precision: Makes the context that a forward pass runs in, so that other views compute as the single one did.
        batch_size: Images per forward pass; results do not depend on it.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
        batch_size: int,
    ) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.batch_size = batch_size
        self.temperature: float | None = None
        self.result: dict[str, Any] = {}

    def logits(self, images: Tensor, views: Mapping[View, float] = SINGLE) -> NDArray[np.float32]:
        """Return the weighted mean of the views' logits, (images, classes), float32."""
        parts = []
        with torch.inference_mode(), self.precision():
            for batch in torch.split(images, self.batch_size):
                parts.append(mean_logits(self.network, batch.to(self.device), views))
        return np.asarray(torch.cat([part.cpu() for part in parts if isinstance(part, Tensor)]).numpy())

    def fit_temperature(self, images: Tensor, targets: Ints) -> None:
        """Fit the temperature on validation images; sets measured later, but CIFAR-10-C, are reported with it, too."""
        logits = self.logits(images)
        self.temperature = self.result["temperature"] = fit_temperature(logits, targets)
        log.info("\nTemperature %.4f, fitted on %s validation images", self.temperature, f"{len(targets):,}")
        self.result |= named("val", scores(logits, targets))
        self._calibrate("val", logits, targets)

    def measure(self, name: str, images: Tensor, targets: Ints, tta: bool) -> None:
        """Measure a further test set in a single view and, if asked for, in several."""
        logits = self.logits(images)
        numbers = scores(logits, targets)
        log.info("\n%s: %s", name, numbers_text(numbers))
        self.result |= named(name, numbers)
        self.measure_beside(name, logits, images, targets, tta)

    def measure_beside(self, name: str, logits: NDArray[np.float32], images: Tensor, targets: Ints, tta: bool) -> None:
        """Measure what is reported beside the single view, whose logits are given."""
        if self.temperature is not None:
            self._calibrate(name, logits, targets)
        for view in AUGMENTED if tta else ():
            numbers = scores(self.logits(images, AUGMENTED[view]), targets)
            log.info("  %-38s %s", VIEW_TEXT[view], numbers_text(numbers))
            self.result |= named(f"{name}/{view}", numbers)

    def measure_corruptions(self, root: Path, corruptions: list[str]) -> None:
        """Measure corruptions of CIFAR-10-C, single view, each severity by itself, and the mean over all given ones."""
        log.info("\nCIFAR-10-C, single view, accuracy by severity 1 to 5, and their mean")
        table = []
        for corruption in corruptions:
            by_severity, targets = robustness.cifar10_c(root, corruption)
            logits = [self.logits(robustness.as_tensor(part)) for part in by_severity]
            accuracies = [scores(part, targets.numpy())["acc"] for part in logits]
            self.result[f"cifar10_c/{corruption}/acc"] = accuracies
            table.append(accuracies)
            columns = " ".join(f"{100 * accuracy:6.2f}" for accuracy in [*accuracies, np.mean(accuracies)])
            log.info("  %-18s %s%%", corruption, columns)
        mean = float(np.mean(table))
        every = set(corruptions) == set(robustness.CORRUPTIONS)
        if every:  # the benchmark's number is of nothing less
            self.result["cifar10_c/acc"] = mean
        whose = "all 15" if every else f"these {len(corruptions)}"
        log.info("  mean accuracy over %s corruptions: %.2f%%", whose, 100 * mean)

    def _calibrate(self, name: str, logits: NDArray[np.float32], targets: Ints) -> None:
        """Add loss and ECE with the temperature; accuracy is the same with and without."""
        assert self.temperature is not None
        before, after = scores(logits, targets), scores(logits / self.temperature, targets)
        self.result |= named(f"{name}/calibrated", {key: after[key] for key in ("loss", "ece")})
        log.info(
            "  %-38s loss %.4f -> %.4f, ECE %.4f -> %.4f",
            f"temperature, {name}",
            before["loss"],
            after["loss"],
            before["ece"],
            after["ece"],
        )


def named(prefix: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics under names that begin with `prefix/`."""
    return {f"{prefix}/{name}": value for name, value in numbers.items()}


def numbers_text(numbers: Mapping[str, Any]) -> str:
    """Return what `scores` returned, in a line."""
    return (
        f"accuracy {percent(numbers['acc'])} ({percent_range(*numbers['acc_interval'])}%), "
        f"loss {numbers['loss']:.4f}, ECE {numbers['ece']:.4f}"
    )
