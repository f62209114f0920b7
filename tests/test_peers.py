"""`--only peers`: the table, and the Keras program's process, with a stand-in for Keras."""

import json
import os
import sys
from pathlib import Path

import pytest
import torchvision
from torchvision.models.resnet import Bottleneck

from cifar_tl.benchmarks import peers, recipes
from cifar_tl.benchmarks.__main__ import main
from cifar_tl.benchmarks.setting import Setting
from cifar_tl.errors import UserError

STAND_IN = """
import json, os, pathlib, sys

pathlib.Path("keras.pid").write_text(str(os.getpid()))
print("loading", file=sys.stderr)
speeds = {"frozen": 1000, "fine-tune": 500}
for line in sys.stdin:
    print(json.dumps({"images_per_s": speeds[line.strip()]}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(peers, "PROGRAM", program)
    monkeypatch.setattr(peers, "keras_python", lambda: Path(sys.executable))
    return program


def is_gone(tmp_path):
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "keras.pid").read_text()), 0)
    return True


@pytest.mark.slow
def test_peers_are_a_row_each_and_the_process_is_gone(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.models, "resnet50", lambda: torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1]))
    small = {name: [*recipe, "data.batch_size=32"] for name, recipe in peers.RECIPES.items()}
    given = {"BATCH_SIZE": 32, "TIMED": 64, "RECIPES": small}
    for name, value in given.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(recipes, "TIMED", 64)
    assert main(["--only", "peers", "--rounds", "1", "--limit", "20"]) == 0
    (folder,) = (tmp_path / "outputs" / "bench").iterdir()
    table = json.loads((folder / "bench.json").read_text())["peers"]
    assert [row["what"] for row in table] == [peers.KERAS, peers.TUTORIAL, *peers.RECIPES]
    assert (table[0]["frozen images/s"], table[0]["fine-tune images/s"]) == (1000, 500)
    for row in table:
        assert row["frozen images/s"] > 0 < row["fine-tune images/s"]
        assert row["times as fast as Keras"] == pytest.approx(1350 / row["s of 10 + 10 epochs, computed"])
    assert is_gone(tmp_path)
    assert f"| {peers.KERAS} | 1,000 |" in capsys.readouterr().out


def test_ratios_are_of_the_same_round():
    figures = {
        f"{peers.KERAS}: frozen": [100.0, 50.0, 100.0],
        f"{peers.KERAS}: fine-tune": [100.0, 50.0, 100.0],
        "other: frozen": [200.0, 100.0, 600.0],
        "other: fine-tune": [200.0, 100.0, 200.0],
    }
    keras, other = peers.rows(figures)
    assert keras["s of 10 + 10 epochs, computed"] == pytest.approx(9000)  # 2 x 450,000 images at 100 a second
    assert (keras["times as fast as Keras"], keras["times low"], keras["times high"]) == (1, 1, 1)
    assert (other["frozen images/s"], other["frozen low"], other["frozen high"]) == (200, 100, 600)
    assert other["s of 10 + 10 epochs, computed"] == pytest.approx(4500)
    ratios = (other["times as fast as Keras"], other["times low"], other["times high"])
    assert ratios == pytest.approx((2, 2, 3))
    assert other["n"] == 3


@pytest.mark.slow
def test_keras_is_killed_after_an_error(stand_in, tmp_path):
    def fail():
        with peers.keras(Path(sys.executable), tmp_path / "log") as speed:
            assert speed("frozen") == 1000
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert is_gone(tmp_path)


@pytest.mark.slow
def test_a_keras_that_fails_is_one_sentence(stand_in, tmp_path, monkeypatch, capsys):
    stand_in.write_text(STAND_IN.replace("for line", "sys.stdin.readline()\nsys.exit('out of memory')\nfor line"))
    monkeypatch.setattr(peers, "tutorial", lambda setting: lambda phase: 1.0)
    monkeypatch.setattr(peers, "RECIPES", {})
    assert main(["--only", "peers"]) == 1
    assert capsys.readouterr().err == "error: Keras ended with exit code 1 in its phase frozen: out of memory\n"
    assert is_gone(tmp_path)


def test_a_python_that_keras_is_not_built_for_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert main(["--only", "peers"]) == 1
    assert "is not built for Python 3.14: use 3.11 to 3.13." in capsys.readouterr().err


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="TensorFlow is not built for it")
@pytest.mark.slow
def test_an_installation_that_fails_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert main(["--only", "peers"]) == 1
    shown = capsys.readouterr()
    assert f"Installing {peers.TENSORFLOW}" in shown.out
    assert shown.err.startswith(f"error: {peers.TENSORFLOW} cannot be installed into outputs/bench/keras-env")
    assert f"No matching distribution found for {peers.TENSORFLOW}" in shown.err
    assert shown.err.count("\n") == 1
    assert not list((tmp_path / "outputs/bench/keras-env").glob("*.installed"))  # the next call tries again


def test_peers_are_measured_on_a_cpu_only(tmp_path):
    with pytest.raises(UserError, match="--device cuda: give --device cpu"):
        peers.measure(Setting("cuda", "32-true", None, None, 1, None, (), tmp_path))
