"""A model class of one's own, as README.md has it: it trains, resumes and is evaluated as any other."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import TINY
from torch.nn.functional import cross_entropy

from cifar_tl.build import build_callbacks, build_datamodule, build_module, check_distillation, model_facts
from cifar_tl.callbacks.feature_cache import BackboneFeatures
from cifar_tl.checkpoints import load_trained
from cifar_tl.cli import run
from cifar_tl.errors import UserError
from cifar_tl.evaluate import evaluate
from cifar_tl.hardware import prepare_for
from cifar_tl.reports.__main__ import main as comparison
from cifar_tl.runs.record import read_metrics
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


OWN = """
import torch
from torch import nn
from cifar_tl.model.module import ResNet50Classifier

class Stem(ResNet50Classifier):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backbone.maxpool = nn.Identity()  # no tensor more or less

class Forward(ResNet50Classifier):
    def forward(self, images):
        return super().forward(images) / 2

class Step(ResNet50Classifier):
    def training_step(self, batch, batch_idx):
        images, targets = batch
        return self.training_loss(self(images), targets)

class Loss(ResNet50Classifier):
    def training_loss(self, logits, targets):
        return super().training_loss(logits, targets) * 2

class Optimizer(ResNet50Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD([{"params": self.head.parameters()}, {"params": self.backbone.parameters()}])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of classes, `own`, which may be imported."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("own", None)


@pytest.mark.parametrize(("name", "another"), [("Stem", True), ("Forward", True), ("Loss", False)])
def test_features_of_another_network_are_not_kept_for_the_package_s(compose, tmp_path, own, name, another):
    distills = ("finetune.distill_upscale=2", "model.weights=IMAGENET1K_V1")
    cfg = compose(*TINY, f"model._target_=own.{name}", f"finetune.features_folder={tmp_path}", *distills)
    prepare_for("cpu", module := build_module(cfg, ["a", "b"]))
    facts = model_facts(module)
    assert facts == {"model_sha256": hashlib.sha256(own.read_bytes()).hexdigest(), "own_network": another}
    facts |= {"weights_sha256": "0", "experiment": "demo"}
    callbacks = build_callbacks(cfg, build_datamodule(cfg), facts, tmp_path)
    caches = [callback for callback in callbacks if isinstance(callback, BackboneFeatures)]
    assert [cache.folder is None for cache in caches] == [another] * 2  # the frozen phase's, and the teacher's


@pytest.mark.parametrize(("name", "method"), [("Forward", "forward"), ("Step", "training_step"), ("Loss", None)])
def test_a_step_of_ones_own_is_told_that_it_leaves_distillation_out(compose, own, name, method):
    given = (f"model._target_=own.{name}", "experiment=distill32")
    if method is None:
        return check_distillation(compose(*given))
    with pytest.raises(UserError, match=rf"without a {method} of its own, and own\.{name}.*distill_upscale=null"):
        check_distillation(compose(*given))
    check_distillation(compose(*given, "finetune.distill_upscale=null"))
    return None


@pytest.mark.slow
def test_another_network_is_not_measured_as_the_package_s(compose, tmp_path, own):
    metrics = train(compose(*TINY, "model._target_=own.Forward"), tmp_path / "run", "demo")
    assert metrics["status"] == "finished"
    with pytest.raises(UserError, match=r"is of own\.Forward, whose network is another one.*own load_from_checkpoint"):
        load_trained(tmp_path / "run")


@pytest.mark.slow
def test_its_own_optimizer_trains_and_a_file_that_changed_is_told(tmp_path, own):
    given = [*TINY, "model._target_=own.Optimizer", "trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1"]
    given += ["trainer=cpu", f"hydra.run.dir={tmp_path / '0'}"]
    assert run("cifar_tl.train:main", "train", given) == 0
    text = (tmp_path / "0" / "train.log").read_text()
    assert text.count("an optimizer of its own") == 2
    first = read_metrics(tmp_path / "0")["model_sha256"]
    own.write_text(OWN + "\n# another one\n")
    sys.modules.pop("own")
    assert run("cifar_tl.train:main", "train", [f"resume={tmp_path / '0'}", "trainer.max_epochs=3"]) == 0
    assert (
        "the file of own.Optimizer has changed since the run's last epoch" in (tmp_path / "0" / "train.log").read_text()
    )
    second = read_metrics(tmp_path / "0")["model_sha256"]
    assert [start["model_sha256"] for start in read_metrics(tmp_path / "0")["starts"]] == [first, second]
    assert first != second
    assert run("cifar_tl.train:main", "train", [*given[:-1], "seed=1", f"hydra.run.dir={tmp_path / '1'}"]) == 0
    assert comparison([str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    assert (
        "The file of own.Optimizer is not the same in all runs and resumes."
        in (tmp_path / "sweep_report.html").read_text()
    )
