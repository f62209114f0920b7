"""python -m cifar_tl.train [group=choice ...] [key=value ...]: the two-phase run, from config to test result."""

import sys

from cifar_tl import cli

if __name__ == "__main__":  # before what takes seconds to import: --help, --cfg job and mistyped keys do without
    sys.exit(cli.run("cifar_tl.train:main", "train", sys.argv[1:]))

import gc
import logging
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from cifar_tl import slurm
from cifar_tl.build import (
    build_augment,
    build_callbacks,
    build_datamodule,
    build_loggers,
    build_module,
    build_schedule,
    check_batch_size,
    check_distillation,
    check_root,
    config_warnings,
    distills,
    fill_backbone,
    keys_without_effect,
    model_class,
    model_facts,
    plain,
    run_facts,
)
from cifar_tl.checkpoints import BEST, FORMAT, LAST, PacedCheckpointIO, completed, read_checkpoint
from cifar_tl.cli import DISK_ERRORS
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.data.decode import SIZE
from cifar_tl.errors import Interrupted, Pruned, UserError, check_flag, check_int
from cifar_tl.files import remove_partial_files
from cifar_tl.hardware import (
    advice_when_out_of_memory,
    flush_denormals,
    forget_peak_memory,
    gpu_in_turn,
    prepare_for,
    resolve_accelerator,
    select_gpu,
)
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.model.optim import optimizer_text
from cifar_tl.model.weights import check_weights, file_sha256
from cifar_tl.processes import check_sweep, own_processes
from cifar_tl.reports.run_page import REPORT, write_run_report
from cifar_tl.runs.formatting import duration_text, percent, result_text
from cifar_tl.runs.record import METRICS, flat, read_metrics, write_metrics
from cifar_tl.runs.resume import (
    is_first_process,
    kept_result,
    longer_text,
    resume_command,
    run_lock,
    save_overrides,
    unsaved_overrides,
)
from cifar_tl.schedule import FinetuneSchedule, epochs_text, stages_text
from cifar_tl.trainer import build_trainer, check_processes, check_strategy, check_trainer, quieten_lightning

log = logging.getLogger(__name__)

FIXED = (
    "seed",
    "model._target_",
    "model.options",
    "model.weights",
    "model.filter_rms",
    "model.head",
    "model.upscale",
    "model.conventions",
    "data.name",
    "data.limit",
    "data.train_limit",
    "data.val_size",
    "data.split_seed",
    "data.train_size",
    "data.test_size",
    "finetune.optimizer",
    "finetune.unfreeze_at_epoch",
    "finetune.stages",
    "finetune.stage_epochs",
    "finetune.progressive_resizing",
    "finetune.distill_upscale",
    "callbacks.ema.",
)
"""Beginnings of the keys that a resumed run cannot change. Others count from the epoch on at which it goes on."""
OF_TRAINING = (
    *("augment.", "data.batch_size", "model.dropout", "finetune.head_lr", "finetune.backbone_lr", "finetune.schedule"),
    *("finetune.warmup_epochs", "finetune.batchnorm", "finetune.momentum", "finetune.weight_decay"),
    *(
        "finetune.label_smoothing",
        "finetune.distill_weight",
        "finetune.frozen_augment",
        "trainer.accumulate_grad_batches",
    ),
    *("trainer.gradient_clip", "trainer.limit_train_batches", "trainer.check_val_every_n_epoch"),
    *("trainer.sync_batchnorm", "trainer.detect_anomaly", "callbacks.early_stopping."),
)
"""Beginnings of the keys that say nothing but how epochs train, and cannot change where none is left."""


def main(cfg: DictConfig) -> float:
    """Train, test, draw the run's page and return the best validation accuracy, for sweeps."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    sweep_goes_on = hydra.mode is RunMode.MULTIRUN and cfg.resume is not None
    run_goes_on = hydra.mode is RunMode.RUN and cfg.resume is not None and not unsaved_overrides(folder)
    if sweep_goes_on or run_goes_on or (slurm.restarted() and cfg.resume is None):
        if (result := kept_result(folder, pruned=not run_goes_on)) is not None:
            log.info("%s", finished_text(folder) if run_goes_on else f"{folder} is finished: kept")
            if not (folder / REPORT).is_file():  # stopped when all but the page was there
                draw_report(folder)
            return result
        cfg.resume = str(folder) if (folder / "checkpoints" / LAST).is_file() else None
    if cfg.resume is not None:
        keep_own_defaults(cfg, folder)
    several = hydra.mode is RunMode.MULTIRUN and hydra.launcher._target_.endswith(".JoblibLauncher")
    if several and cfg.trainer.devices == 1:
        cfg.trainer.devices = gpu_in_turn(hydra.job.num, resolve_accelerator(cfg.trainer.accelerator))
    gc.collect()  # model and trainer of the last job refer to each other: this one would start beside them
    with run_lock(folder):
        if is_first_process():
            remove_partial_files(folder / "checkpoints")
        if cfg.resume is None:
            save_overrides(cfg, folder)
        metrics = train(cfg, folder, experiment=hydra.runtime.choices["experiment"])
    draw_report(folder)
    return float(metrics["best/val/acc"])


def keep_own_defaults(cfg: DictConfig, folder: Path) -> None:
    """Give a run that goes on its own values of keys in FIXED that nobody gives now: today's defaults may be others."""
    given = [argument.lstrip("+~").partition("=")[0] for argument in unsaved_overrides(folder)]
    if {"experiment", "ablate", "finetune"} & set(given):
        return
    try:
        last = torch.load(folder / "checkpoints" / LAST, map_location="cpu", mmap=True, weights_only=True)
        saved, now = flat(last["cifar_tl"]["config"]), flat(plain(cfg))
    except Exception:  # about anything, for a file that is no checkpoint: `read_checkpoint` says what is wrong
        return
    for key in saved.keys() & now.keys():
        if key.startswith(FIXED) and not any(f"{key}.".startswith(f"{each}.") for each in given):
            OmegaConf.update(cfg, key, saved[key])


def finished_text(folder: Path) -> str:
    """Return that a finished run is kept, and how it is trained longer or measured again."""
    return f"{folder} is finished: kept. {longer_text(read_metrics(folder))}cifar_tl.evaluate measures it again"


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
    last = folder / "checkpoints" / LAST
    if cfg.resume is None and last.is_file() and is_first_process():
        raise UserError(f"{folder} holds a run already. Choose another folder, or delete it first.")
    flush_denormals()
    quieten_lightning()
    L.seed_everything(check_int("seed", cfg.seed, 0, 2**32 - 1), workers=True, verbose=False)
    schedule = build_schedule(cfg)  # its mistakes before anything is read
    if cfg.resume is None:  # a run that goes on, or is measured, is what it was
        schedule.check_warmup()
    check_trainer(cfg.trainer)
    check_distillation(cfg)
    accelerator = resolve_accelerator(cfg.trainer.accelerator)
    select_gpu(cfg.trainer.devices, accelerator)
    forget_peak_memory(accelerator)
    if cfg.resume is not None:
        check_root(cfg.data)
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule.classes)
    prepare_for(accelerator, module)
    if check_flag("model.compile", cfg.model.compile):
        torch.compiler.reset()  # of another run in this process, whose graphs count towards the same limit
        module.backbone.compile(dynamic=False)  # batches have two sizes, of which graphs of any size would be slower
    if cfg.resume is None and cfg.model.weights is not None:
        check_weights(cfg.model.weights)
    resumed, before = ({}, {}) if cfg.resume is None else resumed_facts(cfg, last)
    datamodule.prepare_data()  # before weights are downloaded: the data may not be there
    weights = resumed or fill_backbone(cfg, module)
    datamodule.setup("fit")
    if cfg.resume is not None:
        check_data_of_resumed_run(datamodule, before)

    facts = {**run_facts(cfg, datamodule, experiment), **model_facts(module), **weights}
    if cfg.resume is None:
        warn_of_another_split(cfg, datamodule)
    elif "model_sha256" in before and before["model_sha256"] != facts.get("model_sha256"):
        log.warning(
            "warning: the file of %s has changed since the run's last epoch; the record has the SHA-256 of both.",
            cfg.model._target_,
        )
    module.provenance = {"format": FORMAT, "config": plain(cfg), "facts": facts}
    trainer = build_trainer(
        cfg.trainer,
        logger=build_loggers(cfg, folder),
        # the first one, for the others write
        callbacks=[
            SaveConfigOnStart(cfg, folder, facts.get("changed", {})),
            *build_callbacks(cfg, datamodule, facts, folder),
        ],
        plugins=[PacedCheckpointIO(last.parent)],
        sync_batchnorm=cfg.finetune.batchnorm == "train",
        default_root_dir=folder,
    )
    check_sweep(trainer)
    check_strategy(trainer, schedule, cfg.finetune.batchnorm)
    check_batch_size(cfg, trainer.world_size)
    check_processes(datamodule.sizes, trainer.world_size)
    for logger in trainer.loggers:
        logger.log_hyperparams({"experiment": experiment, **plain(cfg)})
    log.info("%s", plan_text(cfg, datamodule, facts, folder))
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for sentence in (*config_warnings(cfg), *keys_without_effect(cfg, given, bool(datamodule.source.own_val))):
        log.warning("warning: %s", sentence)
    sizes = f"data.batch_size={cfg.data.batch_size}, or data.eval_batch_size={cfg.data.eval_batch_size}"
    try:
        with (
            own_processes(trainer, folder, goes_on=cfg.resume is not None),
            advice_when_out_of_memory(f"Lower {sizes} if it was validating or testing."),
        ):
            trainer.fit(module, datamodule=datamodule, ckpt_path=last if cfg.resume else None, weights_only=True)
            return test_best(trainer, module, datamodule, folder)
    except MisconfigurationException as error:  # of a key, that only the data make impossible
        raise UserError(f"Lightning refuses a key of trainer, or what a callback does: {error}") from error
    except OSError as error:
        if error.errno not in DISK_ERRORS or not last.is_file():
            raise
        raise UserError(f"{error.filename or folder}: {error.strerror}. {saved_text(cfg, folder)}") from error
    except Pruned as pruned:
        log.info("%s", pruned)
        return read_metrics(folder)
    except SystemExit as stop:  # how Lightning ends after Ctrl-C
        raise Interrupted(interrupted_text(cfg, folder)) from stop


class SaveConfigOnStart(L.Callback):
    """Save a run's config and overrides once nothing is refused any more.

    Args:
        cfg: The config.
        folder: The run's.
        changed: What a run that goes on has been given anew.
    """

    def __init__(self, cfg: DictConfig, folder: Path, changed: Mapping[str, Any]) -> None:
        self.cfg = cfg
        self.folder = folder
        self.changed = changed
        self.trains = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save them."""
        self.trains = True
        save_overrides(self.cfg, self.folder)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save them where nothing was left to train.

        Raises:
            UserError: Keys of the training are changed, which would change the run's record alone.
        """
        if self.trains:
            return
        refuse_without_training(
            {
                key: value
                for key, value in self.changed.items()
                if key.startswith(OF_TRAINING) or (key == "trainer.max_epochs" and value > trainer.current_epoch)
            }
        )
        save_overrides(self.cfg, self.folder)


def refuse_without_training(changed: Mapping[str, Any]) -> None:
    """Refuse keys of the training where nothing is left to train.

    Raises:
        UserError: There is one.
    """
    if changed:
        raise UserError(
            f"the run has nothing left to train, so that {', '.join(f'{k}={v}' for k, v in changed.items())} would "
            f"change its record alone. Leave it out, or let the run go on by more of what has ended it: "
            f"trainer.max_epochs, a callback's patience or trainer.max_time."
        )


def resumed_facts(cfg: DictConfig, last: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `fill_backbone` did when the run was started, with what is changed now, and all facts of then.

    Raises:
        UserError: No checkpoint, or a key is changed that what is trained already depends on.
    """
    checkpoint = read_checkpoint(last)
    saved, done = checkpoint["cifar_tl"], checkpoint["epoch"] + 1
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"{last} has weights alone, as {BEST} has: no run resumes from it. Restore the run's own {LAST}."
        )
    if cfg.trainer.max_epochs < done:
        raise UserError(
            f"trainer.max_epochs={cfg.trainer.max_epochs} is less than the {done} epochs that the run has trained: "
            f"leave it out, or raise it."
        )
    before, now = flat(plain(completed(saved["config"]))), flat(plain(cfg))
    values = {key: (before.get(key), now.get(key)) for key in (*now, *before)}  # a key that is not there counts as null
    changed = {key: (old, new) for key, (old, new) in values.items() if old != new}
    # where images grow, the number of epochs says when they have grown
    fixed = FIXED if cfg.finetune.progressive_resizing is None else (*FIXED, "trainer.max_epochs")
    lost = {key: values for key, values in changed.items() if key.startswith(fixed)}
    if "model.weights" in lost and _is_file_of(cfg.model.weights, saved["facts"].get("weights_sha256")):
        del lost["model.weights"]  # the same weights, elsewhere
    if "model.dropout" in changed and not all(changed["model.dropout"]):
        lost["model.dropout"] = changed["model.dropout"]  # from or to 0: layers come or go
    if lost:
        texts = ", ".join(f"{key}={new} (the run has {old})" for key, (old, new) in lost.items())
        raise UserError(
            f"a resumed run cannot change {texts}: what it has trained so far depends on it. Leave it out, or start a "
            f"new run with it."
        )
    if done == cfg.trainer.max_epochs:
        refuse_without_training({key: new for key, (_, new) in changed.items() if key.startswith(OF_TRAINING)})
    changed.pop("resume", None)
    for key, (old, new) in changed.items():
        log.info("changed    %s=%s from here on (the run had %s)", key, new, old)
    weights = {key: saved["facts"].get(key) for key in ("weights_sha256", "filter_rms")}
    return {**weights, "changed": {key: new for key, (_, new) in changed.items()}}, saved["facts"]


def _is_file_of(path: Any, sha256: str | None) -> bool:
    """Return whether a path is one of a file with this SHA-256."""
    return path is not None and Path(str(path)).is_file() and file_sha256(Path(str(path))) == sha256


def check_data_of_resumed_run(datamodule: CIFAR10DataModule, facts: Mapping[str, Any]) -> None:
    """Refuse other images than the run has trained on: some may have been, or become, those it is validated on.

    Raises:
        UserError: The images, their classes or the way they are split have changed.
    """
    gone, new = (sorted(set(a) - set(b)) for a, b in pairwise((facts["classes"], datamodule.classes, facts["classes"])))
    if gone or new:
        raise UserError(
            f"the run's classes have changed since it was started: gone {', '.join(gone) or 'none'}; new "
            f"{', '.join(new) or 'none'}. Restore them, or start a new run. data.root= says where the run's data is."
        )
    if facts["split_sha256"] != datamodule.split_sha256:
        raise UserError(
            f"the run's training or validation images have changed since it was started (SHA-256 "
            f"{datamodule.split_sha256[:12]}, the run's {facts['split_sha256'][:12]}): images that it has trained on "
            f"could be validated on. Restore them, or start a new run. data.root= says where the run's data is."
        )


def warn_of_another_split(cfg: DictConfig, datamodule: CIFAR10DataModule) -> None:
    """Warn where the weights are of a run that was trained on other images: on some of those that now validate."""
    path = None if cfg.model.weights is None else check_weights(cfg.model.weights)
    if path is None:
        return
    with warnings.catch_warnings(action="ignore"):  # of pickle protocols, for instance
        state = torch.load(path, map_location="cpu", weights_only=True)
    facts = state["cifar_tl"].get("facts", {}) if "cifar_tl" in state else {}
    if facts and facts.get("split_sha256") != datamodule.split_sha256:
        log.warning(
            "warning: model.weights=%s was trained on other images than this run's: where these are of the same data, "
            "some may be among those that validate it. Its own data.split_seed, val_size and limits keep them apart.",
            cfg.model.weights,
        )


def best_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the checkpoint of a run's best epoch.

    Raises:
        UserError: There is none, or not of the epoch that is recorded as the best.
    """
    if not (folder / METRICS).is_file():
        raise UserError("The training ended before its first epoch was over: there is nothing to test.")
    if "best/epoch" not in (metrics := read_metrics(folder)):
        raise UserError(
            f"No epoch was validated, so that there is no best one to test. {' '.join(metrics['warnings'])} What was "
            f"trained is in {folder / 'checkpoints' / LAST}."
        )
    best = read_checkpoint(folder / "checkpoints" / BEST)
    if best["epoch"] != (recorded := metrics["best/epoch"]):
        raise UserError(
            f"{folder / 'checkpoints' / BEST} is of epoch {best['epoch']}, but the best one in {folder / METRICS} is "
            f"{recorded}: one of them is of another run, and nothing was tested. Restore it, or train again."
        )
    return best


def test_best(
    trainer: L.Trainer, module: ResNet50Classifier, datamodule: CIFAR10DataModule, folder: Path
) -> dict[str, Any]:
    """Measure the best epoch's weights on the test set, the run's one look at it, and say what came out."""
    trainer.strategy.barrier("best.ckpt")  # the first process has written it, and the others read it
    try:
        best = best_checkpoint(folder)
    except UserError:
        if is_first_process() and (folder / METRICS).is_file():
            metrics = read_metrics(folder)
            if metrics["status"] == "running":  # else another start's result stands
                write_metrics(folder, {**metrics, "status": "failed"})
        raise
    module.load_state_dict(best["state_dict"])
    module.backbone.upscale = best["hyper_parameters"]["upscale"]
    trainer.test(module, datamodule=datamodule, verbose=False)
    trainer.strategy.barrier("metrics.json")
    metrics = read_metrics(folder)
    figures = f"\n  figures     tensorboard --logdir {folder}" if (folder / "tensorboard").is_dir() else ""
    log.info(
        "\n%s\n  best epoch  %d of 0..%d, validation accuracy %s\n  time        %s\n  results     %s%s",
        result_text(metrics, datamodule.sizes["test"]),
        metrics["best/epoch"],
        metrics["plan"][-1]["end"] - 1,
        percent(metrics["best/val/acc"]),
        ", ".join(
            f"{phase['name']} {duration_text(phase['seconds'])} ({phase['images_per_s']:,.0f} images/s)"
            for phase in metrics["phases"]
        ),
        folder / "metrics.json",
        figures,
    )
    return metrics


def draw_report(folder: Path) -> None:
    """Draw the run's page and say where it is; a run with its result written is worth more than the page."""
    if not is_first_process():
        return
    again = f"python -m cifar_tl.reports {shlex.quote(str(folder))}"
    try:
        log.info("  report      %s", write_run_report(folder))
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"Interrupted while the report was drawn; the result is saved.\nDraw it by\n  {again}"
        ) from stop
    except Exception as error:
        log.warning("The report was not drawn (%s: %s). Again: %s", type(error).__name__, error, again)


def plan_text(cfg: DictConfig, datamodule: CIFAR10DataModule, facts: dict[str, Any], folder: Path) -> str:
    """Return what is about to happen, formatted for the console."""
    sizes, schedule = datamodule.sizes, build_schedule(cfg)
    weights = cfg.model.weights or "random"
    if facts["weights_sha256"]:
        scale = f"filters at RMS {facts['filter_rms']:g}" if facts["filter_rms"] else "filters as in the file"
        weights += f" (SHA-256 {facts['weights_sha256'][:12]}), {scale}"
    source = f"{cfg.data.name}, {cfg.data.root}" if "root" in cfg.data else cfg.data.name
    lines = [
        f"data       {source}: {sizes['train']:,} images to train, {sizes['val']:,} to validate, "
        f"{sizes['test']:,} to test, 32x32",
        f"weights    {weights}",
        f"device     {facts['device']}, {facts['precision']}, {facts['threads']} threads",
        f"folder     {folder}",
    ]
    lines.append(f"augment    {augment_text(cfg, schedule)}")
    for phase in schedule.phases:
        learning_rates = schedule.peak_learning_rates(phase)
        backbone = f", backbone {learning_rates['backbone']:g}" if phase.stages else ""
        optimizer = "an optimizer of its own"
        if model_class(cfg.model._target_).configure_optimizers is ResNet50Classifier.configure_optimizers:
            optimizer = optimizer_text(cfg.finetune.optimizer, unfrozen=bool(phase.stages))
        lines.append(
            f"phase      {phase.name}, epochs {epochs_text(phase)}: {stages_text(phase.stages)}; "
            f"{optimizer}, {schedule.schedule} learning rate, head {learning_rates['head']:g}{backbone}"
        )
    if distills(cfg):
        size = SIZE * cfg.finetune.distill_upscale
        lines.append(
            f"distill    from the pretrained backbone on images enlarged to {size}x{size}, while fine-tuning; "
            f"weight {cfg.finetune.distill_weight:g}"
        )
    average = cfg.callbacks.get("ema") or {}
    if str(average.get("_target_")).endswith(".WeightEMA"):
        start = f" from epoch {average['start_epoch']} on" if average.get("start_epoch") else ""
        decay = average.get("decay", "0.995")
        lines.append(f"average    of the weights of steps{start}, decay {decay}: it is validated, kept and tested")
    if cfg.resume is not None:
        lines.append(f"resuming   after the last finished epoch in {folder / 'checkpoints' / LAST}")
    return "\n".join(lines)


def augment_text(cfg: DictConfig, schedule: FinetuneSchedule) -> str:
    """Return what happens to training images, `flip random while frozen, then flip random, crop_padding 4`."""
    augment = build_augment(cfg)
    texts = []
    for phase in schedule.phases:
        done = {key: value for key, value in asdict(augment(phase.start)).items() if value not in (0, "none")}
        text = ", ".join(f"{key} {value}" for key, value in done.items()) or "nothing"
        if (text := text if phase.stages else f"{text} while frozen") not in texts:
            texts.append(text)
    return ", then ".join(texts)


def interrupted_text(cfg: DictConfig, folder: Path) -> str:
    """Return what Ctrl-C left and how to go on."""
    if not (folder / "checkpoints" / LAST).is_file():
        return "Interrupted before the first epoch was saved: nothing to resume. Start the run again."
    return f"Interrupted. {saved_text(cfg, folder)}"


def saved_text(cfg: DictConfig, folder: Path) -> str:
    """Return how many epochs a run has saved and how to go on after them."""
    last = folder / "checkpoints" / LAST
    done = read_checkpoint(last)["epoch"] + 1  # of which metrics.json may be ahead
    way_on = f"Continue with\n  {resume_command(folder, unsaved_overrides(folder))}"
    if not HydraConfig.initialized():
        way_on = f"Continue by the same call, with cfg.resume={str(folder)!r}."
    return f"{done} of {cfg.trainer.max_epochs} epochs are saved in {last}.\n{way_on}"
