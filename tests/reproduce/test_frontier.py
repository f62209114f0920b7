"""Accuracy against minutes: what is drawn of hand-made runs, and that it can be read."""

import math
import shutil
from pathlib import Path

import pytest
from handmade import make_run
from matplotlib.text import Text
from omegaconf import OmegaConf

from cifar_tl.reports import svg
from cifar_tl.reports.comparison import Group
from cifar_tl.reports.figures import Result, pareto_front
from cifar_tl.reports.original import PUBLISHED
from cifar_tl.reproduce.jobs import Job
from cifar_tl.reproduce.tables import _mean_curve, write_tables
from cifar_tl.runs.folder import Run


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Make runs and the tables; return the figure that became frontier.svg, None if there is none."""
    saved = {}
    save = svg.save

    def keep(figure, folder, name, alt_text):
        saved[name] = figure
        return save(figure, folder, name, alt_text)

    def drawn(*runs):
        jobs = []
        for recipe, minutes, accuracy, metrics in runs:
            folder = tmp_path / f"{recipe}{len(jobs)}"
            interval = [accuracy - 0.01, accuracy + 0.01]
            given = {
                "experiment": recipe,
                "test/acc": accuracy,
                "test/acc_interval": interval,
                "seconds": [15 * minutes] * 4,
                **metrics,
            }
            make_run(folder, seed=len(jobs), images={"train": 2000}, **given)
            uses = [("results", metrics.get("scale", "full"), recipe)]
            jobs.append(Job(folder.name, folder, [], [], OmegaConf.create(), None, uses))
        written = write_tables(jobs, tmp_path)
        files = [path for path in written if path.stem == "frontier"]
        assert files == ([tmp_path / "frontier.svg", tmp_path / "frontier.png"] if "frontier" in saved else [])
        return saved.get("frontier")

    monkeypatch.setattr(svg, "save", keep)
    return drawn


def lines(axes, marker):
    """The coordinates of the lines of an axes, with or without markers, but for those across all of it."""
    found = [line for line in axes.lines if line.get_linestyle() != "--"]
    return [line.get_xydata().round(6).tolist() for line in found if (line.get_marker() != "None") == marker]


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_point_per_recipe_with_its_range_and_a_line_along_the_front(drawn, tmp_path):
    figure = drawn(
        ("quick", 2, 0.80, {}),
        ("better", 10, 0.90, {}),
        ("better", 14, 0.94, {}),
        ("beaten", 20, 0.85, {}),
    )
    axes = figure.axes[0]
    assert lines(axes, marker=True) == [[[2, 0.8]], [[12, 0.92]], [[20, 0.85]]]
    *bars, front = lines(axes, marker=False)
    assert bars == [[[2, 0.79], [2, 0.81]], [[12, 0.9], [12, 0.94]], [[20, 0.84], [20, 0.86]]]
    assert front == [[2, 0.8], [12, 0.92]]
    assert labels(figure) == ["quick, 200 images/s", "better, 200 images/s", "beaten, 200 images/s"]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "minutes of all epochs on a device")
    text = (tmp_path / "frontier.svg").read_text()
    said = "better, 200 images/s: 92.00% (90.00 to 94.00) in 12.0 minutes on a device; beaten"
    for words in (said, "On the Pareto front: quick, better on a device.", "original, claimed: 92%"):
        assert words in text
        assert words in (tmp_path / "tables.md").read_text()
    assert "](frontier.png)" in (tmp_path / "tables.md").read_text()


def test_what_others_published_is_drawn_across_and_named_at_the_right_end(drawn):
    figure = drawn(("quick", 2, 0.80, {}))
    axes = figure.axes[0]
    across = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert across == list(PUBLISHED.values()) == [0.693, 0.886, 0.92, 0.9725]
    texts = {text.get_text(): text for text in axes.texts if "%" in text.get_text()}
    assert list(texts)[1] == "88.6%  best public, 32x32*"
    figure.draw_without_rendering()
    for text, share in zip(texts.values(), across, strict=True):
        box = Text.get_window_extent(text)
        assert axes.bbox.x1 < box.x0 < box.x1 < figure.bbox.x1
        assert box.y0 < axes.transData.transform((2, share))[1] < box.y1


def test_runs_of_several_devices_are_not_compared(drawn):
    figure = drawn(
        ("quick", 2, 0.80, {}),
        ("quick", 0.1, 0.81, {"device": "a GPU"}),
        ("better", 10, 0.90, {}),
    )
    axes = figure.axes[0]
    assert sorted(lines(axes, marker=True)) == [[[0.1, 0.81]], [[2, 0.8]], [[10, 0.9]]]
    assert [[2, 0.8], [10, 0.9]] in lines(axes, marker=False)  # though the GPU's run beats the first
    markers = {line.get_label(): line.get_marker() for line in axes.lines}
    assert {label: markers[label] for label in labels(figure)} == {
        "quick, 200 images/s, a device": "o",
        "quick, 200 images/s, a GPU": "s",
        "better, 200 images/s, a device": "o",
    }
    assert axes.get_xlabel() == "minutes of all epochs"


def test_a_recipe_on_two_scales_is_two_points(drawn):
    figure = drawn(("quick", 2, 0.80, {}), ("quick", 1, 0.70, {"scale": "proxy"}))
    assert labels(figure) == ["quick full, 200 images/s", "quick proxy, 200 images/s"]


def test_without_fine_tuning_there_is_no_speed_of_it(drawn):
    plan = [{"name": "frozen", "start": 0, "end": 4, "stages": []}]
    figure = drawn(("probe", 2, 0.80, {"plan": plan}))
    assert labels(figure) == ["probe"]


def test_speed_is_of_all_fine_tuning(drawn):
    rates = {"frozen": 9000.0, "fine-tune at 64x64": 300.0, "fine-tune at 96x96": 100.0}
    phases = [
        {"name": name, "epochs": [i], "seconds": 1.0, "images_per_s": rate}
        for i, (name, rate) in enumerate(rates.items())
    ]
    assert labels(drawn(("growing", 2, 0.80, {"phases": phases}))) == ["growing, 150 images/s"]


def test_without_a_finished_run_there_is_no_figure(drawn, tmp_path):
    assert drawn(("quick", 2, 0.80, {"status": "interrupted"})) is None
    text = (tmp_path / "tables.md").read_text()
    assert text == "# Tables\n\n## Results\n\nNo table: too few of its runs are finished.\n\nNot finished: quick0.\n"


def test_the_cliff_is_the_mean_over_the_seeds(drawn, tmp_path):
    for accuracies in ([0.3, 0.4, 0.3, 0.5], [0.3, 0.4, 0.5, None]):
        drawn(*(("quick", 2, 0.80, {"val/acc": values}) for values in ([0.3, 0.4, 0.3, 0.5], accuracies)))
        fall = "+0.0" if accuracies[-1] is None else "-10.0"
        assert f"Validation accuracy around the unfreeze: quick {fall} points" in (tmp_path / "tables.md").read_text()
        for run in tmp_path.glob("quick*"):
            shutil.rmtree(run)


def test_the_mean_over_seeds_goes_as_far_as_the_shortest_run():
    plan = [{"name": "fine-tune", "start": 1, "end": 4, "stages": ["layer4"]}]
    lengths = {4: [0.1, 0.3, 0.5, 0.7], 3: [0.3, 0.5, None]}
    runs = [Run(Path(), {"plan": plan, "epoch": list(range(n)), "val/acc": v}) for n, v in lengths.items()]
    epochs, values, unfreeze = _mean_curve(Group("", {}, runs))
    assert (epochs, unfreeze) == ([0, 1, 2], 1)
    assert values[:2] == pytest.approx([0.2, 0.4])
    assert math.isnan(values[2])


def test_the_legend_covers_no_point(drawn):
    figure = drawn(*((f"recipe_{i}", 10 + i, 0.9 + i / 1000, {}) for i in range(7)))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert not axes.get_legend().get_window_extent().overlaps(axes.bbox)
    assert figure.bbox.count_contains(axes.get_legend().get_window_extent().corners()) == 4


@pytest.mark.parametrize(
    ("results", "front"),
    [
        ([(1, 0.5), (2, 0.6), (3, 0.55), (4, 0.7)], [0, 1, 3]),
        ([(4, 0.7), (1, 0.9)], [1]),
        ([(1, 0.5), (1, 0.6), (2, 0.6)], [1]),
        ([(1, 0.5), (1, 0.5)], [0]),
        ([], []),
    ],
)
def test_the_front_is_what_no_other_is_as_cheap_and_as_good_as(results, front):
    made = [Result(str(i), cost, y, y, y, "a device") for i, (cost, y) in enumerate(results)]
    assert [int(result.label) for result in pareto_front(made)] == front


def test_a_variation_of_a_recipe_has_no_point(drawn):
    runs = [("seed_baseline", 14, 0.67, {}), ("statistics_alone", 1, 0.66, {"experiment": "seed_baseline"})]
    assert [label.split(",")[0] for label in labels(drawn(*runs))] == ["seed_baseline"]
