"""Random draws inside the model, such as dropout's, as a function of (seed, epoch)."""

import lightning as L
import torch

from cifar_tl.data.splits import make_generator

MODEL = 2
"""Purpose of the random generator; the data's are 0 and 10 to 15."""


class EpochSeed(L.Callback):
    """Seed torch's global generators at the start of every epoch, so that a resumed run draws what it would have.

    Args:
        seed: The run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the CPU's and the GPU's generators; every process of a run draws differently."""
        torch.manual_seed(make_generator(self.seed, trainer.current_epoch, MODEL, trainer.global_rank).initial_seed())
