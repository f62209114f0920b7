"""The average of the weights: what is validated, kept and tested, and what goes on to train."""

import json
import logging

import lightning as L
import pytest
import torch
from conftest import TINY

from cifar_tl.build import build_callbacks, build_datamodule
from cifar_tl.callbacks.weight_ema import WeightEMA
from cifar_tl.errors import UserError
from cifar_tl.train import FIXED, train

TWO = ("trainer.max_epochs=4", "finetune.unfreeze_at_epoch=2")
EMA = (*TINY, *TWO, "callbacks=ema", "callbacks.ema.decay=0.5")
"""Two frozen epochs and two of fine-tuning, each with three steps."""


class Watch(L.Callback):
    """Keep what a run validates and tests, and what its steps leave."""

    def __init__(self):
        self.steps, self.validated, self.tested = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(copy(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.validated.append(copy(pl_module))

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tested.append(copy(pl_module))


def copy(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture
def watch(monkeypatch):
    watching = Watch()
    monkeypatch.setattr("cifar_tl.build.progress_bar", lambda: [watching])
    return watching


def weights(folder, name="best"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_the_average_of_fine_tuning_is_validated_kept_and_tested(compose, tmp_path, watch, caplog):
    caplog.set_level(logging.INFO)
    metrics = train(compose(*EMA), tmp_path, "demo")
    steps = len(watch.steps) // 4
    frozen, (first, *others) = watch.steps[steps * 2 - 1], watch.steps[steps * 2 :]
    assert same(watch.validated[1], frozen), "while the backbone is frozen, the head as it is"
    averages = [first]
    for step in others:
        averages.append({name: torch.lerp(averages[-1][name].float(), step[name].float(), 0.5) for name in step})
    for validated, average in zip(watch.validated[2:], (averages[steps - 1], averages[-1]), strict=True):
        for name, tensor in validated.items():
            if not tensor.is_floating_point():
                continue  # a count of batches, which nothing reads
            torch.testing.assert_close(tensor.float(), average[name].float(), msg=name)
    assert not same(watch.validated[3], watch.steps[-1])
    assert "average    of the weights of steps from epoch 2 on, decay 0.5: it is validated" in caplog.text
    assert metrics["best/epoch"] >= 2, "else average and model are the same"
    best = weights(tmp_path)
    assert same(watch.validated[metrics["best/epoch"]], best)
    assert same(watch.tested[0], best)
    assert same(watch.validated[3], weights(tmp_path, "last"))


@pytest.mark.slow
def test_training_goes_on_without_it_and_a_resumed_run_ends_as_one_in_one_piece(compose, tmp_path):
    metrics = train(compose(*EMA), tmp_path / "whole", "demo")
    alone = train(compose(*TINY, *TWO), tmp_path / "alone", "demo")
    assert metrics["train/loss"] == alone["train/loss"]
    assert metrics["val/loss"][:2] == alone["val/loss"][:2]
    assert metrics["val/loss"][2:] != alone["val/loss"][2:]
    constant = (*EMA, "finetune.schedule=constant")
    train(compose(*constant, "trainer.max_epochs=3"), tmp_path / "part", "demo")
    resumed = train(compose(*constant, f"resume={tmp_path / 'part'}"), tmp_path / "part", "demo")
    whole = train(compose(*constant), tmp_path / "constant", "demo")
    for key in ("train/loss", "val/loss", "test/loss", "best/epoch"):
        assert resumed[key] == whole[key], key
    assert same(weights(tmp_path / "part"), weights(tmp_path / "constant"))


@pytest.mark.slow
def test_where_several_batches_make_a_step_it_begins_with_the_first_one_of_its_epoch(compose, tmp_path, watch):
    train(compose(*EMA, "trainer.max_epochs=3", "+trainer.accumulate_grad_batches=3"), tmp_path, "demo")
    assert same(watch.validated[2], watch.steps[-1]), "the epoch's only step"


@pytest.mark.slow
def test_a_run_that_goes_on_cannot_leave_it_out(compose, tmp_path):
    train(compose(*EMA), tmp_path, "demo")
    before = (tmp_path / "metrics.json").read_bytes()
    for other in (EMA[:-2], (*EMA, "callbacks.ema.decay=0.9")):
        with pytest.raises(UserError, match=r"a resumed run cannot change callbacks\.ema\."):
            train(compose(*other, "trainer.max_epochs=5", f"resume={tmp_path}"), tmp_path, "demo")
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert json.loads(before)["status"] == "finished"


def test_its_name_is_what_a_resumed_run_is_told_of(compose, tmp_path):
    assert "callbacks.ema.decay".startswith(FIXED)
    assert not "callbacks.email.to".startswith(FIXED)
    cfg = compose(*TINY, "+callbacks.mean._target_=cifar_tl.callbacks.weight_ema.WeightEMA")
    with pytest.raises(UserError, match=r"callbacks\.mean: an average of weights has the name ema"):
        build_callbacks(cfg, build_datamodule(cfg), {"weights_sha256": None, "experiment": "demo"}, tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"decay": 1}, "ema.decay=1 "), ({"decay": -0.1}, "ema.decay=-0.1 "), ({"start_epoch": -1}, "-1")],
)
def test_values_that_cannot_be(given, said):
    with pytest.raises(UserError, match=said):
        WeightEMA(**given)
