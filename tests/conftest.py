import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: small networks gain nothing from more threads

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from cifar_tl import cli
from cifar_tl.model.backbone import Backbone

TINY = (
    "experiment=demo",
    "data.train_size=60",
    "data.val_size=20",
    "data.test_size=20",
    "data.batch_size=16",
    "trainer.max_epochs=4",
    "logger=csv",
)
"""Both phases on 40 generated images: 3 steps an epoch, 2 + 2 epochs, seconds."""
SGD = ("finetune.optimizer=sgd", "finetune.weight_decay=0")


SMALL = [sys.executable, str(Path(__file__).with_name("small_command.py"))]
"""The command of a process like `cifar_tl.train` with few blocks and without pages."""

RESNET50 = Backbone.blocks


@pytest.fixture(scope="session", autouse=True)
def few_blocks() -> Iterator[None]:
    """Give tests one block per layer, a third of the parameters; `@pytest.mark.resnet50` brings ResNet-50 back."""
    Backbone.blocks = (1, 1, 1, 1)
    yield
    Backbone.blocks = RESNET50


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give a test the same random numbers whatever was tested before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def all_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give marked tests all blocks."""
    if request.node.get_closest_marker("resnet50"):
        monkeypatch.setattr(Backbone, "blocks", RESNET50)


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """Compose conf/train.yaml with overrides, as the command line does."""

    def compose(*overrides: str, config_name: str = "train") -> DictConfig:
        return cli.compose(config_name, overrides)

    return compose


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real CIFAR-10 and real ImageNet weights."""
    folder = Path(os.environ.get("CIFAR_TL_SHARED") or "nowhere")
    needed = (folder / "data" / "cifar-10-batches-py", folder / "weights" / "resnet50-imagenet-pq.pth")
    if missing := [str(path) for path in needed if not path.exists()]:
        pytest.skip(f"CIFAR_TL_SHARED names no folder with real data and weights: {missing[0]} is missing")
    return folder


@pytest.fixture(scope="session")
def tiny_run(compose: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of TINY, trained once; for reading only."""
    from cifar_tl.train import train

    folder = tmp_path_factory.mktemp("tiny")
    train(compose(*TINY), folder, "demo")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_run: Path) -> Path:
    """A checkpoint with ten classes of generated images."""
    return tiny_run / "checkpoints" / "best.ckpt"


@pytest.fixture
def no_run_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an empty page per run: drawing takes longer than the runs of these tests."""

    def leave(folder: Path, output: Path | None = None) -> Path:
        page = (output or folder) / "report.html"
        page.touch()
        return page

    monkeypatch.setattr("cifar_tl.reports.run_page.write_run_report", leave)
    monkeypatch.setattr("cifar_tl.train.write_run_report", leave)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that writes the golden files anew."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")
