"""cifar_tl/runs/README.md says what metrics.json holds."""

import json
import re
from pathlib import Path


def test_every_key_of_metrics_json_is_described_and_every_described_key_is_there(tiny_run):
    readme = (Path(__file__).parents[2] / "cifar_tl" / "runs" / "README.md").read_text()
    table = readme.partition("## metrics.json")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    described = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    assert sorted(described) == sorted(json.loads((tiny_run / "metrics.json").read_text()))
