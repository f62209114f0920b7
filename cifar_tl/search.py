"""Hyperparameter search: Hydra's sweeper that asks Optuna for trials and tells it their results.

The study is a journal file in the sweep's folder; trial N is the run in its folder N. Whatever is needed to go on is in
these files, so that several processes share a search and a killed one loses nothing that is finished.
"""

import random
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cifar_tl.errors import UserError, check_int, first_line
from cifar_tl.files import lock, write_text
from cifar_tl.runs.record import METRICS, read_metrics
from cifar_tl.runs.resume import JOURNAL, MULTIRUN

if TYPE_CHECKING:  # an extra, and slow to import: only where a study is opened
    import optuna

NAME = "search"


def require_optuna() -> None:
    """Raise UserError if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"A search needs Optuna, and {error.name} is missing: pip install -e '.[optuna]'.") from error


def open_study(folder: Path, **options: Any) -> "optuna.Study":
    """Open the study of a sweep's folder, and make it if there is none.

    Args:
        folder: Of the sweep.
        options: `pruner` and `sampler`, which a study does not keep.

    Raises:
        UserError: Optuna is not installed, or cannot read the study's file.
    """
    require_optuna()
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        if NAME in optuna.get_all_study_names(storage):  # reading a study writes nothing
            return optuna.load_study(study_name=NAME, storage=storage, **options)
        return optuna.create_study(
            study_name=NAME, storage=storage, direction="maximize", load_if_exists=True, **options
        )
    except OSError:
        raise
    except Exception as error:  # KeyError, AssertionError, TypeError, ...: whatever a damaged line makes of it
        raise UserError(f"{folder / JOURNAL} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def distribution(override: Override) -> "optuna.distributions.BaseDistribution":
    """Return what Optuna draws from for a sweep of Hydra's grammar, read as Hydra's own Optuna plugin does.

    `interval(a, b)` is continuous, `int(interval(a, b))` whole numbers, on a logarithmic scale with `tag(log, ...)`;
    `range(a, b)` of whole numbers is ordered; all others are choices.

    Raises:
        UserError: Optuna refuses it.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    given: Any = override.value()
    try:
        if override.is_interval_sweep():
            kind = IntDistribution if isinstance(given.start, int) else FloatDistribution
            return kind(given.start, given.end, log="log" in given.tags)
        if override.is_range_sweep() and not given.shuffle and isinstance(given.start + given.step, int):
            values: list[Any] = sorted(override.sweep_iterator(), key=float)
            return IntDistribution(values[0], values[-1], step=abs(given.step))
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, IndexError) as error:
        raise UserError(f"{override.input_line}: Optuna cannot draw from it: {error}") from error


class OptunaSweeper(Sweeper):
    """Runs trials until the study has `n_trials`; see conf/hydra/sweeper/optuna.yaml.

    A trial that was running when its process ended is run again with the same values, from its last checkpoint. Failed
    trials count for the process that ran them; a search that is started again replaces them by new ones.

    Args:
        n_trials: Of the study, all processes and starts together.
        n_jobs: Trials that are asked for at once, and launched together.
        seed: The values of a trial depend on it, the trial's number and the results so far.
        sampler: Config of Optuna's, without its seed.
        params: The search space, sweeps by key.
    """

    def __init__(self, n_trials: int, n_jobs: int, seed: int, sampler: DictConfig, params: DictConfig) -> None:
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.seed = seed
        self.sampler = sampler
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives.

        Raises:
            UserError: A number that is not allowed; Hydra would wrap it if it came from the constructor.
        """
        check_int("hydra.sweeper.n_trials", self.n_trials, 1)
        check_int("hydra.sweeper.n_jobs", self.n_jobs, 1)
        check_int("seed", self.seed, 0)
        require_optuna()
        self.config_loader = hydra_context.config_loader
        self.config: DictConfig = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials, as many at once as `n_jobs` says, until there are enough.

        Args:
            arguments: Overrides of the command line; sweeps among them add to the search space, values fix a key.
        """
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        space, fixed = self._space(arguments)
        study = open_study(folder)
        _check_same_space(study, space, folder)
        write_text(folder / MULTIRUN, OmegaConf.to_yaml(self.config))
        replaced = {trial.number for trial in study.trials if trial.state.name == "FAIL"}
        while True:
            with ExitStack() as held:
                trials = self._claim(study, space, replaced, held)
                if not trials:
                    return
                self.launcher.launch(
                    [[*fixed, *overrides(trial, folder)] for trial in trials], initial_job_idx=trials[0].number
                )
                with lock(folder / ".lock"):  # whoever sees there that a trial is running finds it held
                    for trial in trials:
                        study.tell(trial.number, **result(folder / str(trial.number)))

    def _space(self, arguments: list[str]) -> tuple[dict[str, "optuna.distributions.BaseDistribution"], list[str]]:
        """Return the search space by key, and the overrides that all trials share; a mistake in either raises."""
        swept: dict[str, Override] = {}
        fixed: list[str] = []
        lines = [*(f"{key!s}={value}" for key, value in self.params.items()), *arguments]
        for override in OverridesParser.create(config_loader=self.config_loader).parse_overrides(lines):
            key = override.get_key_element().lstrip("+")  # of one key, whichever way it was given
            swept.pop(key, None)
            if override.is_sweep_override():
                swept[key] = override
            else:
                fixed.append(str(override.input_line))
        if not swept:
            raise UserError("Nothing to search: give sweeps such as 'model.dropout=interval(0, 0.5)'.")
        space: dict[str, Any] = {o.get_key_element(): distribution(o) for o in swept.values()}
        # what cannot be composed is to be found out before there is a study, which cannot be corrected any more
        values = {key: list(getattr(d, "choices", None) or [d.low]) for key, d in space.items()}
        for i in range(max(map(len, values.values()))):
            trial = [f"{key}={those[min(i, len(those) - 1)]}" for key, those in values.items()]
            self.config_loader.load_sweep_config(master_config=self.config, sweep_overrides=[*fixed, *trial])
        return space, fixed

    def _claim(self, study: "optuna.Study", space: Any, replaced: set[int], held: ExitStack) -> list[Any]:
        """Return trials for this process: those whose process is gone, then new ones. None of another process."""
        from optuna.trial import TrialState

        folder = Path(self.config.hydra.sweep.dir)

        def hold(number: int) -> None:
            (folder / str(number)).mkdir(exist_ok=True)
            held.enter_context(lock(folder / str(number) / ".trial", wait=False))

        trials: list[Any] = []
        with lock(folder / ".lock"):  # between two processes, asking and holding are one step
            for trial in study.trials:
                if trial.state.name == "RUNNING" and len(trials) < self.n_jobs:
                    try:
                        hold(trial.number)
                    except BlockingIOError:
                        continue
                    if trial.params.keys() == space.keys():
                        trials.append(trial)
                    else:  # killed while it was asked for, or of a space with other keys
                        study.tell(trial.number, state=TrialState.FAIL)
                        replaced.add(trial.number)  # no process has run it
            while len(trials) < self.n_jobs and len({t.number for t in study.trials} - replaced) < self.n_trials:
                # a sampler draws the same values each time it is made: its seed is another one for every trial
                seed = random.Random(f"{self.seed} {len(study.trials)}").getrandbits(32)
                study.sampler = instantiate(self.sampler, seed=seed)
                trials.append(study.ask(space))
                hold(trials[-1].number)
        return trials


def _check_same_space(study: "optuna.Study", space: Mapping[str, Any], folder: Path) -> None:
    """Refuse a space that Optuna cannot add to a study, before there is a trial with a part of its values.

    Raises:
        UserError: A key is searched in another way.
    """
    from optuna.distributions import check_distribution_compatibility

    for trial in study.trials:
        for key, before in trial.distributions.items():
            try:
                check_distribution_compatibility(before, space.get(key, before))
            except ValueError as error:
                raise UserError(
                    f"{folder} searches {key} in {before}, which now is to be {space[key]}: {first_line(error)} Choose "
                    f"another hydra.sweep.dir=FOLDER."
                ) from error


def overrides(trial: Any, folder: Path) -> list[str]:
    """Return the overrides of a trial's run, with the very values that Optuna has, and of its folder."""
    values = [f"{key}={value}" for key, value in trial.params.items()]
    begun = ["resume=last", "hydra.output_subdir=null"] if (folder / str(trial.number) / METRICS).is_file() else []
    return [*values, *begun, f"hydra.sweep.subdir={trial.number}"]


def result(folder: Path) -> dict[str, Any]:
    """Return what Optuna is told of a trial, from its run's folder."""
    from optuna.trial import TrialState

    try:
        metrics = read_metrics(folder)
    except (OSError, ValueError):  # the run failed early
        metrics = {}
    match metrics.get("status"):
        case "finished":
            return {"values": metrics["best/val/acc"]}
        case "pruned":
            return {"state": TrialState.PRUNED}
    return {"state": TrialState.FAIL}
