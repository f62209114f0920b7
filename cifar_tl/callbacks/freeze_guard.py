"""A proof, early in every phase, that the backbone is frozen when it should be and moves when it should."""

import math
from collections import Counter
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze, run_epochs
from cifar_tl.callbacks.freezing import BATCHNORM_POLICIES, batchnorms, training_modules
from cifar_tl.errors import UserError, check_choice
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

    What should train must have had gradients and have changed. It is enough if another parameter of the same layer has
    changed, for the bias in front of a BatchNorm layer that trains cannot. What of the backbone should not train must
    be bit-identical, BatchNorm's running statistics included. What else there is, a head's BatchNorm for one, or other
    buffers of a backbone that trains, may move as it likes. The expectation comes from the epoch, never from the flags
    that the freezing code sets; what BackboneUnfreeze keeps fixed, and says so, must stay as it is, too. A resumed run
    is checked where it resumes, too.

    The comparison is made after CHECKED_STEPS, and ends the run where something frozen has moved, or where the whole
    head or backbone has no gradient. Less than that, such as a warm-up's first steps that are too small for float32, or
    a part of the head that is used later, has until the end of the epoch, and what an optimizer has that takes no step
    in it, until the epoch in which it does, or the end of the phase. Steps that a GradScaler skips under 16-mixed do
    not count.

    Args:
        unfreeze_at_epoch: As given to BackboneUnfreeze.
        stage_epochs: As given to BackboneUnfreeze.
        progressive_resizing: As given to BackboneUnfreeze.
        batchnorm: The BatchNorm policy; under `frozen` the statistics of training stages must stay as they are.
        max_epochs: Epochs of the whole run; None for the Trainer's.
        stages: As given to BackboneUnfreeze.

    Raises:
        FreezeViolationError: From `on_train_batch_end`, with what is wrong, the tensors and the likely reason.
        UserError: As BackboneUnfreeze, for the same values, when fit starts; values that are not BackboneUnfreeze's.
    """

    phases: Phases

    def __init__(
        self,
        unfreeze_at_epoch: int | None,
        stage_epochs: int = 0,
        progressive_resizing: Sequence[int] | None = None,
        batchnorm: str = "frozen",
        max_epochs: int | None = None,
        stages: Sequence[str] | None = None,
    ) -> None:
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.stage_epochs = stage_epochs
        self.progressive_resizing = progressive_resizing or ()
        self.stages = stages
        self.batchnorm = check_choice("finetune.batchnorm", batchnorm, BATCHNORM_POLICIES)
        self._max_epochs = max_epochs
        self._kept: set[str] = set()
        self._before: dict[str, Tensor] = {}
        self._had_gradient: set[str] = set()
        self._steps: Counter[int] = Counter()
        """Steps since the copy, by the optimizer's id; 0 where each was skipped."""
        self._due: float = CHECKED_STEPS

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Work out the phases."""
        if stage == "fit":
            epochs = run_epochs(trainer) if self._max_epochs is None else self._max_epochs
            self.phases = Phases(
                epochs, self.unfreeze_at_epoch, self.stage_epochs, self.progressive_resizing, self.stages
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the optimizers' steps, and copy the model: a resumed run is checked, too."""

        def count(optimizer: Optimizer, args: object, kwargs: object) -> None:
            self._note_gradients(pl_module)
            # a GradScaler calls fused optimizers even for a step that they have to skip, and tells them so
            self._steps[id(optimizer)] += not getattr(optimizer, "found_inf", None)

        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning adds it
        unfreezing = [callback for callback in callbacks if isinstance(callback, BackboneUnfreeze)]
        if any((its.schedule.phases, its.batchnorm) != (self.phases, self.batchnorm) for its in unfreezing):
            raise UserError(
                "FreezeGuard expects other phases, or another BatchNorm, than BackboneUnfreeze makes: give both the "
                "same unfreeze_at_epoch, stage_epochs, stages, progressive_resizing, batchnorm and max_epochs."
            )
        self._kept = set().union(*(its.kept for its in unfreezing))
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(count)
        self._copy(pl_module)

    def _copy(self, module: L.LightningModule) -> None:
        self._before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self._had_gradient, self._due = set(), CHECKED_STEPS
        self._steps.clear()

    def _note_gradients(self, module: L.LightningModule) -> None:
        if self._before:
            named = module.named_parameters(remove_duplicate=False)  # a module may have two names
            unseen = ((n, p) for n, p in named if n not in self._had_gradient)
            self._had_gradient |= {n for n, p in unseen if p.grad is not None and p.grad.any()}

    def expected_to_change(self, module: L.LightningModule, epoch: int) -> set[str]:
        """Return the names of the parameters and buffers that training must change in an epoch's phase."""
        training = training_modules(module.get_submodule("backbone"), self.phases.at(epoch).stages)
        changing = {id(p) for m in [module.get_submodule("head"), *training] for p in m.parameters()}
        changing -= {id(module.get_parameter(name)) for name in self._kept}
        if self.batchnorm != "frozen":
            # num_batches_tracked counts under `train` only
            changing |= {
                id(b)
                for layer in batchnorms(training)
                for name, b in layer.named_buffers()
                if self.batchnorm == "train" or name != "num_batches_tracked"
            }
        return {name for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in changing}

    def _watched(self, module: L.LightningModule, epoch: int) -> set[str]:
        """Return the backbone's parameters and buffers, except buffers of training stages that BatchNorm has not."""
        backbone = module.get_submodule("backbone")
        training = training_modules(backbone, self.phases.at(epoch).stages)
        free = {id(b) for m in training for b in m.buffers()}
        free -= {id(b) for layer in batchnorms([backbone]) for b in layer.buffers()}
        tensors = module.state_dict(keep_vars=True)
        return {name for name, tensor in tensors.items() if name.startswith("backbone.") and id(tensor) not in free}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the model where a phase starts."""
        if trainer.current_epoch == self.phases.at(trainer.current_epoch).start > 0:
            self._copy(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note that a step is tried, and which parameters have a gradient: a GradScaler may skip the step."""
        self._note_gradients(pl_module)
        self._steps[id(optimizer)] += 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Compare, once the checked steps are done, and once more at the end of the epoch if need be."""
        steps = max(self._steps.values(), default=0)
        if not self._before or (steps < self._due and not trainer.is_last_batch):
            return
        epoch = trainer.current_epoch
        where = f"epoch {epoch}, phase '{self.phases.at(epoch).name}', after {steps} steps"
        optimizers = {id(p): (o, g["lr"]) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        expected = self.expected_to_change(pl_module, epoch)
        parameters = {n: p for n, p in pl_module.named_parameters(remove_duplicate=False) if n in expected}
        changed = {n for n, t in pl_module.state_dict().items() if not torch.equal(t, self._before[n])}
        if moved := (self._watched(pl_module, epoch) - expected) & changed:
            raise FreezeViolationError(
                f"{where}: {_listing(moved)} changed although frozen. "
                f"Something unfroze them or left BatchNorm in train mode."
            )
        if orphans := {n for n, p in parameters.items() if id(p) not in optimizers}:
            raise FreezeViolationError(
                f"{where}: {_listing(orphans)} should train but are in no optimizer group. "
                f"configure_optimizers must give both the head and the whole backbone to the optimizer from step 0."
            )
        taken = {n: self._steps.get(id(optimizers[id(p)][0])) for n, p in parameters.items()}  # None: none was tried
        without_gradient = parameters.keys() - self._had_gradient
        layers = {_layer(n) for n in parameters.keys() & changed}
        still = {
            n
            for n in expected - changed
            if n not in parameters or (optimizers[id(parameters[n])][1] != 0 and _layer(n) not in layers)
        }
        if trainer.is_last_batch:
            waiting = {n for n, count in taken.items() if count is None}
            judged = expected - (waiting if epoch + 1 < self.phases.at(epoch).end else set())
        else:
            ready = {n for n in without_gradient if (taken[n] or 0) >= CHECKED_STEPS}
            parts = [{n for n in parameters if n.startswith(part)} for part in ("backbone.", "head.")]
            judged = {n for part in parts if part <= ready for n in part}
        if names := without_gradient & judged:
            raise FreezeViolationError(
                f"{where}: {_listing(names)} should train but had no gradient. "
                f"They were never unfrozen, or the loss does not depend on them (then set their requires_grad to False "
                f"before fit, and give the others to the optimizer), or a compiled or traced graph from the frozen "
                f"phase is still in use, or the ReLU units behind them are 0 for all images (then widen the head, or "
                f"take another seed)."
            )
        if names := still & judged:
            raise FreezeViolationError(
                f"{where}: {_listing(names)} should train but did not change.{_REASONS.get(str(trainer.precision), '')}"
            )
        if without_gradient or still:
            self._due = math.inf
        else:
            self._before = {}


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _listing(names: set[str]) -> str:
    some = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensors ({some}{', ...' if len(names) > 3 else ''})"
