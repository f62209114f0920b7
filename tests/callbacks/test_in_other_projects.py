"""BackboneUnfreeze and FreezeGuard in somebody else's module, beside Lightning's BackboneFinetuning."""

from contextlib import nullcontext
from itertools import cycle
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from cifar_tl import callbacks
from cifar_tl.callbacks import BackboneUnfreeze, FreezeGuard, freezing
from cifar_tl.callbacks.freeze_guard import FreezeViolationError
from cifar_tl.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's, of DataLoaders without workers and short epochs
    pytest.mark.filterwarnings("ignore:.*backbone.*lr"),
]


README = (Path(callbacks.__file__).parent / "README.md").read_text(encoding="utf-8")
SHOWN: dict = {}
exec(README.partition("```python\n")[2].partition("\ntrainer = ")[0], SHOWN)
TheirModule = SHOWN["YourModule"]
"""The LightningModule that the README of the callbacks shows."""


class WithoutTheBackbone(TheirModule):
    """What BackboneFinetuning wants: the backbone's parameters join the optimizer at the unfreeze."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class TheirModuleAtARate(TheirModule):
    """It trains without BackboneUnfreeze."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batch_size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 8, 8, generator=generator) + 1
    return DataLoader(TensorDataset(images, (images.mean(dim=(1, 2, 3)) > 1).long()), batch_size=batch_size)


def fit(module, callback, epochs, folder, resume=None, batch_size=8, **more):
    keys = {
        "max_epochs": epochs,
        "callbacks": callback,
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(**keys | more)
    trainer.fit(module, loader(batch_size), ckpt_path=resume, weights_only=resume is not None or None)
    return trainer


def ours():
    return [BackboneUnfreeze(unfreeze_at_epoch=2, head_lr=0.1, backbone_lr=0.01), FreezeGuard(unfreeze_at_epoch=2)]


def lightnings():
    return [BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01)]


def moved(module, before):
    """The names of the backbone's tensors that are not what they were."""
    return {n for n, t in module.backbone.state_dict().items() if not torch.equal(t, before[n])}


def clone(module):
    return {name: tensor.clone() for name, tensor in module.backbone.state_dict().items()}


def frozen_and_moved(module, callbacks, folder):
    """Return how many tensors of the backbone change in two frozen epochs."""
    before = clone(module)
    fit(module, callbacks, 2, folder)
    return len(moved(module, before))


def trains_after_resume(make_module, callbacks, folder):
    """Return whether the backbone trains in a run that is resumed after the unfreeze."""
    fit(make_module(), callbacks(), 3, folder).save_checkpoint(folder / "c.ckpt")
    saved = make_module()
    saved.load_state_dict(torch.load(folder / "c.ckpt", weights_only=True)["state_dict"])
    resumed = make_module()
    fit(resumed, callbacks(), 4, folder, folder / "c.ckpt")
    return "yes" if "0.weight" in moved(resumed, clone(saved)) else "no, without a warning"


def groups(module, callbacks, epochs, folder):
    return fit(module, callbacks, epochs, folder).optimizers[0].param_groups


@pytest.mark.slow
def test_the_table_beside_lightnings_backbone_finetuning_is_the_readmes(tmp_path):
    rows = [
        (
            "tensors of the backbone that change while it is frozen, of 7",
            frozen_and_moved(TheirModule(), [BackboneUnfreeze(None, head_lr=0.1, backbone_lr=0.01)], tmp_path),
            frozen_and_moved(WithoutTheBackbone(), [BackboneFinetuning(unfreeze_backbone_at_epoch=9)], tmp_path),
        ),
        (
            "the backbone trains in a run resumed after the unfreeze",
            trains_after_resume(TheirModule, ours, tmp_path),
            trains_after_resume(WithoutTheBackbone, lightnings, tmp_path),
        ),
        (
            "parameter groups before and after the unfreeze",
            " and ".join(str(len(groups(TheirModule(), ours(), epochs, tmp_path))) for epochs in (3, 4)),
            " and ".join(str(len(groups(WithoutTheBackbone(), lightnings(), epochs, tmp_path))) for epochs in (2, 3)),
        ),
    ]
    text = "| | BackboneUnfreeze | Lightning's BackboneFinetuning |\n|---|---|---|\n"
    text += "".join(f"| {what} | {mine} | {theirs} |\n" for what, mine, theirs in rows)
    assert text in README, text


def test_the_module_of_the_readme_trains_both_parts(tmp_path):
    module = TheirModule()
    before = clone(module)
    fit(module, ours(), 4, tmp_path)
    assert {"0.weight", "0.bias", "1.weight"} <= moved(module, before)


def test_what_is_no_part_of_the_backbone_may_move_as_it_likes(tmp_path):
    class WithMore(TheirModule):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
            self.register_buffer("average", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.average.lerp_(loss.detach(), 0.1)
            return loss

    module = WithMore()
    fit(module, ours(), 4, tmp_path)
    assert module.average != 0
    assert module.head[1].num_batches_tracked > 0


class KilledIn(L.Callback):
    """End a run in the middle of an epoch, leaving a checkpoint."""

    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            trainer.save_checkpoint(self.path)
            raise SystemError


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_that_goes_on_in_mid_epoch_is_in_its_phase(tmp_path, epoch):
    with pytest.raises(SystemError):
        fit(TheirModule(), [*ours(), KilledIn(epoch, tmp_path / "c.ckpt")], 4, tmp_path)
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    before = {name.removeprefix("backbone."): tensor for name, tensor in saved.items()}
    changed, compared = {}, []

    class Watching(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            changed[trainer.current_epoch] = moved(pl_module, before)

    unfreeze, guard = ours()
    guard.expected_to_change = lambda *args: compared.append(args[1]) or FreezeGuard.expected_to_change(guard, *args)
    fit(TheirModule(), [unfreeze, guard, Watching()], 4, tmp_path, tmp_path / "c.ckpt")
    # the weights, once they train; never the statistics, which batchnorm=frozen keeps
    assert changed[epoch] == ({"0.weight", "0.bias", "1.weight", "1.bias"} if epoch == 3 else set())
    assert compared == ([3] if epoch == 3 else [1, 2])  # where it goes on, and where a phase starts


def test_steps_too_small_for_float32_at_first_are_no_fault(tmp_path):
    """A layer of the head at 20,000, which the first steps of the warm-up do not move, and later ones do."""
    module = TheirModule()
    with torch.no_grad():
        module.head[1].weight.fill_(2e4)
        module.head[1].bias.fill_(2e4)
    fit(module, [BackboneUnfreeze(1, 1e-2, 1e-2, warmup_epochs=1), FreezeGuard(1)], 2, tmp_path, batch_size=1)
    with torch.no_grad():
        module.head[1].weight.fill_(1e9)
        module.head[1].bias.fill_(1e9)
    with pytest.raises(FreezeViolationError, match=r"after 32 steps.*2 tensors \(head.1.bias, head.1.weight\) should"):
        fit(module, [BackboneUnfreeze(1, 1e-2, 1e-2, warmup_epochs=1), FreezeGuard(1)], 2, tmp_path, batch_size=1)


def test_a_bias_in_front_of_batchnorm_that_trains_may_stay(tmp_path):
    """Its gradient is zero but for rounding: a batch's mean is subtracted after it."""
    module = TheirModule()
    before = clone(module)
    unfreeze = BackboneUnfreeze(1, head_lr=0.1, backbone_lr=1e-4, batchnorm="train")
    fit(module, [unfreeze, FreezeGuard(1, batchnorm="train")], 2, tmp_path)
    assert moved(module, before) >= {"0.weight", "1.weight", "1.running_mean"}
    assert "0.bias" not in moved(module, before), "then this tests nothing"


class Normalized(nn.Module):
    """Images normalized by the backbone itself, and an average that it keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.5))
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.average.lerp_(x.detach().mean(), 0.1)
        return x - self.mean


@pytest.mark.parametrize("policy", freezing.BATCHNORM_POLICIES)
def test_buffers_that_are_not_batchnorms_may_stay_or_move_while_the_backbone_trains(tmp_path, policy):
    module = TheirModule()
    module.backbone = nn.Sequential(Normalized(), *module.backbone)
    before = clone(module)
    unfreeze = BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.01, batchnorm=policy)
    fit(module, [unfreeze, FreezeGuard(1, batchnorm=policy)], 2, tmp_path)
    assert "0.average" in moved(module, before)
    assert "0.mean" not in moved(module, before)


def test_a_buffer_that_moves_while_the_backbone_is_frozen_is_caught(tmp_path):
    module = TheirModule()
    module.backbone = nn.Sequential(Normalized(), *module.backbone)
    module.backbone[0].train = lambda mode=True: module.backbone[0]  # stays in train mode
    with pytest.raises(FreezeViolationError, match=r"epoch 0.*1 tensors \(backbone.0.average\) changed although"):
        fit(module, ours(), 3, tmp_path)


class InTurn(TheirModule):
    """Two optimizers, stepped by hand: the head's in every batch, the backbone's in the batches of `batches`."""

    automatic_optimization = False
    batches = ()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.head, self.backbone)]

    def training_step(self, batch, batch_idx):
        head, backbone = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        head.step()
        head.zero_grad()
        if (self.current_epoch, batch_idx) in self.batches:
            backbone.step()
            backbone.zero_grad()


@pytest.mark.parametrize("batches", [[(1, 7)], [(2, 0)]])
def test_a_part_whose_optimizer_steps_late_is_waited_for(tmp_path, batches):
    module = InTurn()
    module.batches = batches
    guard = FreezeGuard(1)
    fit(module, [BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.1), guard], 3, tmp_path, batch_size=4)
    assert not guard._before, "the comparison is still to come"


def test_a_part_whose_optimizer_never_steps_is_caught_at_the_end_of_the_phase(tmp_path):
    with pytest.raises(FreezeViolationError, match=r"epoch 2, phase 'fine-tune'.*0.bias.*should train but did"):
        fit(InTurn(), [BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.1), FreezeGuard(1)], 3, tmp_path, batch_size=4)


def test_a_module_may_be_registered_under_two_names(tmp_path):
    class Alias(InTurn):
        def __init__(self):
            super().__init__()
            backbone, head = self.backbone, self.head
            del self.backbone, self.head
            self.model = nn.Sequential(backbone, head)
            self.backbone, self.head = backbone, head

    module = Alias()
    module.batches = [(2, 0)]
    fit(module, [BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.1), FreezeGuard(1)], 3, tmp_path, batch_size=4)
    module.batches = [(1, batch) for batch in range(8)]
    broken = [BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.1), FreezeGuard(1)]
    broken[0].apply = lambda module, phase: freezing.freeze(module.backbone)  # and never unfreeze it
    with pytest.raises(FreezeViolationError, match=r"epoch 1.*after 3 steps.*no gradient"):
        fit(module, broken, 3, tmp_path, batch_size=4)


def test_what_a_waiting_optimizer_does_not_move_is_caught(tmp_path):
    module = InTurn()
    module.batches = [(2, 0)]
    module.backbone[0].register_parameter("spare", nn.Parameter(torch.ones(1)))
    module.backbone.register_parameter("unused", nn.Parameter(torch.ones(1)))
    with pytest.raises(FreezeViolationError, match=r"epoch 2.*\(backbone.0.spare, backbone.unused\).*no gradient"):
        fit(module, [BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.1), FreezeGuard(1)], 3, tmp_path, batch_size=4)


def test_a_part_of_the_head_that_is_used_later_is_waited_for(tmp_path):
    class TwoTasks(TheirModule):
        def __init__(self):
            super().__init__()
            self.head = nn.ModuleList([self.head, nn.Sequential(nn.Flatten(), nn.Linear(8, 2))])

        def training_step(self, batch, batch_idx):
            images, targets = batch
            return nn.functional.cross_entropy(self.head[batch_idx > 4](self.backbone(images)), targets)

    unfreeze, guard = ours()
    fit(TwoTasks(), [unfreeze, guard], 3, tmp_path, batch_size=4)
    assert not guard._before, "the comparison is still to come"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"stage_epochs": 1},
            "stage_epochs and stages are about the stages of a torchvision ResNet, and Sequential is none",
        ),
        ({"stages": ["layer4"]}, "stage_epochs and stages are about .* Sequential is none"),
        (
            {"progressive_resizing": [1, 2]},
            "progressive_resizing sets the backbone's `upscale`, and Sequential has",
        ),
    ],
)
def test_what_the_backbone_cannot_do_is_refused_before_anything_trains(tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        fit(TheirModule(), [BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.1, **keys)], 9, tmp_path)


@pytest.mark.parametrize("killed", [False, True])
def test_statistics_do_not_adapt_after_the_fit(tmp_path, killed):
    module = TheirModule()
    unfreeze = BackboneUnfreeze(1, head_lr=0.1, backbone_lr=0.01, batchnorm="adapt")
    with pytest.raises(SystemError) if killed else nullcontext():
        fit(module, [unfreeze, *([KilledIn(1, tmp_path / "c.ckpt")] if killed else [])], 2, tmp_path)
    before = clone(module)
    module.backbone.eval()(torch.randn(4, 3, 8, 8))
    assert not moved(module, before)
    torch.save(module.backbone, tmp_path / "whole.pt")


class Adapted(TheirModule):
    """A backbone of which a part is fixed, as adapters do it, or the whole, as many do who freeze it themselves."""

    def __init__(self, fixed, rest_trains, in_the_optimizer):
        super().__init__()
        self.in_the_optimizer = in_the_optimizer
        self.backbone.requires_grad_(rest_trains)
        for name in fixed:
            self.backbone.get_parameter(name).requires_grad_(False)
        self.backbone.register_parameter("unused", nn.Parameter(torch.ones(1), requires_grad=False))

    def configure_optimizers(self):
        def chosen(part):
            return [p for p in part.parameters() if p.requires_grad or self.in_the_optimizer]

        return torch.optim.SGD([{"params": chosen(self.head)}, {"params": chosen(self.backbone)}], lr=0.0)


def with_gradients(module):
    return {name for name, parameter in module.backbone.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("in_the_optimizer", [True, False])
@pytest.mark.parametrize("killed", [False, True])
def test_what_an_author_has_fixed_stays_fixed(tmp_path, in_the_optimizer, killed):
    module = Adapted(["0.weight"], rest_trains=True, in_the_optimizer=in_the_optimizer)
    before, trainable = clone(module), with_gradients(module)
    with pytest.raises(SystemError) if killed else nullcontext():
        fit(module, [*ours(), *([KilledIn(1, tmp_path / "c.ckpt")] if killed else [])], 4, tmp_path)
    assert moved(module, before) == (set() if killed else {"0.bias", "1.weight", "1.bias"})
    assert with_gradients(module) == trainable, "as before, also if the run ends while all is frozen"


def test_a_change_of_what_an_author_has_fixed_is_caught(tmp_path):
    class Thaws(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.backbone[0].requires_grad_(True)

    unfreeze = [BackboneUnfreeze(0, head_lr=0.1, backbone_lr=0.1), Thaws()]
    module = Adapted(["0.weight"], rest_trains=True, in_the_optimizer=True)
    with pytest.raises(FreezeViolationError, match=r"epoch 0.*1 tensors \(backbone.0.weight\) changed although frozen"):
        fit(module, [*unfreeze, FreezeGuard(0)], 4, tmp_path)


def test_a_backbone_that_comes_frozen_is_unfrozen_and_has_gradients_before_optimizers_and_processes_are_made(tmp_path):
    module = Adapted([], rest_trains=False, in_the_optimizer=False)
    del module.backbone.unused
    before = clone(module)
    fit(module, ours(), 4, tmp_path)
    assert moved(module, before) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_second_fit_trains_what_the_first_has_frozen(tmp_path):
    module = Adapted(["0.weight"], rest_trains=True, in_the_optimizer=True)
    fit(module, [BackboneUnfreeze(None, head_lr=0.1, backbone_lr=0.1), FreezeGuard(None)], 2, tmp_path)
    before = clone(module)
    fit(module, ours(), 4, tmp_path)
    assert moved(module, before) == {"0.bias", "1.weight", "1.bias"}


def test_a_backbone_that_comes_frozen_and_never_trains_is_left_as_it_came(tmp_path):
    module = Adapted([], rest_trains=False, in_the_optimizer=True)
    seen = []

    class Looks(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.append(with_gradients(pl_module))

    fit(module, [BackboneUnfreeze(None, head_lr=0.1, backbone_lr=0.1), FreezeGuard(None), Looks()], 2, tmp_path)
    assert seen == [set()], "several processes would wait for its gradients"
    assert with_gradients(module) == set()


def test_parameters_that_are_integers_stay_fixed(tmp_path):
    module = Adapted([], rest_trains=True, in_the_optimizer=False)
    module.backbone.register_parameter("quantized", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    fit(module, ours(), 4, tmp_path)
    assert module.backbone.quantized.tolist() == [1, 1, 1]


def test_the_guard_alone_needs_the_modules_when_training_starts(tmp_path):
    class Late(TheirModule):
        def __init__(self):
            super().__init__()
            del self.backbone, self.head

        def configure_model(self):
            fresh = TheirModule()
            self.backbone, self.head = fresh.backbone, fresh.head

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    guard = FreezeGuard(0, batchnorm="train")
    fit(Late(), [guard], 2, tmp_path)
    assert not guard._before, "the comparison is still to come"


class Momentum(TheirModule):
    """SGD with momentum, so that the optimizer has a state."""

    def configure_optimizers(self):
        groups = super().configure_optimizers().param_groups
        return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.0, momentum=0.9)


def test_a_run_that_goes_on_from_the_last_step_of_the_frozen_phase_forgets_it_too(tmp_path):
    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 3):
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    torch.manual_seed(0)
    whole, resumed = Momentum(), Momentum()
    fit(whole, [*ours(), Saving()], 4, tmp_path)
    fit(resumed, ours(), 4, tmp_path, tmp_path / "c.ckpt")
    assert torch.equal(whole.head[1].weight, resumed.head[1].weight)


@pytest.mark.parametrize("keys", [{"max_epochs": None, "max_steps": 8}, {"max_epochs": -1}])
@pytest.mark.parametrize("one", [0, 1])
def test_a_trainer_without_a_number_of_epochs_is_refused(tmp_path, keys, one):
    with pytest.raises(UserError, match=r"give Trainer\(max_epochs="):
        fit(TheirModule(), [ours()[one]], 4, tmp_path, **keys)


@pytest.mark.parametrize("keys", [{"max_steps": 8}, {"max_steps": 4, "accumulate_grad_batches": 2}])
def test_steps_that_end_before_the_unfreeze_are_refused(tmp_path, keys):
    with pytest.raises(UserError, match=rf"max_steps={keys['max_steps']} ends the run before the phase 'fine-tune'"):
        fit(TheirModule(), ours(), 4, tmp_path, **keys)
    fit(TheirModule(), ours(), 4, tmp_path, **keys | {"max_steps": keys["max_steps"] + 1})
    part = [BackboneUnfreeze(2, head_lr=0.1, backbone_lr=0.1, max_epochs=4), FreezeGuard(2, max_epochs=4)]
    assert fit(TheirModule(), part, 4, tmp_path, **keys).global_step == keys["max_steps"], "a part of a whole run"


def test_a_fast_dev_run_goes_through_a_step_of_the_frozen_phase(tmp_path):
    module = TheirModule()
    before = clone(module)
    trainer = fit(module, ours(), 20, tmp_path, fast_dev_run=True)
    assert trainer.global_step == 1
    assert not moved(module, before)


def test_averaging_that_clears_batchnorms_statistics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"StochasticWeightAveraging.*give EMAWeightAveraging"):
        fit(TheirModule(), [*ours(), StochasticWeightAveraging(swa_lrs=0.1)], 4, tmp_path)
    fit(TheirModule(), [*ours(), EMAWeightAveraging()], 4, tmp_path)


def test_one_group_for_everything_is_refused_with_the_way_out(tmp_path):
    class OneGroup(TheirModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(UserError, match="groups of their own for head and backbone"):
        fit(OneGroup(), ours(), 3, tmp_path)


@pytest.mark.parametrize(("theirs", "missing"), [("head", "backbone"), ("backbone", "head")])
def test_an_optimizer_without_one_of_both_is_refused_before_anything_trains(tmp_path, theirs, missing):
    class Forgotten(TheirModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.get_submodule(theirs).parameters(), lr=0.1)

    with pytest.raises(UserError, match=f"No optimizer has the parameters of the {missing}"):
        fit(Forgotten(), ours(), 3, tmp_path)


class LayerWise(TheirModule):
    """A learning rate of their own for the backbone's normalization layers, said by `key`."""

    def __init__(self, **own):
        super().__init__()
        self.own = own

    def configure_optimizers(self):
        conv, bn = self.backbone[0], self.backbone[1]
        groups = [self.head, conv, bn]
        groups = [{"params": part.parameters()} for part in groups]
        return torch.optim.SGD([*groups[:2], {**groups[2], **self.own}], lr=0.1)


def test_a_groups_share_of_its_parts_learning_rate_is_kept_after_a_resume_too(tmp_path):
    trainer = fit(LayerWise(lr_scale=0.25), ours(), 3, tmp_path)
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates[2] == pytest.approx(0.25 * rates[1])
    assert rates[1] > 0
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    resumed = fit(LayerWise(lr_scale=0.25), ours(), 4, tmp_path, tmp_path / "c.ckpt")
    rates = [group["lr"] for group in resumed.optimizers[0].param_groups]
    assert rates[2] == pytest.approx(0.25 * rates[1])


def test_learning_rates_that_would_be_lost_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"groups of the backbone have learning rates of their own, 0.1, 0.01"):
        fit(LayerWise(lr=0.01), ours(), 3, tmp_path)


def test_a_scheduler_beside_it_is_refused(tmp_path):
    class Scheduled(TheirModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(UserError, match="owns the learning rates"):
        fit(Scheduled(), ours(), 3, tmp_path)


def test_a_module_without_a_head_is_refused(tmp_path):
    module = TheirModule()
    module.classifier = module.head
    del module.head
    with pytest.raises(UserError, match="has no module named head"):
        fit(module, ours(), 3, tmp_path)


class Endless(IterableDataset):
    """Images without a length."""

    def __iter__(self):
        return cycle([(torch.zeros(3, 8, 8), torch.tensor(0))])


def test_training_data_without_a_length_is_refused(tmp_path):
    unfreeze = BackboneUnfreeze(unfreeze_at_epoch=1, head_lr=0.1, backbone_lr=0.1)

    def trainer(**more):
        return L.Trainer(
            max_epochs=2,
            callbacks=[unfreeze],
            logger=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **more,
        )

    with pytest.raises(UserError, match=r"no length.* limit_train_batches"):
        trainer().fit(TheirModule(), DataLoader(Endless(), batch_size=4))
    limited = trainer(limit_train_batches=3)
    limited.fit(TheirModule(), DataLoader(Endless(), batch_size=4))
    assert limited.global_step == 6


def test_a_test_alone_turns_no_gradients_on(tmp_path):
    class Tested(TheirModule):
        def test_step(self, batch, batch_idx):
            self.head(self.backbone(batch[0]))

    module = Tested()
    module.backbone.requires_grad_(False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        callbacks=[BackboneUnfreeze(2, 0.1, 0.1)],
        accelerator="cpu",
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.test(module, loader(8), verbose=False)
    assert with_gradients(module) == set()


def test_a_backbone_that_never_trains_may_be_left_out_of_the_optimizer(tmp_path):
    callbacks = [BackboneUnfreeze(None, head_lr=0.1, backbone_lr=0.01), FreezeGuard(None)]
    assert fit(WithoutTheBackbone(), callbacks, 2, tmp_path).current_epoch == 2


def test_steps_of_accumulated_batches_are_rounded_up(tmp_path):
    steps = {"batch_size": 12, "accumulate_grad_batches": 2, "max_steps": 4}
    with pytest.raises(UserError, match="max_steps=4 ends the run before"):
        fit(TheirModule(), [BackboneUnfreeze(2, 0.1, 0.1)], 4, tmp_path, **steps)


def test_a_guard_of_no_policy_of_batchnorm_is_refused():
    with pytest.raises(UserError, match=r"frozne is not allowed.*frozen"):
        FreezeGuard(unfreeze_at_epoch=2, batchnorm="frozne")


class OwnFreezing(L.Callback):
    """Somebody else's, which leaves BatchNorm in train mode if it is `careless`."""

    def __init__(self, careless):
        self.careless = careless

    def on_train_epoch_start(self, trainer, pl_module):
        frozen = trainer.current_epoch < 2
        pl_module.backbone.requires_grad_(not frozen)
        pl_module.backbone.train(not frozen or self.careless)


def test_the_guard_checks_ones_own_freezing(tmp_path):
    fit(TheirModuleAtARate(), [OwnFreezing(careless=False), FreezeGuard(2, batchnorm="train")], 3, tmp_path)
    with pytest.raises(FreezeViolationError, match=r"running_mean.* left BatchNorm in train mode") as caught:
        fit(TheirModuleAtARate(), [OwnFreezing(careless=True), FreezeGuard(2, batchnorm="train")], 3, tmp_path)
    assert "BackboneUnfreeze" not in str(caught.value)


@pytest.mark.parametrize(
    "guard", [FreezeGuard(None), FreezeGuard(3), FreezeGuard(2, stage_epochs=1), FreezeGuard(2, batchnorm="train")]
)
def test_a_guard_of_other_phases_than_the_unfreezes_is_refused(tmp_path, guard):
    with pytest.raises(UserError, match="give both the same unfreeze_at_epoch"):
        fit(TheirModule(), [BackboneUnfreeze(2, 0.1, 0.1), guard], 8, tmp_path)
