"""Export: files that stand on their own and give the checkpoint's logits, or no file."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from cifar_tl import cli
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.errors import UserError
from cifar_tl.export import export, main, metadata
from cifar_tl.exporters import EXPORTERS
from cifar_tl.model.classifier import ImageClassifier
from cifar_tl.trained import restore

FORMATS = list(EXPORTERS)
IMAGES = Synthetic(10, 12).test()[0]


@pytest.fixture(scope="session")
def exported(compose, tiny_checkpoint, tmp_path_factory):
    """Export each format once; return the file."""
    files = {}

    def exported(format, input="uint8"):
        if (format, input) not in files:
            folder = tmp_path_factory.mktemp("export")
            overrides = (f"checkpoint='{tiny_checkpoint}'", f"format={format}", f"input={input}")
            files[format, input] = export(compose(*overrides, config_name="export"), folder)
        return files[format, input]

    return exported


@pytest.fixture(scope="session")
def expected(tiny_checkpoint):
    """The checkpoint's logits for IMAGES, normalised by hand."""
    trained = restore(tiny_checkpoint)
    mean, std = (torch.tensor(trained.facts["normalisation"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return trained.module((IMAGES / 255 - mean) / std)


@pytest.mark.parametrize(
    ("format", "input"),
    [("onnx", "uint8"), ("onnx", "float"), ("torchscript", "uint8"), ("torch_export", "float")],
)
def test_the_file_gives_the_checkpoints_logits_for_any_batch(exported, expected, format, input):
    run, _ = EXPORTERS[format].load(exported(format, input))
    images = IMAGES if input == "uint8" else IMAGES / 255
    for size in (1, 5, 12):
        with torch.no_grad():
            assert (run(images[:size]) - expected[:size]).abs().max() < 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_says_what_it_is(exported, tiny_checkpoint, format):
    _, found = EXPORTERS[format].load(exported(format, "float" if format == "torch_export" else "uint8"))
    trained = restore(tiny_checkpoint)
    assert json.loads(found["classes"]) == list(trained.classes)
    assert found["input"].startswith("float32" if format == "torch_export" else "uint8")
    assert "softmax" in found["output"]
    normalisation = json.loads(found["normalisation"])
    assert (normalisation["mean"][0], normalisation["std"][0]) == (0.485, 0.229)
    provenance = json.loads(found["provenance"])
    assert provenance["facts"]["split_sha256"] == trained.facts["split_sha256"]
    assert provenance["config"]["data"]["name"] == "synthetic"


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
    command = [sys.executable, "-c", code, str(exported("onnx"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.abs(np.load(tmp_path / "logits.npy") - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize("format", ["torchscript", "torch_export"])
def test_the_other_files_need_nothing_of_this_program(exported, expected, tmp_path, format):
    torch.save((IMAGES if format == "torchscript" else IMAGES / 255, expected), tmp_path / "images.pt")
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
import torch
load = {"torch.jit.load" if format == "torchscript" else "lambda path: torch.export.load(path).module()"}
images, expected = torch.load("images.pt")
assert (load(sys.argv[1])(images) - expected).abs().max() < 1e-4
assert not [name for name in sys.modules if name.split(".")[0] in ("cifar_tl", "lightning", "torchvision")]
"""
    path = exported(format, "uint8" if format == "torchscript" else "float")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bug", ["normalisation", "nan"])
def test_no_file_is_left_when_its_logits_differ(compose, tiny_checkpoint, tmp_path, monkeypatch, bug):
    def forward(self, images):
        if bug == "nan":
            return self.head(self.backbone(images.float() * self.scale + self.offset)) * float("nan")
        return self.head(self.backbone(images.float() * self.scale))

    monkeypatch.setattr(ImageClassifier, "forward", forward)
    cfg = compose(f"checkpoint='{tiny_checkpoint}'", "format=torchscript", config_name="export")
    with pytest.raises(UserError, match=r"not exported: logits .* more than tolerance=0\.0001"):
        export(cfg, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_survives_a_refused_export(compose, tiny_checkpoint, tmp_path):
    (tmp_path / "model.pt").write_text("earlier")
    overrides = (
        f"checkpoint='{tiny_checkpoint}'",
        "format=torchscript",
        f"output='{tmp_path}/model.pt'",
        "tolerance=0",
    )
    with pytest.raises(UserError, match="tolerance=0"):
        export(compose(*overrides, "input=float", config_name="export"), tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt", "earlier")]


def test_no_training_image_travels_in_the_file(exported):
    # weights are 95 MB; the sample input that torch.export stores is two black images
    content = exported("torch_export", "float").read_bytes()
    images = Synthetic(60, 20).train()[0]
    assert not any((image / 255).numpy().tobytes()[:4000] in content for image in images)


def test_without_the_data_random_images_are_compared_and_it_is_said(compose, tiny_checkpoint, tmp_path, caplog):
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["cifar_tl"]["config"]["data"] |= {"name": "cifar10", "root": "nowhere", "download": True}
    torch.save(checkpoint, tmp_path / "best.ckpt")
    cfg = compose(f"checkpoint='{tmp_path}/best.ckpt'", "format=torchscript", "parity_images=7", config_name="export")
    with caplog.at_level("INFO"):
        export(cfg, tmp_path)
    assert "same class for 7 of 7: 7 random images: the run's data is not at nowhere" in caplog.text


def test_metadata_is_strings(tiny_checkpoint):
    assert all(isinstance(value, str) for value in metadata(restore(tiny_checkpoint), "uint8").values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["format=onxn"], "format=onxn is not allowed: choose onnx, torchscript, torch_export. Did you mean onnx?"),
        (["input=float32"], "input=float32 is not allowed: choose uint8, float. Did you mean float?"),
        (["output=model.onnx", "format=torchscript"], "output=model.onnx should end in .pt"),
        (["tolerance=-1"], "tolerance=-1 is not allowed"),
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
    monkeypatch.setattr("cifar_tl.exporters.find_spec", lambda name: None if name == "onnxscript" else "there")
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'cifar_tl\[export\]'"):
        export(compose("checkpoint=nowhere.ckpt", config_name="export"), tmp_path)


def test_the_command_says_what_it_did_and_nothing_else(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "cifar_tl.export", f"checkpoint='{tiny_checkpoint}'", "output=model.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["parity", "input", "output", "model"]
    assert "20 validation images of the run" in done.stdout
