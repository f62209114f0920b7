import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cifar_tl.build import build_module
from cifar_tl.checkpoints import load_trained
from cifar_tl.data.batch import class_indices, one_hot
from cifar_tl.errors import UserError
from cifar_tl.model.classifier import ImageClassifier
from cifar_tl.model.head import dense_head
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.model.optim import build_optimizer, match_parameters, optimizer_text, parameter_groups


def make_module():
    return ResNet50Classifier(
        classes=[str(n) for n in range(10)],
        upscale=1,
        head=[128, 64],
        dropout=0.0,
        optimizer="adamw",
        momentum=0.9,
        weight_decay=0.05,
        label_smoothing=0.1,
    )


@pytest.fixture(scope="module")
def module():
    return make_module()


def fit_on_features(module, folder, resume=None):
    """Train on 16 features in 4 batches, saving a checkpoint in the middle of the first epoch."""
    features, targets = torch.randn(16, 2048), torch.arange(16) % 10

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (0, 1) and resume is None:
                trainer.save_checkpoint(folder / "c.ckpt")

    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[Saving()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )
    loader = DataLoader(TensorDataset(features, targets), batch_size=4)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=resume is not None or None)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, of a DataLoader without workers and of mid-epoch
def test_it_goes_on_from_a_checkpoint_in_mid_epoch(tmp_path):
    fit_on_features(make_module(), tmp_path)
    assert fit_on_features(make_module(), tmp_path, tmp_path / "c.ckpt").global_step == 8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_progress_bars_have_the_loss_of_a_step(module, tmp_path):
    assert "train/loss_step" in fit_on_features(module, tmp_path).progress_bar_metrics


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_a_trainer_used_by_hand_is_none_of_a_run_and_one_of_a_run_stays_one(tmp_path, tiny_checkpoint):
    fit_on_features(make_module(), tmp_path)
    with pytest.raises(UserError, match=r"c.ckpt was not written by cifar_tl.train\."):
        load_trained(tmp_path / "c.ckpt")
    module = ResNet50Classifier.load_from_checkpoint(tiny_checkpoint, weights_only=True)
    assert module.provenance == torch.load(tiny_checkpoint, weights_only=True)["cifar_tl"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("given", [lambda own: {"optimizer": own}, lambda own: ([own], [])])
def test_a_subclass_may_return_optimizers_as_lightning_takes_them(module, tmp_path, monkeypatch, given):
    own = module.configure_optimizers()
    monkeypatch.setattr(module, "configure_optimizers", lambda: given(own))
    assert fit_on_features(module, tmp_path).optimizers[0].__class__ is own.__class__


def test_head_is_the_originals():
    shapes = [tuple(layer.weight.shape) for layer in dense_head(2048, [128, 64], 10, 0.0) if hasattr(layer, "weight")]
    assert shapes == [(128, 2048), (64, 128), (10, 64)]


def test_dropout_outside_0_1_is_refused():
    with pytest.raises(UserError, match=r"model\.dropout=1"):
        dense_head(8, [4], 2, 1.0)


def test_named_groups_hold_every_parameter_once_and_spare_vectors_from_decay(module):
    groups = module.configure_optimizers().param_groups
    assert [g["name"] for g in groups] == ["head", "head_no_decay", "backbone", "backbone_no_decay"]
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(module.parameters()))
    for group in groups:
        decays = group["weight_decay"] > 0
        assert all((p.ndim > 1) == decays for p in group["params"])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_optimizers_start_at_rate_zero_until_their_owner_sets_it(module, name, monkeypatch):
    monkeypatch.setattr(module, "optimizer", name)
    assert {g["lr"] for g in module.configure_optimizers().param_groups} == {0.0}


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_decay_that_would_outweigh_the_gradient_is_refused(compose, name):
    keys = ("experiment=demo", f"finetune.optimizer={name}")
    for allowed in (0, 5e-4):
        assert build_module(compose(*keys, f"finetune.weight_decay={allowed}"), "ab").weight_decay == allowed
    with pytest.raises(UserError, match=rf"weight_decay=0.05 is not allowed with finetune.optimizer={name}"):
        build_module(compose(*keys), "ab")


def step_with(name, rate, steps=1):
    """Take steps with gradients that one direction dominates; return the groups of a small model, before and after."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32))
    groups = parameter_groups(nn.Linear(8, 4), backbone, weight_decay=0.05)
    before = {g["name"]: [p.detach().clone() for p in g["params"]] for g in groups}
    optimizer = build_optimizer(name, groups, momentum=0.9)
    for group in optimizer.param_groups:
        group["lr"] = rate
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in (p for g in groups for p in g["params"]):
            rows, columns = len(p), p[0].numel()
            strong = torch.randn(rows, 1, generator=generator) * torch.randn(1, columns, generator=generator)
            p.grad = (10 * strong + torch.randn(rows, columns, generator=generator)).view_as(p)
        optimizer.step()
    return before, {g["name"]: [p.detach() for p in g["params"]] for g in groups}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_parameters_may_join_a_group_that_has_been_trained(name):
    layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    optimizer = build_optimizer(name, parameter_groups(nn.Linear(4, 2), layers, weight_decay=0.05), momentum=0.9)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = [p.detach().clone() for p in layers.parameters()]
    for training in (layers[1], layers):  # stage by stage, the last one first
        for p in training.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, layers.parameters(), strict=True))


def test_muon_moves_kernels_about_equally_in_all_directions():
    before, after = step_with("muon", rate=0.01)
    change = (after["backbone"][0] - before["backbone"][0] * (1 - 0.01 * 0.05)).flatten(1)
    sizes = torch.linalg.svdvals(change) / (0.01 * 0.2 * 144**0.5)  # 144 inputs: as long as a step of AdamW
    assert 0.3 < sizes.min() < sizes.max() < 1.5  # of the gradient, one would be tens of times the others


def test_muon_is_adamw_for_all_but_the_backbones_kernels():
    _, muon = step_with("muon", rate=0.01, steps=3)
    _, adamw = step_with("adamw", rate=0.01, steps=3)
    for name in ("head", "head_no_decay", "backbone_no_decay"):
        torch.testing.assert_close(muon[name], adamw[name])


def test_the_plan_names_adamw_while_muon_has_no_kernels_to_train():
    assert optimizer_text("muon", unfrozen=False) == "adamw"
    assert "muon" in optimizer_text("muon", unfrozen=True)
    assert optimizer_text("sgd", unfrozen=True) == "sgd"


def test_a_head_may_be_one_linear_layer(compose):
    head = build_module(compose("experiment=demo", "model.head=[]"), "ab").head
    assert [(layer.in_features, layer.out_features) for layer in head] == [(2048, 2)]


def test_logits_come_out_and_probabilities_are_predicted(module):
    images = torch.randn(2, 3, 32, 32)
    module.eval()
    with torch.no_grad():
        logits = module(images)
        probabilities = module.predict_step((images, torch.zeros(2)), 0)
    torch.testing.assert_close(probabilities, logits.softmax(1))


def test_logits_are_float32_also_where_the_backbone_computes_in_bfloat16(module):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    classifier = ImageClassifier(module.backbone, module.head, (0.5,) * 3, (0.25,) * 3, "uint8")
    module.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = module.backbone((images / 255 - 0.5) / 0.25)
        outputs = [module((images / 255 - 0.5) / 0.25), module(features), classifier(images)]
    assert features.dtype == torch.bfloat16
    for logits in outputs:
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, module.head(features.float()), rtol=0, atol=1e-2)


def test_one_hot_and_back():
    targets = torch.tensor([3, 0])
    assert class_indices(one_hot(targets, 10)).tolist() == [3, 0]
    assert class_indices(targets) is targets


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_states_from_another_device_take_the_strides_of_their_parameters(name):
    def steps(optimizer, parameters, count):
        generator = torch.Generator().manual_seed(1)
        for _ in range(count):
            for p in parameters:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()

    def make(memory_format):
        torch.manual_seed(0)
        backbone = nn.Conv2d(8, 8, 3, bias=False).to(memory_format=memory_format)
        groups = parameter_groups(nn.Linear(4, 2), backbone, weight_decay=0.05)
        optimizer = build_optimizer(name, groups, momentum=0.9)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        return optimizer, [p for group in groups for p in group["params"]]

    saved, parameters = make(torch.channels_last)  # as on a GPU
    steps(saved, parameters, 2)
    resumed, others = make(torch.contiguous_format)
    with torch.no_grad():
        for p, q in zip(others, parameters, strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved.state_dict())
    match_parameters(resumed)
    steps(resumed, others, 2)
    straight, expected = make(torch.contiguous_format)
    steps(straight, expected, 2)
    steps(straight, expected, 2)
    for p, q in zip(others, expected, strict=True):
        torch.testing.assert_close(p, q)


def test_kerass_conventions_are_one_key():
    options = {"classes": ["a", "b"], "upscale": 1, "head": [16], "dropout": 0.0, "optimizer": "adam"}
    options |= {"momentum": 0.9, "weight_decay": 0.0, "label_smoothing": 0.0}
    torch_module = ResNet50Classifier(**options)
    keras = ResNet50Classifier(**options, conventions="keras")
    for module, momentum, eps, adam_eps in ((torch_module, 0.1, 1e-5, 1e-8), (keras, 0.01, 1.001e-5, 1e-7)):
        layers = [m for m in module.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(layer.momentum, layer.eps) for layer in layers} == {(momentum, eps)}
        assert {group["eps"] for group in module.configure_optimizers().param_groups} == {adam_eps}
    for layer in (m for m in keras.head if isinstance(m, nn.Linear)):
        assert layer.bias.eq(0).all()
        limit = (6 / sum(layer.weight.shape)) ** 0.5  # Glorot's
        assert 0.9 * limit < layer.weight.abs().max() <= limit
    with pytest.raises(UserError, match=r"model\.conventions=theano"):
        ResNet50Classifier(**options, conventions="theano")


def test_dropout_is_after_each_hidden_layer_of_a_runs_head(compose):
    head = build_module(compose("experiment=demo", "model.dropout=0.2"), "ab").head
    assert [type(layer).__name__ for layer in head] == [*["Linear", "ReLU", "Dropout"] * 2, "Linear"]
    assert {layer.p for layer in head if isinstance(layer, nn.Dropout)} == {0.2}


def test_momentum_is_the_configs_and_nesterovs(compose):
    def optimizer(name):
        keys = (f"finetune.optimizer={name}", "finetune.momentum=0.5", "finetune.weight_decay=0")
        return build_module(compose("experiment=demo", *keys), "ab").configure_optimizers()

    assert optimizer("muon").momentum == 0.5
    assert {(group["momentum"], group["nesterov"]) for group in optimizer("sgd").param_groups} == {(0.5, True)}
