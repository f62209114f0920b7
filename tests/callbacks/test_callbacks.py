"""Callbacks called as the Trainer calls them, one by one."""

import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cifar_tl.callbacks.feature_cache import FeatureCache
from cifar_tl.callbacks.own_signals import OwnSignals
from cifar_tl.callbacks.predictions_recorder import PredictionsRecorder
from cifar_tl.callbacks.pruning import Pruning
from cifar_tl.callbacks.run_recorder import RunRecorder
from cifar_tl.callbacks.tensorboard_figures import TensorBoardFigures
from cifar_tl.data.lazy import LazyImages
from cifar_tl.errors import Pruned
from cifar_tl.runs.predictions import SplitPredictions
from cifar_tl.schedule import FinetuneSchedule


def after_epoch(epoch, accuracy=0.5):
    return SimpleNamespace(callback_metrics={"val/acc": accuracy}, current_epoch=epoch)


def test_of_equally_good_epochs_the_figures_have_the_first():
    figures = TensorBoardFigures(None, None, {})
    for epoch in (0, 1):
        figures.on_train_epoch_end(after_epoch(epoch), None)
    assert figures._best == (0.5, 0)


def test_what_the_hparams_page_needs_survives_a_resume():
    before, after = (TensorBoardFigures(None, None, {}) for _ in range(2))
    before._best, before._seconds = (0.9, 3), 60.0
    after.load_state_dict(before.state_dict())
    assert (after._best, after._seconds) == ((0.9, 3), 60.0)


def test_of_equally_good_epochs_the_predictions_are_of_the_first(tmp_path):
    recorder = PredictionsRecorder(None, tmp_path, 1, 4)
    for epoch in (1, 2):
        logits = np.full((2, 2), epoch, np.float32)
        recorder.val = SplitPredictions(logits, np.zeros(2, np.int64), np.arange(2))
        recorder.on_train_epoch_end(after_epoch(epoch), None)
    assert recorder._best["logits"][0, 0] == 1


def test_only_the_first_process_writes_the_record(tmp_path):
    recorder = RunRecorder(tmp_path, FinetuneSchedule(2, 1, 1e-3, 1e-3), {"images": {"val": 1}})
    recorder.write(SimpleNamespace(is_global_zero=False))
    assert not list(tmp_path.iterdir())


def test_a_process_is_pruned_for_the_reason_of_the_first_one():
    trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda reason: "Pruned after epoch 1"))
    with pytest.raises(Pruned, match="epoch 1"):
        Pruning(None).on_train_epoch_start(trainer, None)


def test_a_test_alone_has_the_commands_signal_handlers():
    def ours(*_):
        pass

    before = signal.signal(signal.SIGTERM, ours)
    try:
        own = OwnSignals()
        signal.signal(signal.SIGTERM, lambda *_: None)  # Lightning's
        own.on_test_start(None, None)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_features_of_images_that_are_not_in_memory_are_not_kept_on_disk(tmp_path, monkeypatch):
    lazy = LazyImages([], None, 1, [])
    splits = {"train": (lazy, None), "val": (lazy, None)}
    data = SimpleNamespace(splits=splits, sizes={"train": 0, "val": 0}, mean=(), std=())
    cache = FeatureCache(data, 2, "auto", tmp_path)
    monkeypatch.setattr(cache, "_compute", lambda *of: torch.ones(1, 1, 1))
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce_boolean_decision=lambda decision: decision)
    trainer = SimpleNamespace(strategy=strategy, precision="32-true")
    assert set(cache._get(trainer, nn.Identity())) == {"train", "val"}
    assert not list(tmp_path.iterdir())
