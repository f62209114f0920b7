"""The callback that keeps the backbone frozen, unfreezes it on time, and owns every learning rate."""

import math
import sys
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle

from cifar_tl.callbacks import freezing
from cifar_tl.errors import UserError, check_choice
from cifar_tl.schedule import FinetuneSchedule, Phase


def run_epochs(trainer: L.Trainer) -> int:
    """Return a run's epochs, from 1; under `fast_dev_run`, which sets them to 1, enough for every schedule.

    Raises:
        UserError: The Trainer counts steps alone, or has no end.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning adds it
        return sys.maxsize
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        raise UserError(
            "The learning rates depend on the number of epochs: give Trainer(max_epochs=...), beside max_steps, too, "
            "or max_epochs= to BackboneUnfreeze and FreezeGuard."
        )
    return trainer.max_epochs


class BackboneUnfreeze(L.Callback):
    """Freeze the backbone until `unfreeze_at_epoch`, then train it, too, at learning rates of its own.

    Works on any LightningModule with a `backbone` and a `head` whose optimizer has the parameters of both, in groups of
    their own, and of nothing else, from step 0, and no learning rate scheduler, on training data with a length. What
    trains and how fast is a function of the epoch, applied anew at the start of every epoch and of every fit: a resumed
    run is in the right phase by construction (Lightning issue 21901). A parameter group's `lr_scale`, if it has one, is
    a factor of its part's learning rate, as in timm. Of a backbone or head that has gradients when fit
    starts, parameters without them stay as they are; when fit ends, everything else has gradients.

    Args:
        unfreeze_at_epoch: First epoch of fine-tuning; 0 trains everything from the start, None never unfreezes.
        head_lr: Learning rate of the head while the backbone is frozen.
        backbone_lr: Learning rate of the backbone once it trains.
        head_lr_unfrozen: Learning rate of the head once the backbone trains; None for `head_lr`.
        schedule: `constant` or `cosine` (to zero), once for the frozen epochs and once for the others.
        warmup_epochs: Epochs of linear warm-up at the start of both, fractions allowed.
        stage_epochs: Epochs between the unfreezing of two stages of a torchvision ResNet; 0 unfreezes all at once.
        batchnorm: One of freezing.BATCHNORM_POLICIES, for what trains.
        max_epochs: Epochs of the whole run; None for the Trainer's.
        compiled: The backbone is compiled by torch.compile, and has to be compiled anew for every phase.
        progressive_resizing: Values of the backbone's `upscale`, each for the same share of fine-tuning, and for two
            shares if given twice; None leaves it alone.
        stages: Those of schedule.STAGES, of a torchvision ResNet, that unfreeze; None for all of whatever backbone.

    Attributes:
        kept: Names of the parameters that stay fixed in every phase.

    Raises:
        UserError: A value that cannot be, or an unfreeze that is never reached; without `max_epochs`, when fit starts.
            Then, too: no `backbone` or `head`, a backbone without the stages or the `upscale` that are asked for, a
            parameter group of both or of neither, an optimizer without the parameters of one, a learning rate
            scheduler, StochasticWeightAveraging, training data without a length, or, without `max_epochs`, a max_steps
            that ends the run before the last phase.
    """

    schedule: FinetuneSchedule

    def __init__(
        self,
        unfreeze_at_epoch: int | None,
        head_lr: float,
        backbone_lr: float,
        head_lr_unfrozen: float | None = None,
        schedule: str = "cosine",
        warmup_epochs: float = 0.0,
        stage_epochs: int = 0,
        batchnorm: str = "frozen",
        max_epochs: int | None = None,
        compiled: bool = False,
        progressive_resizing: Sequence[int] | None = None,
        stages: Sequence[str] | None = None,
    ) -> None:
        self.batchnorm = check_choice("finetune.batchnorm", batchnorm, freezing.BATCHNORM_POLICIES)
        self.compiled = compiled
        self._schedule = {
            "unfreeze_at_epoch": unfreeze_at_epoch,
            "head_lr": head_lr,
            "backbone_lr": backbone_lr,
            "head_lr_unfrozen": head_lr_unfrozen,
            "schedule": schedule,
            "warmup_epochs": warmup_epochs,
            "stage_epochs": stage_epochs,
            "progressive_resizing": progressive_resizing,
            "stages": stages,
        }
        self._max_epochs = max_epochs
        self.kept: set[str] = set()
        self._prepared = False
        self._adapting: list[RemovableHandle] = []
        if max_epochs is not None:
            self.schedule = FinetuneSchedule(max_epochs, **self._schedule)  # type: ignore[arg-type]  # checked there

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the module, take the number of epochs from the Trainer, and turn gradients on.

        DistributedDataParallel, which wraps the module next, never averages those of a parameter that has none then.
        """
        for name in ("backbone", "head"):
            if not isinstance(getattr(pl_module, name, None), nn.Module):
                raise UserError(f"{type(pl_module).__name__} has no module named {name}, which BackboneUnfreeze needs.")
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning adds it
        if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
            raise UserError(
                "StochasticWeightAveraging sets learning rates, which BackboneUnfreeze owns, and clears BatchNorm's "
                "statistics, which batchnorm=frozen keeps: give EMAWeightAveraging."
            )
        if self._max_epochs is None:
            epochs = run_epochs(trainer)
            self.schedule = FinetuneSchedule(epochs, **self._schedule)  # type: ignore[arg-type]  # checked there
        self._check_backbone(pl_module.get_submodule("backbone"))
        trains = any(phase.stages for phase in self.schedule.phases)
        backbone = freezing.parameters_to_keep(pl_module, "backbone", trains)
        self.kept = backbone | freezing.parameters_to_keep(pl_module, "head", True)
        if self.kept and trains:
            names = f"{', '.join(sorted(self.kept)[:3])}{', ...' if len(self.kept) > 3 else ''}"
            rank_zero_info(f"{len(self.kept)} parameters came without gradients and stay fixed: {names}")
        self._prepared = True
        self._turn_gradients_on(pl_module)

    def _turn_gradients_on(self, module: nn.Module) -> None:
        for part in ("backbone", "head"):
            for name, parameter in module.get_submodule(part).named_parameters(part, remove_duplicate=False):
                if name not in self.kept:
                    parameter.requires_grad_(True)

    def _check_backbone(self, backbone: nn.Module) -> None:
        """Raise a UserError, before anything trains, if a later phase asks for what the backbone does not have."""
        phases = self.schedule.phases
        if any(phase.upscale is not None for phase in phases) and not hasattr(backbone, "upscale"):
            raise UserError(
                f"progressive_resizing sets the backbone's `upscale`, and {type(backbone).__name__} has none: "
                f"leave it out, or enlarge images by that attribute in the backbone's forward."
            )
        try:
            for phase in phases:
                freezing.training_modules(backbone, phase.stages)
        except AttributeError as error:
            raise UserError(
                f"stage_epochs and stages are about the stages of a torchvision ResNet, and {type(backbone).__name__} "
                f"is none ({error}): leave them out."
            ) from error

    def apply(self, module: nn.Module, phase: Phase) -> None:
        """Put a module with a backbone and a head into a phase, whatever phase it was in."""
        self._stop_adapting()
        backbone, head = module.get_submodule("backbone"), module.get_submodule("head")
        freezing.freeze(backbone)
        kept = [module.get_parameter(name) for name in self.kept]
        freezing.unfreeze([head], "train", kept)
        training = freezing.training_modules(backbone, phase.stages)
        freezing.unfreeze(training, self.batchnorm, kept)
        self._adapting = freezing.adapt_statistics(training) if self.batchnorm == "adapt" else []
        if phase.upscale is not None:
            backbone.upscale = phase.upscale  # type: ignore[assignment]  # no module, whatever nn.Module promises

    def _stop_adapting(self) -> None:
        for handle in self._adapting:
            handle.remove()
        self._adapting = []

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave BatchNorm's statistics, and what has gradients, to whoever uses the model next."""
        self._stop_adapting()
        self._turn_gradients_on(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Do what `on_fit_end` does, which is not called then."""
        self._stop_adapting()
        if self._prepared:
            self._turn_gradients_on(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out whose learning rate each parameter group has, and enter the phase: in mid-epoch no epoch starts.

        Raises:
            UserError: A group with parameters of both, or of neither; none for one of them; learning rates of groups
                that would be lost; a scheduler; training data without a length; too few steps for all phases.
        """
        members = {name: {id(p) for p in pl_module.get_submodule(name).parameters()} for name in ("head", "backbone")}
        self._modules: list[list[str]] = []
        for optimizer in trainer.optimizers:
            self._modules.append([])
            for number, group in enumerate(optimizer.param_groups):
                ids = {id(p) for p in group["params"]}
                whose = [name for name, theirs in members.items() if ids & theirs]
                if len(whose) != 1:
                    raise UserError(
                        f"Parameter group {number} of {type(optimizer).__name__} has parameters of "
                        f"{' and '.join(whose) or 'neither head nor backbone'}. Give the optimizer groups of their own "
                        f"for head and backbone, both from step 0, as parameter_groups() of cifar_tl.model.optim does."
                    )
                self._modules[-1].append(whose[0])
            _check_own_rates(optimizer, self._modules[-1])
        trained = {"head", "backbone"} if any(phase.stages for phase in self.schedule.phases) else {"head"}
        for name in sorted(trained - {name for names in self._modules for name in names}):
            if members[name]:
                raise UserError(
                    f"No optimizer has the parameters of the {name}, which is to train. Give the optimizer groups of "
                    f"their own for head and backbone, both from step 0."
                )
        if trainer.lr_scheduler_configs:
            raise UserError("BackboneUnfreeze owns the learning rates: return no scheduler from configure_optimizers.")
        if math.isinf(trainer.num_training_batches):
            raise UserError(
                "The training data has no length, but learning rates depend on it: give Trainer limit_train_batches."
            )
        last = self.schedule.phases[-1]
        before = last.start * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        fast = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning adds it
        if self._max_epochs is None and not fast and before and 0 <= trainer.max_steps <= before:
            raise UserError(
                f"max_steps={trainer.max_steps} ends the run before the phase '{last.name}', which starts at epoch "
                f"{last.start}, after {before} steps: raise it, or lower unfreeze_at_epoch."
            )
        self.apply(pl_module, self.schedule.phase(trainer.current_epoch))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enter the epoch's phase."""
        epoch = trainer.current_epoch
        phase = self.schedule.phase(epoch)
        self.apply(pl_module, phase)
        if self.compiled and epoch == phase.start > 0:
            torch.compiler.reset()  # a graph of the frozen phase gives no gradients

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Set every group's learning rate for this step; in the first one of fine-tuning, clear the optimizer's state.

        A run that goes on from the last step of an epoch has no start of the next one.
        """
        if batch_idx == 0 and trainer.current_epoch == self.schedule.unfreeze_at_epoch:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()  # a second phase is a second training: moments of the first would steer it
        learning_rates = self.schedule.learning_rates(
            trainer.current_epoch, batch_idx, int(trainer.num_training_batches)
        )
        for optimizer, modules in zip(trainer.optimizers, self._modules, strict=True):
            for group, name in zip(optimizer.param_groups, modules, strict=True):
                group["lr"] = learning_rates[name] * group.get("lr_scale", 1.0)
        # where Lightning writes after this step: it would write what an earlier one has logged, too
        if trainer._logger_connector.should_update_logs or trainer.is_last_batch:
            pl_module.log_dict({f"lr/{name}": value for name, value in learning_rates.items()})


def _check_own_rates(optimizer: torch.optim.Optimizer, parts: Sequence[str]) -> None:
    """Refuse groups of one part that have different learning rates and no `lr_scale`.

    Raises:
        UserError: BackboneUnfreeze would set them to the same.
    """
    for part in set(parts):
        groups = [group for group, name in zip(optimizer.param_groups, parts, strict=True) if name == part]
        rates = list(dict.fromkeys(float(group["lr"]) for group in groups if "lr_scale" not in group))
        if len(rates) > 1:
            raise UserError(
                f"Parameter groups of the {part} have learning rates of their own, {', '.join(map(str, rates))}, and "
                f"BackboneUnfreeze sets those of all groups. Give such a group 'lr_scale', a factor of its part's "
                f"learning rate, instead of 'lr'."
            )
