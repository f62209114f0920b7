"""The frozen phase leaves every backbone tensor as it is, and the guard catches what would break that silently."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import SGD, TINY
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from cifar_tl import train as command
from cifar_tl.callbacks import freezing
from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze
from cifar_tl.callbacks.epoch_seed import EpochSeed
from cifar_tl.callbacks.freeze_guard import CHECKED_STEPS, FreezeGuard, FreezeViolationError
from cifar_tl.callbacks.phase_log import PhaseLog
from cifar_tl.model import optim
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.schedule import Phases


@pytest.fixture
def initial(monkeypatch):
    """The tensors of the run's module as it was built, once it is."""
    initial = {}
    build = command.build_module

    def remember(*args):
        module = build(*args)
        initial.update({k: v.clone() for k, v in module.state_dict().items()})
        return module

    monkeypatch.setattr(command, "build_module", remember)
    return initial


def moved(initial, folder):
    """Return the names of the tensors that a run has changed."""
    final = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name for name in initial if not torch.equal(initial[name], final[name])}


@pytest.mark.slow
def test_frozen_phase_leaves_every_backbone_tensor_untouched(compose, tmp_path, initial):
    keys = ("finetune.unfreeze_at_epoch=null", "trainer.max_epochs=2", "finetune.cache_features=false")
    command.train(compose(*TINY, *keys), tmp_path, "demo")
    assert moved(initial, tmp_path) == {name for name in initial if name.startswith("head.")}


@pytest.mark.parametrize("policy", freezing.BATCHNORM_POLICIES)
@pytest.mark.parametrize("finetune", ["two_phase", "gradual"])
@pytest.mark.slow
def test_guard_passes_honest_runs(compose, tmp_path, policy, finetune):
    overrides = (*TINY, f"finetune={finetune}", "finetune.unfreeze_at_epoch=1", f"finetune.batchnorm={policy}")
    epochs = 2 if finetune == "two_phase" else 6
    metrics = command.train(compose(*overrides, f"trainer.max_epochs={epochs}"), tmp_path, "demo")
    assert metrics["status"] == "finished"


def train_with_bug(compose, tmp_path):
    command.train(compose(*TINY, "finetune.unfreeze_at_epoch=1", "trainer.max_epochs=2"), tmp_path, "demo")


def test_guard_catches_a_backbone_that_is_never_thawed(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(freezing, "unfreeze", lambda modules, batchnorm, kept: None)
    with pytest.raises(FreezeViolationError, match=r"epoch 1.*no gradient.*never unfrozen"):
        train_with_bug(compose, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_stages_that_are_not_named_stay_as_they_were(compose, tmp_path, initial, optimizer):
    keys = ("finetune.stages=[layer3,layer4]", f"finetune.optimizer={optimizer}", "finetune.weight_decay=0")
    metrics = command.train(compose(*TINY, *keys, "finetune.batchnorm=train"), tmp_path, "demo")
    assert [phase["stages"] for phase in metrics["plan"]] == [[], ["layer4", "layer3"]]
    changed = moved(initial, tmp_path)
    assert {name.split(".")[1] for name in changed if name.startswith("backbone.")} == {"layer3", "layer4"}


@pytest.mark.slow
def test_guard_checks_every_scale_of_images(compose, tmp_path, monkeypatch):
    apply = BackboneUnfreeze.apply

    def breaks(self, module, phase):
        apply(self, module, phase)
        module.backbone.requires_grad_(phase.upscale == 1)

    monkeypatch.setattr(BackboneUnfreeze, "apply", breaks)
    keys = (*TINY, "finetune.unfreeze_at_epoch=1", "finetune.progressive_resizing=[1,2]", "trainer.max_epochs=3")
    with pytest.raises(FreezeViolationError, match=r"epoch 2, phase 'fine-tune at 64x64'.*no gradient"):
        command.train(compose(*keys), tmp_path, "demo")


def test_guard_catches_batchnorm_left_training(compose, tmp_path, monkeypatch):
    # what Lightning's BackboneFinetuning does: no gradient, but statistics that move
    monkeypatch.setattr(freezing, "freeze", lambda module: module.requires_grad_(False))
    with pytest.raises(FreezeViolationError, match=r"epoch 0.*running_mean.*changed although frozen"):
        train_with_bug(compose, tmp_path)


@pytest.mark.slow
def test_guard_catches_a_group_missing_from_the_optimizer(compose, tmp_path, monkeypatch):
    groups = optim.parameter_groups
    monkeypatch.setattr(
        "cifar_tl.model.module.parameter_groups",
        lambda *args: [g for g in groups(*args) if g["name"] != "backbone"],
    )
    with pytest.raises(FreezeViolationError, match=r"epoch 1.*in no optimizer group"):
        train_with_bug(compose, tmp_path)


@pytest.mark.slow
def test_guard_catches_a_stale_compiled_graph(compose, tmp_path, monkeypatch):
    apply = BackboneUnfreeze.apply

    def compile_when_frozen(self, module, phase):
        apply(self, module, phase)
        if not phase.stages:
            # what a compiler makes of a frozen module: weights as constants of the graph, which no unfreeze reaches
            graph = copy.deepcopy(module.backbone)
            monkeypatch.setattr(module.backbone, "forward", graph.forward)

    monkeypatch.setattr(BackboneUnfreeze, "apply", compile_when_frozen)
    with pytest.raises(FreezeViolationError, match=r"epoch 1.*compiled or traced graph"):
        train_with_bug(compose, tmp_path)


@pytest.mark.slow
def test_guard_checks_a_resumed_run_where_it_resumes(compose, tmp_path, monkeypatch):
    overrides = (*TINY, "finetune.unfreeze_at_epoch=1", "trainer.max_epochs=3")
    checked = []
    check = FreezeGuard.expected_to_change
    monkeypatch.setattr(
        FreezeGuard, "expected_to_change", lambda self, m, epoch: checked.append(epoch) or check(self, m, epoch)
    )
    epoch_end = PhaseLog.on_train_epoch_end

    def die_in_epoch_2(self, trainer, module):
        if trainer.current_epoch == 2:
            raise SystemError
        epoch_end(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(PhaseLog, "on_train_epoch_end", die_in_epoch_2)
        with pytest.raises(SystemError):
            command.train(compose(*overrides), tmp_path, "demo")
    assert checked == [0, 1]
    command.train(
        compose(*TINY, "finetune.unfreeze_at_epoch=1", "trainer.max_epochs=3", f"resume={tmp_path}"), tmp_path, ""
    )
    assert checked == [0, 1, 2]


@pytest.fixture
def seen(monkeypatch):
    """The learning rates of every step of a run, by group."""
    steps = []
    monkeypatch.setattr(
        EpochSeed,
        "on_train_batch_end",
        lambda self, trainer, *args: steps.append({g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups}),
    )
    return steps


@pytest.mark.slow
def test_rates_in_the_optimizer_are_the_plans(compose, tmp_path, seen):
    rates = ("finetune.head_lr=3e-3", "finetune.head_lr_unfrozen=2e-4", "finetune.backbone_lr=1e-4")
    command.train(compose(*TINY, *rates, "finetune.schedule=constant", "finetune.warmup_epochs=0"), tmp_path, "demo")
    assert seen[0] == {"head": 3e-3, "head_no_decay": 3e-3, "backbone": 0.0, "backbone_no_decay": 0.0}
    assert seen[-1] == {"head": 2e-4, "head_no_decay": 2e-4, "backbone": 1e-4, "backbone_no_decay": 1e-4}


@pytest.mark.slow
def test_rates_in_the_optimizer_warm_up_at_the_start_of_both_halves(compose, tmp_path, seen):
    rates = ("finetune.head_lr=3e-3", "finetune.head_lr_unfrozen=3e-4", "finetune.backbone_lr=6e-4")
    command.train(compose(*TINY, *rates, "finetune.schedule=constant", "finetune.warmup_epochs=1"), tmp_path, "demo")
    assert [step["head"] for step in seen] == pytest.approx([1e-3, 2e-3, *[3e-3] * 4, 1e-4, 2e-4, *[3e-4] * 4])
    assert [step["backbone"] for step in seen] == pytest.approx([*[0.0] * 6, 2e-4, 4e-4, *[6e-4] * 4])


class Scaled(MixedPrecision):
    """16-mixed's GradScaler, on the CPU in 32-bit."""

    def __init__(self):
        super().__init__("bf16-mixed", "cpu")
        self.scaler = torch.amp.GradScaler("cpu")

    def forward_context(self):
        return nullcontext()


@pytest.mark.slow
def test_steps_that_the_scaler_skips_are_not_counted(compose, tmp_path, monkeypatch):
    overrides = (*TINY, *SGD, "data.batch_size=4", "trainer.max_epochs=2")
    step = ResNet50Classifier.training_step

    def overflowing(self, batch, batch_idx):
        return step(self, batch, batch_idx) * (float("inf") if batch_idx < CHECKED_STEPS else 1.0)

    monkeypatch.setattr(ResNet50Classifier, "training_step", overflowing)
    build = command.build_trainer

    def scaled(keys, plugins, **extra):
        monkeypatch.setattr("cifar_tl.trainer.resolve_precision", lambda *_: None)  # the plugin's
        return build(keys, plugins=[*plugins, Scaled()], **extra)

    counted = []
    watch = FreezeGuard.on_train_batch_end

    def noted(self, trainer, module, outputs, batch, batch_idx):
        counted.append(max(self._steps.values()))
        watch(self, trainer, module, outputs, batch, batch_idx)

    monkeypatch.setattr(FreezeGuard, "on_train_batch_end", noted)
    monkeypatch.setattr(command, "build_trainer", scaled)
    metrics = command.train(compose(*overrides, "finetune.unfreeze_at_epoch=1"), tmp_path, "demo")
    assert metrics["status"] == "finished"
    assert counted[: CHECKED_STEPS + 1] == [*[0] * CHECKED_STEPS, 1]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_a_precision_that_may_be_the_reason_is_named(precision):
    module = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    guard = FreezeGuard(unfreeze_at_epoch=1, max_epochs=1)
    guard.phases = Phases(1, None)
    trainer = SimpleNamespace(
        callbacks=[], current_epoch=0, optimizers=[optimizer], is_last_batch=True, precision=precision
    )
    guard.on_train_start(trainer, module)
    guard.on_train_epoch_start(trainer, module)
    guard.on_before_optimizer_step(trainer, module, optimizer)
    guard._had_gradient = {"head.weight", "head.bias"}
    with pytest.raises(FreezeViolationError, match=rf"after 0 steps.*did not change.*{precision}.*bf16-mixed"):
        guard.on_train_batch_end(trainer, module, None, None, 0)


def test_a_step_that_a_fused_optimizer_skips_does_not_count():
    module = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    guard = FreezeGuard(1)
    guard.on_train_start(SimpleNamespace(callbacks=[], optimizers=[optimizer]), module)
    for found in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
    assert list(guard._steps.values()) == [1]


def test_draws_inside_the_model_differ_by_seed_epoch_and_process():
    def drawn(seed, epoch, rank):
        EpochSeed(seed).on_train_epoch_start(SimpleNamespace(current_epoch=epoch, global_rank=rank), None)
        return torch.rand(1).item()

    with torch.random.fork_rng():
        assert len({drawn(*of) for of in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4
        assert drawn(0, 3, 0) == drawn(0, 3, 0)
