"""Lightning's Trainer for a run: built from the `trainer` group, its keys and its processes checked first."""

import logging
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch.nn.parallel import DistributedDataParallel

from cifar_tl import slurm
from cifar_tl.cli import TRAINER_ALTERNATIVES, TRAINER_KEYS
from cifar_tl.errors import UserError, check_choice, check_flag, check_int, check_number, suggest
from cifar_tl.hardware import PRECISIONS, resolve_accelerator, resolve_precision
from cifar_tl.runs.resume import is_first_process
from cifar_tl.schedule import STAGES, FinetuneSchedule

FLAGS = {
    *("sync_batchnorm", "benchmark", "deterministic"),
    *("enable_progress_bar", "enable_model_summary", "detect_anomaly"),
}
"""Those that are true or false: Lightning takes any other value for one of them, and does not say for which."""


def build_trainer(trainer: Mapping[Any, Any], **extra: Any) -> L.Trainer:
    """Build Lightning's Trainer from the `trainer` group; keys of TRAINER_KEYS added with +trainer. are passed on.

    Args:
        trainer: The group.
        extra: More arguments of the Trainer, which the group's win over; `plugins` is a list.

    Raises:
        UserError: A key that a run cannot honour, a value that cannot be, or srun started other processes than it asks
            for.
    """
    check_trainer(trainer)
    accelerator = resolve_accelerator(trainer["accelerator"])
    keys = {str(key): value for key, value in trainer.items()}
    keys |= {"accelerator": accelerator, "precision": resolve_precision(trainer["precision"], accelerator)}
    own = {
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(bar, ProgressBar) for bar in extra.get("callbacks", progress_bar())),
        "benchmark": accelerator == "cuda" and not trainer.get("deterministic"),  # it picks algorithms by their time
        **extra,
        "plugins": [*cluster_environment(), *extra.get("plugins", [])],
    }
    try:
        built = L.Trainer(**own | keys)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"trainer: Lightning's Trainer refuses its keys: {error}") from error
    if isinstance(built.strategy, DDPStrategy):  # buffers never differ between the processes: see `check_strategy`
        known = signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before
        built.strategy._ddp_kwargs.setdefault(sync, False)
    processes = built.num_devices * built.num_nodes
    if slurm.tasks() not in (1, processes) and not TorchElasticEnvironment.detect():  # torchrun starts its own
        raise UserError(
            f"srun started {slurm.tasks()} processes, and trainer.devices={trainer['devices']} on {built.num_nodes} "
            f"node(s) trains with {processes}. Give trainer=ddp, and as trainer.devices= and trainer.num_nodes= srun's "
            f"--ntasks-per-node and --nodes."
        )
    return built


def cluster_environment() -> list[ClusterEnvironment]:
    """Return where the Trainer's processes come from, if this is SLURM: from srun, or as elsewhere.

    Left alone, Lightning takes SLURM_NTASKS for srun and waits for processes that nobody starts; it wants
    SLURM_NTASKS_PER_NODE, which `srun -n 2` does not set; and it handles SIGUSR1, which is `cli`'s.

    Raises:
        UserError: srun did not start the same number of processes on each node.
    """
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect():
        return []
    if slurm.tasks() == 1:
        return [LightningEnvironment()]
    on_nodes = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # 2, or 2(x3) on three nodes, or 2,1
    each = on_nodes.partition("(")[0]
    if "," in on_nodes:
        raise UserError(f"srun started {on_nodes} processes on the nodes: give each as many: --ntasks-per-node=N.")
    os.environ["SLURM_NTASKS_PER_NODE"] = each
    return [SLURMEnvironment(auto_requeue=False)]


def check_trainer(trainer: Mapping[Any, Any]) -> None:
    """Refuse keys of the Trainer that a run cannot honour, before anything is read.

    Raises:
        UserError: Such a key, or a value that cannot be.
    """
    for key in trainer:
        if key not in TRAINER_KEYS:
            allowed = f"{suggest(str(key), TRAINER_KEYS)} Keys: {', '.join(sorted(TRAINER_KEYS))}."
            raise UserError(f"trainer.{key} is not supported. {TRAINER_ALTERNATIVES.get(key) or allowed.strip()}")
    check_choice("trainer.precision", trainer.get("precision", "auto"), PRECISIONS)
    check_int("trainer.accumulate_grad_batches", trainer.get("accumulate_grad_batches", 1), 1)
    check_int("trainer.log_every_n_steps", trainer.get("log_every_n_steps", 1), 1)
    for key in sorted(FLAGS & trainer.keys()):
        if (key, trainer[key]) not in (("deterministic", "warn"), ("deterministic", None), ("benchmark", None)):
            check_flag(f"trainer.{key}", trainer[key])
    if not isinstance(trainer.get("max_time"), str | None):
        raise UserError(f"trainer.max_time={trainer['max_time']} is not allowed: give DD:HH:MM:SS.")
    clip = trainer.get("gradient_clip_val")
    if clip is not None and not check_number("trainer.gradient_clip_val", clip, 0) > 0:
        raise UserError(f"trainer.gradient_clip_val={clip} clips nothing: give a number above 0, or null.")
    batches = trainer.get("limit_train_batches")
    if isinstance(batches, bool):  # true would be one step
        raise UserError(f"trainer.limit_train_batches={batches} is not allowed: give a number of steps, or a share.")
    if batches in (0, 0.0):
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on: give a number of steps, or a share.")
    every = check_int("trainer.check_val_every_n_epoch", trainer.get("check_val_every_n_epoch", 1), 1)
    if every > trainer.get("max_epochs", every):
        raise UserError(
            f"trainer.check_val_every_n_epoch={every} is never reached, at trainer.max_epochs={trainer['max_epochs']}: "
            f"validation chooses the epoch that is tested."
        )


def check_strategy(trainer: L.Trainer, schedule: FinetuneSchedule, batchnorm: str) -> None:
    """Refuse several processes that would wait for gradients of what is frozen, or train another model than one does.

    Args:
        trainer: From `build_trainer`.
        schedule: Of the run.
        batchnorm: What BatchNorm does in stages that train.

    Raises:
        UserError: The processes are no DistributedDataParallel's; there is a frozen phase, and it is not told that
            parameters may be unused; or BatchNorm takes statistics that the processes do not share.
    """
    strategy, processes = trainer.strategy, trainer.world_size
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            f"trainer.strategy= starts the processes by {strategy.launcher._start_method}, which leaves this one, "
            f"whose record it is, without what they have trained. Give trainer=ddp."
        )
    if processes == 1:
        return
    if not isinstance(strategy, DDPStrategy):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} is not supported: optimizer groups and checkpoints need "
            f"whole parameters in every process. Give trainer=ddp."
        )
    finds_unused = strategy._ddp_kwargs.get("find_unused_parameters", False)
    if not finds_unused and any(phase.stages != STAGES for phase in schedule.phases):
        raise UserError(
            f"{processes} processes would wait for gradients that a frozen backbone does not have. Give "
            f"trainer=ddp, with trainer.devices= or trainer.num_nodes= as you like."
        )
    synchronized = strategy._layer_sync is not None and strategy.root_device.type == "cuda"
    if batchnorm == "adapt" or (batchnorm == "train" and not synchronized):
        gpus = " GPUs share them, unless trainer.sync_batchnorm=false was given." if batchnorm == "train" else ""
        raise UserError(
            f"finetune.batchnorm={batchnorm} is not possible in {processes} processes: each would take the statistics "
            f"of its own share of a batch, and train another model than one process does.{gpus} Give "
            f"finetune.batchnorm=frozen, or trainer.devices=1."
        )


def check_processes(sizes: Mapping[str, int], processes: int) -> None:
    """Refuse more processes than images of a split: some would have none to validate or test.

    Raises:
        UserError: With the split.
    """
    for split, images in sizes.items():
        if images < processes:
            raise UserError(
                f"{processes} processes cannot share {images} {split} images. Give fewer processes by trainer.devices= "
                f"and trainer.num_nodes=, or more images."
            )


class Bar(RichProgressBar):
    """Lightning's, without the version of the first logger, which tells nothing here.

    Its metrics are read once a second: to read one makes a step wait for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, Any] = {}
        self._read = -math.inf

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar."""
        if (now := time.monotonic()) >= self._read + 1:
            shown = super().get_metrics(trainer, pl_module)
            self._shown, self._read = {key: value for key, value in shown.items() if key != "v_num"}, now
        return self._shown


def progress_bar() -> list[L.Callback]:
    """Return a progress bar if stdout is a terminal, and this process has it for itself."""
    return [Bar()] if sys.stdout.isatty() and multiprocessing.parent_process() is None else []


def quieten_lightning() -> None:
    """Silence what Lightning says about itself; its warnings stay, but for those that do not fit here."""
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # left out: on the run's record
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")  # Lightning 2.6 on torch 2.14
    warnings.filterwarnings("ignore", message=r".*find_unused_parameters=True was specified")  # once all is unfrozen
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")  # a resumed run's
    warnings.filterwarnings("ignore", message=r"The number of training batches")  # PhaseLog sees to it
    warnings.filterwarnings("ignore", message=r"The `srun` command is available")  # and was left out on purpose
    warnings.filterwarnings("ignore", message=r"The AccumulateGrad node's stream does not match")  # its issue 21567
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers", "callbacks.model_summary"):  # they say what was asked for
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    if not is_first_process():
        logging.getLogger("cifar_tl").setLevel(logging.ERROR)  # the first one says it all
