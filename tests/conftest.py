import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: small networks gain nothing from more threads

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
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


RESNET50 = Backbone.blocks


@pytest.fixture(scope="session", autouse=True)
def few_blocks() -> Iterator[None]:
    """Give tests one block per layer, a third of the parameters; `@pytest.mark.resnet50` brings ResNet-50 back."""
    Backbone.blocks = (1, 1, 1, 1)
    yield
    Backbone.blocks = RESNET50


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
    folder = os.environ.get("CIFAR_TL_SHARED")
    if not folder:
        pytest.skip("CIFAR_TL_SHARED names no folder with the real data and weights")
    return Path(folder)


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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that writes the golden files anew."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")
