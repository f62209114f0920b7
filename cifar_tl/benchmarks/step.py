"""The fine-tune step: ours in Lightning, the same step in a bare loop, and Lightning as a tutorial would write it."""

import time
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from typing import Any

import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from cifar_tl.benchmarks.setting import Setting, summary, take_turns
from cifar_tl.benchmarks.torchvision_way import Classifier, dataloader
from cifar_tl.build import build_datamodule, build_module, build_unfreeze
from cifar_tl.callbacks.epoch_seed import EpochSeed
from cifar_tl.callbacks.freeze_guard import CHECKED_STEPS, FreezeGuard
from cifar_tl.data.batch import Batch
from cifar_tl.data.decode import SIZE
from cifar_tl.hardware import device_name, prepare_for
from cifar_tl.model.backbone import Backbone
from cifar_tl.model.module import ResNet50Classifier

WARM_UP = CHECKED_STEPS + 1
PEAK_BF16 = {
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40": 181e12,
    "L40S": 362e12,
    "4090": 165e12,
}
"""Dense bf16 arithmetic a second, from the vendor's data sheets; keys are parts of device names, the longest counts."""


class Clock(L.Callback):
    """Time the steps after the first ones, from the end of one to the end of the last, with what is between them.

    Args:
        setting: To wait for the device.
        steps: How many there are in all.
    """

    def __init__(self, setting: Setting, steps: int) -> None:
        self.setting = setting
        self.steps = steps
        self.images = 0
        self.seconds = 0.0
        self._done = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Start, or stop."""
        self._done += 1
        if self._done > WARM_UP:
            self.images += len(batch[0])
        if self._done in (WARM_UP, self.steps):
            self.setting.synchronize()
            self.seconds = time.perf_counter() - self.seconds


class OptimizerClock(L.Callback):
    """Time the optimizer's part of the steps after the first ones; on a GPU, each part waits for the device.

    Args:
        setting: To wait for the device.

    Attributes:
        share: Of these steps' seconds, from the end of the backward pass to the end of the step.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._steps = 0
        self._backward_done = self._last = 0.0
        self._optimizer = self._all = 0.0

    @property
    def share(self) -> float:
        """Return the optimizer's share, 0..1."""
        return self._optimizer / self._all

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
        """Start: the backward pass is done."""
        self._backward_done = self._now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Stop, and add the step."""
        now = self._now()
        self._steps += 1
        if self._steps > WARM_UP:
            self._optimizer += now - self._backward_done
            self._all += now - self._last
        self._last = now

    def _now(self) -> float:
        self.setting.synchronize()
        return time.perf_counter()


def fit_options(setting: Setting, steps: int) -> dict[str, Any]:
    """Return what both of Lightning's loops are built with."""
    return {
        "accelerator": setting.device,
        "devices": 1,
        "precision": setting.precision,
        "max_epochs": -1,
        "max_steps": steps,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Return images a second of each loop, on a GPU with its share of the peak, and the optimizer's share of a step."""
    rows: list[dict[str, Any]] = []
    for batch_size in setting.batch_sizes:
        loops, shares = candidates(setting, batch_size)
        figures = take_turns(loops, setting.rounds, warm_up=0)  # each turn has its own
        new = summary(figures, "images/s", f"batch {batch_size}: bare loop")
        if setting.is_gpu:
            add_share_of_peak(new, setting)
        rows += new + summary(take_turns(shares, setting.rounds, warm_up=0), "of a step")
    return rows


Candidates = dict[str, Callable[[], float]]


def candidates(setting: Setting, batch_size: int) -> tuple[Candidates, Candidates]:
    """Return functions that run some steps: of each loop, for images a second; of each optimizer, for its share."""
    config = setting.config("finetune=full", f"data.batch_size={batch_size}")
    timed = max(50 if setting.is_gpu else 4, 512 // batch_size)  # a DataLoader has some batches ready in advance
    steps = WARM_UP + timed

    def ours_module(optimizer: str = "adamw") -> ResNet50Classifier:  # adamw, as the tutorial has
        module = build_module(config, datamodule.classes)
        module.optimizer = optimizer
        prepare_for(setting.device, module)
        return module

    def fit(clock: L.Callback, compiled: bool = False, optimizer: str = "adamw", **options: Any) -> None:
        callbacks = [EpochSeed(0), build_unfreeze(config), FreezeGuard(0, max_epochs=config.trainer.max_epochs), clock]
        options = {**fit_options(setting, steps), **options}
        trainer = L.Trainer(**options, callbacks=callbacks, benchmark=setting.is_gpu)
        module = ours_module(optimizer)
        if compiled:
            torch.compiler.reset()
            module.backbone.compile(dynamic=False)
        trainer.fit(module, datamodule=datamodule)

    def ours(**options: Any) -> float:
        clock = Clock(setting, steps)
        fit(clock, **options)
        return clock.images / clock.seconds

    def share(optimizer: str) -> float:
        clock = OptimizerClock(setting)
        fit(clock, optimizer=optimizer)
        return clock.share

    def bare() -> float:
        module = ours_module().to(setting.device)
        unfreeze = build_unfreeze(config)
        unfreeze.apply(module, unfreeze.schedule.phase(0))
        optimizer = module.configure_optimizers()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        start, count = 0.0, 0
        batches = chain.from_iterable(repeat(datamodule.train_dataloader()))
        for step, (images, targets) in zip(range(steps), batches, strict=False):
            if step == WARM_UP:
                setting.synchronize()
                start = time.perf_counter()
            with setting.autocast():
                loss = cross_entropy(module(images), targets)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            optimizer.step()
            optimizer.zero_grad()
            count += len(images) if step >= WARM_UP else 0
        setting.synchronize()
        return count / (time.perf_counter() - start)

    def tutorial() -> float:
        clock = Clock(setting, steps)
        # Lightning changes cuDNN's autotuning only where it is told to, and ours has switched it on
        trainer = L.Trainer(**fit_options(setting, steps), callbacks=[clock], benchmark=False)
        trainer.fit(Classifier(len(datamodule.classes), 1e-3), theirs)
        return clock.images / clock.seconds

    datamodule = build_datamodule(config)
    datamodule.prepare_data()
    datamodule.setup("fit")
    ours()  # puts the images onto the device, where the bare loop takes them from
    images, targets = datamodule.splits["train"]
    assert isinstance(images, torch.Tensor)
    theirs = dataloader(images.cpu(), targets.cpu(), batch_size, 2, setting.is_gpu)
    loops: dict[str, Callable[[], float]] = {"bare loop": bare, "cifar_tl": ours, "tutorial": tutorial}
    if setting.is_gpu:
        loops["cifar_tl, compiled"] = partial(ours, compiled=True)
    elif setting.precision != "bf16-mixed":
        loops["cifar_tl, bf16-mixed"] = partial(ours, precision="bf16-mixed")
    loops["cifar_tl, Muon"] = partial(ours, optimizer="muon")
    shares: Candidates = {"optimizer, AdamW": partial(share, "adamw"), "optimizer, Muon": partial(share, "muon")}

    def named(functions: Candidates) -> Candidates:
        return {f"batch {batch_size}: {name}": function for name, function in functions.items()}

    return named(loops), named(shares)


def flops_per_image() -> float:
    """Return the floating-point operations of a fine-tune step per image of 32x32, 2 per multiply-add."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without numbers
        Backbone(upscale=1).eval()(torch.zeros(1, 3, SIZE, SIZE)).sum().backward()
    return float(counter.get_total_flops())


def peak_bf16(name: str) -> float | None:
    """Return the dense bf16 operations a second of a device by its name, None for one that is not listed.

    Nor is a part of a GPU (MIG), whose name has the whole one's.
    """
    if "MIG" in name.split():
        return None
    return PEAK_BF16.get(max((part for part in PEAK_BF16 if part in name), key=len, default=""))


def add_share_of_peak(rows: list[dict[str, Any]], setting: Setting) -> None:
    """Add to each row its share of the GPU's peak bf16 arithmetic (MFU), if that is what it computes in and known."""
    peak = peak_bf16(device_name(setting.device)) if setting.precision == "bf16-mixed" else None
    for row in rows:
        row["MFU"] = row["median"] * flops_per_image() / peak if peak else None
