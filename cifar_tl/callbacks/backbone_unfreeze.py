"""The callback that keeps the backbone frozen, unfreezes it on time, and owns every learning rate."""

import lightning as L
import torch
from torch.utils.hooks import RemovableHandle

from cifar_tl.callbacks import freezing
from cifar_tl.errors import check_choice
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.schedule import FinetuneSchedule, Phase


class BackboneUnfreeze(L.Callback):
    """Freeze the backbone until `plan.unfreeze_at_epoch`, then unfreeze it and drop the learning rates.

    What trains and how fast is a function of the epoch (see FinetuneSchedule), applied anew at the start of every epoch: a
    resumed run is in the right phase by construction (Lightning issue 21901). Parameter groups exist from step 0, and no
    scheduler touches their rates.

    Args:
        plan: Phases and learning rates.
        batchnorm: One of freezing.BATCHNORM_POLICIES, for the stages that train.
        compiled: The backbone is compiled, and has to be compiled anew for every phase.
    """

    def __init__(self, plan: FinetuneSchedule, batchnorm: str, compiled: bool = False) -> None:
        self.plan = plan
        self.compiled = compiled
        self.batchnorm = check_choice("finetune.batchnorm", batchnorm, freezing.BATCHNORM_POLICIES)
        self._adapting: list[RemovableHandle] = []

    def apply(self, module: ResNet50Classifier, phase: Phase) -> None:
        """Put the module into a phase, whatever phase it was in."""
        for handle in self._adapting:
            handle.remove()
        freezing.freeze(module.backbone)
        module.head.requires_grad_(True)
        module.head.train()
        training = [m for stage in phase.stages for m in freezing.stage_modules(module.backbone, stage)]
        freezing.unfreeze(training, self.batchnorm)
        self._adapting = freezing.adapt_statistics(training) if self.batchnorm == "adapt" else []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enter the epoch's phase; at the unfreeze, drop what the optimizer remembers of the frozen phase."""
        assert isinstance(pl_module, ResNet50Classifier)
        epoch = trainer.current_epoch
        phase = self.plan.phase(epoch)
        self.apply(pl_module, phase)
        if self.compiled and epoch == phase.start > 0:
            torch.compiler.reset()  # a graph of the frozen phase gives no gradients
        if epoch == self.plan.unfreeze_at_epoch:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()  # a second phase is a second training: moments of the first would steer it

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Set every group's learning rate for this step."""
        rates = self.plan.learning_rates(trainer.current_epoch, batch_idx, int(trainer.num_training_batches))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[group["part"]]
        if batch_idx % trainer.log_every_n_steps == 0 or trainer.is_last_batch:  # type: ignore[attr-defined]  # Lightning adds it
            pl_module.log_dict({f"lr/{part}": rate for part, rate in rates.items()})
