"""python -m cifar_tl.evaluate checkpoint=RUN/checkpoints/best.ckpt: the run's test numbers, from its checkpoint."""

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifar_tl import cli

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure a checkpoint on the test set of the data that its run used.

    Args:
        cfg: As composed from conf/evaluate.yaml; values that are null there are the run's.

    Returns:
        `test/acc`, `test/acc_interval`, `test/loss`, `test/ece` and the per-class figures.

    Raises:
        UserError: The checkpoint or the data is missing or broken.
    """
    from cifar_tl import run  # late: `--help` should not wait for torch
    from cifar_tl.checkpoints import read_checkpoint
    from cifar_tl.data.datamodule import build_datamodule
    from cifar_tl.hardware import prepare_for, resolve_accelerator

    run.quieten_lightning()
    checkpoint = read_checkpoint(Path(cfg.checkpoint))
    trained = OmegaConf.create(checkpoint["cifar_tl"]["config"])
    for key, value in cfg.data.items():
        if value is not None:
            trained.data[key] = value
    datamodule = build_datamodule(trained.data, run.build_augment(trained, run.build_plan(trained)), trained.seed)
    module = run.build_module(trained, checkpoint["cifar_tl"]["facts"]["classes"])
    module.load_state_dict(checkpoint["state_dict"])
    prepare_for(resolve_accelerator(cfg.trainer.accelerator), module)
    trainer = run.build_trainer(cfg.trainer, logger=False, enable_checkpointing=False)
    (scalars,) = trainer.test(module, datamodule=datamodule, verbose=False)
    examples = datamodule.sizes["test"]
    result = run.test_result(scalars, module, examples)
    log.info("%s", run.result_text(result, examples))
    for name, *values in zip(
        module.classes, result["test/precision"], result["test/recall"], result["test/f1"], strict=True
    ):
        log.info("  %-12s precision %.4f  recall %.4f  F1 %.4f", name, *values)
    return result


if __name__ == "__main__":
    sys.exit(cli.run(evaluate, "evaluate", sys.argv[1:]))
