import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar_tl import checkpoints
from cifar_tl.checkpoints import PacedCheckpointIO, load_trained
from cifar_tl.errors import UserError
from cifar_tl.evaluate import evaluate


@pytest.fixture
def slow_disk(tmp_path):
    """A writer for which writing takes long, so that the second checkpoint is not due for a long time."""
    checkpoint_io = PacedCheckpointIO(tmp_path)
    checkpoint_io.SHARE = 1e-9
    return checkpoint_io


def stored(path):
    return torch.load(path, weights_only=True)["x"].item()


def test_the_first_checkpoint_is_written_at_once_and_later_ones_when_due(slow_disk, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    x = torch.tensor(1.0)
    slow_disk.save_checkpoint({"x": x}, path)
    assert stored(path) == 1
    slow_disk.save_checkpoint({"x": x.add_(1)}, path)
    slow_disk.save_checkpoint({"x": x.add_(1)}, path)
    x.add_(1)  # training goes on; what was saved stays as it was
    assert stored(path) == 1
    assert slow_disk.load_checkpoint(path, weights_only=True)["x"] == 3
    assert stored(path) == 3


def test_every_checkpoint_is_written_at_once_where_that_costs_little(tmp_path):
    checkpoint_io = PacedCheckpointIO(tmp_path)
    checkpoint_io.SHARE = float("inf")
    for i in range(3):
        checkpoint_io.save_checkpoint({"x": torch.tensor(i)}, tmp_path / "last.ckpt")
        assert stored(tmp_path / "last.ckpt") == i


def test_a_full_disk_leaves_the_old_checkpoint_whole(slow_disk, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    slow_disk.save_checkpoint({"x": torch.tensor(1)}, path)
    slow_disk.save_checkpoint({"x": torch.tensor(2)}, path)

    def full(checkpoint, file):
        file.write_bytes(b"part")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError, match="disk is full"):
        slow_disk.flush()
    assert stored(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def changed(tiny_checkpoint, tmp_path):
    """Save the tiny checkpoint with changes."""

    def changed(change):
        content = torch.load(tiny_checkpoint, weights_only=True)
        change(content)
        path = tmp_path / "changed.ckpt"
        torch.save(content, path)
        return path

    return changed


def test_keys_that_an_older_checkpoint_does_not_have_get_their_defaults(changed, compose, tiny_checkpoint):
    def older(content):
        config = content["cifar_tl"]["config"]
        del config["model"]["upscale"], config["data"]["one_hot"], config["augment"]
        del content["hyper_parameters"]["upscale"]

    path = changed(older)
    trained = load_trained(path)
    assert (trained.config.model.upscale, trained.config.data.one_hot) == (1, False)
    assert trained.config.data.train_size == 60
    assert "upscale" not in trained.saved_config["model"]
    evaluated, expected = (
        evaluate(compose(f"checkpoint='{checkpoint}'", "trainer.accelerator=cpu", config_name="evaluate"))
        for checkpoint in (path, tiny_checkpoint)
    )
    assert evaluated.pop("checkpoint_sha256") != expected.pop("checkpoint_sha256")
    assert evaluated == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["cifar_tl"].update(format=99), "has format 99, this version of cifar_tl reads 1"),
        (lambda content: content["cifar_tl"].pop("format"), "has format None, this version of cifar_tl reads 1"),
        (lambda content: content["hyper_parameters"].update(depth=7), "does not fit this version of cifar_tl"),
        (lambda content: content["cifar_tl"]["facts"].pop("normalization"), "does not fit this version of cifar_tl"),
        (lambda content: content["cifar_tl"]["facts"]["classes"].pop(), "another number of classes"),
        (lambda content: content["cifar_tl"]["config"].pop("data"), "does not fit this version of cifar_tl"),
        (lambda content: content.pop("cifar_tl"), "was not written by cifar_tl.train"),
        (lambda content: content.update(code=argparse.Namespace()), "was not written by cifar_tl.train"),
    ],
    ids=["later", "none", "unknown argument", "no normalization", "classes", "no data", "somebody else's", "code"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_words(changed, change, said):
    with pytest.raises(UserError, match=said) as raised:
        load_trained(changed(change))
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"text, not a checkpoint", b"\x80\x02cposix\nsystem\n."])
def test_what_is_no_checkpoint_is_refused_without_advice_to_run_its_code(tmp_path, content):
    (tmp_path / "best.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read: it is damaged or no checkpoint") as raised:
        load_trained(tmp_path / "best.ckpt")
    assert "weights_only" not in str(raised.value)


def test_a_checkpoint_with_a_few_bytes_changed_is_refused(tiny_checkpoint, tmp_path):
    content = bytearray(tiny_checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "best.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read: it is damaged or no checkpoint"):
        load_trained(tmp_path / "best.ckpt")


def test_a_runs_folder_means_its_best_checkpoint(tiny_run, tmp_path):
    for folder in (tiny_run, tiny_run / "checkpoints"):
        assert load_trained(folder).path == tiny_run / "checkpoints" / "best.ckpt"
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "0").symlink_to(tiny_run)
    with pytest.raises(UserError, match=r"there is no best\.ckpt in this folder.* There is .*sweep/0/checkpoints/best"):
        load_trained(tmp_path / "sweep")


def test_another_file_of_a_run_leads_to_its_folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(f"Give the run's folder, {tmp_path}.")):
        load_trained(tmp_path / "metrics.json")


@pytest.mark.slow
def test_loading_a_checkpoint_takes_no_callback_and_no_report():
    """Nor matplotlib, for which lint-imports has a contract: torchmetrics imports it wherever it is installed."""
    code = "import sys, cifar_tl.checkpoints; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "cifar_tl.model.module" in loaded
    modules = ("cifar_tl.callbacks", "cifar_tl.reports", "cifar_tl.build", "cifar_tl.trainer")
    assert [name for name in loaded if name.startswith(modules)] == []


def test_copies_that_a_gpu_makes_are_awaited_before_they_are_written(tmp_path, monkeypatch):
    order, write = [], checkpoints._write
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("waited"))
    monkeypatch.setattr(checkpoints, "_write", lambda *args: (order.append("wrote"), write(*args)))
    io = PacedCheckpointIO(tmp_path)
    io._due = float("inf")
    io.save_checkpoint({"a": torch.ones(2)}, tmp_path / "last.ckpt")
    assert order == []
    io.teardown()
    assert order == ["waited", "wrote"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_checkpoint_holds_the_values_from_before_the_next_step(tmp_path):
    weight = torch.zeros(64, 32, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    copy = checkpoints._copy_to_host({"weight": weight})["weight"]
    for _ in range(100):
        weight.add_(1)
    torch.cuda.synchronize()
    assert torch.equal(copy, torch.zeros(64, 32, 3, 3))
    assert copy.stride() == weight.stride()


def test_no_kill_leaves_a_checkpoint_to_resume_from_without_the_best_one_that_it_names(tmp_path, monkeypatch):
    order, move = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(Path(target).name), move(self, target))[1])
    io = PacedCheckpointIO(tmp_path)
    for name in ("best.ckpt", "last.ckpt"):
        io.save_checkpoint({"epoch": 0}, tmp_path / name)
    assert order == ["best.ckpt", "last.ckpt"]


def test_a_best_checkpoint_of_somebodys_own_waits_for_nothing(tmp_path):
    io = PacedCheckpointIO(tmp_path / "run")
    io.save_checkpoint({"epoch": 0}, tmp_path / "run" / "last.ckpt")
    io._due = 0.0
    io.save_checkpoint({"epoch": 0}, tmp_path / "mine" / "best.ckpt")
    assert (tmp_path / "mine" / "best.ckpt").is_file()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    io.save_checkpoint({"epoch": 1}, tmp_path / "link" / "best.ckpt")  # the run's, by another name
    assert not (tmp_path / "run" / "best.ckpt").exists()


def test_what_is_held_does_not_change_with_the_training(tmp_path):
    io = PacedCheckpointIO(tmp_path)
    io._due = float("inf")
    moment = torch.zeros(2)
    io.save_checkpoint({"optimizer_states": [{"state": {0: {"exp_avg": moment}}}]}, tmp_path / "last.ckpt")
    moment.add_(1)
    io.teardown()
    assert torch.load(tmp_path / "last.ckpt")["optimizer_states"][0]["state"][0]["exp_avg"].tolist() == [0, 0]


def test_the_best_checkpoint_carries_no_optimizer(tiny_checkpoint):
    assert "optimizer_states" not in torch.load(tiny_checkpoint, weights_only=True)
