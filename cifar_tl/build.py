"""From the config to the parts of a run, in plain, typed calls: data, model, schedule, callbacks, loggers."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from inspect import Parameter, getmro, isclass, signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import lightning as L
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze
from cifar_tl.callbacks.distillation import FeatureDistillation
from cifar_tl.callbacks.epoch_seed import EpochSeed
from cifar_tl.callbacks.feature_cache import FeatureCache
from cifar_tl.callbacks.freeze_guard import FreezeGuard
from cifar_tl.callbacks.own_signals import OwnSignals
from cifar_tl.callbacks.phase_log import PhaseLog
from cifar_tl.callbacks.predictions_recorder import PredictionsRecorder
from cifar_tl.callbacks.run_recorder import RunRecorder
from cifar_tl.callbacks.tensorboard_figures import TensorBoardFigures
from cifar_tl.callbacks.weight_ema import WeightEMA
from cifar_tl.checkpoints import checkpoint_callbacks
from cifar_tl.cli import compose
from cifar_tl.data.augment import Augment
from cifar_tl.data.cifar10 import Cifar10
from cifar_tl.data.datamodule import CIFAR10DataModule, Source
from cifar_tl.data.folder import ImageFolders
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.errors import (
    UserError,
    check_choice,
    check_flag,
    check_int,
    check_path,
    first_line,
)
from cifar_tl.hardware import environment, prepare_for, resolve_accelerator, resolve_precision
from cifar_tl.model.backbone import Backbone
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.model.optim import check_optimizer
from cifar_tl.model.weights import check_weights, file_sha256, load_weights
from cifar_tl.runs.record import config_sha256, git_state
from cifar_tl.schedule import FinetuneSchedule
from cifar_tl.trainer import progress_bar

FROZEN_AUGMENT = ("none", "flip", "full")


def build_schedule(cfg: DictConfig) -> FinetuneSchedule:
    """Build the phases and learning rates of a config."""
    return build_unfreeze(cfg).schedule


def build_augment(cfg: DictConfig) -> Callable[[int], Augment]:
    """Build the augmentation of a config as a function of the epoch."""
    schedule = build_schedule(cfg)
    full = Augment(**cfg.augment)
    choice = check_choice("finetune.frozen_augment", cfg.finetune.frozen_augment, FROZEN_AUGMENT)
    frozen = {"none": Augment(), "flip": full.only_flips, "full": full}[choice]
    return lambda epoch: full if schedule.phase(epoch).stages else frozen


def check_root(data: DictConfig) -> None:
    """Refuse a relative data.root of a run that was started in another folder: data would be fetched into this one.

    Raises:
        UserError: It is not there.
    """
    if "root" in data and not (root := check_path("data.root", data.root)).exists() and not root.is_absolute():
        fetch = f"; `python -m cifar_tl.data fetch --root {root}` fetches it" if data.name == "cifar10" else ""
        raise UserError(
            f"the run's data is not at {root} ({root.absolute()}): data.root= says where it is, relative to the folder "
            f"in which the command is given{fetch}."
        )


def build_source(data: DictConfig) -> Source:
    """Build the source of images that `data.name` asks for."""
    match check_choice("data.name", data.name, ("cifar10", "folder", "synthetic")):
        case "cifar10":
            return Cifar10(check_path("data.root", data.root), download=check_flag("data.download", data.download))
        case "folder":
            return ImageFolders(check_path("data.root", data.root), data.workers)
        case _:
            return Synthetic(data.train_size, data.test_size)


def build_datamodule(cfg: DictConfig) -> CIFAR10DataModule:
    """Build the data module of a config; nothing is read yet."""
    data = cfg.data
    return CIFAR10DataModule(
        source=build_source(data),
        batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size,
        val_size=data.val_size,
        limit=data.limit,
        train_limit=data.train_limit,
        split_seed=data.split_seed,
        one_hot=check_flag("data.one_hot", data.one_hot),
        augment=build_augment(cfg),
        seed=cfg.seed,
    )


def build_module(cfg: DictConfig, classes: Any) -> ResNet50Classifier:
    """Build the LightningModule of a config, with a random backbone.

    Raises:
        UserError: A value that cannot be, or an optimizer with a weight decay that is not for it.
    """
    check_optimizer(cfg.finetune.optimizer, cfg.finetune.weight_decay)
    if not OmegaConf.is_list(cfg.model.head):
        shown = "null" if cfg.model.head is None else cfg.model.head
        raise UserError(f"model.head={shown} is not allowed: give the units of its layers as a list, [128,64] or [].")
    if not OmegaConf.is_dict(cfg.model.options):
        shown = "null" if cfg.model.options is None else cfg.model.options
        raise UserError(f"model.options={shown} is not allowed: give arguments one by one, +model.options.NAME=VALUE.")
    model, options = model_class(cfg.model._target_), plain(cfg.model.options)
    if unknown := [name for name in options if not _takes(model, name)]:
        raise UserError(f"model.options.{unknown[0]}={options[unknown[0]]}: {model.__name__} has no such argument.")
    return model(
        classes=list(classes),
        upscale=cfg.model.upscale,
        head=list(cfg.model.head),
        dropout=cfg.model.dropout,
        optimizer=cfg.finetune.optimizer,
        momentum=cfg.finetune.momentum,
        weight_decay=cfg.finetune.weight_decay,
        label_smoothing=cfg.finetune.label_smoothing,
        distill_weight=cfg.finetune.distill_weight,
        conventions=cfg.model.conventions,
        **options,
    )


def model_class(target: str) -> type[ResNet50Classifier]:
    """Return the class that `model._target_` names.

    Raises:
        UserError: It cannot be imported, or is another one than a ResNet50Classifier.
    """
    try:
        found = resolve_name(target)
    except Exception as error:  # whatever somebody's file raises
        raise UserError(
            f"model._target_={target} cannot be imported: {first_line(error)}. Give MODULE.CLASS, MODULE being a file "
            f"in the current directory or on PYTHONPATH."
        ) from error
    if not (isclass(found) and issubclass(found, ResNet50Classifier)):
        raise UserError(
            f"model._target_={target} is no subclass of cifar_tl.model.module.ResNet50Classifier, which it has to be: "
            f"backbone, head, metrics and checkpoints are its."
        )
    return found


def model_facts(module: ResNet50Classifier) -> dict[str, Any]:
    """Return what a config does not say of a model class of one's own; nothing of this program's.

    `model_sha256` is of the file that defines the class, None where there is none. `own_network` says whether the model
    computes logits otherwise than a ResNet50Classifier of the same arguments, as far as its layers and its `forward`
    tell: what a ResNet50Classifier with its weights would compute is then something else.
    """
    own = type(module)
    if own is ResNet50Classifier:
        return {}
    arguments = {key: value for key, value in module.hparams.items() if key in signature(ResNet50Classifier).parameters}
    with torch.device("meta"):
        stock = ResNet50Classifier(**arguments)
    parts = ((module.backbone, stock.backbone), (module.head, stock.head))
    same = own.forward is ResNet50Classifier.forward and all(
        type(mine) is type(theirs) and repr(mine) == repr(theirs) for mine, theirs in parts
    )
    return {"model_sha256": _sha256_of_class(own), "own_network": not same}  # type: ignore[arg-type]  # mypy doubts that a class has a hash


@cache
def _sha256_of_class(own: type) -> str | None:
    """Return the hash of the file that defines a class, as it was when the class was first asked for."""
    try:
        return file_sha256(Path(inspect.getfile(own)))
    except (OSError, TypeError):  # a class that was made in a session
        return None


def build_unfreeze(cfg: DictConfig) -> BackboneUnfreeze:
    """Build the callback that unfreezes the backbone."""
    finetune = cfg.finetune
    return BackboneUnfreeze(
        unfreeze_at_epoch=finetune.unfreeze_at_epoch,
        head_lr=finetune.head_lr,
        backbone_lr=finetune.backbone_lr,
        head_lr_unfrozen=finetune.head_lr_unfrozen,
        schedule=finetune.schedule,
        warmup_epochs=finetune.warmup_epochs,
        stage_epochs=finetune.stage_epochs,
        progressive_resizing=finetune.progressive_resizing,
        stages=finetune.stages,
        batchnorm=finetune.batchnorm,
        max_epochs=check_int("trainer.max_epochs", cfg.trainer.max_epochs, 1),
        compiled=cfg.model.compile,
    )


def build_guard(cfg: DictConfig) -> FreezeGuard:
    """Build the callback that checks what the one of `build_unfreeze` says."""
    finetune = cfg.finetune
    return FreezeGuard(
        unfreeze_at_epoch=finetune.unfreeze_at_epoch,
        stage_epochs=finetune.stage_epochs,
        progressive_resizing=finetune.progressive_resizing,
        batchnorm=finetune.batchnorm,
        max_epochs=check_int("trainer.max_epochs", cfg.trainer.max_epochs, 1),
        stages=finetune.stages,
    )


def build_callbacks(
    cfg: DictConfig, datamodule: CIFAR10DataModule, facts: Mapping[str, Any], folder: Path
) -> list[L.Callback]:
    """Build the callbacks of a run: its own, checkpoints, a progress bar, and what the `callbacks` group adds.

    None of them relies on another one, nor on the order, but that the best epoch's checkpoint is saved before the last
    one's, which notes it.

    Args:
        cfg: As composed from conf/train.yaml.
        datamodule: Of the run.
        facts: From `run_facts`, with the hash of the weights.
        folder: The run's.

    Raises:
        UserError: A callback of the group that cannot be built, or that a run cannot honour.
    """
    added = _added_callbacks(cfg.callbacks)
    finetune, schedule = cfg.finetune, build_schedule(cfg)
    unfreeze_at_epoch, max_epochs = schedule.unfreeze_at_epoch, schedule.max_epochs
    features = finetune.features_folder
    if features is not None:
        features = check_path("finetune.features_folder", features)
    if not facts["weights_sha256"] or facts.get("own_network"):
        features = None
    distillation = build_distillation(cfg, datamodule, facts, features)
    callbacks: list[L.Callback] = [
        OwnSignals(),
        EpochSeed(cfg.seed),
        build_unfreeze(cfg),
        build_guard(cfg),
        FeatureCache(
            datamodule,
            unfreeze_at_epoch,
            str(finetune.cache_features).lower(),
            features,
        ),
        *([] if distillation is None else [distillation]),
        PhaseLog(schedule, finetune.batchnorm),
        RunRecorder(folder, schedule, facts, cfg.finetune.batchnorm),
        PredictionsRecorder(datamodule, folder, unfreeze_at_epoch, max_epochs),
        TensorBoardFigures(datamodule, schedule, {"experiment": facts["experiment"], **plain(cfg)}),
        *checkpoint_callbacks(folder / "checkpoints"),
        *added,
    ]
    has_bar = any(isinstance(callback, ProgressBar) for callback in added)
    return callbacks + (progress_bar() if cfg.trainer.get("enable_progress_bar", True) and not has_bar else [])


def distills(cfg: DictConfig) -> bool:
    """Return whether a run learns from a teacher: it has one, the pretrained backbone, and something to teach."""
    trains = any(phase.stages for phase in build_schedule(cfg).phases)
    return cfg.finetune.distill_upscale is not None and cfg.model.weights is not None and trains


def check_distillation(cfg: DictConfig) -> None:
    """Refuse a model class that may not have what the teacher's features are compared with.

    Raises:
        UserError: Its `forward` or its `training_step` is its own; or a factor that cannot be.
    """
    if cfg.finetune.distill_upscale is not None:
        check_int("finetune.distill_upscale", cfg.finetune.distill_upscale, 1)
    model = model_class(cfg.model._target_)
    for name in ("forward", "training_step"):
        if distills(cfg) and getattr(model, name) is not getattr(ResNet50Classifier, name):
            raise UserError(
                f"finetune.distill_upscale={cfg.finetune.distill_upscale} is for a model class without a {name} of its "
                f"own, and {cfg.model._target_} has one: give finetune.distill_upscale=null, which leaves distillation "
                f"out."
            )


def build_distillation(
    cfg: DictConfig, datamodule: CIFAR10DataModule, facts: Mapping[str, Any], folder: Path | None
) -> FeatureDistillation | None:
    """Build the callback that brings the teacher's features, if the run has a teacher.

    Args:
        cfg: As composed from conf/train.yaml.
        datamodule: Of the run.
        facts: With the hash of the weights.
        folder: Where features are kept; None keeps none.
    """
    if not distills(cfg):
        return None

    def pretrained() -> Backbone:
        try:
            check_weights(cfg.model.weights)
        except UserError as error:
            raise UserError(
                f"model.weights={cfg.model.weights}: no such file. The teacher is made of it, where a run goes on, "
                f"too: give model.weights= the path of a copy."
            ) from error
        module = build_module(cfg, datamodule.classes)
        prepare_for(resolve_accelerator(cfg.trainer.accelerator), module)
        if fill_backbone(cfg, module)["weights_sha256"] != facts["weights_sha256"]:
            raise UserError(
                f"model.weights={cfg.model.weights} is another file than the run was started with, whose SHA-256 is "
                f"{facts['weights_sha256']}: the teacher is made of it. Restore it, or give the path of a copy."
            )
        return module.backbone

    schedule = build_schedule(cfg)
    start, upscale = schedule.unfreeze_at_epoch, cfg.finetune.distill_upscale
    own_upscale = schedule.phase(start).upscale or cfg.model.upscale
    return FeatureDistillation(datamodule, start, upscale, own_upscale, pretrained, folder)


def fill_backbone(cfg: DictConfig, module: ResNet50Classifier) -> dict[str, Any]:
    """Load the ImageNet weights; return the SHA-256 of their file and the filters' scale, None for random weights."""
    if cfg.model.weights is None:
        return {"weights_sha256": None, "filter_rms": None}
    sha256 = load_weights(module.backbone, cfg.model.weights, cfg.model.filter_rms)
    return {"weights_sha256": sha256, "filter_rms": cfg.model.filter_rms}


def _added_callbacks(nodes: DictConfig) -> list[L.Callback]:
    """Return what the `callbacks` group adds, by `_target_`.

    Raises:
        UserError: It cannot be built, or averages weights in another way than WeightEMA.
    """
    added = {str(name): _instantiated("callbacks", name, node) for name, node in nodes.items()}
    for name, callback in added.items():
        average = isinstance(callback, WeightAveraging | StochasticWeightAveraging)
        if average and not isinstance(callback, WeightEMA):
            raise UserError(
                f"callbacks.{name}: {type(callback).__name__} is not supported. Give callbacks=ema, whose average is "
                f"validated, kept, tested and resumed."
            )
        if isinstance(callback, WeightEMA) and name != "ema":  # a resumed run is told by that name
            raise UserError(f"callbacks.{name}: an average of weights has the name ema: callbacks=ema.")
    return list(added.values())


def build_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """Build the loggers of the `logger` group, by `_target_`.

    One that takes `save_dir` has the run's folder for it, unless it says where. TensorBoard's files are in
    RUN/tensorboard.
    """
    return [_instantiated("logger", name, node, {"save_dir": str(folder)}) for name, node in cfg.logger.items()]


def _instantiated(group: str, name: Any, node: DictConfig, defaults: Mapping[str, Any] | None = None) -> Any:
    """Make what a node of the config with a `_target_` describes; it gets those of the defaults that it takes."""
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise UserError(f"{group}.{name} has no _target_: give the class to build, as conf/{group}/*.yaml do.")
    if left_out := sorted(OmegaConf.missing_keys(node)):
        raise UserError(f"{left_out[0]}= is missing: give it.")
    try:
        make = instantiate(node, _convert_="all", _partial_=True)
        given = {key: value for key, value in (defaults or {}).items() if key not in make.keywords}
        return make(**{key: value for key, value in given.items() if _takes(make.func, key)})
    except Exception as error:  # whatever somebody's class raises
        cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
        if isinstance(cause, UserError):
            raise cause from error
        package = cause.name if isinstance(cause, ModuleNotFoundError) else None
        missing = f" `pip install {package}` may help." if package else ""
        raise UserError(f"{group}.{name}: {node._target_} cannot be built: {cause}.{missing}") from error


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function has an argument; a class may pass on what it does not name to the one it is made of."""
    for each in [base.__init__ for base in getmro(function)] if isclass(function) else [function]:  # type: ignore[misc]  # no instance's
        parameters = signature(each).parameters
        if name in parameters or not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
            return name in parameters
    return False


def check_batch_size(cfg: DictConfig, processes: int) -> None:
    """Refuse batches of one image for BatchNorm layers that take the statistics of a batch: layer4 has one pixel of it.

    Raises:
        UserError: Each process has a single image a step.
    """
    size, batchnorm = cfg.data.batch_size, cfg.finetune.batchnorm
    one_pixel = any(phase.stages and (phase.upscale or cfg.model.upscale) == 1 for phase in build_schedule(cfg).phases)
    if size <= processes and batchnorm != "frozen" and one_pixel:
        each = "" if processes == 1 else f" for each of {processes} processes"
        raise UserError(
            f"data.batch_size={size} is one image a step{each}, of which layer4 has one pixel: no variance for "
            f"finetune.batchnorm={batchnorm} to take. Give at least {2 * processes}, or finetune.batchnorm=frozen."
        )


def config_warnings(cfg: DictConfig) -> list[str]:
    """Return a sentence for what is allowed, but probably not meant."""
    trains = any(phase.stages for phase in build_schedule(cfg).phases)
    if cfg.model.weights is None and trains and cfg.finetune.batchnorm == "frozen":
        return [
            "model.weights=null with finetune.batchnorm=frozen: BatchNorm keeps its initial statistics, which were "
            "not measured on images. finetune.batchnorm=train tracks them (on CPUs, in a single process)."
        ]
    return []


def keys_without_effect(cfg: DictConfig, given: Sequence[str], own_val: bool = False) -> list[str]:
    """Return a sentence for each key that was given and is known to change nothing, because of another one.

    Args:
        cfg: As composed from conf/train.yaml.
        given: Overrides of the command line; what a recipe says beside them is not a mistake of the user's.
        own_val: Whether the data has a validation split of its own.
    """
    finetune, start = cfg.finetune, cfg.finetune.unfreeze_at_epoch
    reasons = {}
    if start == 0:
        why = "with finetune.unfreeze_at_epoch=0 no epoch is frozen"
        keys = ("finetune.frozen_augment", "finetune.cache_features", "finetune.features_folder")
        reasons = dict.fromkeys(keys, why)
        if finetune.head_lr_unfrozen is not None:
            reasons["finetune.head_lr"] = f"{why}, and the head's learning rate is finetune.head_lr_unfrozen"
        if finetune.progressive_resizing:
            reasons["model.upscale"] = "finetune.progressive_resizing sets it from the first epoch on"
    if start is None:
        reasons = dict.fromkeys(
            ("finetune.backbone_lr", "finetune.head_lr_unfrozen", "finetune.batchnorm"),
            "with finetune.unfreeze_at_epoch=null the backbone stays frozen",
        )
        if finetune.optimizer == "muon":
            reasons["finetune.momentum"] = "Muon is for the backbone, which stays frozen"
    if finetune.optimizer not in ("muon", "sgd"):
        reasons["finetune.momentum"] = f"finetune.optimizer={finetune.optimizer} has none"
    if cfg.model.weights is None:
        reasons["model.filter_rms"] = "random weights are left as they are"
    if not distills(cfg):
        why = "finetune.distill_upscale=null distills nothing"
        if cfg.model.weights is None:
            why = "random weights have nothing to teach"
        elif start is None:
            why = "with finetune.unfreeze_at_epoch=null the backbone stays frozen"
        reasons["finetune.distill_weight"] = why
        if finetune.distill_upscale is not None:
            reasons["finetune.distill_upscale"] = why
    if not cfg.model.head:
        reasons["model.dropout"] = "model.head=[] has no hidden units to drop"
    if cfg.trainer.get("gradient_clip_val") is None:
        reasons["trainer.gradient_clip_algorithm"] = "nothing is clipped without +trainer.gradient_clip_val"
    by_key = {argument.lstrip("+").partition("=")[0]: argument for argument in given}
    if own_val:
        reasons["data.val_size"] = "the data has a validation split of its own"
    if by_key.get("ablate", "ablate=none") != "ablate=none":
        with suppress(HydraException, OmegaConfBaseException):  # what else is given needs it
            whole = plain(compose("train", [argument for argument in given if not argument.startswith("ablate=")]))
            whole |= {"resume": cfg.resume, "trainer": {**whole["trainer"], "devices": cfg.trainer.devices}}
            if whole == plain(cfg):
                reasons["ablate"] = "the run is the same without it"
    return [f"{by_key[key]} has no effect: {why}." for key, why in reasons.items() if key in by_key]


def run_facts(cfg: DictConfig, datamodule: CIFAR10DataModule, experiment: str) -> dict[str, Any]:
    """Return what is known of a run before it trains, as plain values, for metrics.json and checkpoints.

    Args:
        cfg: As composed from conf/train.yaml.
        datamodule: Set up.
        experiment: Name of the choice in conf/experiment.
    """
    accelerator = resolve_accelerator(cfg.trainer.accelerator)
    return {
        "experiment": experiment,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": cfg.seed,
        "weights": cfg.model.weights,
        "config_sha256": config_sha256({key: value for key, value in plain(cfg).items() if key != "resume"}),
        "split_sha256": datamodule.split_sha256,
        "test_sha256": datamodule.test_sha256,
        "duplicates": datamodule.duplicates,
        "images": datamodule.sizes,
        "classes": list(datamodule.classes),
        "normalization": {"mean": list(datamodule.mean), "std": list(datamodule.std)},
        "precision": resolve_precision(cfg.trainer.precision, accelerator),
        **environment(accelerator),
        **git_state(),
    }


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as nested dicts and lists, resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
