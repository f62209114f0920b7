"""A proof, early in every phase, that the backbone is frozen when it should be and moves when it should."""

import math
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from cifar_tl.callbacks.freezing import training_modules
from cifar_tl.errors import UserError
from cifar_tl.schedule import Phases

CHECKED_STEPS = 3


_REASONS = {
    "16-mixed": " trainer.precision=16-mixed skips steps whose gradients are not finite: try bf16-mixed or 32-true.",
    **{
        precision: f" trainer.precision={precision} rounds away steps that are small beside the weights: try "
        f"bf16-mixed or 32-true."
        for precision in ("bf16-true", "16-true")
    },
}
"""What a precision may have to do with weights that stay as they are."""


class FreezeViolationError(UserError):
    """The model did not train as the phase says; going on would give a result that the config does not describe."""


class FreezeGuard(L.Callback):
    """Compare the model before and after the first steps of each phase with what the phase says should have changed.

    What should train must have had gradients and have changed; what of the backbone should not must be bit-identical,
    BatchNorm's running statistics included. What else a module has, a head's BatchNorm for one, may move as it likes.
    The expectation comes from the epoch alone, never from the flags that the freezing code sets. A resumed run is
    checked where it resumes, too. Batches without a step do not count: a GradScaler skips some under 16-mixed, and
    gradients may be accumulated. What has not changed after CHECKED_STEPS is looked at again at the end of the epoch:
    the first steps of a warm-up may be too small for float32.

    Args:
        unfreeze_at_epoch: As given to BackboneUnfreeze.
        stage_epochs: As given to BackboneUnfreeze.
        progressive_resizing: As given to BackboneUnfreeze.
        batchnorm: The BatchNorm policy; under `frozen` the statistics of training stages must stay as they are.
        max_epochs: Epochs of the whole run; None for the Trainer's.

    Raises:
        FreezeViolationError: From `on_train_batch_end`, with what is wrong, the tensors and the likely reason.
    """

    phases: Phases

    def __init__(
        self,
        unfreeze_at_epoch: int | None,
        stage_epochs: int = 0,
        progressive_resizing: Sequence[int] | None = None,
        batchnorm: str = "frozen",
        max_epochs: int | None = None,
    ) -> None:
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.stage_epochs = stage_epochs
        self.progressive_resizing = progressive_resizing or ()
        self.batchnorm = batchnorm
        self._max_epochs = max_epochs
        self._before: dict[str, Tensor] = {}
        self._had_gradient: set[str] = set()
        self._steps = 0
        self._due: float = CHECKED_STEPS

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Work out the phases."""
        if stage == "fit":
            epochs = trainer.max_epochs if self._max_epochs is None else self._max_epochs
            self.phases = Phases(epochs or 0, self.unfreeze_at_epoch, self.stage_epochs, self.progressive_resizing)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps that the optimizers take, and copy the model: a resumed run is checked, too."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._count)
        self._copy(pl_module)

    def _copy(self, module: L.LightningModule) -> None:
        self._before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self._had_gradient, self._steps, self._due = set(), 0, CHECKED_STEPS

    def _count(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        # a GradScaler calls fused optimizers even for a step that they have to skip, and tells them so
        if self._before and not getattr(optimizer, "found_inf", None):
            self._steps += 1

    def expected_to_change(self, module: L.LightningModule, epoch: int) -> set[str]:
        """Return the names of the parameters and buffers that training must change in an epoch's phase."""
        training = training_modules(module.get_submodule("backbone"), self.phases.at(epoch).stages)
        changing = {id(p) for m in [module.get_submodule("head"), *training] for p in m.parameters()}
        if self.batchnorm != "frozen":
            # num_batches_tracked counts under `train` only
            changing |= {
                id(b)
                for m in training
                for name, b in m.named_buffers()
                if self.batchnorm == "train" or not name.endswith("num_batches_tracked")
            }
        return {name for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in changing}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the model where a phase starts."""
        if trainer.current_epoch == self.phases.at(trainer.current_epoch).start > 0:
            self._copy(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note which parameters have a gradient."""
        if self._before:
            self._had_gradient |= {n for n, p in pl_module.named_parameters() if p.grad is not None and p.grad.any()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Compare, once the checked steps are done."""
        if not self._before or (self._steps < self._due and not trainer.is_last_batch):
            return
        before, self._before = self._before, {}
        epoch = trainer.current_epoch
        changed = {n for n, t in pl_module.state_dict().items() if not torch.equal(t, before[n])}
        expected = self.expected_to_change(pl_module, epoch)
        parameters = {name for name, _ in pl_module.named_parameters()}
        learning_rates = {
            id(p): g["lr"] for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]
        }
        standing = {n for n, p in pl_module.named_parameters() if learning_rates.get(id(p)) == 0}
        still = expected - changed - standing
        without_gradient = (expected & parameters) - self._had_gradient
        orphans = {n for n, p in pl_module.named_parameters() if n in expected and id(p) not in learning_rates}
        where = f"epoch {epoch}, phase '{self.phases.at(epoch).name}', after {self._steps} steps"
        if moved := {name for name in changed - expected if name.startswith("backbone.")}:
            raise FreezeViolationError(
                f"{where}: {_listing(moved)} changed although frozen. "
                f"Something unfroze them or left BatchNorm in train mode after BackboneUnfreeze had frozen them."
            )
        if orphans:
            raise FreezeViolationError(
                f"{where}: {_listing(orphans)} should train but are in no optimizer group. "
                f"configure_optimizers must give both the head and the whole backbone to the optimizer from step 0."
            )
        if without_gradient:
            raise FreezeViolationError(
                f"{where}: {_listing(without_gradient)} should train but had no gradient. "
                f"They were never unfrozen, or a compiled or traced graph from the frozen phase is still in use."
            )
        if still and not trainer.is_last_batch:
            self._before, self._due = before, math.inf
        elif still:
            raise FreezeViolationError(
                f"{where}: {_listing(still)} should train but did not change.{_REASONS.get(str(trainer.precision), '')}"
            )


def _listing(names: set[str]) -> str:
    some = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensors ({some}{', ...' if len(names) > 3 else ''})"
