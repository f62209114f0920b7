"""Export: files that stand on their own and give the checkpoint's logits, or no file."""

import json
import resource
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import cifar_tl
from cifar_tl import cli
from cifar_tl.checkpoints import load_trained
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.errors import UserError
from cifar_tl.export import EXPORTERS, export, main, metadata, parity_images, quiet
from cifar_tl.model.backbone import Backbone
from cifar_tl.model.classifier import ImageClassifier
from cifar_tl.model.weights import file_sha256

FORMATS = list(EXPORTERS)
IMAGES = Synthetic(10, 12).test()[0]


INPUT = {"onnx": "uint8", "torch_export": "float"}


@pytest.fixture(scope="session")
def onnx(tiny_checkpoint, tmp_path_factory):
    """Export to ONNX as a user does; return the file and the finished process."""
    folder = tmp_path_factory.mktemp("onnx")
    code = (
        "import sys; from cifar_tl import cli; from cifar_tl.model.backbone import Backbone; "
        f"Backbone.blocks = {Backbone.blocks}; sys.exit(cli.run('cifar_tl.export:main', 'export', sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, f"checkpoint='{tiny_checkpoint}'", "output=model.onnx"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return folder / "model.onnx", done


@pytest.fixture(scope="session")
def exported(compose, onnx, tiny_checkpoint, tmp_path_factory):
    """For each format a file, for each input at least one."""
    files = {"onnx": onnx[0]}
    overrides = (f"checkpoint='{tiny_checkpoint}'", "format=torch_export", f"input={INPUT['torch_export']}")
    files["torch_export"] = export(compose(*overrides, config_name="export"), tmp_path_factory.mktemp("export"))
    return files


@pytest.fixture(scope="session")
def loaded(exported):
    """For each format what runs the file, and the metadata in it."""
    with quiet():
        return {format: EXPORTERS[format].load(path) for format, path in exported.items()}


@pytest.fixture(scope="session")
def expected(tiny_checkpoint):
    """The checkpoint's logits for IMAGES, normalized by hand."""
    trained = load_trained(tiny_checkpoint)
    mean, std = (torch.tensor(trained.facts["normalization"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return trained.module((IMAGES / 255 - mean) / std)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_the_file_gives_the_checkpoints_logits_for_any_batch(loaded, expected, format):
    run, _ = loaded[format]
    images = IMAGES if INPUT[format] == "uint8" else IMAGES / 255
    assert (expected - expected.mean(dim=0)).abs().max() > 1e-3  # otherwise the next lines would show nothing
    for size in (1, 5, 12):
        with torch.no_grad():
            assert (run(images[:size]) - expected[:size]).abs().max() < 1e-5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_the_file_says_what_it_is(loaded, tiny_checkpoint, format):
    _, found = loaded[format]
    trained = load_trained(tiny_checkpoint)
    assert json.loads(found["classes"]) == list(trained.classes)
    assert found["input"].startswith("uint8" if INPUT[format] == "uint8" else "float32")
    assert "softmax" in found["output"]
    normalization = json.loads(found["normalization"])
    assert (normalization["mean"][0], normalization["std"][0]) == (0.485, 0.229)
    provenance = json.loads(found["provenance"])
    assert provenance["facts"]["split_sha256"] == trained.facts["split_sha256"]
    assert provenance["config"]["data"]["name"] == "synthetic"


@pytest.mark.slow
def test_onnx_runs_with_onnx_runtime_alone(exported, expected, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    code = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(given,) = session.get_inputs()
assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
images = numpy.load("images.npy")
numpy.save("logits.npy", session.run(["logits"], {"images": images})[0])
assert session.run(["logits"], {"images": images[:1]})[0].shape == (1, 10)
assert len(json.loads(session.get_modelmeta().custom_metadata_map["classes"])) == 10
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "cifar_tl", "lightning", "onnx")]
"""
    command = [sys.executable, "-c", code, str(exported["onnx"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "logits.npy") - expected.numpy()).max() < 1e-4


@pytest.mark.slow
def test_torch_export_needs_nothing_of_this_program(exported, expected, tmp_path):
    torch.save((IMAGES / 255, expected), tmp_path / "images.pt")
    code = """
import sys
import torch
images, expected = torch.load("images.pt")
with torch.no_grad():
    logits = torch.export.load(sys.argv[1]).module()(images)
assert (logits - expected).abs().max() < 1e-4
assert not [name for name in sys.modules if name.split(".")[0] in ("cifar_tl", "lightning", "torchvision")]
"""
    command = [sys.executable, "-c", code, str(exported["torch_export"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_version_of_onnxs_operators_can_be_chosen(compose, tiny_checkpoint, tmp_path):
    import onnx

    export(compose(f"checkpoint='{tiny_checkpoint}'", "opset=21", config_name="export"), tmp_path)
    assert [entry.version for entry in onnx.load(tmp_path / "best.onnx").opset_import if not entry.domain] == [21]


@pytest.fixture
def somebodys(tiny_checkpoint, tmp_path):
    """The checkpoint as if its run had had absolute paths."""
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["cifar_tl"]["config"]["model"]["weights"] = "/home/somebody/weights/mine.pth"
    checkpoint["cifar_tl"]["config"]["finetune"]["features_folder"] = "C:\\Users\\somebody\\features"
    checkpoint["cifar_tl"]["config"]["logger"] = {"mlflow": {"tracking_uri": "https://somebody/mlflow"}}
    torch.save(checkpoint, tmp_path / "somebodys.ckpt")
    return tmp_path / "somebodys.ckpt"


@pytest.mark.parametrize("format", FORMATS)
def test_no_absolute_path_travels_in_the_file(compose, somebodys, tmp_path, format):
    path = export(compose(f"checkpoint='{somebodys}'", f"format={format}", config_name="export"), tmp_path / "exported")
    parts = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    here = Path(cifar_tl.__file__).parents[1]
    for private in (b"somebody/", b"Users", str(here).encode(), str(Path(torch.__file__).parent).encode()):
        assert not any(private in part for part in parts), private
    with quiet():
        _, found = EXPORTERS[format].load(path)
    config = json.loads(found["provenance"])["config"]
    assert (config["model"]["weights"], config["finetune"]["features_folder"]) == ("mine.pth", "features")


def test_images_that_are_not_the_runs_are_said_to_be_others(compose, tiny_checkpoint, tmp_path, caplog):
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["cifar_tl"]["config"]["data"]["split_seed"] = 1
    torch.save(checkpoint, tmp_path / "best.ckpt")
    with caplog.at_level("INFO"):
        export(compose(f"checkpoint='{tmp_path}'", "format=torch_export", config_name="export"), tmp_path)
    assert "validation images that are not the run's" in caplog.text


@pytest.mark.parametrize("bug", ["normalization", "nan"])
@pytest.mark.slow
def test_no_file_is_left_when_its_logits_differ(compose, tiny_checkpoint, tmp_path, monkeypatch, bug):
    def forward(self, images):
        if bug == "nan":
            return self.head(self.backbone(images.float() * self.scale + self.offset)) * float("nan")
        return self.head(self.backbone(images.float() * self.scale))

    monkeypatch.setattr(ImageClassifier, "forward", forward)
    cfg = compose(f"checkpoint='{tiny_checkpoint}'", "format=torch_export", config_name="export")
    with pytest.raises(UserError, match=r"not exported: logits .* more than tolerance=0\.0001"):
        export(cfg, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_earlier_file_survives_a_refused_export(compose, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_tl.export.compare", lambda *arguments: (1.0, 0))
    path = tmp_path / "model.pt2"
    path.write_text("earlier")
    overrides = (f"checkpoint='{tiny_checkpoint}'", "format=torch_export", f"output='{path}'")
    with pytest.raises(UserError, match="not exported"):
        export(compose(*overrides, config_name="export"), tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt2", "earlier")]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_a_file_that_cannot_be_written_whole_is_none(compose, tiny_checkpoint, tmp_path, format):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = compose(f"checkpoint='{tiny_checkpoint}'", f"format={format}", config_name="export")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # as a full disk, but that it has other words
    try:
        with pytest.raises(UserError, match=r"output=.* cannot be written: File too large"):
            export(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_no_image_of_the_data_travels_in_the_file(exported):
    # torch.export stores its example input, and with a slice of a larger tensor all of that
    content = exported["torch_export"].read_bytes()
    images = Synthetic(60, 20).train()[0]
    for given in (images, images.float() / 255):
        assert not any(image.numpy().tobytes() in content for image in given)


@pytest.mark.slow
def test_without_the_data_random_images_are_compared_and_it_is_said(compose, tiny_checkpoint, tmp_path, caplog):
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["cifar_tl"]["config"]["data"] |= {"name": "cifar10", "root": "nowhere", "download": True}
    torch.save(checkpoint, tmp_path / "best.ckpt")
    cfg = compose(f"checkpoint='{tmp_path}/best.ckpt'", "format=torch_export", "parity_images=7", config_name="export")
    with caplog.at_level("INFO"):
        export(cfg, tmp_path)
    assert "same class for 7 of 7: 7 random images, data.root= saying where the run's are: " in caplog.text


def test_the_images_to_compare_on_are_where_they_are_said_to_be(compose, tiny_checkpoint, tmp_path):
    for name in ("cat", "dog"):
        for number in range(4):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    config = OmegaConf.create(OmegaConf.to_container(compose("data=folder", "data.root=nowhere", "data.val_size=2")))
    trained = replace(load_trained(tiny_checkpoint), config=config)
    assert "data.root= saying where the run's are: data.root=nowhere" in parity_images(trained, None, 7)[1]
    images, what = parity_images(trained, tmp_path, 7)
    assert (images.shape, what) == ((2, 3, 32, 32), "2 validation images that are not the run's")
    with pytest.raises(UserError, match="elsewhere"):
        parity_images(trained, tmp_path / "elsewhere", 7)
    (tmp_path / "train" / "dog" / "3.png").write_bytes(b"broken")
    trained.config.data.root = str(tmp_path)
    assert parity_images(trained, None, 7)[1].endswith(f"{tmp_path} cannot be used as it is")


def test_a_run_on_generated_images_takes_no_place_of_others(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match="would have no effect: the run's images are generated"):
        parity_images(load_trained(tiny_checkpoint), tmp_path, 7)


def test_a_checkpoint_is_known_by_the_hash_of_what_was_read(tiny_checkpoint, tmp_path):
    copy = shutil.copy(tiny_checkpoint, tmp_path / "best.ckpt")
    trained = load_trained(copy)
    copy.write_bytes(b"of a run that went on")
    assert json.loads(metadata(trained, "uint8")["provenance"])["checkpoint_sha256"] == file_sha256(tiny_checkpoint)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["format=onxn"], "format=onxn is not allowed: choose onnx, torch_export. Did you mean onnx?"),
        (["input=float32"], "input=float32 is not allowed: choose uint8, float. Did you mean float?"),
        (["output=model.onnx", "format=torch_export"], "output=model.onnx should end in .pt2"),
        (["output=/dev/null/model.onnx"], "output=/dev/null/model.onnx cannot be written: /dev/null is no folder"),
        (["tolerance=-1"], "tolerance=-1 is not allowed"),
        (["opset=17"], "opset=17 is not allowed: torch writes 18 to 25."),
        (["opset=18", "format=torch_export"], "opset=18 is for format=onnx; format=torch_export has none."),
        (["format=torchscript"], "format=torchscript is not allowed: choose onnx, torch_export."),
        (["parity_images=0"], "parity_images=0 is not allowed"),
        (["checkpoint=nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_a_readable_error(tiny_checkpoint, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, "export", [f"checkpoint='{tiny_checkpoint}'", *arguments]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_a_missing_package_is_named(compose, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_tl.export.find_spec", lambda name: None if name == "onnxscript" else "there")
    with pytest.raises(UserError, match="not installed: `pip install onnxscript`"):
        export(compose("checkpoint=nowhere.ckpt", config_name="export"), tmp_path)


@pytest.mark.slow
def test_the_command_says_what_it_did_and_nothing_else(onnx):
    _, done = onnx
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["parity", "input", "output", "model"]
    assert "20 validation images of the run" in done.stdout
