"""A training run as a function of its config: build, fit, choose by validation, test once."""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze
from cifar_tl.callbacks.epoch_seed import EpochSeed
from cifar_tl.callbacks.feature_cache import CacheDecision, FeatureCache, decide, memory_for_features
from cifar_tl.callbacks.freeze_guard import FreezeGuard
from cifar_tl.callbacks.phase_log import PhaseLog
from cifar_tl.callbacks.predictions_recorder import PredictionsRecorder
from cifar_tl.callbacks.run_recorder import RunRecorder, config_sha256, git_state
from cifar_tl.callbacks.tensorboard_figures import TensorBoardFigures
from cifar_tl.checkpoints import BEST, LAST, PacedCheckpointIO, checkpoint_callbacks, read_checkpoint
from cifar_tl.data.augment import Augment
from cifar_tl.data.datamodule import CIFAR10DataModule, build_datamodule
from cifar_tl.errors import Interrupted, UserError, check_choice, check_int
from cifar_tl.hardware import environment, prepare_for, resolve_accelerator, resolve_precision
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.model.optim import optimizer_text
from cifar_tl.model.weights import load_weights
from cifar_tl.no_profiler import NoProfiler
from cifar_tl.runs.formatting import duration_text
from cifar_tl.runs.metrics import wilson_interval
from cifar_tl.schedule import FinetuneSchedule, epochs_text, stages_text

log = logging.getLogger(__name__)


def train(cfg: DictConfig, folder: Path, experiment: str) -> dict[str, Any]:
    """Carry out a run, or continue the one in `folder` if `cfg.resume` is set.

    Args:
        cfg: As composed from conf/train.yaml.
        folder: The run's; gets checkpoints, logs and metrics.json.
        experiment: Name of the choice in conf/experiment, for the record.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: A mistake in the config, the data, the weights or the checkpoint.
        Interrupted: Ctrl-C.
    """
    quieten_lightning()
    L.seed_everything(check_int("seed", cfg.seed, 0), workers=True, verbose=False)
    plan = build_schedule(cfg)
    callbacks: list[L.Callback] = [
        EpochSeed(cfg.seed),
        BackboneUnfreeze(plan, cfg.finetune.batchnorm, compiled=cfg.model.compile),
        FreezeGuard(plan, cfg.finetune.batchnorm),
    ]
    augment = build_augment(cfg)
    datamodule = build_datamodule(cfg.data, augment, cfg.seed)
    accelerator = resolve_accelerator(cfg.trainer.accelerator)
    precision = resolve_precision(cfg.trainer.precision, accelerator)
    # whoever trains in bfloat16 has a device that is fast in it
    module = build_module(cfg, datamodule.classes, "bfloat16" if precision.startswith("bf16") else "float32")
    prepare_for(accelerator, module)
    if cfg.model.compile:
        module.backbone.compile()

    last = folder / "checkpoints" / LAST
    if cfg.resume is None:
        weights = cfg.model.weights
        sha256 = load_weights(module.backbone, weights, cfg.model.filter_rms) if weights is not None else None
    else:
        sha256 = read_checkpoint(last)["cifar_tl"]["facts"]["weights_sha256"]
    datamodule.prepare_data()
    datamodule.setup("fit")

    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    facts = {
        "experiment": experiment,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": cfg.seed,
        "weights": cfg.model.weights,
        "weights_sha256": sha256,
        "filter_rms": cfg.model.filter_rms if sha256 else None,
        "config_sha256": config_sha256({key: value for key, value in config.items() if key != "resume"}),
        "split_sha256": datamodule.split_sha256,
        "images": datamodule.sizes,
        "classes": list(datamodule.classes),
        "normalization": {"mean": list(datamodule.mean), "std": list(datamodule.std)},
        "precision": precision,
        **environment(accelerator),
        **git_state(),
    }
    module.provenance = {"config": config, "facts": facts}
    record = RunRecorder(folder, plan, facts)
    predictions = PredictionsRecorder(folder, datamodule, plan)
    callbacks += [record, PhaseLog(plan, cfg.finetune.batchnorm, record)]
    kept = Path(cfg.finetune.features_folder) if cfg.finetune.features_folder and sha256 else None
    feature_cache = FeatureCache(plan, datamodule, kept)
    callbacks += [feature_cache, predictions]  # the cache after the record, which counts its time
    loggers = build_loggers(cfg.logger, folder)
    callbacks += [
        TensorBoardFigures(plan, datamodule, predictions, record, logger, config)
        for logger in loggers
        if isinstance(logger, TensorBoardLogger)
    ]
    batches = math.ceil(datamodule.sizes["train"] / cfg.data.batch_size)
    checkpoint_io = PacedCheckpointIO()
    trainer = build_trainer(
        {**cfg.trainer, "log_every_n_steps": min(cfg.trainer.log_every_n_steps, batches)},
        logger=loggers,
        callbacks=[*callbacks, *progress_bar(), *checkpoint_callbacks(last.parent)],
        plugins=checkpoint_io,
        benchmark=accelerator == "cuda",
        default_root_dir=folder,
    )
    available = memory_for_features(accelerator)
    mode = str(cfg.finetune.cache_features).lower()
    cache = decide(mode, plan, augment(0), datamodule.sizes, available, trainer.world_size)
    feature_cache.views = cache.views
    record.facts["features"] = cache.text
    for logger in trainer.loggers:
        logger.log_hyperparams(config)
    log.info("%s", plan_text(cfg, plan, datamodule, facts, cache, folder))

    resume_from = last if cfg.resume is not None else None
    try:
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=resume_from, weights_only=True)
        finally:
            checkpoint_io.flush()
        result = test(trainer, module, datamodule, record, folder)
        predictions.write(trainer)
        return result
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory at data.batch_size={cfg.data.batch_size}. Lower it. ({error})"
        ) from error
    except SystemExit as stop:  # how Lightning ends after Ctrl-C
        raise Interrupted(interrupted_text(record, last)) from stop


def test(
    trainer: L.Trainer, module: ResNet50Classifier, datamodule: CIFAR10DataModule, record: RunRecorder, folder: Path
) -> dict[str, Any]:
    """Measure the best epoch's weights on the test set, the run's one look at it, and say what came out."""
    module.load_state_dict(read_checkpoint(folder / "checkpoints" / BEST)["state_dict"])
    (scalars,) = trainer.test(module, datamodule=datamodule, verbose=False)
    examples = datamodule.sizes["test"]
    result = test_result(scalars, module, examples)
    record.finish(trainer, result)
    speeds = record.phase_speeds()
    log.info(
        "\n%s\n  best epoch  %d of 0..%d, validation accuracy %.4f\n  time        %s\n  results     %s\n"
        "  pictures    tensorboard --logdir %s",
        result_text(result, examples),
        record.best["epoch"],
        record.plan.max_epochs - 1,
        record.best["val/acc"],
        ", ".join(f"{s['name']} {duration_text(s['seconds'])} ({s['images_per_s']:,.0f} images/s)" for s in speeds),
        folder / "metrics.json",
        folder,
    )
    return record.content()


def test_result(scalars: Mapping[str, float], module: ResNet50Classifier, examples: int) -> dict[str, Any]:
    """Return a test's figures as metrics.json holds them."""
    return {
        "test/acc": scalars["test/acc"],
        "test/acc_interval": list(wilson_interval(scalars["test/acc"], examples)),
        "test/loss": scalars["test/loss"],
        "test/ece": scalars["test/ece"],
        **module.test_details,
    }


def result_text(result: dict[str, Any], examples: int) -> str:
    """Return a test's figures for people."""
    low, high = result["test/acc_interval"]
    return (
        f"Test accuracy {100 * result['test/acc']:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f} % for "
        f"{examples:,} images), loss {result['test/loss']:.4f}, ECE {result['test/ece']:.4f}"
    )


def build_schedule(cfg: DictConfig) -> FinetuneSchedule:
    """Build the phases and learning rates of a config."""
    finetune = cfg.finetune
    return FinetuneSchedule(
        max_epochs=cfg.trainer.max_epochs,
        unfreeze_at_epoch=finetune.unfreeze_at_epoch,
        stage_epochs=finetune.stage_epochs,
        head_lr=finetune.head_lr,
        backbone_lr=finetune.backbone_lr,
        head_lr_unfrozen=finetune.head_lr_unfrozen,
        schedule=finetune.schedule,
        warmup_epochs=finetune.warmup_epochs,
    )


def build_augment(cfg: DictConfig) -> Callable[[int], Augment]:
    """Build the augmentation of a config as a function of the epoch."""
    plan = build_schedule(cfg)
    full = Augment(**cfg.augment)
    choice = check_choice("finetune.frozen_augment", cfg.finetune.frozen_augment, ("none", "flip", "full"))
    frozen = {"none": replace(full.only_flips, flip="none"), "flip": full.only_flips, "full": full}[choice]
    return lambda epoch: full if plan.phase(epoch).stages else frozen


def build_module(cfg: DictConfig, classes: Any, muon_dtype: str = "float32") -> ResNet50Classifier:
    """Build the LightningModule of a config, with a random backbone."""
    return ResNet50Classifier(
        classes=classes,
        upscale=cfg.model.upscale,
        head=list(cfg.model.head),
        dropout=cfg.model.dropout,
        optimizer=cfg.finetune.optimizer,
        momentum=cfg.finetune.momentum,
        weight_decay=cfg.finetune.weight_decay,
        label_smoothing=cfg.finetune.label_smoothing,
        muon_dtype=muon_dtype,
    )


def build_trainer(trainer: Mapping[Any, Any], **extra: Any) -> L.Trainer:
    """Build Lightning's Trainer from the `trainer` group; keys added with +trainer. are passed on."""
    accelerator = resolve_accelerator(trainer["accelerator"])
    keys = {**trainer, "accelerator": accelerator, "precision": resolve_precision(trainer["precision"], accelerator)}
    try:
        return L.Trainer(
            **{"profiler": NoProfiler(), **{str(key): value for key, value in keys.items()}},
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=bool(progress_bar()),
            **extra,
        )
    except (TypeError, ValueError) as error:  # MisconfigurationException is no ValueError, but says enough by itself
        raise UserError(f"trainer: Lightning's Trainer refuses its keys: {error}") from error


def progress_bar() -> list[L.Callback]:
    """Return a progress bar where somebody can see it."""
    return [RichProgressBar()] if sys.stdout.isatty() else []


def build_loggers(loggers: DictConfig, folder: Path) -> list[Logger]:
    """Build the loggers that the `logger` group names."""
    built: list[Logger] = []
    if "tensorboard" in loggers:
        built.append(TensorBoardLogger(folder, name=None, version="tensorboard", default_hp_metric=False))
    if "csv" in loggers:
        built.append(CSVLogger(folder, name="csv"))
    return built


def plan_text(
    cfg: DictConfig,
    plan: FinetuneSchedule,
    datamodule: CIFAR10DataModule,
    facts: dict[str, Any],
    cache: CacheDecision,
    folder: Path,
) -> str:
    """Return what is about to happen, for people."""
    sizes = datamodule.sizes
    sha256 = f" (SHA-256 {facts['weights_sha256'][:12]})" if facts["weights_sha256"] else ""
    scale = f", filters at RMS {facts['filter_rms']:g}" if facts["filter_rms"] else ""
    source = f"{cfg.data.name}, {cfg.data.root}" if "root" in cfg.data else cfg.data.name
    lines = [
        f"data       {source}: {sizes['train']:,} images to train, {sizes['val']:,} to validate, 32x32",
        f"weights    {cfg.model.weights or 'random'}{sha256}{scale}",
        f"device     {facts['device']}, {facts['precision']}, {facts['threads']} threads",
        f"folder     {folder}",
    ]
    for phase in plan.phases:
        rates = plan.peak_learning_rates(phase)
        backbone = f", backbone {rates['backbone']:g}" if phase.stages else ""
        optimizer = optimizer_text(cfg.finetune.optimizer, unfrozen=bool(phase.stages))
        lines.append(
            f"phase      {phase.name}, epochs {epochs_text(phase)}: {stages_text(phase.stages)}; "
            f"{optimizer}, {plan.schedule} learning rate, head {rates['head']:g}{backbone}"
        )
    lines.append(f"features   {cache.text}")
    if cfg.resume is not None:
        lines.append(f"resuming   after the last finished epoch in {folder / 'checkpoints' / LAST}")
    return "\n".join(lines)


def interrupted_text(record: RunRecorder, last: Path) -> str:
    """Return what Ctrl-C left and how to go on."""
    if not last.is_file():
        return "Interrupted before the first epoch was over: nothing to resume. Start the run again."
    return (
        f"Interrupted. {len(record.epochs)} of {record.plan.max_epochs} epochs are saved in {last}. Continue with\n"
        f"  python -m cifar_tl.train resume={last.parents[1]}"
    )


def quieten_lightning() -> None:
    """Silence what Lightning says about itself; its warnings stay, but for those that do not fit here."""
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")  # Lightning 2.6 on torch 2.14
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")  # a resumed run's
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
