"""The callback that ends a search's hopeless trials."""

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L

from cifar_tl.errors import Pruned
from cifar_tl.runs.formatting import percent
from cifar_tl.runs.record import shortest
from cifar_tl.runs.resume import JOURNAL
from cifar_tl.search import open_study

if TYPE_CHECKING:
    import optuna


class Pruning(L.Callback):
    """Report `val/acc` of every epoch to the study of the search, and end the run where the pruner says so.

    The run's folder says which trial it is. A run that is no trial, or none that is still searched, is left alone.

    Args:
        pruner: Optuna's. It compares epochs of the same number, which are of the same phase in all trials of a search
            that does not vary the schedule.
    """

    def __init__(self, pruner: "optuna.pruners.BasePruner") -> None:
        self.pruner = pruner
        self._trial: optuna.Trial | None = None
        self._reason = ""
        self._accuracy: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the trial; only the first process talks to the study."""
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not (folder.parent / JOURNAL).is_file() or not folder.name.isdecimal():
            return
        import optuna

        study = open_study(folder.parent, pruner=self.pruner)
        trials = [trial for trial in study.trials if trial.number == int(folder.name)]
        if trials and not trials[0].state.is_finished():
            self._trial = optuna.Trial(study, trials[0]._trial_id)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask about the epoch before a resume: the run may have ended between its checkpoint and the pruner's word."""
        self._ask(trainer.current_epoch - 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the epoch's validation accuracy; an epoch without validation has none."""
        self._accuracy = shortest(float(trainer.callback_metrics["val/acc"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the epoch, unless the run had done so before it was resumed, and ask the pruner."""
        epoch, trial = trainer.current_epoch, self._trial
        accuracy, self._accuracy = self._accuracy, None
        if accuracy is None or trial is None:
            return
        if epoch not in trial.study.trials[trial.number].intermediate_values:
            trial.report(accuracy, epoch)
        self._ask(epoch)

    def _ask(self, epoch: int) -> None:
        """Ask the pruner, if the trial has reported this epoch last: it judges no other one."""
        trial = self._trial
        if trial is None or max(trial.study.trials[trial.number].intermediate_values, default=None) != epoch:
            return
        if trial.should_prune():
            reported = {t.number: t.intermediate_values for t in trial.study.trials}
            others = [values[epoch] for values in reported.values() if epoch in values]
            self._reason = (
                f"Pruned after epoch {epoch} by {type(self.pruner).__name__}: validation accuracy "
                f"{percent(reported[trial.number][epoch])}, the best of {len(others)} trials had "
                f"{percent(max(others))} then."
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the run; not at the end of an epoch, whose record and checkpoints are written first.

        Raises:
            Pruned: The pruner said so.
        """
        if reason := trainer.strategy.broadcast(self._reason):
            raise Pruned(reason)
