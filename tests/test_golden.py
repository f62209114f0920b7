"""What others read of a run - files, keys, the page, the configs - compared with what was agreed on.

`pytest tests/test_golden.py --update-golden` writes the files of tests/golden anew; the diff is then to be justified.
"""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from handmade import make_run
from omegaconf import OmegaConf

from cifar_tl.cli import conf_folder
from cifar_tl.reports.__main__ import main
from cifar_tl.runs.record import flat

GOLDEN = Path(__file__).parent / "golden"
GROUPS = ("augment", "callbacks", "data", "experiment", "ablate", "finetune", "logger", "model", "trainer")
"""All but `sweep`, whose files only fill hydra.sweeper."""


class Text(HTMLParser):
    """The words of a page, a line per element; drawings and styles left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.hidden = 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in ("svg", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("svg", "style")

    def handle_data(self, data):
        if not self.hidden and data.strip():
            self.lines.append(" ".join(data.split()))


def kind(value: object) -> object:
    """Return the type of a JSON value; of a list that of its first item, of an object those of its values."""
    if isinstance(value, dict):
        return {key: kind(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [kind(value[0])] if value else []
    return type(value).__name__


@pytest.fixture
def agreed(request):
    """Compare a text with a golden file, or write the file."""

    def agreed(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text()

    return agreed


def test_metrics_json_has_the_agreed_keys_and_types(tiny_run, agreed):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    metrics |= {"git_commit": str(metrics["git_commit"]), "git_dirty": bool(metrics["git_dirty"])}
    metrics["versions"] = {key: str(value) for key, value in metrics["versions"].items()}
    agreed("metrics.json", json.dumps(kind(metrics), indent=1) + "\n")


def test_predictions_npz_has_the_agreed_arrays(tiny_run, agreed):
    with np.load(tiny_run / "predictions.npz", allow_pickle=False) as data:
        lines = [f"{name} {data[name].dtype.kind} {data[name].shape}" for name in sorted(data)]
    agreed("predictions.txt", "\n".join(lines) + "\n")


def test_a_runs_page_says_what_was_agreed(tmp_path, agreed):
    run = make_run(tmp_path / "run", ["data.limit=400"])
    assert main([str(run)]) == 0
    agreed("page.txt", "\n".join(Text((run / "report.html").read_text()).lines) + "\n")


@pytest.mark.slow
def test_a_comparison_says_what_was_agreed(tmp_path, agreed, no_run_pages):
    for job, (rate, seed) in enumerate([("1e-3", 0), ("1e-3", 1), ("1e-4", 0), ("1e-4", 1)]):
        make_run(tmp_path / "sweep" / str(job), [f"finetune.head_lr={rate}"], seed, strength=1.5 if job < 2 else 1.2)
    assert main([str(tmp_path / "sweep")]) == 0
    page = (tmp_path / "sweep" / "sweep_report.html").read_text()
    agreed("comparison.txt", "\n".join(Text(page).lines) + "\n")


@pytest.mark.slow
def test_every_choice_of_every_group_composes_to_what_was_agreed(compose, agreed):
    """The whole default config, and of every other choice the keys that differ."""
    default = compose()
    base, lines = flat(OmegaConf.to_container(default)), [OmegaConf.to_yaml(default)]
    for choice in sorted(f"{group}={path.stem}" for group in GROUPS for path in (conf_folder() / group).glob("*.yaml")):
        config = compose(choice, *(["data.root=FOLDER"] if choice == "data=folder" else []))
        own = flat(OmegaConf.to_container(config))
        lines.append(f"# {choice}")
        lines += [f"{key}: {json.dumps(value)}" for key, value in own.items() if value != base.get(key, "no such key")]
        lines += [*(f"without {key}" for key in base if key not in own), ""]
    agreed("configs.txt", "\n".join(lines))
