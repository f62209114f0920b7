"""python -m cifar_tl.evaluate checkpoint=RUN/checkpoints/best.ckpt: the run's test numbers, from its checkpoint."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cifar_tl import cli
from cifar_tl.errors import UserError, check_flag
from cifar_tl.files import written_in_one_step

if TYPE_CHECKING:
    import lightning as L

    from cifar_tl.data.datamodule import CIFAR10DataModule
    from cifar_tl.trained import Trained

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Evaluate, and leave the figures as evaluation.json in the output folder of this call."""
    result = evaluate(cfg)
    path = Path(HydraConfig.get().runtime.output_dir) / "evaluation.json"
    with written_in_one_step(path, "hydra.run.dir") as partial:
        partial.write_text(json.dumps({"checkpoint": str(cfg.checkpoint), **result}, indent=1) + "\n")
    log.info("\nresults     %s", path)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure a checkpoint on the test set of the data that its run used, and on what else `cfg` asks for.

    Args:
        cfg: As composed from conf/evaluate.yaml; values that are null there are the run's.

    Returns:
        `test/acc`, `test/acc_interval`, `test/loss`, `test/ece` and the per-class figures of the single view, as the
        run had them. Then, if asked for: `test/flip/*` and `test/flip_shift/*`; `temperature`, `val/*` and
        `*/calibrated/*`; `cifar10.1_v6/*`; `cifar10_c/*`.

    Raises:
        UserError: The checkpoint or the data is missing or broken.
    """
    from cifar_tl import run  # late: `--help` should not wait for torch
    from cifar_tl.data.datamodule import build_datamodule
    from cifar_tl.hardware import prepare_for, resolve_accelerator
    from cifar_tl.trained import restore

    run.quieten_lightning()
    trained = restore(Path(cfg.checkpoint))
    data = trained.config.data
    for key, value in cfg.data.items():
        if value is not None:
            data[key] = value
    prepare_for(resolve_accelerator(cfg.trainer.accelerator), trained.module)
    beside = ExtraEvaluations(cfg, trained)
    datamodule = build_datamodule(data, run.build_augment(trained.config), trained.config.seed)
    precision = cfg.trainer.precision or trained.facts["precision"]
    trainer = run.build_trainer({**cfg.trainer, "precision": precision}, logger=False, enable_checkpointing=False)
    (scalars,) = trainer.test(trained.module, datamodule=datamodule, verbose=False)
    examples = datamodule.sizes["test"]
    result = run.test_result(scalars, trained.module, examples)
    log.info("%s", run.result_text(result, examples))
    for name, *values in zip(
        trained.classes, result["test/precision"], result["test/recall"], result["test/f1"], strict=True
    ):
        log.info("  %-12s precision %.4f  recall %.4f  F1 %.4f", name, *values)
    return result | beside.evaluate(trainer, datamodule)


class ExtraEvaluations:
    """The figures that are asked for beside those of the single view on the test set.

    Args:
        cfg: As composed from conf/evaluate.yaml.
        trained: The checkpoint, with the data group as `cfg` has changed it.

    Raises:
        UserError: A wrong key, or files of another test set that are missing; before anything is computed.
    """

    def __init__(self, cfg: DictConfig, trained: "Trained") -> None:
        from cifar_tl.data import robustness
        from cifar_tl.data.cifar10 import Cifar10

        self.trained = trained
        self.tta = check_flag("tta", cfg.tta)
        self.temperature = check_flag("temperature", cfg.temperature)
        self.version = cfg.cifar10_1
        self.corruptions = robustness.chosen_corruptions(cfg.cifar10_c) if cfg.cifar10_c is not None else []
        self.root = Path(trained.config.data.get("root") or "data")  # generated images have no root
        if (self.version is not None or self.corruptions) and trained.classes != Cifar10.classes:
            raise UserError(
                f"cifar10_1= and cifar10_c= are for models with CIFAR-10's classes; those of {cfg.checkpoint} are "
                f"{', '.join(trained.classes)}."
            )
        if self.version is not None:
            self.new_images = robustness.cifar10_1(self.root, self.version)
        for corruption in self.corruptions:
            robustness.cifar10_c(self.root, corruption)

    def evaluate(self, trainer: "L.Trainer", datamodule: "CIFAR10DataModule") -> dict[str, Any]:
        """Measure and say it; return the figures by name.

        Args:
            trainer: Has tested the single view; its device and precision are used.
            datamodule: Of the run, with the test set loaded.

        Raises:
            UserError: The run's validation split cannot be made again.
        """
        from cifar_tl.evaluation import Evaluation

        device = trainer.strategy.root_device
        classifier = self.trained.classifier().to(device)
        batch_size = self.trained.config.data.eval_batch_size
        evaluation = Evaluation(classifier, device, trainer.precision_plugin.forward_context, batch_size)
        if self.temperature:
            datamodule.setup("validate")
            if datamodule.split_sha256 != self.trained.facts["split_sha256"]:
                raise UserError(
                    f"temperature=true: the run's validation split cannot be made again (SHA-256 "
                    f"{datamodule.split_sha256[:12]}, the run's was {self.trained.facts['split_sha256'][:12]}): its "
                    f"data has changed. data.root= says where the run's data is."
                )
            evaluation.fit_temperature(datamodule.images("val").cpu(), datamodule.targets("val").cpu())
        if self.tta or self.temperature:
            log.info("\ntest, beside the single view above")
            images, targets = datamodule.images("test"), datamodule.targets("test").cpu()
            evaluation.measure_beside("test", evaluation.logits(images), images, targets, self.tta)
        if self.version is not None:
            evaluation.measure(f"cifar10.1_{self.version}", *self.new_images, self.tta)
        if self.corruptions:
            evaluation.measure_corruptions(self.root, self.corruptions)
        return evaluation.result


if __name__ == "__main__":
    sys.exit(cli.run(main, "evaluate", sys.argv[1:]))
