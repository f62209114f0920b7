"""What evaluate reports beside the single view: recomputed here by other means."""

import hashlib
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, pad

from cifar_tl import cli
from cifar_tl.build import build_datamodule, plain
from cifar_tl.checkpoints import load_trained
from cifar_tl.data import download, robustness
from cifar_tl.data.cifar10 import Cifar10
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.data.splits import split_train_val
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.errors import Interrupted, UserError
from cifar_tl.evaluate import Evaluation, evaluate, main
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.model.tta import AUGMENTED, identity, mirrored, shifted_in, shifted_out


def logits_by_hand(trained, images):
    """The checkpoint's logits, normalized by hand."""
    mean, std = (torch.tensor(trained.facts["normalization"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return trained.module((images / 255 - mean) / std)


def ece_by_hand(logits, targets, bins=15):
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    right = (predicted == targets).double()
    error = 0.0
    for index in range(bins):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        if inside.any():
            error += inside.double().mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with its last layer fitted: it has learned too little to tell one image from another."""
    path = tmp_path_factory.mktemp("sharp") / "best.ckpt"
    content = torch.load(tiny_checkpoint, weights_only=True)
    trained = load_trained(tiny_checkpoint)
    images, targets = Synthetic(60, 300).test()  # neither the run's validation nor its test images
    last, trained.module.head[-1] = trained.module.head[-1], torch.nn.Identity()
    features = logits_by_hand(trained, images).double()
    mean, scale = features.mean(dim=0), features.std(dim=0).mean()
    centred = (features - mean) / scale
    ridge = centred.T @ centred + torch.eye(last.in_features)
    weight = 10 * torch.linalg.solve(ridge, centred.T @ torch.eye(10, dtype=torch.float64)[targets]).T / scale
    name = f"head.{len(trained.module.head) - 1}"
    content["state_dict"] |= {f"{name}.weight": weight.float(), f"{name}.bias": -(weight @ mean).float()}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def evaluated(compose, checkpoint):
    overrides = (f"checkpoint='{checkpoint}'", "trainer.accelerator=cpu", "tta=true", "temperature=true")
    return evaluate(compose(*overrides, config_name="evaluate"))


def test_single_view_stays_the_runs_whatever_is_asked_for_beside_it(compose, tiny_checkpoint, tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    single = {key: value for key, value in metrics.items() if key.startswith("test/")}
    overrides = (f"checkpoint='{tiny_checkpoint}'", "trainer.accelerator=cpu", "tta=true", "temperature=true")
    assert single.items() <= evaluate(compose(*overrides, config_name="evaluate")).items()


def test_ctrl_c_in_the_test_is_an_interruption(compose, tiny_checkpoint, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ResNet50Classifier, "test_step", interrupted)
    with pytest.raises(Interrupted):
        evaluate(compose(f"checkpoint='{tiny_checkpoint}'", "trainer.accelerator=cpu", config_name="evaluate"))


def test_data_of_a_run_from_another_folder_is_not_fetched_into_this_one(
    compose, tiny_checkpoint, tmp_path, monkeypatch
):
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["cifar_tl"]["config"]["data"] = plain(compose())["data"]
    torch.save(content, tmp_path / "best.ckpt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the run's data is not at data \(.*data\): data\.root= says where"):
        evaluate(compose("checkpoint=best.ckpt", "trainer.accelerator=cpu", config_name="evaluate"))
    assert not (tmp_path / "data").exists()


def test_precision_is_the_runs(compose, tiny_checkpoint, tmp_path):
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["cifar_tl"]["facts"]["precision"] = "bf16-mixed"
    torch.save(content, tmp_path / "best.ckpt")
    arguments = (f"checkpoint='{tmp_path / 'best.ckpt'}'", "trainer.accelerator=cpu")
    loss = {
        precision: evaluate(compose(*arguments, f"trainer.precision={precision}", config_name="evaluate"))["test/loss"]
        for precision in ("null", "bf16-mixed", "32-true")
    }
    assert loss["null"] == loss["bf16-mixed"] != loss["32-true"]


def test_what_a_deterministic_run_measured_is_measured_so_again(compose, tiny_checkpoint, tmp_path, monkeypatch):
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["cifar_tl"]["config"]["trainer"]["deterministic"] = True
    torch.save(content, tmp_path / "best.ckpt")
    seen = []
    monkeypatch.setattr(
        ResNet50Classifier, "on_test_start", lambda self: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    try:
        for checkpoint in (tiny_checkpoint, tmp_path / "best.ckpt"):
            overrides = (f"checkpoint='{checkpoint}'", "trainer.accelerator=cpu")
            evaluate(compose(*overrides, config_name="evaluate"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True]


@pytest.mark.parametrize("where", ["test", "more views"])
def test_a_full_gpu_gets_advice(compose, tiny_checkpoint, monkeypatch, where):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(*((ResNet50Classifier, "test_step") if where == "test" else (Evaluation, "logits")), full)
    overrides = (f"checkpoint='{tiny_checkpoint}'", "trainer.accelerator=cpu", "tta=true", "data.eval_batch_size=7")
    with pytest.raises(UserError, match=r"out of memory\. Lower data\.eval_batch_size=7\."):
        evaluate(compose(*overrides, config_name="evaluate"))


def test_flip_and_shift_are_airbenchs(evaluated, checkpoint):
    images, targets = Synthetic(60, 20).test()
    trained = load_trained(checkpoint)

    def mirror(images):
        return 0.5 * logits_by_hand(trained, images) + 0.5 * logits_by_hand(trained, images.flip(-1))

    padded = pad(images.float(), (1, 1, 1, 1), "reflect")
    both = 0.5 * mirror(images) + 0.25 * mirror(padded[..., :32, :32]) + 0.25 * mirror(padded[..., 2:, 2:])
    for name, logits in (("flip", mirror(images)), ("flip_shift", both)):
        assert evaluated[f"test/{name}/acc"] == float((logits.argmax(dim=1) == targets).double().mean())
        assert evaluated[f"test/{name}/loss"] != pytest.approx(evaluated["test/loss"], abs=1e-3)
        assert evaluated[f"test/{name}/loss"] == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-4)
        assert evaluated[f"test/{name}/ece"] == pytest.approx(ece_by_hand(logits, targets), rel=1e-4)


def test_views_are_different_and_their_weights_add_up_to_1():
    image = torch.arange(3 * 32 * 32).view(1, 3, 32, 32) % 251
    for views in AUGMENTED.values():
        assert sum(views.values()) == 1
        assert len({tuple(view(image).flatten().tolist()) for view in views}) == len(views)
    assert torch.equal(mirrored(image)[0, 0, 0], image[0, 0, 0].flip(0))
    assert torch.equal(shifted_in(image)[..., 1:, 1:], image[..., :-1, :-1])
    assert torch.equal(shifted_out(image)[..., :-1, :-1], image[..., 1:, 1:])
    assert identity(image) is image


def test_temperature_is_fitted_on_the_runs_validation_split_alone(evaluated, checkpoint):
    trained = load_trained(checkpoint)
    images, targets = Synthetic(60, 20).train()
    _, val = split_train_val(targets, 20, None, 0)
    logits = logits_by_hand(trained, images[val]).double()
    losses = {t: float(cross_entropy(logits / t, targets[val])) for t in np.exp(np.linspace(-4.6, 4.6, 20_000))}
    best = min(losses, key=losses.__getitem__)
    assert 0.02 < best < 50
    assert evaluated["temperature"] == pytest.approx(best, rel=2e-3)
    assert evaluated["val/calibrated/loss"] == pytest.approx(losses[best], abs=1e-4)
    assert evaluated["val/calibrated/loss"] <= evaluated["val/loss"]


def test_loss_and_ece_are_reported_before_and_after(evaluated, checkpoint):
    images, targets = Synthetic(60, 20).test()
    logits = logits_by_hand(load_trained(checkpoint), images)
    assert evaluated["test/ece"] == pytest.approx(ece_by_hand(logits, targets), rel=1e-4)
    calibrated = logits / evaluated["temperature"]
    assert evaluated["test/calibrated/loss"] == pytest.approx(float(cross_entropy(calibrated, targets)), rel=1e-4)
    assert evaluated["test/calibrated/ece"] == pytest.approx(ece_by_hand(calibrated, targets), rel=1e-4)


def test_another_validation_split_is_refused(compose, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["cifar_tl"]["config"]["data"]["split_seed"] = 1
    torch.save(content, tmp_path / "best.ckpt")
    cfg = compose(f"checkpoint='{tmp_path}/best.ckpt'", "temperature=true", config_name="evaluate")
    with pytest.raises(UserError, match="the run's validation split cannot be made again"):
        evaluate(cfg)


def test_other_images_with_the_same_targets_are_no_validation_split(compose, checkpoint, monkeypatch):
    original = Synthetic.train
    monkeypatch.setattr(Synthetic, "train", lambda self: (255 - original(self)[0], original(self)[1]))
    cfg = compose(f"checkpoint='{checkpoint}'", "temperature=true", config_name="evaluate")
    with pytest.raises(UserError, match="the run's validation split cannot be made again"):
        evaluate(cfg)


@pytest.mark.parametrize(
    "names", [("ant", "bee", *Synthetic.classes[2:]), Synthetic.classes[:5], Synthetic.classes[::-1]]
)
def test_data_with_other_classes_is_refused_with_both_lists(compose, checkpoint, monkeypatch, names):
    monkeypatch.setattr(Synthetic, "classes", names)
    with pytest.raises(UserError, match="the data has other classes than checkpoint") as raised:
        evaluate(compose(f"checkpoint='{checkpoint}'", config_name="evaluate"))
    assert f"checkpoint (10): {', '.join(load_trained(checkpoint).classes)}\n" in str(raised.value)
    assert f"data ({len(names)}): {', '.join(names)}\n" in str(raised.value)


def test_class_names_are_compared_after_unicode_normalization(compose, checkpoint, tmp_path, monkeypatch):
    composed, decomposed = ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}")
    content = torch.load(checkpoint, weights_only=True)
    content["cifar_tl"]["facts"]["classes"][0] = decomposed
    torch.save(content, tmp_path / "best.ckpt")
    monkeypatch.setattr(Synthetic, "classes", (composed, *Synthetic.classes[1:]))
    assert "test/acc" in evaluate(compose(f"checkpoint='{tmp_path}/best.ckpt'", config_name="evaluate"))


def test_all_test_images_after_a_limited_run(compose, tiny_checkpoint, tmp_path):
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["cifar_tl"]["config"]["data"]["limit"] = 10
    torch.save(content, tmp_path / "best.ckpt")

    def images(*overrides):
        result = evaluate(compose(f"checkpoint='{tmp_path}'", *overrides, config_name="evaluate"))
        return sum(map(sum, result["test/confusion"]))

    assert (images(), images("data.limit=all"), images("data.limit=15")) == (10, 20, 15)


def test_other_test_images_than_the_runs_are_said_to_be_others(compose, tiny_checkpoint, tiny_run, caplog):
    overrides = (f"checkpoint='{tiny_checkpoint}'", "trainer.accelerator=cpu")
    recorded = json.loads((tiny_run / "metrics.json").read_text())["test_sha256"]
    with caplog.at_level("INFO"):
        assert evaluate(compose(*overrides, config_name="evaluate"))["test_sha256"] == recorded
        assert "not the run's own" not in caplog.text
        other = evaluate(compose(*overrides, "data.limit=10", config_name="evaluate"))["test_sha256"]
    assert other != recorded
    assert f"not the run's own test images (SHA-256 {other[:12]}, the run's {recorded[:12]})" in caplog.text


def test_the_test_folder_alone_is_enough(compose, tiny_checkpoint, tmp_path):
    images, targets = Synthetic(60, 20).test()
    for number, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        path = tmp_path / "data" / "test" / Synthetic.classes[target] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["cifar_tl"]["config"]["data"] |= {"name": "folder", "root": "nowhere", "workers": 0}
    names = sorted(Synthetic.classes)
    content["cifar_tl"]["facts"]["classes"] = names
    torch.save(content, tmp_path / "best.ckpt")
    overrides = (f"checkpoint='{tmp_path}'", f"data.root='{tmp_path}/data'")
    confusion = evaluate(compose(*overrides, config_name="evaluate"))["test/confusion"]
    assert [sum(row) for row in confusion] == [2] * 10
    with pytest.raises(UserError, match="has no folder train"):
        evaluate(compose(*overrides, "temperature=true", config_name="evaluate"))


@pytest.fixture(scope="module")
def cifar_checkpoint(checkpoint, tmp_path_factory):
    """The same with the classes of CIFAR-10."""
    path = tmp_path_factory.mktemp("cifar") / "best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    facts = content["cifar_tl"]["facts"]
    facts["classes"] = list(Cifar10.classes)
    datamodule = build_datamodule(load_trained(checkpoint).config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Synthetic, "classes", Cifar10.classes)
        datamodule.setup("validate")
    facts["split_sha256"] = datamodule.split_sha256
    torch.save(content, path)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Tiny CIFAR-10.1 and CIFAR-10-C; what is generated has CIFAR-10's classes, too."""
    monkeypatch.setattr(Synthetic, "classes", Cifar10.classes)
    rng = np.random.default_rng(0)
    for version, examples in (("v4", 21), ("v6", 20)):
        np.save(tmp_path / f"cifar10.1_{version}_data.npy", rng.integers(0, 256, (examples, 32, 32, 3), dtype=np.uint8))
        np.save(tmp_path / f"cifar10.1_{version}_labels.npy", (np.arange(examples) % 10).astype(np.int32))
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for name in ("fog", "saturate"):
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(4), 5).astype(np.uint8))
    return tmp_path


@pytest.mark.slow
def test_cifar10_1(compose, cifar_checkpoint, root):
    overrides = (f"checkpoint='{cifar_checkpoint}'", f"data.root='{root}'", "trainer.accelerator=cpu", "tta=true")
    result = evaluate(compose(*overrides, "cifar10_1=v6", config_name="evaluate"))
    images = torch.from_numpy(np.load(root / "cifar10.1_v6_data.npy")).permute(0, 3, 1, 2)
    targets = torch.from_numpy(np.load(root / "cifar10.1_v6_labels.npy")).long()
    logits = logits_by_hand(load_trained(cifar_checkpoint), images)
    assert result["cifar10.1_v6/acc"] == float((logits.argmax(dim=1) == targets).double().mean())
    assert result["cifar10.1_v6/loss"] == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-4)
    assert "cifar10.1_v6/flip_shift/acc" in result


def test_cifar10_1_has_two_versions(root):
    assert [len(robustness.cifar10_1(root, version)[0]) for version in ("v4", "v6")] == [21, 20]


@pytest.mark.slow
def test_cifar10_c_by_severity_and_mean(compose, cifar_checkpoint, root):
    overrides = (f"checkpoint='{cifar_checkpoint}'", f"data.root='{root}'", "trainer.accelerator=cpu")
    result = evaluate(compose(*overrides, "cifar10_c=[fog,saturate]", config_name="evaluate"))
    trained = load_trained(cifar_checkpoint)
    expected = {}
    for name in ("fog", "saturate"):
        images = torch.from_numpy(np.load(root / "CIFAR-10-C" / f"{name}.npy")).permute(0, 3, 1, 2)
        right = logits_by_hand(trained, images).argmax(dim=1) == torch.arange(4).repeat(5)
        expected[f"cifar10_c/{name}/acc"] = right.double().view(5, 4).mean(dim=1).tolist()
    assert expected.items() <= result.items()
    assert "cifar10_c/acc" not in result  # the benchmark's number, which is of all fifteen
    for name in set(robustness.CORRUPTIONS) - {"fog"}:
        shutil.copy(root / "CIFAR-10-C" / "saturate.npy", root / "CIFAR-10-C" / f"{name}.npy")
    whole = evaluate(compose(*overrides, "cifar10_c=all", config_name="evaluate"))
    means = [np.mean(expected[f"cifar10_c/{name}/acc"]) for name in ("fog", "saturate")]
    assert whole["cifar10_c/acc"] == pytest.approx((means[0] + 14 * means[1]) / 15)


def test_all_corruptions_are_the_fifteen_of_the_benchmark():
    assert len(robustness.chosen_corruptions("all")) == 15
    assert not set(robustness.chosen_corruptions("all")) & set(robustness.EXTRA_CORRUPTIONS)
    assert robustness.chosen_corruptions(["fog", "snow", "fog"]) == ["fog", "snow"]


def test_an_archive_under_the_name_of_an_array_is_named(root):
    np.savez(root / "x.npz", np.zeros(1))
    (root / "x.npz").replace(root / "cifar10.1_v6_data.npy")
    with pytest.raises(UserError, match=r"v6_data.npy is not a readable .npy file \(it is an archive\)"):
        robustness.cifar10_1(root, "v6")


@pytest.fixture
def command(cifar_checkpoint, root, monkeypatch, capsys):
    """Run the command in `root`; return its exit code, output and error."""
    monkeypatch.chdir(root)

    def command(*arguments):
        code = cli.run(main, "evaluate", [f"checkpoint='{cifar_checkpoint}'", f"data.root='{root}'", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.mark.parametrize(
    ("arguments", "damage", "said"),
    [
        (["cifar10_1=v5"], None, "cifar10_1=v5 is not allowed: choose v4, v6"),
        (["cifar10_c=fogg"], None, "Did you mean fog?"),
        (["cifar10_c=true"], None, "cifar10_c=True is not allowed: choose all, "),
        (["cifar10_c=[]"], None, "cifar10_c=[] is not allowed: choose all, "),
        (["cifar10_1=v6"], ("cifar10.1_v6_data.npy", np.zeros((0, 32, 32, 3), np.uint8)), "v6_data.npy has no images"),
        (["cifar10_c=[all,fog]"], None, "a name in cifar10_c=all is not allowed: choose "),
        (["data.limit=al"], None, "data.limit=al is not allowed: give a whole number"),
        (["data.root=[a,b]"], None, "data.root=['a', 'b'] is not allowed: give one path."),
        (["tta=maybe"], None, "tta=maybe is not allowed: give true or false"),
        (["temprature=true"], None, "Did you mean temperature?"),
        (["cifar10_1=v6"], ("cifar10.1_v6_labels.npy", None), "modestyachts/CIFAR-10.1"),
        (["cifar10_1=v6"], ("cifar10.1_v6_data.npy", b"no array"), "is not a readable .npy file"),
        (["cifar10_c=fog"], ("CIFAR-10-C/fog.npy", None), "56bf5dcef84df0e2308c6dcbcbbd8499"),
        (["cifar10_c=fog"], ("CIFAR-10-C/fog.npy", np.zeros((20, 3, 32, 32), np.uint8)), "not uint8 (examples, 32, 32"),
        (["cifar10_c=fog"], ("CIFAR-10-C/fog.npy", np.zeros((21, 32, 32, 3), np.uint8)), "no multiple of 5"),
        (["cifar10_c=fog"], ("CIFAR-10-C/labels.npy", np.full(20, 10)), "does not hold 20 class indices"),
        (["cifar10_c=fog"], ("CIFAR-10-C/labels.npy", np.arange(20) // 5), "not the same for every severity"),
    ],
    ids=str,
)
def test_a_mistake_gets_a_readable_error(command, root, arguments, damage, said):
    if damage:
        path, content = root / damage[0], damage[1]
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
    code, _, err = command(*arguments)
    assert code == 1
    assert said in err
    assert "Traceback" not in err


def test_other_test_sets_are_refused_for_other_classes(command, tiny_checkpoint):
    code, _, err = command(f"checkpoint='{tiny_checkpoint}'", "cifar10_1=v6")
    assert code == 1
    assert "are for models with CIFAR-10's classes" in err


def test_a_mistyped_root_is_not_filled(compose, cifar_checkpoint, tmp_path, monkeypatch):
    content = torch.load(cifar_checkpoint, weights_only=True)
    content["cifar_tl"]["config"]["data"] |= {"name": "cifar10", "root": "data", "download": True}
    torch.save(content, tmp_path / "best.ckpt")
    monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("the network was used"))
    keys = (f"checkpoint='{tmp_path}'", f"data.root='{tmp_path}/typo'", "trainer.accelerator=cpu")
    with pytest.raises(UserError, match=r"typo.*cifar-10-batches-py is missing"):
        evaluate(compose(*keys, config_name="evaluate"))
    assert not (tmp_path / "typo").exists()


def test_a_class_without_test_images_has_no_scores(compose, tiny_checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(CIFAR10DataModule, "_chosen_for_test", lambda self, targets: torch.where(targets < 2)[0])
    caplog.set_level(logging.INFO)
    evaluate(compose(f"checkpoint='{tiny_checkpoint}'", "trainer.accelerator=cpu", config_name="evaluate"))
    lines = [line for line in caplog.text.splitlines() if "no test images" in line]
    assert len(lines) == 8
    assert caplog.text.count("  recall ") == 2


@pytest.mark.slow
def test_metrics_are_left_as_json(command, root, cifar_checkpoint):
    code, out, _ = command("hydra.run.dir=here", "tta=true", "temperature=true", "cifar10_1=v6", "cifar10_c=[fog]")
    assert code == 0
    result = json.loads((root / "here" / "evaluation.json").read_text())
    assert result["checkpoint"] == str(cifar_checkpoint)
    assert {"test/acc", "temperature", "test/calibrated/ece", "cifar10.1_v6/acc", "cifar10_c/fog/acc"} <= result.keys()
    assert "fitted on 20 validation images" in out
    numbers = {name: result[f"test/{name}"][3] for name in ("precision", "recall", "f1")}
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["cat"]]
    assert [float(word) for word in line.split() if "." in word] == pytest.approx(list(numbers.values()), abs=1e-4)
    for name, said in (("flip", "flip, 2 views"), ("flip_shift", "6 views")):
        assert any(said in line and f"{100 * result[f'test/{name}/acc']:.2f}%" in line for line in out.splitlines())
    assert "evaluation.json" in out
    assert result["checkpoint_sha256"] == hashlib.sha256(cifar_checkpoint.read_bytes()).hexdigest()
    assert (result["data"], result["test_images"], result["precision"]) == ("synthetic", 20, "32-true")
    assert {"checkpoint_epoch", "device", "versions", "git_commit"} <= result.keys()


def test_the_loss_does_not_depend_on_the_size_of_batches(compose, tiny_checkpoint, tiny_run):
    keys = (f"checkpoint='{tiny_checkpoint}'", "trainer.accelerator=cpu", "data.eval_batch_size=7")
    whole = json.loads((tiny_run / "metrics.json").read_text())["test/loss"]
    assert evaluate(compose(*keys, config_name="evaluate"))["test/loss"] == pytest.approx(whole, rel=1e-5)
