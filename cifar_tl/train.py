"""python -m cifar_tl.train [group=choice ...] [key=value ...]: the two-phase run, from config to test result."""

import gc
import logging
import os
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cifar_tl import cli

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> float:
    """Train, test, draw the report and return the best validation accuracy, for sweeps."""
    from cifar_tl.run import train  # late: `--help` should not wait for torch

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    metrics = train(cfg, folder, experiment=hydra.runtime.choices["experiment"])
    gc.collect()  # model and trainer refer to each other: the next job of a sweep would start beside them
    draw_report(folder)
    return float(metrics["best/val/acc"])


def draw_report(folder: Path) -> None:
    """Draw the run's page and say where it is; a run with its result written is worth more than the page."""
    from cifar_tl.reports.run_page import write_run_report  # late: `--help` should not wait for matplotlib

    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # one process of several draws
    try:
        log.info("  report      %s", write_run_report(folder))
    except Exception as error:
        log.warning(
            "The report was not drawn (%s: %s). Again: python -m cifar_tl.reports %s",
            type(error).__name__,
            error,
            folder,
        )


if __name__ == "__main__":
    sys.exit(cli.run(main, "train", sys.argv[1:]))
