"""A model class of one's own, as README.md has it: it trains, resumes and is evaluated as any other."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import TINY
from torch.nn.functional import cross_entropy

from cifar_tl.build import build_module
from cifar_tl.checkpoints import load_trained
from cifar_tl.cli import run
from cifar_tl.errors import UserError
from cifar_tl.evaluate import evaluate
from cifar_tl.train import train

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """The module that the README shows, with a class that has another tensor, too."""
    module = ModuleType("mine")
    exec(README.partition("## A loss of your own")[2].partition("```python\n")[2].partition("```")[0], vars(module))

    class Wider(module.Focal):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = torch.nn.Parameter(torch.ones(()))

    module.Wider = Wider
    monkeypatch.setitem(sys.modules, "mine", module)


def test_its_loss_trains_and_its_arguments_come_from_the_config(compose):
    logits, targets = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
    loss = cross_entropy(logits, targets)
    for gamma in (0, 3):
        cfg = compose(*TINY, "model._target_=mine.Focal", f"+model.options.gamma={gamma}")
        model = build_module(cfg, ["a", "b", "c"])
        assert type(model).__name__ == "Focal"
        torch.testing.assert_close(model.training_loss(logits, targets), (1 - (-loss).exp()) ** gamma * loss)


@pytest.mark.slow
def test_its_run_is_resumed_and_evaluated_as_any_other(compose, tmp_path, capsys):
    own = ("model._target_=mine.Focal", "+model.options.gamma=1", "trainer=cpu")
    assert run("cifar_tl.train:main", "train", [*TINY, *own, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert run("cifar_tl.train:main", "train", [f"resume={tmp_path / 'run'}", "trainer.max_epochs=5"]) == 0
    plain = train(compose(*TINY), tmp_path / "plain", "demo")
    assert load_trained(tmp_path / "plain").module.hparams == load_trained(tmp_path / "run").module.hparams
    sys.modules.pop("mine")
    metrics = evaluate(compose(f"checkpoint={tmp_path / 'run'}", "trainer.accelerator=cpu", config_name="evaluate"))
    assert metrics["test/loss"] > 0
    assert metrics["test/loss"] != plain["test/loss"]
    assert run("cifar_tl.train:main", "train", [f"resume={tmp_path / 'run'}", "trainer.max_epochs=6"]) == 1
    assert "model._target_=mine.Focal cannot be imported: No module named 'mine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model._target_=mine.Fokal"], "module 'mine' has no attribute 'Fokal'"),
        (["model._target_=theirs.Focal"], "No module named 'theirs'"),
        (["model._target_=torch.nn.Linear"], "no subclass of cifar_tl.model.module.ResNet50Classifier"),
        (["model._target_=torch.nn.functional.relu"], "no subclass of"),
        (["model._target_=mine.Focal", "+model.options.gama=1"], "gama=1: Focal has no such argument"),
        (["+model.options.gamma=1"], "gamma=1: ResNet50Classifier has no such argument"),
    ],
)
def test_a_class_that_cannot_be_is_refused(compose, given, said):
    with pytest.raises(UserError, match=said):
        build_module(compose(*TINY, *given), ["a", "b"])


@pytest.mark.slow
def test_other_tensors_are_read_by_the_class_itself(compose, tmp_path):
    train(compose(*TINY, "model._target_=mine.Wider", "callbacks=none"), tmp_path, "demo")
    with pytest.raises(UserError, match="read by its own load_from_checkpoint"):
        load_trained(tmp_path)
