"""The page of a run: right numbers, in one file that asks for nothing, and drawn for damaged runs, too."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from handmade import CLASSES, make_run
from PIL import Image
from torchmetrics.functional import classification as theirs

from cifar_tl.reports import figures
from cifar_tl.reports.__main__ import main
from cifar_tl.reports.original import beside_original
from cifar_tl.reports.page import FigureFolder
from cifar_tl.reports.run_predictions import classes
from cifar_tl.runs.folder import read_run
from cifar_tl.runs.predictions import read_images


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


def test_metrics_are_torchmetrics_from_the_predictions_file(drawn):
    run, text = drawn
    with np.load(run / "predictions.npz", allow_pickle=False) as data:
        targets, predicted = (torch.from_numpy(data[f"test_{key}"]) for key in ("targets", "logits"))
    accuracy = theirs.multiclass_accuracy(predicted, targets, len(CLASSES), average="micro")
    assert f"<strong>{100 * accuracy:.2f}%</strong>" in text
    recall, precision, f1 = (
        getattr(theirs, f"multiclass_{name}")(predicted, targets, len(CLASSES), average="none").tolist()
        for name in ("recall", "precision", "f1_score")
    )
    support = torch.bincount(targets).tolist()
    rows = {row[0]: row[1:] for row in Page(text).table("class")[1:]}
    for i, name in enumerate(CLASSES):
        shown = [float(rows[name][column]) for column in (0, 1, 3, 5)]
        # to a digit; torchmetrics computes in 32 bits
        assert shown == pytest.approx([support[i], *(100 * x[i] for x in (recall, precision, f1))], abs=0.0501)
    both = theirs.multiclass_confusion_matrix(predicted, targets, len(CLASSES)).numpy()
    assert both[3, 4] == both[~np.eye(5, dtype=bool)].max()
    assert Page(text).table("pair")[1][0] == "cat ⇄ deer"
    assert f"cat predicted as deer: {both[3, 4]} (" in Page(text).table("pair")[1][1]


def test_a_class_without_test_images_has_no_scores_and_is_in_no_mean(tmp_path):
    run = SimpleNamespace(test_metrics={}, test_confusion=np.array([[8, 2, 0], [0, 9, 1], [0, 0, 0]]), classes="abc")
    section = classes(run, FigureFolder(tmp_path))
    rows = {row[0]: row[1:] for row in section["table"].rows}
    assert rows["c"] == ["0", *"-----"]
    assert rows["mean of 2"][1] == "85.0"  # of 80 and 90
    assert "from b (90.0%) down to a (80.0%)" in section["figures"][1].svg


def test_temperature_lowers_the_validation_loss(drawn):
    rows = {row[0]: row[1:] for row in Page(drawn[1]).table("")[1:]}
    before, after = map(float, rows["validation: negative log-likelihood"])
    assert after < before
    assert len(set(rows["test: accuracy"])) == 1


def test_what_the_unfreeze_changed(drawn):
    with np.load(drawn[0] / "predictions.npz", allow_pickle=False) as data:
        targets = torch.from_numpy(data["val_targets"])
        before, after = (
            theirs.multiclass_recall(torch.from_numpy(data[key]), targets, len(CLASSES), average="none").tolist()
            for key in ("frozen_val_logits", "val_logits")
        )
    rows = Page(drawn[1]).table("class, validation")
    shown = {row[0]: row[2:5] for row in rows[1:]}
    for i, name in enumerate(CLASSES):
        expected = [100 * before[i], 100 * after[i], 100 * (after[i] - before[i])]
        assert [float(value) for value in shown[name]] == pytest.approx(expected, abs=0.0501)
        assert shown[name][2][0] in "+-"
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


def test_every_test_image_on_the_page_is_the_one_that_is_named(drawn):
    images = read_images(drawn[0])
    shown = re.findall(r'alt="test image (\d+):[^>]*src="data:image/png;base64,([^"]+)"', drawn[1])
    assert len(shown) > 20
    assert "(no image)" not in drawn[1]
    for index, data in shown:
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        np.testing.assert_array_equal(decoded, images[int(index)])


def test_page_and_figures_follow_a_dark_or_light_system(drawn):
    figure = (drawn[0] / "figures" / "accuracy.svg").read_text()
    for text in (drawn[1], figure):
        assert "prefers-color-scheme" in text.replace(" ", "")
    assert "currentColor" in figure
    assert figure.count(figures.INK) == 1  # in the style that says what the current colour is


def test_figures_are_files_too(drawn):
    names = {path.name for path in (drawn[0] / "figures").iterdir()}
    for figure in ("accuracy", "loss", "learning_rates", "confusion", "per_class", "reliability", "mistakes"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names


def test_plan_and_what_happened(drawn):
    frozen, tuned = Page(drawn[1]).table("phase")[1:3]
    assert frozen[:6] == ["frozen", "0..1", "head", "0.001", "frozen", "2 of 2"]
    assert tuned[:6] == ["fine-tune", "2..3", "head and layer4", "0.001", "0.0001", "2 of 2"]
    assert "validation accuracy went from 40.00% to 50.00% (+10.00 points)" in drawn[1]
    assert "python -m cifar_tl.train data.limit=400 seed=0" in drawn[1]
    assert "0123abcd" in drawn[1]


@pytest.mark.slow
def test_same_files_same_page(drawn):
    before = {path.name: path.read_bytes() for path in (drawn[0] / "figures").iterdir()}
    assert main([str(drawn[0])]) == 0
    assert (drawn[0] / "report.html").read_text() == drawn[1]
    assert {path.name: path.read_bytes() for path in (drawn[0] / "figures").iterdir()} == before


def test_a_real_run_has_every_section(tiny_run, tmp_path):
    for name in ("metrics.json", "predictions.npz", "images.npz"):
        shutil.copy(tiny_run / name, tmp_path)
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2[^>]*>([^<]+)", text) == [
        *("Schedule, and what happened", "Curves", "Classes", "What the unfreeze changed", "Most confused pairs"),
        *("Calibration", "Mistakes", "Most and least certain", "Time", "Repeat it"),
    ]
    assert 'class="notes"' not in text
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 11


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
    assert f"This run has not finished (status: {status}). 4 of 9 epochs are recorded" in text
    assert 'id="s0"' in text
    assert "Accuracy" in text


def test_a_finished_run_that_went_on_and_was_stopped_has_no_test_result(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    assert main([str(run)]) == 0
    assert "test accuracy" in (run / "report.html").read_text()
    metrics = {key: value for key, value in metrics.items() if not key.startswith("test/")} | {"status": "interrupted"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "there is no test result" in text
    assert "predictions.npz is of before the run went on" in text
    assert "test accuracy" not in text
    assert "Confusion" not in text


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


def set_metrics(run, **values):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, **values}))


def odd_epochs(run):
    set_metrics(run, epoch="all")
    return "metrics.json: val/acc has 4 values for epochs that are not known", "Confusion"


def odd_duplicates(run):
    set_metrics(run, duplicates=None)
    return "metrics.json: duplicates is not an object with test, val", "Confusion"


@pytest.mark.parametrize(
    "damage",
    [
        *(damage_metrics, half_metrics, truncate_predictions, remove_predictions, remove_images, other_predictions),
        *(odd_epochs, odd_duplicates),
    ],
)
def test_damage_is_named_and_the_rest_drawn(tmp_path, damage):
    run = make_run(tmp_path / "run")
    problem, still_there = damage(run)
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text().replace("&#39;", "'")
    assert problem in text
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


def test_test_metrics_are_those_of_metrics_json(tmp_path):
    run = make_run(
        tmp_path / "run", **{"test/loss": 0.7654, "test/ece": 0.0321, "test/recall": [0.1, 0.2, 0.3, 0.4, 0.5]}
    )
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<b>0.7654</b>" in text
    assert "<b>0.0321</b>" in text
    assert [row[2] for row in Page(text).table("class")[1:6]] == ["10.0", "20.0", "30.0", "40.0", "50.0"]


def test_warnings_stand_at_the_top(tmp_path):
    run = make_run(tmp_path / "run", warnings=["The loss is <not> a finite number from epoch 2 on."])
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert 0 < text.index("The loss is &lt;not&gt; a finite number") < text.index('class="headline"')


def test_null_in_the_epochs_costs_no_section(tmp_path):
    nothing = [None] * 4
    holes = {"train/loss": [2.0, 1.5, None, None], "val/loss": nothing, "val/ece": nothing, "lr/backbone": nothing}
    run = make_run(tmp_path / "run", **holes, **{"val/acc": [None, 0.4, None, 0.1]})
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "could not be drawn" not in text
    page = Page(text)
    assert page.table("phase")[2][6:9] == ["- → -", "- → 10.00", "10.00"]
    assert page.table("epoch")[3] == ["2", "fine-tune", "-", "0.5000", "-", "-", "-"]
    for figure in ("accuracy", "loss", "calibration_error", "learning_rates"):
        assert (run / "figures" / f"{figure}.svg").is_file()


def test_a_run_without_validation_is_drawn(tmp_path):
    run = make_run(tmp_path / "run", status="failed", **{"val/acc": [None] * 4, "best/epoch": None})
    assert main([str(run)]) == 0
    assert "'Curves' could not be drawn" not in (run / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")


MONEY = ["$1 to $5", "$\\frac{", "a$b", "\\$x", "<b> & co"]


def test_dollar_signs_in_names_are_drawn_as_written(tmp_path):
    run = make_run(tmp_path / "run", classes=MONEY)
    assert main([str(run)]) == 0
    assert "could not be drawn" not in (run / "report.html").read_text(encoding="utf-8")
    for figure in ("confusion", "per_class", "mistakes", "unfreeze"):
        text = unescape((run / "figures" / f"{figure}.svg").read_text(encoding="utf-8"))
        for name in MONEY[:4] if figure == "mistakes" else MONEY:
            assert f"{name}<" in text or f"{name} " in text


def test_learning_rates_are_written_without_formulas(drawn):
    text = (drawn[0] / "figures" / "learning_rates.svg").read_text(encoding="utf-8")
    assert ">0.001<" in text
    assert "mathdefault" not in text


def test_names_of_short_phases_do_not_overlap():
    names = ["frozen", *(f"fine-tune from layer{stage}" for stage in (4, 3, 2, 1)), "fine-tune at 128x128"]
    phases = list(zip(names, [0, 10, 11, 12, 13, 14], strict=True))
    figure = figures.curves("Accuracy", range(20), {"validation": [0.5] * 20}, phases, 19)
    figure.canvas.draw()
    (axes,) = figure.axes
    (top,) = axes.child_axes
    labels = top.get_xticklabels()
    assert [label.get_text() for label in labels] == names
    places = [label.get_window_extent().x0 for label in labels]
    angle = np.deg2rad(labels[0].get_rotation())
    height = labels[0].get_fontsize() * figure.dpi / 72
    assert (np.diff(places) * np.sin(angle) > height).all()  # parallel lines of text, one below the other


def test_names_without_a_font_are_drawn_without_a_warning(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(figures, "_fonts", lambda: ["DejaVu Sans"])
    warnings.simplefilter("always")
    run = make_run(tmp_path / "run", classes=["猫", "犬", "鳥", "鹿", "蛙"])
    assert main([str(run)]) == 0
    assert [str(warning.message) for warning in recwarn] == []
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "could not be drawn" not in text
    assert Page(text).table("class")[1][0] == "猫"
    assert "猫" in (run / "figures" / "confusion.svg").read_text(encoding="utf-8")


def test_fonts_of_other_scripts_are_used_where_they_are_installed(monkeypatch):
    monkeypatch.setattr(figures, "get_font_names", lambda: ["Noto Sans CJK JP", "DejaVu Sans", "Comic Sans MS"])
    assert figures._fonts.__wrapped__() == ["DejaVu Sans", "Noto Sans CJK JP"]


def test_a_figure_that_fails_costs_nothing_else(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(figures, "confusion", fail)
    monkeypatch.setattr(figures, "gallery", fail)
    monkeypatch.setattr(figures, "reliability", fail)
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    for name in ("confusion", "mistakes", "reliability"):
        assert f"The figure '{name}' could not be drawn: RuntimeError: no luck." in text
    page = Page(text)
    assert page.table("class")
    assert page.table("")[0] == ["", "as trained", "temperature 2.228"]
    assert '<ul class="gallery">' in text
    assert (run / "figures" / "per_class.svg").is_file()
    assert "metrics.json has" not in text
    assert "metrics.json is" not in text


@pytest.mark.slow
def test_files_are_utf_8_whatever_the_locale(tmp_path):
    runs = tmp_path / "Läufe"
    for seed in (0, 1):
        make_run(
            runs / f"größer {seed}", ["model.weights=été"], seed, classes=["ä", "ö", "ü", "猫", "ß"], experiment="Übung"
        )
    (runs / "größer 1" / ".hydra" / "overrides.yaml").write_bytes("- model.weights=été\n".encode())
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "cifar_tl.reports", str(runs)]
    subprocess.run(command, check=True, env={**os.environ, **locale}, capture_output=True)
    for seed in (0, 1):
        page = (runs / f"größer {seed}" / "report.html").read_bytes().decode("utf-8")
        assert "Übung" in page
        assert "model.weights=été" in page
    for ending in ("html", "md", "csv"):
        assert "été" in (runs / f"sweep_report.{ending}").read_bytes().decode("utf-8")
    comparison = (runs / "sweep_report.html").read_bytes().decode("utf-8")
    assert "Läufe" in comparison
    assert 'href="gr%C3%B6%C3%9Fer%200/report.html">größer 0<' in comparison
    assert "ß" in (runs / "größer 0" / "figures" / "confusion.svg").read_bytes().decode("utf-8")


@pytest.mark.slow
def test_the_recreated_study_stands_beside_the_originals_numbers(tmp_path):
    epochs = list(range(20))
    curves = {key: [0.5] * 20 for key in ("train/loss", "train/acc", "val/loss", "val/ece", "lr/head", "lr/backbone")}
    phases = [
        {"name": "frozen", "epochs": epochs[:10], "seconds": 20.0, "images_per_s": 900.0},
        {"name": "fine-tune", "epochs": epochs[10:], "seconds": 80.0, "images_per_s": 200.0},
    ]
    length = {"epoch": epochs, "phase": ["frozen"] * 10 + ["fine-tune"] * 10, "seconds": [1.0] * 20, "phases": phases}
    accuracies = [0.6 + epoch / 1000 for epoch in epochs]
    own = {**curves, **length, "val/acc": accuracies, "experiment": "seed_baseline"}
    own |= {"images": {"train": 45_000, "val": 5_000}}
    run = make_run(tmp_path / "run", **own)
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    rows = next(table for table in Page(text).tables if table[0] == ["epoch", "phase", "this run", "original"])
    assert rows[11] == ["10", "fine-tune", "61.00", "44.64"]
    assert rows[2][3] == "-"  # the notebook's text does not name it
    assert rows[20][3] == "69.30"
    assert "could not be drawn" not in text
    for number, (names, change) in enumerate(
        [
            (CLASSES, {"experiment": "best32"}),
            (["rose", *CLASSES[1:]], {}),
            (CLASSES, {"images": {"train": 900, "val": 100}}),
        ]
    ):
        other = make_run(tmp_path / f"other{number}", classes=names, **{**own, **change})
        assert beside_original(read_run(other), FigureFolder(tmp_path / "figures")) is None


def test_a_page_may_go_elsewhere(tmp_path):
    run = make_run(tmp_path / "run")
    before = sorted(run.rglob("*"))
    assert main([str(run), "--output", str(tmp_path / "pages")]) == 0
    assert 'href="../run/metrics.json"' in (tmp_path / "pages" / "report.html").read_text()
    assert (tmp_path / "pages" / "report.html").is_file()
    assert (tmp_path / "pages" / "figures" / "confusion.png").is_file()
    assert sorted(run.rglob("*")) == before


def test_a_tested_run_without_its_record_is_not_called_unfinished(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "train.log").touch()
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "has not finished" not in text
    assert "metrics.json is missing: curves, times and what was run are missing." in text


def test_every_start_of_a_resumed_run_is_on_its_page(tmp_path):
    first = {"epoch": 0, "started": "2026-01-01T00:00:00+00:00", "git_commit": "aaaa", "git_dirty": True}
    first |= {"device": "a GPU", "threads": 4, "precision": "bf16-mixed", "changed": None}
    second = {**first, "epoch": 2, "started": "2026-01-02T00:00:00+00:00", "git_commit": "bbbb", "git_dirty": False}
    second |= {"device": "a CPU", "precision": "32-true", "changed": {"trainer.accelerator": "cpu"}}
    third = {**second, "epoch": 99, "device": "another CPU", "changed": {"data.eval_batch_size": 7}}
    starts, facts = [first, second, third], {key: third[key] for key in ("started", "device")}
    run = make_run(tmp_path / "run", starts=starts, **facts)
    assert main([str(run)]) == 0
    text = unescape((run / "report.html").read_text(encoding="utf-8"))
    assert "2026-01-01T00:00:00+00:00, commit aaaa with uncommitted changes, a GPU, bf16-mixed" in text
    assert "2026-01-02T00:00:00+00:00, commit bbbb, a CPU, 32-true; changed: trainer.accelerator=cpu" in text
    assert "a GPU, bf16-mixed, threads: 4; then a CPU, 32-true, threads: 4<" in text
    assert "resumed to be tested" in text
    assert "another CPU, 32-true; changed: data.eval_batch_size=7" in text
    assert "handmade, 2026-01-01" in text


def test_test_images_that_are_training_images_are_named_at_the_top(tmp_path):
    duplicates = {"test": 12, "val": 0, "example": ["test/cat/leak0.png", "train/cat/000.png"]}
    run = make_run(tmp_path / "run", duplicates=duplicates)
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "12 test images are training or validation images, too, pixel for pixel (test/cat/leak0.png is train" in text
    assert "validation images are training images, too" not in text
    set_metrics(run, duplicates={"test": 0, "val": 3, "example": None})
    assert main([str(run)]) == 0
    assert "3 validation images are training images, too" in (run / "report.html").read_text(encoding="utf-8")
