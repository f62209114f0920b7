"""The page that compares runs, from run folders made by hand."""

import csv
import json
import os
import re
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from handmade import CLASSES, make_run, scored

from cifar_tl.reports import figures
from cifar_tl.reports.__main__ import main
from cifar_tl.reports.ablation import ablation
from cifar_tl.reports.comparison import Difference, effects, group_runs, paired_difference, reference, seed_of
from cifar_tl.reports.comparison_page import write_sweep_report
from cifar_tl.reports.run_predictions import _changes
from cifar_tl.runs.folder import find_runs, read_runs

STRENGTHS = {"1e-3": 2.0, "3e-4": 1.0}


@pytest.fixture
def sweep(tmp_path):
    job = 0
    for lr, strength in STRENGTHS.items():
        for seed in (1, 2, 10):
            overrides = [f"finetune.backbone_lr={lr}", "data.limit=400"]
            run = make_run(tmp_path / "sweep" / str(job), overrides, seed, strength)
            (run / "report.html").write_text("drawn when the job ended")
            os.utime(run / "report.html", ns=((run / "metrics.json").stat().st_mtime_ns,) * 2)
            job += 1
    return tmp_path / "sweep"


def accuracies(strength):
    return [scored(seed, 400, strength).accuracy for seed in (1, 2, 10)]


def test_a_run_that_is_given_in_two_ways_counts_once(sweep, tmp_path):
    (tmp_path / "link").symlink_to(sweep)
    out = tmp_path / "out"
    assert main([str(sweep), str(tmp_path / "link" / "0"), str(sweep / ".." / "sweep"), "--output", str(out)]) == 0
    with (out / "sweep_report.csv").open() as file:
        assert [row["n"] for row in csv.DictReader(file)] == ["3", "3"]
    assert main([str(sweep / "0"), str(tmp_path / "link" / "0"), "--output", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "sweep_report.csv").exists(), "one run is compared with nothing"


def test_means_ranges_and_n(sweep):
    assert main([str(sweep)]) == 0
    rows = {row["setting"]: row for row in csv.DictReader((sweep / "sweep_report.csv").read_text().splitlines())}
    for lr, strength in STRENGTHS.items():
        row, expected = rows[f"backbone_lr={lr}"], accuracies(strength)
        assert row["n"] == "3"
        assert float(row["test/acc mean"]) == pytest.approx(np.mean(expected))
        assert float(row["test/acc std"]) == pytest.approx(np.std(expected, ddof=1))
        assert float(row["test/acc min"]) == min(expected)
        assert float(row["test/acc max"]) == max(expected)
        mean, deviation = 100 * np.mean(expected), 100 * np.std(expected, ddof=1)
        shown = f"{mean:.2f}% | {deviation:.2f} | {100 * min(expected):.2f} to {100 * max(expected):.2f} |"
        assert f"| backbone_lr={lr} | 3 | {shown}" in (sweep / "sweep_report.md").read_text()
    page = (sweep / "sweep_report.html").read_text()
    assert 'href="3/report.html"' in page
    assert (sweep / "3" / "report.html").read_text() == "drawn when the job ended"
    assert "data.limit=400" in page


def test_intervals_of_few_images_stay_within_what_there_can_be():
    before, after = np.array([False] * 3), np.array([True, True, False])
    assert _changes(before, after)[4] == "-30.1 to +100.0"
    assert _changes(after, before)[4] == "-100.0 to +30.1"
    assert _changes(before[:1], after[:1])[4] == "-73.4 to +100.0"


def test_paired_difference_is_that_of_the_images(sweep):
    strong, weak = group_runs(read_runs(sorted(sweep.iterdir())))
    difference = paired_difference(strong, weak)
    pairs = [(scored(seed, 400, 2.0), scored(seed, 400, 1.0)) for seed in (1, 2, 10)]
    each = np.mean([a.right.astype(float) - b.right for a, b in pairs], axis=0)
    assert difference.mean == pytest.approx(np.mean(accuracies(2.0)) - np.mean(accuracies(1.0)))
    assert difference.only_a == np.mean([(a.right & ~b.right).sum() for a, b in pairs])
    draws = np.random.default_rng(0).choice(each, (4000, len(each))).mean(axis=1)  # the bootstrap as referee
    assert (difference.low, difference.high) == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.004)
    assert difference.seeds == [1, 2, 10]


def test_a_run_without_overrides_is_of_the_setting_of_those_that_have_a_seed(tmp_path):
    runs = read_runs([make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)])
    runs[0].overrides = []
    (group,) = group_runs(runs)
    assert len(group.runs) == 2


def test_runs_on_other_data_are_no_seeds_of_one_setting(tmp_path):
    runs = read_runs([make_run(tmp_path / str(n), [f"data.root={n}"], seed=n) for n in (0, 1)])
    (group,) = group_runs(runs)  # the same data at two places
    assert len(group.runs) == 2
    for number, run in enumerate(runs):
        run.config = {"data.root": str(number)}
        run.metrics |= {"split_sha256": "a" * 64, "test_sha256": f"{number}" * 64}
    assert [group.label for group in group_runs(runs)] == ["root=0 (aaaaaaaa 00000000)", "root=1 (aaaaaaaa 11111111)"]


def test_keys_that_were_taken_out_are_told_from_those_set_to_nothing(tmp_path):
    given = [[], ["~logger.csv"], ["~trainer.max_time"]]
    runs = read_runs([make_run(tmp_path / str(n), overrides, seed=n) for n, overrides in enumerate(given)])
    assert [(g.label, len(g.runs)) for g in group_runs(runs)] == [("as it stands", 2), ("max_time=removed", 1)]


def test_settings_that_begin_with_an_underscore_are_in_the_legend(tmp_path):
    given = [["callbacks.c._target_=a.B"], ["callbacks.c._target_=a.C"]]
    labels = [g.label for g in group_runs(read_runs([make_run(tmp_path / str(n), o) for n, o in enumerate(given)]))]
    drawn = figures.runs_over_each_other("Accuracy", {label: [(range(2), [0.5, 0.6])] for label in labels}, [1])
    assert [text.get_text() for text in drawn.axes[0].get_legend().get_texts()] == [f"{x} (n=1)" for x in labels]


def test_runs_of_other_seeds_or_images_are_not_paired(tmp_path):
    a, b = make_run(tmp_path / "a", ["x=1"], seed=1), make_run(tmp_path / "b", ["x=2"], seed=2)
    one, two = group_runs(read_runs([a, b]))
    assert paired_difference(one, two) is None
    same = paired_difference(one, one)
    assert same == Difference(0, -same.high, same.high, 0, 0, [1], [0.0])
    assert 0 < same.high < 0.01


def test_long_overrides_leave_room_for_the_plots():
    names = [f"data.root=/a/long/path/of/somebody/{'x' * n}, model.weights=weights.pth" for n in (20, 90)]
    drawn = figures.points("Test accuracy", {name: [0.5, 0.6] for name in names})
    drawn.draw_without_rendering()
    assert drawn.axes[0].get_window_extent().width > 0.4 * drawn.bbox.width
    drawn = figures.runs_over_each_other("Accuracy", {name: [(range(3), [0.5, 0.6, 0.7])] for name in names}, [1])
    drawn.draw_without_rendering()
    legend = drawn.axes[0].get_legend().get_window_extent()
    assert drawn.bbox.count_contains(legend.corners()) == 4


def test_which_override_mattered(tmp_path):
    runs = []
    for i, (a, b) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        accuracy = 0.5 + 0.1 * a + 0.01 * b
        runs.append(make_run(tmp_path / str(i), [f"a={a}", f"b={b}"], **{"test/acc": accuracy}))
    for run in runs:
        (run / "predictions.npz").unlink()
    first, second = effects(group_runs(read_runs(runs)), "test/acc")
    assert (first.key, second.key) == ("a", "b")
    assert first.spread == pytest.approx(0.1)
    assert second.spread == pytest.approx(0.01)
    assert first.values["1"] == (pytest.approx(0.605), 2, 0.6, 0.61)


def test_a_job_that_is_missing_from_a_grid_makes_no_cause(tmp_path):
    tried = [(rate, mode) for rate in ("1e-3", "3e-3", "1e-2") for mode in ("frozen", "train")]
    for i, (rate, mode) in enumerate(tried[:-2] + tried[-1:]):  # (1e-2, frozen) has failed
        accuracy = {"frozen": 0.9, "train": 0.5}[mode]  # the rate changes nothing
        make_run(tmp_path / str(i), [f"lr={rate}", f"bn={mode}"], **{"test/acc": accuracy})
    mode, rate = effects(group_runs(read_runs(find_runs(tmp_path))), "test/acc")
    assert (mode.key, mode.spread) == ("bn", pytest.approx(0.4))
    assert {value: runs for value, (_, runs, *_) in mode.values.items()} == {"frozen": 2, "train": 2}
    assert (rate.key, rate.spread) == ("lr", 0)
    assert {value: runs for value, (_, runs, *_) in rate.values.items()} == {"1e-3": 1, "3e-3": 1, "1e-2": 1}


def test_numbers_are_equal_however_they_were_typed(tmp_path):
    for seed, overrides in enumerate((["lr=1e-2"], ["lr=0.01"], ["lr=1e-3", "flag=false"], ["lr=0.010"])):
        run = make_run(tmp_path / str(seed), overrides, seed=seed)
        config = {"lr": 1e-3 if seed == 2 else 0.01, "seed": seed, "flag": seed != 2}
        (run / ".hydra" / "config.yaml").write_text(json.dumps(config))
    groups = group_runs(read_runs(find_runs(tmp_path)))
    assert [(group.label, [seed_of(run) for run in group.runs]) for group in groups] == [
        ("lr=0.01", [0, 1, 3]),
        ("lr=0.001 flag=false", [2]),
    ]


def test_overrides_that_only_vary_together_are_no_cause(tmp_path):
    runs = [["a=0", "b=0", "c=0"], ["a=1", "b=1", "c=0"], ["a=1", "b=1"]]
    for overrides, accuracy in zip(runs, (0.9, 0.5, 0.6), strict=True):
        make_run(tmp_path / str(len(overrides)) / overrides[0], overrides, **{"test/acc": accuracy})
    (effect,) = effects(group_runs(read_runs(find_runs(tmp_path))), "test/acc")
    assert effect.key == "c"
    assert {value: mean for value, (mean, *_) in effect.values.items()} == {"0": 0.5, "(not given)": 0.6}


@pytest.mark.slow
def test_unfinished_runs_are_named_and_left_out(sweep, no_run_pages):
    make_run(sweep / "6", ["finetune.backbone_lr=1e-3", "data.limit=400"], seed=4, status="failed")
    make_run(sweep / "7", ["finetune.backbone_lr=9", "data.limit=400"], seed=1, status="running")
    (sweep / "0" / "metrics.json").write_text("{")
    assert main([str(sweep)]) == 0
    page = (sweep / "sweep_report.html").read_text()
    assert "5 of 8 runs finished" in page
    assert f"{sweep / '6'} has not finished (failed); the tables are without it." in page
    assert f"{sweep / '0'}: metrics.json cannot be read" in page
    curves = (sweep / "sweep_figures" / "val_acc.svg").read_text()
    # two and three seeds that finished; and of a setting without any, what there is
    assert [f"backbone_lr={lr} (n={n})" in curves for lr, n in (("1e-3", 2), ("3e-4", 3), ("9", 1))] == [True] * 3


def test_folders_are_sorted_by_number_where_their_names_are_numbers(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("10", "9", "²")]
    assert find_runs(tmp_path) == [runs[2], runs[1], runs[0]]


def test_runs_that_were_set_aside_are_not_compared(tmp_path):
    new = make_run(tmp_path / "ablation-none", ["ablate=none"])
    old = make_run(tmp_path / "replaced" / "ablation-none.1", ["ablate=none"])
    assert find_runs(tmp_path) == [new]
    assert find_runs(tmp_path / "replaced") == [old]


@pytest.mark.slow
def test_several_folders_are_compared_where_they_meet_or_where_asked(tmp_path, capsys, no_run_pages):
    runs = [str(make_run(tmp_path / name, [f"x={name}"], status="failed")) for name in ("a", "b")]
    assert main(runs) == 0
    assert (tmp_path / "sweep_report.html").is_file()
    assert main([*runs, "--output", str(tmp_path / "there")]) == 0
    assert 'href="../a/report.html"' in (tmp_path / "there" / "sweep_report.html").read_text()
    assert str(tmp_path / "there" / "sweep_report.md") in capsys.readouterr().out


def test_some_runs_of_a_sweep_do_not_replace_its_comparison(sweep, capsys, no_run_pages):
    (sweep / "multirun.yaml").touch()
    assert main([str(sweep / "0"), str(sweep / "1")]) == 1
    assert f"{sweep} has the comparison of all of its sweep's runs: give --output FOLDER" in capsys.readouterr().err
    assert not (sweep / "sweep_report.html").exists()
    assert main([str(sweep / "0"), str(sweep / "1"), "--output", str(sweep / "some")]) == 0
    assert main([str(sweep)]) == 0


def test_runs_of_an_edited_config_file_are_no_seeds_of_one_setting(tmp_path, no_run_pages):
    for seed, lr in enumerate((0.1, 0.1, 0.2)):
        run = make_run(tmp_path / str(seed), ["experiment=mine"], seed, 2.0 - 5 * lr)
        more = {"gradient_clip_val": 1.0} if lr == 0.2 else {}
        config = {"seed": seed, "finetune": {"backbone_lr": lr}, "data": {"root": str(seed)}}
        config["trainer"] = {"devices": [seed], **more}
        (run / ".hydra" / "config.yaml").write_text(json.dumps(config))
    assert main([str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "sweep_report.csv").read_text().splitlines()))
    assert {(row["setting"], row["n"]) for row in rows} == {
        ("backbone_lr=0.1 gradient_clip_val=null", "2"),
        ("backbone_lr=0.2 gradient_clip_val=1.0", "1"),
    }


def test_what_changes_no_result_makes_no_setting_of_its_own(tmp_path):
    given = (["sweep=seeds", "seed=1"], ["seed=2", "logger=csv"], ["seed=3", "data.root=/x"], ["seed=4", "+resume=x"])
    runs = [make_run(tmp_path / str(seed), overrides, seed=seed) for seed, overrides in enumerate(given, 1)]
    (group,) = group_runs(read_runs(runs))
    assert (len(group.runs), group.overrides) == (4, {})


def test_unfair_comparisons_are_named(tmp_path):
    facts = (
        {"git_dirty": True, "device": "a", "test_sha256": "0", "weights_sha256": "0"},
        {"git_dirty": True, "device": "b", "test_sha256": "1", "precision": "16-mixed", "git_commit": "4567"},
    )
    runs = [
        str(make_run(tmp_path / str(i), ["x=1"], seed=3, status="failed", split_sha256=str(i), **those))
        for i, those in enumerate(facts)
    ]
    runs.append(str(make_run(tmp_path / "again", ["x=1"], seed=3, split_sha256="0", test_sha256="0")))
    assert main(runs) == 0
    page = (tmp_path / "sweep_report.html").read_text()
    assert "The runs are of different train/validation splits." in page
    assert "The runs are of different test sets." in page
    assert "has a seed twice" in page
    assert "2 of 3 runs are of a checkout with changes" in page
    assert "The runs are of different devices." in page
    assert "The runs are of different precisions." in page
    assert "The runs are of different commits." in page
    assert "The runs are of different ImageNet weights." in page


def test_images_in_two_splits_are_named_beside_the_numbers(tmp_path, no_run_pages):
    make_run(tmp_path / "0", ["x=1"], duplicates={"test": 12, "val": 0, "example": ["a.png", "b.png"]})
    make_run(tmp_path / "1", ["x=2"], duplicates={"test": 12, "val": 3, "example": ["a.png", "b.png"]})
    write_sweep_report([tmp_path / "0", tmp_path / "1"], tmp_path)
    for ending in ("html", "md"):
        text = (tmp_path / f"sweep_report.{ending}").read_text()
        assert "All runs: 12 test images are training or validation images, too, pixel for pixel (a.png is b.pn" in text
        assert f"{tmp_path / '1'}: 3 validation images are training images, too" in text


def test_a_single_run_has_no_range(tmp_path, no_run_pages):
    make_run(tmp_path / "0", ["x=1"])
    write_sweep_report([tmp_path / "0"], tmp_path)
    row = next(line for line in (tmp_path / "sweep_report.md").read_text().splitlines() if line.startswith("| all"))
    assert [cell.strip() for cell in row.split("|")][4:6] == ["-", "-"]


def test_more_settings_than_colours_are_drawn_in_other_lines():
    curves = {f"trial {i}": [([0, 1], [0.1, 0.2])] for i in range(20)}
    (axes,) = figures.runs_over_each_other("a title", curves, []).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_legend().get_lines()}
    cliffs = {f"recipe {i}": ([0, 1], [0.1, 0.2], 1) for i in range(20)}
    figure = figures.cliff("a title", cliffs)
    (axes,) = [axes for axes in figure.axes if axes.get_legend()]
    figure.draw_without_rendering()
    assert not axes.get_legend().get_window_extent().overlaps(axes.bbox)
    assert len(looks) == len({(line.get_color(), line.get_linestyle()) for line in axes.get_legend().get_lines()}) == 20


def test_ctrl_c_while_pages_are_drawn_is_no_traceback(tmp_path, monkeypatch, capsys):
    def stopped(*args):
        raise KeyboardInterrupt

    make_run(tmp_path / "0")
    monkeypatch.setattr("cifar_tl.reports.run_page.write_run_report", stopped)
    assert main([str(tmp_path / "0")]) == 130
    assert capsys.readouterr().err == "Interrupted. The same command draws the pages that are missing.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("different", "named"),
    [
        ({"classes": ["ant", *CLASSES[1:]]}, "class names (ant against airplane)"),
        ({"classes": CLASSES[::-1]}, "class names (their order)"),
        ({"split_sha256": "b"}, "the SHA-256 of the split"),
        ({"split_sha256": "a", "test_sha256": "b"}, "the SHA-256 of the test set"),
        ({"targets": True}, "the classes of the test images"),
        ({"indices": True}, "test images (400 and 400)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runs_on_other_data_are_not_paired_and_the_page_says_why(tmp_path, different, named, no_run_pages):
    fields = {"split_sha256": "a", **different}
    touched = {name for name in ("targets", "indices") if fields.pop(name, False)}
    make_run(tmp_path / "0", ["x=1"], strength=2.0, split_sha256="a")
    make_run(tmp_path / "1", ["x=2"], **fields)
    if touched:
        with np.load(tmp_path / "1" / "predictions.npz") as data:
            arrays = {name: data[name] for name in data}
        arrays |= {f"test_{name}": arrays[f"test_{name}"][::-1] for name in touched}
        np.savez(tmp_path / "1" / "predictions.npz", **arrays)
    one, two = group_runs(read_runs([tmp_path / "0", tmp_path / "1"]))
    assert paired_difference(two, one) is None
    assert main([str(tmp_path)]) == 0
    text = unescape((tmp_path / "sweep_report.html").read_text(encoding="utf-8"))
    assert f"'x=2': not paired with the best, since they differ in {named}." in text
    assert "Paired over the same test images" not in text
    assert ("The runs are of different classes." in text) == ("classes" in different)


def test_another_training_split_does_not_keep_runs_from_being_paired_on_the_same_test_images(tmp_path):
    for job, split in enumerate("ab"):
        make_run(tmp_path / str(job), [f"data.split_seed={job}"], split_sha256=split, test_sha256="t")
    one, two = group_runs(read_runs([tmp_path / "0", tmp_path / "1"]))
    assert paired_difference(one, two) is not None


def test_one_run_of_other_data_among_the_seeds_is_a_setting_of_its_own(tmp_path):
    for job, (x, seed) in enumerate([(1, 0), (1, 1), (2, 0), (2, 1)]):
        make_run(tmp_path / str(job), [f"x={x}"], seed, split_sha256="b" if job == 3 else "a")
    one, two, other = group_runs(read_runs([tmp_path / str(job) for job in range(4)]))
    assert [len(group.runs) for group in (one, two, other)] == [2, 1, 1]
    assert paired_difference(one, two).seeds == [0]
    assert paired_difference(one, other) is None
    assert {"x", "data.root"} == {effect.key for effect in effects([one, two, other], "test/acc")}


@pytest.mark.slow
def test_one_bad_run_is_named_and_the_rest_is_drawn(sweep, no_run_pages):
    metrics = json.loads((sweep / "1" / "metrics.json").read_text())
    (sweep / "1" / "metrics.json").write_text(json.dumps({**metrics, "best/val/acc": None, "seconds": None}))
    (sweep / "4" / "metrics.json").write_text(json.dumps({**metrics, "val/acc": [None, 0.1, None, 0.2], "phases": [7]}))
    assert main([str(sweep)]) == 0
    page = (sweep / "sweep_report.html").read_text(encoding="utf-8")
    assert f"{sweep / '1'}: metrics.json: best/val/acc is not a number" in page
    assert f"{sweep / '4'}: metrics.json: phases is not a list" in page
    assert "could not be drawn" not in page
    assert (sweep / "sweep_figures" / "val_acc.svg").is_file()
    rows = {row["setting"]: row for row in csv.DictReader((sweep / "sweep_report.csv").read_text().splitlines())}
    assert float(rows["backbone_lr=1e-3"]["test/acc mean"]) == pytest.approx(np.mean(accuracies(2.0)))


def test_ablation_leaves_out_a_run_without_its_accuracy(tmp_path):
    runs = [
        make_run(tmp_path / str(job), [f"ablate={name}"], **{"best/val/acc": accuracy})
        for job, (name, accuracy) in enumerate([("none", 0.9), ("adamw", None), ("flip", 0.8)])
    ]
    table = ablation(group_runs(read_runs(runs)))
    assert [row[0] for row in table.rows] == ["none", "flip"]


def test_no_ablation_where_something_else_was_varied_too(tmp_path):
    settings = (["ablate=none"], ["ablate=flip"], ["ablate=adamw", "experiment=best64"])
    runs = [make_run(tmp_path / str(job), overrides) for job, overrides in enumerate(settings)]
    assert ablation(group_runs(read_runs(runs[:2]))) is not None
    assert ablation(group_runs(read_runs(runs))) is None


@pytest.mark.slow
def test_a_run_that_went_on_with_other_values_is_named(tmp_path, no_run_pages):
    make_run(tmp_path / "0", ["x=1"], 1)
    starts = [{"epoch": 0}, {"epoch": 2, "changed": {"x": 1}}, {"epoch": 99, "changed": {"y": 3}}]
    make_run(tmp_path / "1", ["x=1"], 2, starts=starts)
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "sweep_report.html").read_text()
    assert "1 had x=1 from its epoch 2 on alone." in text
    assert "1 had y=3 in its test alone." in text


@pytest.mark.slow
def test_runs_whose_pages_cannot_be_written_are_compared_elsewhere(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name, [f"x={name}"]) for name in "ab"]

    def protected(run, output):
        raise PermissionError(13, "Permission denied", str(run / "report.html"))

    monkeypatch.setattr("cifar_tl.reports.run_page.write_run_report", protected)
    assert main([*map(str, runs), "--output", str(tmp_path / "mine")]) == 0
    assert f"{runs[0] / 'report.html'} was not drawn: Permission denied" in capsys.readouterr().err
    assert (tmp_path / "mine" / "sweep_report.html").is_file()
    assert main([str(runs[0])]) == 1
    assert main([*map(str, runs)]) == 1, "their pages were asked for"
    assert (tmp_path / "sweep_report.html").is_file()


@pytest.mark.slow
def test_warnings_of_a_training_are_named(tmp_path, no_run_pages):
    make_run(tmp_path / "0", ["x=1"], warnings=["Validation accuracy fell."])
    make_run(tmp_path / "1", ["x=2"])
    assert main([str(tmp_path)]) == 0
    assert f"{tmp_path / '0'}: Validation accuracy fell." in (tmp_path / "sweep_report.html").read_text()


def test_links_lead_to_folders_with_odd_names(tmp_path):
    for name in ("lr=1e-3,x#1?", "100%"):
        make_run(tmp_path / name, [f"x={name}"], status="failed")
    assert main([str(tmp_path)]) == 0
    links = re.findall(r'<a href="([^"#]+)">', (tmp_path / "sweep_report.html").read_text())
    assert sorted(links) == ["100%25/report.html", "lr%3D1e-3%2Cx%231%3F/report.html"]
    assert all((tmp_path / unquote(link)).is_file() for link in links)


def test_a_comparisons_figure_that_fails_costs_nothing_else(sweep, monkeypatch):
    def fail(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(figures, "points", fail)
    assert main([str(sweep)]) == 0
    page = unescape((sweep / "sweep_report.html").read_text())
    assert "The figure 'test_accuracy' could not be drawn: RuntimeError: no luck." in page
    assert "Validation accuracy per setting" in page
    assert "Compared with the best" in page


def test_a_sweep_of_one_job_is_a_sweep(tmp_path):
    make_run(tmp_path / "sweep" / "0", status="failed")
    assert main([str(tmp_path / "sweep")]) == 0
    assert (tmp_path / "sweep" / "0" / "report.html").is_file()
    assert "all runs" in (tmp_path / "sweep" / "sweep_report.html").read_text()


def test_validation_chooses_the_best_setting_whatever_the_test_says(tmp_path, no_run_pages):
    for x, val, test in ((1, 0.8, 0.7), (2, 0.9, 0.6)):
        make_run(tmp_path / str(x), [f"x={x}"], **{"best/val/acc": val, "test/acc": test})
    assert reference(group_runs(read_runs([tmp_path / "1", tmp_path / "2"]))).label == "x=2"
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "sweep_report.md").read_text()
    assert text.index("| x=2 |") < text.index("| x=1 |")
