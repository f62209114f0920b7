"""What cifar_tl/README.md shows under "From Python" does what it says."""

from pathlib import Path

import pytest
from conftest import TINY

import cifar_tl
from cifar_tl.model.module import ResNet50Classifier


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's, of a Trainer used by hand
def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    text = (Path(cifar_tl.__file__).parent / "README.md").read_text(encoding="utf-8")
    shown = text.partition("## From Python\n")[2].partition("\n## ")[0]
    whole, parts = (block.partition("```")[0] for block in shown.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(whole.replace('["experiment=demo", "seed=1"]', repr([*TINY, "trainer.accelerator=cpu"])), names)
    assert 0 <= names["metrics"]["test/acc"] <= 1
    assert (tmp_path / "outputs" / "mine" / "metrics.json").is_file()
    exec(parts, names)
    assert names["trainer"].current_epoch == 4
    assert not names["guard"]._before  # it has compared the model in both phases
    assert sum(map(len, names["probabilities"])) == len(names["datamodule"].targets("test"))
    (checkpoint,) = tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt")
    assert ResNet50Classifier.load_from_checkpoint(checkpoint, weights_only=True).classes == names["module"].classes
