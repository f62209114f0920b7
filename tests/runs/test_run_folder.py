"""Run folders, read back: what is missing or of the wrong type is named, and the rest is there."""

import json

import numpy as np
import pytest
from handmade import CLASSES, make_run

from cifar_tl.runs.folder import read_run
from cifar_tl.runs.record import FORMAT, KINDS, faults, read_metrics, write_metrics
from cifar_tl.runs.table import Table


def change(run, **values):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, **values}))


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("best/val/acc", None, "best/val/acc is not a number"),
        ("test/acc", "high", "test/acc is not a number"),
        ("seconds", [10.0, None, 40.0, 40.0], "seconds is not a list, each item a number"),
        ("val/acc", [0.1], "val/acc has 1 values for 4 epochs"),
        ("phases", 3, "phases is not a list, each item an object with name, epochs, seconds, images_per_s"),
        ("phases", [{"name": "frozen"}], "phases is not a list"),
        ("plan", [{"name": "frozen", "start": None, "end": 1, "stages": []}], "plan is not a list"),
        ("warnings", "collapsed", "warnings is not a list, each item text"),
        ("test/acc_interval", [0.1], "test/acc_interval is not two numbers"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_and_left_out(tmp_path, key, value, problem):
    run_folder = make_run(tmp_path / "run")
    change(run_folder, **{key: value})
    run = read_run(run_folder)
    assert [text for text in run.problems if problem in text]
    assert key not in run.metrics
    assert run.metrics["seed"] == 0


def test_null_in_a_list_per_epoch_is_allowed(tmp_path):
    run = read_run(make_run(tmp_path / "run", **{"val/loss": [1.0, None, None, None]}))
    assert run.problems == []
    assert run.metrics["val/loss"] == [1.0, None, None, None]


def test_a_finished_run_without_its_results_says_so(tmp_path):
    run_folder = make_run(tmp_path / "run")
    metrics = json.loads((run_folder / "metrics.json").read_text())
    del metrics["best/val/acc"]
    (run_folder / "metrics.json").write_text(json.dumps(metrics))
    assert "metrics.json has no best/val/acc." in read_run(run_folder).problems


@pytest.mark.parametrize("written", [FORMAT + 1, "two"])
def test_a_later_format_is_refused_in_words(tmp_path, written):
    run_folder = make_run(tmp_path / "run")
    change(run_folder, format=written)
    with pytest.raises(ValueError, match=f"format {written}, this version reads up to {FORMAT}"):
        read_metrics(run_folder)
    assert any("format" in problem for problem in read_run(run_folder).problems)


def test_what_a_run_writes_has_the_types_that_are_read(tiny_run):
    metrics = read_metrics(tiny_run)
    assert faults(metrics) == {}
    assert KINDS.keys() <= metrics.keys()


def test_metrics_of_the_test_are_read_and_else_computed(tmp_path):
    run_folder = make_run(tmp_path / "run")
    computed = read_run(run_folder)
    per_class = [computed.test_metrics[f"test/{name}"] for name in ("precision", "recall", "f1")]
    assert all(len(values) == len(CLASSES) for values in per_class)
    assert computed.test_metrics["test/acc"] == computed.predictions.test.accuracy
    change(run_folder, **{"test/loss": 0.25, "test/recall": [0.5] * 5})
    read = read_run(run_folder).test_metrics
    assert (read["test/loss"], read["test/recall"]) == (0.25, [0.5] * 5)
    assert read["test/precision"] == per_class[0]
    (run_folder / "metrics.json").unlink()
    assert read_run(run_folder).test_metrics == computed.test_metrics


def test_metrics_json_is_utf_8_and_strict(tmp_path):
    write_metrics(tmp_path, {"classes": ["été"], "val/loss": [float("nan")]})
    assert json.loads((tmp_path / "metrics.json").read_bytes().decode("utf-8"), parse_constant=pytest.fail)
    assert read_metrics(tmp_path)["val/loss"] == [None]


def test_a_table_is_markdown_and_csv(tmp_path):
    table = Table("Title", ["name", "state", "n"], [["a|b", "fertig", "1"]], "A note.", words=(0, 1))
    assert table.markdown() == (
        "## Title\n\n| name | state | n |\n| --- | --- | ---: |\n| a\\|b | fertig | 1 |\n\nA note."
    )
    table.write_csv(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == b"name,state,n\r\na|b,fertig,1\r\n"


def test_counts_that_fit_no_class_list_are_no_confusion_matrix(tmp_path):
    run_folder = make_run(tmp_path / "run", **{"test/confusion": [[1, 2], [3]]})
    assert read_run(run_folder).test_confusion is None
    change(run_folder, **{"test/confusion": np.eye(5, dtype=int).tolist()})
    assert read_run(run_folder).test_confusion.tolist() == np.eye(5).tolist()
