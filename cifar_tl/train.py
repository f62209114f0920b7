"""python -m cifar_tl.train [group=choice ...] [key=value ...]: the two-phase run, from config to test result."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cifar_tl import cli


def main(cfg: DictConfig) -> float:
    """Train, test and return the best validation accuracy, for sweeps."""
    from cifar_tl.run import train  # late: `--help` should not wait for torch

    hydra = HydraConfig.get()
    metrics = train(cfg, Path(hydra.runtime.output_dir), experiment=hydra.runtime.choices["experiment"])
    return float(metrics["best/val/acc"])


if __name__ == "__main__":
    sys.exit(cli.run(main, "train", sys.argv[1:]))
