import subprocess
import sys

import pytest
import torch

from cifar_tl import checkpoints
from cifar_tl.checkpoints import PacedCheckpointIO


@pytest.fixture
def slow_disk(monkeypatch):
    """A writer for which writing takes long, so that the second checkpoint is not due for a long time."""
    checkpoint_io = PacedCheckpointIO()
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
    checkpoint_io = PacedCheckpointIO()
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


@pytest.mark.slow
def test_loading_a_checkpoint_takes_no_callback_and_no_report():
    """Nor matplotlib, for which lint-imports has a contract: torchmetrics imports it wherever it is installed."""
    code = "import sys, cifar_tl.checkpoints; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "cifar_tl.model.module" in loaded
    rooms = ("cifar_tl.callbacks", "cifar_tl.reports", "cifar_tl.build")
    assert [name for name in loaded if name.startswith(rooms)] == []
