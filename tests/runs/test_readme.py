"""cifar_tl/runs/README.md says what metrics.json holds."""

import json
import re
from pathlib import Path

import pytest
import torch

from cifar_tl.model.module import ResNet50Classifier

README = (Path(__file__).parents[2] / "cifar_tl" / "runs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.resnet50
@pytest.mark.parametrize("upscale", [1, 2])
def test_the_code_for_torch_alone_computes_a_runs_features(tmp_path, upscale):
    model = ResNet50Classifier(["a", "b"], upscale=upscale).eval()
    torch.save(
        {"state_dict": model.state_dict(), "hyper_parameters": {"upscale": upscale}, "cifar_tl": {}},
        tmp_path / "best.ckpt",
    )
    code = README.partition("Without this package")[2].partition("```python\n")[2].partition("```")[0]
    names = {"images": (images := torch.randn(2, 3, 32, 32))}
    with torch.inference_mode():
        exec(code.replace("RUN/checkpoints", str(tmp_path)), names)
        torch.testing.assert_close(names["features"], model.backbone(images), rtol=1e-4, atol=1e-4)


def test_every_key_of_metrics_json_is_described_and_every_described_key_is_there(tiny_run):
    table = README.partition("## metrics.json")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    described = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    assert sorted(described) == sorted(json.loads((tiny_run / "metrics.json").read_text()))
