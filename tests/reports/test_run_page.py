"""The page of a run: right figures, alone in the world, and there for damaged runs, too."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from handmade import CLASSES, make_run
from sklearn import metrics as sk

from cifar_tl.reports.__main__ import main


class Page(HTMLParser):
    """Tables as lists of rows of text, and everything that could ask for something from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.wanted, self.tags, self.without_alt, self.in_cell = [], [], set(), 0, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True
        elif tag == "img" and not given.get("alt"):
            self.without_alt += 1
        self.wanted += [given[key] for key in ("src", "xlink:href", "srcset") if key in given]
        self.wanted += [given["href"]] if tag == "link" else []

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, first):
        return next(table for table in self.tables if table[0][0] == first)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("drawn") / "run", ["data.limit=400"])
    assert main([str(run)]) == 0
    return run, (run / "report.html").read_text()


def test_figures_are_scikit_learns_from_the_predictions_file(drawn):
    run, text = drawn
    with np.load(run / "predictions.npz", allow_pickle=False) as data:
        targets, predicted = data["test_targets"], data["test_logits"].argmax(axis=1)
    assert f"<strong>{100 * sk.accuracy_score(targets, predicted):.2f} %</strong>" in text
    precision, recall, f1, support = sk.precision_recall_fscore_support(targets, predicted)
    rows = {row[0]: row[1:] for row in Page(text).table("class")[1:]}
    for i, name in enumerate(CLASSES):
        shown = [rows[name][0], rows[name][1], rows[name][3], rows[name][5]]
        assert shown == [f"{support[i]}", *(f"{100 * x[i]:.1f}" for x in (recall, precision, f1))]
    both = sk.confusion_matrix(targets, predicted)
    assert both[3, 4] == both[~np.eye(5, dtype=bool)].max()
    assert Page(text).table("pair")[1][0] == "cat ⇄ deer"
    assert f"cat said to be deer: {both[3, 4]} (" in Page(text).table("pair")[1][1]


def test_temperature_lowers_the_validation_loss(drawn):
    rows = {row[0]: row[1:] for row in Page(drawn[1]).table("")[1:]}
    before, after = map(float, rows["validation: negative log-likelihood"])
    assert after < before
    assert len(set(rows["test: accuracy"])) == 1


def test_what_the_thaw_changed(drawn):
    with np.load(drawn[0] / "predictions.npz", allow_pickle=False) as data:
        targets = data["val_targets"]
        before, after = (
            sk.recall_score(targets, data[key].argmax(axis=1), average=None)
            for key in ("frozen_val_logits", "val_logits")
        )
    rows = Page(drawn[1]).table("class, validation")
    shown = {row[0]: row[2:5] for row in rows[1:]}
    for i, name in enumerate(CLASSES):
        change = f"{100 * (after[i] - before[i]):+.1f}"
        assert shown[name] == [f"{100 * before[i]:.1f}", f"{100 * after[i]:.1f}", change]
    changes = [float(row[4]) for row in rows[1:-1]]
    assert changes == sorted(changes, reverse=True)


def test_page_asks_for_nothing(drawn):
    page = Page(drawn[1])
    assert page.wanted
    assert all(reference.startswith(("data:", "#")) for reference in page.wanted)
    assert "url(http" not in drawn[1]
    assert "@import" not in drawn[1]
    assert "script" not in page.tags
    assert page.without_alt == 0
    assert len(drawn[1].encode()) < 5e6


def test_figures_are_files_too(drawn):
    names = {path.name for path in (drawn[0] / "figures").iterdir()}
    for figure in ("accuracy", "loss", "learning_rates", "confusion", "per_class", "reliability", "mistakes"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names


def test_plan_and_what_happened(drawn):
    frozen, tuned = Page(drawn[1]).table("phase")[1:3]
    assert frozen[:6] == ["frozen", "0..1", "head", "0.001", "frozen", "2 of 2"]
    assert tuned[:6] == ["fine-tune", "2..3", "head and layer4", "0.001", "0.0001", "2 of 2"]
    assert "validation accuracy went from 40.00 to 50.00 % (+10.00 points)" in drawn[1]
    assert "python -m cifar_tl.train data.limit=400 seed=0" in drawn[1]
    assert "0123abcd" in drawn[1]


@pytest.mark.slow
def test_same_files_same_page(drawn):
    before = {path.name: path.read_bytes() for path in (drawn[0] / "figures").iterdir()}
    assert main([str(drawn[0])]) == 0
    assert (drawn[0] / "report.html").read_text() == drawn[1]
    assert {path.name: path.read_bytes() for path in (drawn[0] / "figures").iterdir()} == before


def test_names_are_escaped(tmp_path):
    overrides = ["data.root=<script>alert(1)</script>"]
    run = make_run(tmp_path / "run", overrides, status="failed", experiment="<b>")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "<script" not in text
    assert "<b>," not in text


@pytest.mark.parametrize("status", ["running", "failed"])
def test_unfinished_run_says_so(tmp_path, status):
    run = make_run(tmp_path / "run", status=status, plan=[{"name": "frozen", "start": 0, "end": 9, "stages": []}])
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert f"This run has not finished (its record says: {status}). 4 of 9 epochs are recorded" in text
    assert 'id="s0"' in text
    assert "Accuracy" in text


def damage_metrics(run):
    (run / "metrics.json").write_text('{"status": "finished", ')
    return "metrics.json cannot be read", "Confusion"


def half_metrics(run):
    (run / "metrics.json").write_text('{"status": "finished", "epoch": [0], "phases": 3}')
    return "'Curves' could not be drawn", "Confusion"


def truncate_predictions(run):
    (run / "predictions.npz").write_bytes((run / "predictions.npz").read_bytes()[:500])
    return "predictions.npz cannot be read", "Confusion"


def remove_predictions(run):
    (run / "predictions.npz").unlink()
    return "predictions.npz is missing", "Confusion"


def remove_images(run):
    (run / "images.npz").unlink()
    return "images.npz is missing", "Confusion"


def other_predictions(run):
    metrics = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(re.sub(r'"test/acc": [0-9.]+', '"test/acc": 0.123', metrics))
    return "they are not of the same run", "Confusion"


@pytest.mark.parametrize(
    "damage",
    [damage_metrics, half_metrics, truncate_predictions, remove_predictions, remove_images, other_predictions],
)
def test_damage_is_named_and_the_rest_drawn(tmp_path, damage):
    run = make_run(tmp_path / "run")
    said, still_there = damage(run)
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text().replace("&#x27;", "'")
    assert said in text
    assert still_there in text


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    assert main([folder]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_reports_import_no_torch_and_help_no_matplotlib(tmp_path):
    code = (
        "import sys, cifar_tl.reports.__main__; assert 'matplotlib' not in sys.modules; "
        "import cifar_tl.reports.run_page, cifar_tl.reports.comparison_page; "
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
