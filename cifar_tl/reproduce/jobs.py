"""The runs behind the published tables: what each is given, and what of it is already there."""

import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cifar_tl import cli
from cifar_tl.errors import UserError, check_choice, check_int
from cifar_tl.reproduce.publish import RELATED
from cifar_tl.runs.folder import REPLACED, read_run
from cifar_tl.runs.record import IGNORED_KEYS, config_sha256, flat, matters
from cifar_tl.runs.resume import LAST, run_lock

PARTS = ("results", "ablation", "ladder", "scale")
SHOWN_KEYS = ("model.weights", "model.filter_rms", "trainer.precision", "trainer.accelerator")
"""Keys whose values every table shows, so that runs that were passed other ones may be published."""

ADDED_BESIDE = ("checkpoint", "trainer.accelerator", "data.root", "tta", "temperature", "cifar10_1", "cifar10_c")
"""Keys of cifar_tl.evaluate that add results to the others, or name what is evaluated and where."""


@dataclass
class Job:
    """One run.

    Attributes:
        name: Of its folder.
        folder: Where it is, or will be.
        overrides: Of cifar_tl.train, from conf/reproduce.yaml.
        passed: More of them, from the command line.
        config: What they compose to.
        evaluate: Overrides of cifar_tl.evaluate, for the finished run; none: it is not evaluated again.
        uses: Part, scale and recipe of every table that it is for.
    """

    name: str
    folder: Path
    overrides: list[str]
    passed: list[str]
    config: DictConfig
    evaluate: list[str] = field(default_factory=list)
    uses: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """The overrides of `passed` that change no result, such as where the data are today; see IGNORED_KEYS."""
        return [override for override in self.passed if override.lstrip("+~").partition("=")[0] in IGNORED_KEYS]

    @property
    def evaluation(self) -> Path:
        """What cifar_tl.evaluate leaves."""
        return self.folder / "evaluation" / "evaluation.json"

    @property
    def checkpoint(self) -> Path:
        """What cifar_tl.evaluate reads."""
        return self.folder / "checkpoints" / "best.ckpt"


def plan_jobs(cfg: DictConfig, passed: Sequence[str], folder: Path) -> list[Job]:
    """Return the runs that `cfg` asks for, each once.

    Args:
        cfg: As composed from conf/reproduce.yaml.
        passed: Overrides of every run; they win over the config's.
        folder: Gets a folder per run.

    Raises:
        UserError: An unknown part, or overrides that do not compose.
    """
    jobs: dict[str, Job] = {}
    if lacking := [part for part in PARTS if part not in cfg]:
        others = ",".join(part for part in PARTS if part not in lacking)
        raise UserError(f"~{lacking[0]} is not allowed: only=[{others}] goes without it.")
    only = [cfg.only] if isinstance(cfg.only, str) else _list("only", cfg.only, "[results]")
    only = [check_choice("only", part, PARTS) for part in (PARTS if cfg.only is None else only)]
    rows = [cfg.recipes] if isinstance(cfg.recipes, str) else _list("recipes", cfg.recipes, "[best32]")
    known: dict[str, None] = {}
    for part in PARTS:  # also where few are asked for: a run that parts share has one folder, whichever part asks
        given = cfg[part].recipes
        recipes = _ablations() if given is None else _lists(f"{part}.recipes", given, "['experiment=best32']")
        evaluate = _list(f"{part}.evaluate", cfg[part].get("evaluate"), "['tta=true']")
        for scale, shared in _lists(f"{part}.scales", cfg[part].scales, "['data.limit=10000']").items():
            known |= dict.fromkeys(map(str, recipes) if part in only else ())
            for recipe, overrides in recipes.items():
                of_any_seed = compose([*overrides, *shared, *passed])  # which takes longest here
                for seed in _seeds(cfg, part, recipe):
                    given = [*overrides, *shared, f"seed={seed}"]
                    config = deepcopy(of_any_seed)
                    config.seed = seed
                    name = f"{part}-{recipe}-{scale}-seed{seed}"
                    job = Job(name, folder / name, given, list(passed), config)
                    places = {key: str(OmegaConf.select(config, key)) for key in ("data.root", "model.weights")}
                    job = jobs.setdefault(config_sha256({**_related(config), **places}), job)
                    if part in only and (not rows or recipe in rows):
                        job.uses.append((part, str(scale), str(recipe)))
                        job.evaluate = evaluate or job.evaluate
    for row in rows:
        check_choice("recipes", row, tuple(known))
    if not (asked := [job for job in jobs.values() if job.uses]):
        raise UserError(f"Nothing to run: {', '.join(only)} of conf/reproduce.yaml have no recipe, scale or seed.")
    return asked


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/train.yaml.

    Raises:
        UserError: It cannot be done.
    """
    try:
        return cli.compose("train", [cli.set_or_add(override, "train") for override in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{' '.join(overrides)}: {cli.explain(error, 'train')}") from error


def differences(job: Job) -> list[str]:
    """Return what a job's folder was run with and the job would not be; nothing if the folder holds no run."""
    saved = job.folder / ".hydra" / "config.yaml"
    if not saved.is_file():
        return []
    theirs, ours = _related(OmegaConf.load(saved)), _related(job.config)
    keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    return [f"{key}={theirs.get(key)}, now {ours.get(key)}" for key in keys]


def differing(job: Job) -> list[str]:
    """Return the sentence that names `differences`, if there are any; weights have a column in every table."""
    found = [text for text in differences(job) if not text.startswith("model.weights=")]
    return [f"{job.name} was run with {'; '.join(found)}."] if found else []


def unpublishable(jobs: Sequence[Job], folder: Path) -> list[str]:
    """Return a sentence per reason why the tables of some jobs are not those that conf/reproduce.yaml stands for.

    Args:
        jobs: Of the tables.
        folder: As given to `plan_jobs`.
    """
    reasons = []
    if missing := ", ".join(job.name for job in jobs if not read_run(job.folder).finished):
        reasons.append(
            f"{missing}: not finished. recipes=[NAME] publishes these rows alone, but of an ablation; "
            f"PART.more_seeds.NAME=[] leaves a row's other seeds out."
        )
    if missing := ", ".join(job.name for job in jobs if job.evaluate and not _evaluated(job)):
        reasons.append(
            f"{missing}: not evaluated again, as the published rows are; without tables_only=true this is done."
        )
    planned = {use: job for job in plan_jobs(cli.compose("reproduce"), [], folder) for use in job.uses}
    for part in RELATED:
        asked = {use for job in jobs for use in job.uses if use[0] == part}
        if lacking := [job.name for use, job in planned.items() if asked and use[0] == part and use not in asked]:
            reasons.append(f"{part} is published as a whole, and {lacking[0]} is left out.")
    for job in jobs:
        named = next((planned[use] for use in job.uses if use in planned), None)
        if named is None:
            reasons.append(f"{job.name} is not in conf/reproduce.yaml.")
            continue
        ours, theirs = _related(job.config), _related(named.config)
        hidden = [f"{k}={ours.get(k)}" for k in ours | theirs if ours.get(k) != theirs.get(k)]
        hidden = [text for text in hidden if text.partition("=")[0] not in (*SHOWN_KEYS, "seed")]
        hidden += [text for text in job.evaluate if text.lstrip("+").partition("=")[0] not in ADDED_BESIDE]
        reasons += [f"{job.name} has {', '.join(hidden)}, which no table shows."] if hidden else []
    return [*reasons, *(text for job in jobs for text in differing(job))]


def state(job: Job) -> tuple[str, str]:
    """Return what there is to do, `keep`, `evaluate`, `resume`, `replace` or `run`, and why, in words."""
    from cifar_tl.hardware import resolve_accelerator, resolve_precision  # late: `--help` should not wait for torch
    from cifar_tl.model.weights import file_sha256

    if not job.folder.is_dir():
        return "run", ""
    run, different = read_run(job.folder), differences(job)
    trainer = job.config.trainer
    precision = resolve_precision(trainer.precision, resolve_accelerator(trainer.accelerator))
    if run.metrics and run.metrics.get("precision") != precision:
        different.append(f"{run.metrics.get('precision')}, now {precision}")
    weights, sha256 = Path(str(job.config.model.weights)).expanduser(), run.metrics.get("weights_sha256")
    if sha256 and weights.is_file() and (now := file_sha256(weights)) != sha256:
        different.append(f"weights of SHA-256 {sha256[:12]}, now {now[:12]}")
    if different:
        return "replace", f"was run with {'; '.join(different)}"
    if run.finished and "test/acc" in run.metrics:
        if job.evaluate and not _evaluated(job):
            return "evaluate", "trained, to be evaluated"
        return "keep", f"finished {run.metrics['started'][:10]}, commit {str(run.metrics.get('git_commit'))[:7]}"
    if (job.folder / LAST).is_file():
        return "resume", f"goes on after {len(run.metrics.get('epoch', []))} epochs"
    return "replace", "was stopped before its first epoch was over"


def set_aside(job: Job) -> Path:
    """Move what is in a job's folder into REPLACED, beside it, and return where it is now.

    Raises:
        UserError: Another process trains there.
    """
    place = job.folder.parent / REPLACED / job.name
    number = 1
    while (new := place.with_name(f"{place.name}.{number}")).exists():
        number += 1
    new.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(job.folder):
        shutil.move(job.folder, new)
    return new


def _evaluated(job: Job) -> bool:
    saved = job.evaluation.parent / ".hydra" / "overrides.yaml"
    asked: set[str] = set(OmegaConf.load(saved) if saved.is_file() else [])
    wanted = set(job.evaluate)
    others = {override.lstrip("+").partition("=")[0] for override in asked - wanted} - set(ADDED_BESIDE)
    return job.evaluation.is_file() and wanted <= asked and not others


def _seeds(cfg: DictConfig, part: str, recipe: str) -> list[int]:
    lists = {f"{part}.seeds": _list(f"{part}.seeds", cfg[part].seeds, "[0,1]")}
    key = f"{part}.more_seeds"
    lists[f"{key}.{recipe}"] = _lists(key, cfg[part].get("more_seeds"), "[0,1]").get(recipe, [])
    return list(dict.fromkeys(check_int(key, seed, 0) for key, seeds in lists.items() for seed in seeds))


def _lists(key: str, given: Any, example: str) -> dict[str, list[Any]]:
    """Return the lists by name that a key holds; none for null."""
    if given is not None and not isinstance(given, DictConfig):
        raise UserError(f"{key}={given} is not allowed: give lists by name, such as {key}.NAME={example}.")
    named = {str(name): value for name, value in (given or {}).items()}
    return {name: _list(f"{key}.{name}", value, example) for name, value in named.items()}


def _list(key: str, given: Any, example: str) -> list[Any]:
    """Return the list that a key holds; an empty one for null."""
    if given is not None and not isinstance(given, ListConfig):
        raise UserError(f"{key}={given} is not allowed: give a list, such as {example}.")
    return list(given or ())


def _ablations() -> dict[str, list[str]]:
    names = sorted(path.stem for path in (cli.conf_folder() / "ablate").glob("*.yaml"))
    return {name: [f"ablate={name}"] for name in sorted(names, key=lambda name: name != "none")}


def _related(config: Any) -> dict[str, Any]:
    """Return the values by dotted key that a result depends on; weights by their file's name."""
    values = flat(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]  # the root is a mapping
    related = {key: value for key, value in values.items() if matters(key)}
    if related.get("model.weights") is not None:
        related["model.weights"] = Path(related["model.weights"]).name
    return related
