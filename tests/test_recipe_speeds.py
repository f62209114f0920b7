"""`--only recipes`: what is timed, the minutes computed from it, and how they get into the READMEs."""

import csv
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from cifar_tl.benchmarks import recipes
from cifar_tl.benchmarks.__main__ import main
from cifar_tl.benchmarks.setting import Setting
from cifar_tl.benchmarks.step import WARM_UP
from cifar_tl.cli import conf_folder
from cifar_tl.errors import UserError
from cifar_tl.reproduce.frontier import PICTURE, SPEED
from cifar_tl.reproduce.publish import PROVENANCE, RESULTS
from cifar_tl.schedule import Phase


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", "32-true", None, None, 1, 512, (), tmp_path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with published accuracies, and a README for what is measured."""
    origin = dict.fromkeys(PROVENANCE, "x")
    (tmp_path / RESULTS).mkdir(parents=True)
    with (tmp_path / RESULTS / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["config", "test acc", "range", *PROVENANCE])
        writer.writeheader()
        writer.writerow({"config": "progressive", "test acc": "96.5", "range": "96.1 to 96.9"} | origin)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "README.md").write_text("<!-- table: results -->\n<!-- /table -->\n")
    (tmp_path / "conf/experiment/README.md").write_text("<!-- table: speed -->\n<!-- /table -->\n")
    monkeypatch.setattr(recipes, "conf_folder", lambda: tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_every_phase_is_timed_and_published_with_its_minutes(checkout, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "RECIPES", ("best32", "progressive"))
    monkeypatch.setattr(recipes, "TIMED", 64)
    given = ["--only", "recipes", "--rounds", "1", "--limit", "513", "--precision", "bf16-mixed"]
    assert main(given) == 0, capsys.readouterr().err
    (folder,) = (checkout / "outputs" / "bench").iterdir()
    result = json.loads((folder / "bench.json").read_text())
    best32, progressive = result["recipes"]
    assert [key for key in best32 if key.endswith("images/s")] == ["frozen, images/s", "fine-tune, images/s"]
    rates = {key: value for key, value in progressive.items() if key.endswith("images/s")}
    assert list(rates) == [f"{name}, images/s" for name in ("frozen", "fine-tune at 64x64", "fine-tune at 128x128")]
    minutes = sum(45_000 * epochs / rate for epochs, rate in zip((10, 4, 6), rates.values(), strict=True)) / 60
    assert progressive["low"] == progressive["high"] == progressive["minutes"] == pytest.approx(minutes)

    setting = Setting("cpu", "bf16-mixed", None, None, 1, None, (), checkout / "outputs")
    written = recipes.publish_speed(result, setting)
    assert {checkout / SPEED, checkout / PICTURE} < set(written)
    rows = list(csv.DictReader((checkout / SPEED).read_text().splitlines()))
    assert [row["config"] for row in rows] == ["best32", "progressive"]
    frozen, small, large = (f"{rate:,.0f}" for rate in rates.values())
    assert (rows[1]["frozen, images/s"], rows[1]["fine-tune, images/s"]) == (
        frozen,
        f"{small} at 64x64, {large} at 128x128",
    )
    assert (rows[1]["n"], rows[1]["weights"], rows[1]["precision"]) == ("1", "random", "bf16-mixed")
    assert rows[1]["minutes of training"] == f"{minutes:.3g}"
    assert f"| progressive | {frozen} | {small} at 64x64," in (checkout / "conf/experiment/README.md").read_text()
    with Image.open(checkout / PICTURE) as picture:
        shown = picture.text["Description"]
    assert shown.startswith(f"progressive, {float(rows[1]['minutes of training']):.3g} min on ")
    assert shown.endswith(", bf16-mixed: 96.50% (96.10 to 96.90)")
    assert "best32" not in shown  # its accuracy is not published


def test_what_cannot_be_published_is_said_before_minutes_are_spent(checkout, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "measure", lambda setting: pytest.fail("measured"))
    real = ["--publish", "--data-root", "data", "--weights", "w.pth"]
    monkeypatch.setattr("cifar_tl.runs.record.git_state", lambda: {"git_commit": "0123abc", "git_dirty": True})
    assert main(["--only", "recipes", *real]) == 1
    assert "this checkout has changes: commit them" in capsys.readouterr().err
    (checkout / "conf/experiment/README.md").unlink()
    assert main(["--only", "recipes", *real]) == 1
    assert "goes into a checkout" in capsys.readouterr().err
    for given in (["step", *real], ["recipes", "--publish"], ["recipes", *real, "--limit", "20"]):
        with pytest.raises(SystemExit):
            main(["--only", *given])
        assert "--publish is for --only recipes, with --data-root" in capsys.readouterr().err
    assert not (checkout / "outputs").exists()


def test_what_is_published_is_written_before_other_parts_can_fail(checkout, monkeypatch, capsys):
    def fail(setting):
        raise UserError("no network")

    written = []
    monkeypatch.setattr(recipes, "measure", lambda setting: [{"what": "x"}])
    monkeypatch.setattr(recipes, "publish_speed", lambda result, setting: written.append(result["recipes"]) or [])
    monkeypatch.setattr("cifar_tl.benchmarks.peers.measure", fail)
    monkeypatch.setattr("cifar_tl.runs.record.git_state", lambda: {"git_commit": "0123abc", "git_dirty": False})
    given = ["--only", "recipes", "peers", "--publish", "--data-root", "data", "--weights", "w.pth"]
    assert main(given) == 1
    assert capsys.readouterr().err == "error: no network\n"
    assert written == [[{"what": "x"}]]


def test_every_recipe_is_timed():
    recipes_there = {path.stem for path in (conf_folder() / "experiment").glob("*.yaml")}
    assert {*recipes.RECIPES, "default", "demo"} == recipes_there  # default is best32, demo's images are generated


@pytest.mark.parametrize(
    ("rates", "cells"), [({"frozen": 900.0}, ("900", "-")), ({"fine-tune": 1234.5}, ("-", "1,234"))]
)
def test_a_recipe_may_have_one_phase(checkout, rates, cells):
    row = {"what": "x", **{f"{name}, images/s": rate for name, rate in rates.items()}}
    result = {"git_commit": None, "git_dirty": None, "device": "a device", "date": "2026-01-02T03:04:05"}
    result["recipes"] = [{**row, "minutes": 0.0123, "low": 0.01, "high": 123.45, "n": 1}]
    recipes.publish_speed(result, Setting("cpu", "32-true", None, None, 1, None, (), checkout))
    (row,) = csv.DictReader((checkout / SPEED).read_text().splitlines())
    assert (row["frozen, images/s"], row["fine-tune, images/s"]) == cells
    assert (row["minutes of training"], row["range"]) == ("0.0123", "0.01 to 123")


def test_minutes_are_of_all_epochs_and_their_range_is_over_rounds():
    phases = [Phase("frozen", 0, 2, ()), Phase("fine-tune", 2, 5, ("layer4",))]
    figures = {"x: frozen": [1500, 750, 750], "x: fine-tune": [75, 150, 75]}
    row = recipes.row("x", phases, figures)
    assert (row["frozen, images/s"], row["fine-tune, images/s"]) == (750, 75)
    assert (row["minutes"], row["low"], row["high"], row["n"]) == (32, 17, 32, 3)  # medians: 2 + 30; 1 + 30, 2 + 15


@pytest.mark.slow
def test_a_phase_trains_what_its_recipe_trains_in_it(setting, monkeypatch):
    seen = []

    def fit(trainer, module, datamodule):
        (unfreeze,) = (c for c in trainer.callbacks if hasattr(c, "schedule"))
        (clock,) = (c for c in trainer.callbacks if isinstance(c, recipes.StepClock))
        clock.images, clock.seconds = 1, 1
        phase = unfreeze.schedule.phase(0)
        cached = any(isinstance(callback, recipes.TimedFeatures) for callback in trainer.callbacks)
        seen.append((phase.stages, phase.upscale or module.backbone.upscale, cached, datamodule.batch_size))

    monkeypatch.setattr(recipes.L.Trainer, "fit", fit)
    for speed in recipes.speeds(setting, ["experiment=progressive"]).values():
        speed()
    upper = ("layer4", "layer3", "layer2")
    assert seen == [((), 2, True, 128), (upper, 2, False, 128), (upper, 4, False, 128)]


@pytest.mark.slow
def test_a_phase_is_ten_epochs_and_the_features_of_both_views_once(setting, monkeypatch):
    def fit(trainer, module, datamodule):
        for callback in trainer.callbacks:
            if isinstance(callback, recipes.StepClock):
                callback.images, callback.seconds = 100, 0.1
            elif isinstance(callback, recipes.Timed):
                callback.views, callback.seconds_per_view = 2, 0.005

    monkeypatch.setattr(recipes.L.Trainer, "fit", fit)
    speeds = recipes.speeds(setting, ["experiment=distill32"])
    assert speeds["frozen"]() == pytest.approx(500)  # an image 1 ms in each epoch, and once 2 x 5 ms
    assert speeds["fine-tune"]() == pytest.approx(400)  # the same, with the teacher's, and its own once more
    assert recipes.speeds(setting, ["experiment=best32"])["fine-tune"]() == pytest.approx(1000)


def test_the_clock_leaves_out_the_first_steps_and_each_epochs_first(setting, monkeypatch):
    ticks = iter([*range(WARM_UP), WARM_UP + 1, 100, 103])
    monkeypatch.setattr(recipes.time, "perf_counter", lambda: float(next(ticks)))
    waits = []
    monkeypatch.setattr(Setting, "synchronize", lambda self: waits.append(step))
    clock = recipes.StepClock(setting)
    batches = [*range(WARM_UP + 1), 0, 1]
    for step, batch_idx in enumerate(batches, start=1):
        trainer = SimpleNamespace(is_last_batch=step == WARM_UP + 1, global_step=step, max_steps=len(batches))
        clock.on_train_batch_end(trainer, None, None, ([0] * 8, [0] * 8), batch_idx)
    assert (clock.images, clock.seconds) == (16, 2 + 3)
    # for the device: at the start, where timing starts or ends, and at the end
    assert waits == [1, WARM_UP, WARM_UP + 1, WARM_UP + 2, WARM_UP + 3]
