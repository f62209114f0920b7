"""What a run shows in TensorBoard and keeps as predictions, and that looking changes nothing."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util
from torch import nn
from torchmetrics.functional import classification as theirs

from cifar_tl import cli
from cifar_tl.build import build_datamodule, build_module
from cifar_tl.callbacks import tensorboard_figures as inspection
from cifar_tl.callbacks.projector import Projector, evaluating, principal_components, sprite
from cifar_tl.callbacks.tensorboard_figures import hparam_values
from cifar_tl.checkpoints import load_trained
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.data.splits import split_train_val
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.runs.metrics import softmax
from cifar_tl.runs.predictions import read_images, read_predictions
from cifar_tl.train import train


def events(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def run(compose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(compose(*TINY, "logger=tensorboard", "model.dropout=0.2"), folder, "demo")
    return folder


@pytest.mark.slow
def test_tags_are_those_of_the_readme(run):
    readme = (Path(__file__).parents[2] / "cifar_tl" / "runs" / "README.md").read_text()
    table = readme.partition("| tag | what |")[2].partition("\n\n")[0]
    promised = {tag for line in table.splitlines() for tag in re.findall(r"`([^`]+)`", line.partition(" | ")[0])}
    promised |= {tag.replace("val/", "test/") for tag in promised if tag.startswith("val/") and "CLASS" in tag}
    classes = json.loads((run / "metrics.json").read_text())["classes"]
    promised = {tag.replace("CLASS", name) for tag in promised for name in classes}
    tags = events(run).Tags()
    written = {tag.removesuffix("/text_summary") for kind in ("scalars", "images", "tensors") for tag in tags[kind]}
    promised -= {"train/distillation"}  # the demo has no teacher
    assert promised - {"test/"} == written | {"features/before", "features/after"}


@pytest.mark.slow
def test_the_thaw_is_marked(run):
    accumulator = events(run)
    assert [e.value for e in accumulator.Scalars("phase")] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [e.step for e in accumulator.Scalars("phase")] == [0, 2, 3, 5, 6, 8, 9, 11]
    plan, unfreeze = (e.tensor_proto.string_val[0].decode() for e in accumulator.Tensors("phases/text_summary"))
    assert "| fine-tune | 2..3 | head and whole backbone |" in plan
    assert unfreeze.startswith("Epoch 2: **fine-tune**")


@pytest.mark.slow
def test_pictures_come_at_the_end_of_each_phase_and_of_the_run(run):
    accumulator = events(run)
    assert [e.step for e in accumulator.Images("val/confusion")] == [5, 11]
    assert [e.step for e in accumulator.Images("test/confusion")] == [12]
    assert [e.step for e in accumulator.Images("inputs/first_batch")] == [6]  # the frozen phase sees features


@pytest.mark.slow
def test_what_is_said_of_a_class_is_of_that_class(run):
    accumulator, metrics = events(run), json.loads((run / "metrics.json").read_text())
    test = read_predictions(run).test
    shares = softmax(test.logits)
    for index, name in enumerate(metrics["classes"]):
        for metric in ("precision", "recall", "f1"):
            (scalar,) = accumulator.Scalars(f"test/{metric}/{name}")
            assert scalar.value == pytest.approx(metrics[f"test/{metric}"][index])
        (curve,) = accumulator.Tensors(f"test/pr/{name}")
        true_positives = tensor_util.make_ndarray(curve.tensor_proto)[0]  # by threshold, 0 first
        assert true_positives[0] == (test.targets == index).sum()
        threshold = np.linspace(0, 1, len(true_positives))[len(true_positives) // 10]
        assert true_positives[len(true_positives) // 10] == (shares[test.targets == index, index] >= threshold).sum()


@pytest.mark.slow
def test_hparams_page_has_the_important_keys_and_the_results(run):
    (path,) = [p for p in run.glob("tensorboard/events*") if b"hparams" in p.read_bytes()]
    accumulator = EventAccumulator(str(path))
    accumulator.Reload()
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(values) == set(inspection.HPARAMS)
    assert values["finetune.batchnorm"].string_value == "train"
    metrics = HParamsPluginData.FromString(
        accumulator.SummaryMetadata("_hparams_/experiment").plugin_data.content
    ).experiment.metric_infos
    names = {metric.name.tag for metric in metrics}
    assert names == {"best/val/acc", "best/epoch", "time/minutes", "test/acc", "test/loss", "test/ece"}
    assert names <= set(events(run).Tags()["scalars"])  # else their columns stay empty


@pytest.mark.slow
def test_projector_has_the_features_of_validation_images_before_and_after(run):
    config = (run / "tensorboard" / "projector_config.pbtxt").read_text()
    assert 'tensor_name: "features/before"' in config
    assert 'tensor_name: "features/after"' in config
    trained = load_trained(run)
    datamodule = build_datamodule(trained.config)
    datamodule.setup("fit")
    torch.manual_seed(trained.config.seed)
    untrained = build_module(trained.config, datamodule.classes)
    projector = run / "tensorboard" / "projector"
    labels = (projector / "labels.tsv").read_text().splitlines()
    assert labels == [datamodule.classes[label] for label in datamodule.targets("val").tolist()]
    thumbnails = np.asarray(Image.open(projector / "thumbnails.png"))
    assert np.array_equal(thumbnails[:32, 32:64], datamodule.images("val")[1].permute(1, 2, 0).numpy())
    for name, module in (("before", untrained), ("after", trained.module)):
        check_projected(projector / f"{name}.tsv", datamodule, module)


def check_projected(path, datamodule, module):
    """The file has the features that the module's backbone gives for all validation images."""
    with torch.no_grad():
        batches = datamodule.normalized("val", torch.arange(datamodule.sizes["val"]))
        features = torch.cat([module.eval().backbone(batch) for batch in batches]).numpy()
    centred = features - features.mean(axis=0)
    written = np.loadtxt(path)
    # the signs of principal components are free, the angles and lengths between images are not
    np.testing.assert_allclose(written @ written.T, centred @ centred.T, atol=1e-3 * (centred**2).sum(1).max())


@pytest.mark.slow
def test_an_early_end_is_one_of_its_phase_and_images_do_not_grow_before_the_unfreeze(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection.figures, "pixels", lambda figure: np.zeros((2, 2, 3), dtype=np.uint8))  # fast
    grows = ("trainer.max_epochs=8", "finetune.progressive_resizing=[2,3]", "logger=tensorboard")
    ends = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=1")
    soon = "callbacks.early_stopping.start_epoch=2"
    metrics = train(compose(*TINY, *grows, *ends, soon), tmp_path, "demo")
    assert metrics["epoch"] == [0, 1, 2, 3]
    assert [e.step for e in events(tmp_path).Images("val/confusion")] == [5, 11]
    trained = load_trained(tmp_path)
    datamodule = build_datamodule(trained.config)
    datamodule.setup("fit")
    torch.manual_seed(trained.config.seed)
    untrained = build_module(trained.config, datamodule.classes)
    assert untrained.backbone.upscale == 1
    check_projected(tmp_path / "tensorboard" / "projector" / "before.tsv", datamodule, untrained)


def test_the_projectors_images_are_from_all_of_the_split(compose):
    chosen = Projector(SimpleNamespace(sizes={"val": 2500}), "")._chosen()
    assert 800 < len(chosen) <= 1000
    assert chosen[-1] >= 2490


def test_what_the_network_sees_is_shown_as_it_was_before_normalization():
    images, targets = Synthetic(20, 20).train()
    ((batch, _),) = ArrayLoader(images, targets, 20, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    shown = inspection.denormalized(batch, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    np.testing.assert_array_equal(shown, images.permute(0, 2, 3, 1).numpy())


@pytest.mark.slow
def test_predictions_file_has_the_figures_of_metrics_json(run):
    metrics, predictions = json.loads((run / "metrics.json").read_text()), read_predictions(run)
    predicted, targets = torch.from_numpy(predictions.test.predicted), torch.from_numpy(predictions.test.targets)
    assert theirs.multiclass_accuracy(predicted, targets, 10, average="micro") == pytest.approx(metrics["test/acc"])
    assert predictions.val.accuracy == pytest.approx(metrics["best/val/acc"])
    confusion = theirs.multiclass_confusion_matrix(predicted, targets, 10)
    assert confusion.tolist() == metrics["test/confusion"]
    for name in ("precision", "recall", "f1_score"):
        expected = getattr(theirs, f"multiclass_{name}")(predicted, targets, 10, average="none").tolist()
        assert metrics[f"test/{name.removesuffix('_score')}"] == pytest.approx(expected, abs=1e-6)
    losses = torch.nn.functional.cross_entropy(
        *(torch.from_numpy(x) for x in (predictions.test.logits, predictions.test.targets))
    )
    assert losses.item() == pytest.approx(metrics["test/loss"], rel=1e-5)
    for split, epoch in ((predictions.val, metrics["best/epoch"]), (predictions.frozen, 1)):
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(split.logits), torch.from_numpy(split.targets))
        assert loss.item() == pytest.approx(metrics["val/loss"][epoch], rel=1e-5)
    assert predictions.val.indices.tolist() == split_train_val(Synthetic(60, 20).train()[1], 20, None, 0)[1].tolist()
    with np.load(run / "predictions.npz", allow_pickle=False) as data:
        assert {data[f"{s}_logits"].dtype for s in ("val", "test")} == {np.dtype("float32")}
        assert {data[f"{s}_{k}"].dtype for s in ("val", "test") for k in ("targets", "indices")} == {np.dtype("int64")}
        assert len(set(data["val_indices"])) == 20


@pytest.mark.slow
def test_images_are_those_of_the_test_set(run):
    images, _ = Synthetic(60, 20).test()
    for index, image in read_images(run).items():
        np.testing.assert_array_equal(image, images[index].permute(1, 2, 0).numpy())


@pytest.mark.slow
def test_looking_changes_nothing(run, compose, tmp_path):
    blind = train(compose(*TINY, "model.dropout=0.2"), tmp_path, "demo")
    seen = json.loads((run / "metrics.json").read_text())
    for key in ("train/loss", "val/loss", "val/acc", "test/loss"):
        assert blind[key] == seen[key], key
    assert not (tmp_path / "tensorboard").exists()
    for a, b in zip(vars(read_predictions(run)).values(), vars(read_predictions(tmp_path)).values(), strict=True):
        np.testing.assert_array_equal(getattr(a, "logits", a), getattr(b, "logits", b))


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_resumed_run_shows_everything_once(run, compose, tmp_path, monkeypatch):
    step = ResNet50Classifier.training_step

    def dies(self, images_and_targets, batch_idx):
        if (self.current_epoch, batch_idx) == (3, 1):
            raise Killed
        return step(self, images_and_targets, batch_idx)

    arguments = (*TINY, "logger=tensorboard", "model.dropout=0.2")
    with monkeypatch.context() as patched:
        patched.setattr(ResNet50Classifier, "training_step", dies)
        with pytest.raises(Killed):
            train(compose(*arguments), tmp_path, "demo")
    train(compose(*arguments, f"resume={tmp_path}"), tmp_path, "demo")
    straight, resumed = events(run), events(tmp_path)
    for tag in straight.Tags()["images"]:
        assert [e.step for e in resumed.Images(tag)] == [e.step for e in straight.Images(tag)], tag
    assert len(resumed.Tensors("phases/text_summary")) == 2
    assert {e.step for e in resumed.Scalars("phase")} == {e.step for e in straight.Scalars("phase")}
    for split in ("val", "test", "frozen"):
        a, b = (getattr(read_predictions(folder), split) for folder in (run, tmp_path))
        np.testing.assert_array_equal(a.logits, b.logits)
        np.testing.assert_array_equal(a.indices, b.indices)
    for name in ("before", "after"):
        a, b = (folder / "tensorboard" / "projector" / f"{name}.tsv" for folder in (run, tmp_path))
        assert a.read_text() == b.read_text()


@pytest.mark.parametrize(
    ("overrides", "validated", "projected"),
    [
        (["finetune.unfreeze_at_epoch=null", "trainer.max_epochs=1"], 1, ["before"]),
        (["finetune.unfreeze_at_epoch=0", "finetune.stage_epochs=1", "trainer.max_epochs=5"], 5, ["before", "after"]),
    ],
    ids=["head_only", "gradual"],
)
@pytest.mark.slow
def test_other_plans(compose, tmp_path, monkeypatch, caplog, overrides, validated, projected):
    monkeypatch.setattr(inspection.figures, "pixels", lambda figure: np.zeros((2, 2, 3), dtype=np.uint8))  # fast
    few = ("data.train_size=40", "data.batch_size=20", "logger=tensorboard")
    train(compose(*TINY, *few, *overrides), tmp_path, "demo")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(events(tmp_path).Images("val/confusion")) == validated
    config = (tmp_path / "tensorboard" / "projector_config.pbtxt").read_text()
    assert [name for name in ("before", "after") if f'"features/{name}"' in config] == projected


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_does_not_cost_the_run(compose, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(inspection.figures, "confusion", lambda *_: 1 / 0)
    monkeypatch.setattr(inspection.figures, "pixels", lambda figure: np.zeros((2, 2, 3), dtype=np.uint8))  # fast
    cfg = compose(*TINY, "logger=tensorboard", "finetune.unfreeze_at_epoch=0", "trainer.max_epochs=1")
    assert train(cfg, tmp_path, "demo")["status"] == "finished"
    assert "TensorBoard goes without val/confusion: ZeroDivisionError" in caplog.text
    assert "test/reliability" in events(tmp_path).Tags()["images"]
    before, after = (np.loadtxt(tmp_path / "tensorboard" / "projector" / f"{n}.tsv") for n in ("before", "after"))
    assert not np.allclose(before, after)  # trained from the first step


def test_evaluating_puts_every_mode_back():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    module[0].eval()
    before = [m.training for m in module.modules()]
    with evaluating(module):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == before


def test_principal_components_keep_distances():
    features = np.random.default_rng(0).normal(size=(6, 40))
    shown = principal_components(features, 5)  # six points span five dimensions
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (features, shown)]
    np.testing.assert_allclose(*distances, atol=1e-6)


def test_sprite_is_row_by_row():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((5, 2, 2, 3), dtype=np.uint8)
    square = sprite(images)
    assert square.shape == (6, 6, 3)
    assert square[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 0], [0, 0, 0]]


def test_hparams_tell_recipes_and_the_jobs_of_shipped_sweeps_apart(compose):
    recipes = [
        "best32",
        "distill32",
        "best64",
        "best96",
        "hires",
        "progressive",
        "progressive64",
        "long32",
        "seed_baseline",
    ]
    rows = [hparam_values(OmegaConf.to_container(compose(f"experiment={name}"))) for name in recipes]
    assert len({tuple(row.items()) for row in rows}) == len(recipes)
    for path in (cli.conf_folder() / "sweep").glob("*.yaml"):
        swept = OmegaConf.load(path).get("hydra", {}).get("sweeper", {}).get("params", {}) or {}
        assert {key for key in swept if "." in key} <= set(inspection.HPARAMS), path


def test_hparam_values_are_flat_and_plain():
    config = {"seed": 3, "data": {"limit": None}, "model": {"head": [128, 64], "weights": "/some/where/w.pth"}}
    values = hparam_values(config)
    assert (values["seed"], values["data.limit"], values["model.head"], values["model.weights"]) == (
        3,
        "null",
        "128-64",
        "w.pth",
    )


def test_hparams_have_the_arguments_of_a_model_of_ones_own():
    values = hparam_values({"model": {"_target_": "mine.Focal", "options": {"gamma": 2, "parts": [1, 2]}}})
    own = {key: value for key, value in values.items() if key.startswith(("model._target_", "model.options"))}
    assert own == {"model._target_": "mine.Focal", "model.options.gamma": 2, "model.options.parts": "1-2"}
