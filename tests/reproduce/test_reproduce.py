"""The published tables: which runs are made, kept and continued, and what is made of them. Runs are made by hand."""

import csv
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest
from handmade import make_run
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cifar_tl import cli
from cifar_tl.errors import Interrupted, UserError
from cifar_tl.reports.__main__ import main as report
from cifar_tl.reproduce import __main__ as reproduce
from cifar_tl.reproduce import jobs
from cifar_tl.reproduce.frontier import MINUTES, published_results
from cifar_tl.reproduce.jobs import Job
from cifar_tl.reproduce.publish import PROVENANCE
from cifar_tl.reproduce.tables import spearman, write_tables
from cifar_tl.runs.resume import run_lock

PASSED = ("data=synthetic", "model.weights=null", "trainer=cpu")
RECIPES = {name: [f"experiment={name}"] for name in ("seed_baseline", "best32")}
RESULTS = ["results-seed_baseline-full-seed0", "results-best32-full-seed0"]
ACCURACIES = {"seed_baseline": 0.3, "best32": 0.5}
"""Validation accuracies after the unfreeze; 0.4 before it. Other recipes have 0.45."""


def leave_run(folder, overrides, **metrics):
    """Leave what a run with these overrides would."""
    after = next((value for name, value in ACCURACIES.items() if name in folder.name), 0.45)
    curve = {"val/acc": [0.3, 0.4, after, after + 0.1], "best/val/acc": after + 0.1, "images": {"train": 2000}}
    given, seed = [o for o in overrides if not o.startswith(("seed=", "hydra."))], folder.name[-1]
    curve["experiment"] = next((o.partition("=")[2] for o in given if o.startswith("experiment=")), "default")
    make_run(folder, given, int(seed), **{**curve, "test/acc_interval": [0.8, 0.9], **metrics})
    OmegaConf.save(jobs.compose([*given, f"seed={seed}"]), folder / ".hydra" / "config.yaml")


@pytest.fixture(autouse=True)
def recipes(tmp_path_factory, monkeypatch):
    """Few recipes and published rows, whatever the checkout has."""
    folder = shutil.copytree(cli.conf_folder(), tmp_path_factory.mktemp("checkout") / "conf")
    published = folder / "experiment" / "results" / "results.csv"
    rows = [["config", "test acc", "range", *PROVENANCE]] + [
        [name, "94.30", "93.90 to 94.70", *["-"] * len(PROVENANCE)] for name in ("best64", "best32")
    ]
    published.write_text("".join(",".join(row) + "\n" for row in rows))
    speeds = [["config", MINUTES, *PROVENANCE]] + [
        [name, "12.5", *["-"] * len(PROVENANCE)] for name in ("best64", "best32")
    ]
    (published.parent / "speed.csv").write_text("".join(",".join(row) + "\n" for row in speeds))
    (folder / "experiment" / "README.md").write_text("")
    conf = OmegaConf.load(folder / "reproduce.yaml")
    conf.results.recipes, conf.results.more_seeds = RECIPES, {"best32": []}
    conf.scale.recipes = {name: [f"experiment={name}"] for name in ("best32", "hires")}
    conf.ladder.recipes = {**RECIPES, "best32_bn_train": ["experiment=best32", "ablate=bn_train"]}
    OmegaConf.save(conf, folder / "reproduce.yaml")
    monkeypatch.setattr(cli, "conf_folder", lambda: folder)
    return folder


@pytest.fixture(scope="module")
def composed():
    """What is composed already, by overrides: otherwise these tests do little else."""
    return {}


@pytest.fixture(autouse=True)
def composed_once(composed, monkeypatch):
    """Compose what is the same for all tests once. None of them changes what `train` is composed of."""
    compose = jobs.compose

    def remembered(overrides):
        if tuple(overrides) not in composed:
            composed[tuple(overrides)] = compose(overrides)
        return deepcopy(composed[tuple(overrides)])

    monkeypatch.setattr(jobs, "compose", remembered)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; what it calls is noted, and leaves hand-made runs."""
    monkeypatch.chdir(tmp_path)
    called, failing, evaluated, resumed = [], [], [], []

    def play(module, arguments):
        keys = {key: value.strip("'") for key, _, value in (a.partition("=") for a in arguments)}
        if module == "cifar_tl.evaluate":
            evaluated.append(keys)
            (Path(keys["hydra.run.dir"]) / ".hydra").mkdir(parents=True, exist_ok=True)
            given = [argument for argument in arguments if not argument.startswith("hydra.")]  # as Hydra does
            (Path(keys["hydra.run.dir"]) / ".hydra" / "overrides.yaml").write_text(json.dumps(given))
            (Path(keys["hydra.run.dir"]) / "evaluation.json").write_text('{"test/acc": 0, "test/flip/acc": 0.875}')
            return True
        folder = Path(keys.get("resume", keys.get("hydra.run.dir")))
        called.append((folder.name, "resume" in keys))
        if folder.name in failing:
            return False
        if "resume" in keys:
            resumed.append(keys)
            arguments = json.loads((folder / ".hydra" / "overrides.yaml").read_text())
            shutil.rmtree(folder)
        leave_run(folder, arguments)
        return True

    def run(*arguments, passed=PASSED):
        for calls in (called, evaluated, resumed):
            calls.clear()
        code = reproduce.main([*passed, *arguments])
        return code, *capsys.readouterr()

    monkeypatch.setattr(reproduce, "command", play)
    run.called, run.failing, run.evaluated, run.resumed = called, failing, evaluated, resumed
    return run


def rows(name):
    return list(csv.DictReader(Path("outputs/reproduce", f"{name}.csv").read_text().splitlines()))


def test_results_with_provenance_and_the_cliff(command):
    code, out, err = command("only=[results]")
    assert code == 0, err
    assert command.called == [(name, False) for name in RESULTS]
    first, second = rows("results")
    assert (first["config"], first["frozen"], first["+1 epoch"], first["best val"]) == (
        "seed_baseline",
        "40.00",
        "30.00",
        "40.00",
    )
    assert (second["+1 epoch"], second["range"], second["flip TTA"]) == ("50.00", "80.00 to 90.00", "87.50")
    assert second["test acc"] != "0.00"  # the run's own, read once
    text = Path("outputs/reproduce/tables.md").read_text()
    assert "`python -m cifar_tl.reproduce 'only=[results]' data=synthetic model.weights=null trainer=cpu`" in text
    assert "a device; 2026-01-02; commit 0123abc; weights random; 32-true" in text
    assert "seed_baseline -10.0 points; best32 +10.0 points" in Path("outputs/reproduce/cliff.svg").read_text()
    assert Path("outputs/reproduce/cliff.png").is_file()
    assert Path("outputs/reproduce/frontier.png").is_file()
    assert all(f"outputs/reproduce/{name}" in out for name in ("tables.md", "cliff.svg", "frontier.svg"))


def test_only_publish_writes_into_the_checkout(command, recipes):
    root = recipes.parent
    (root / "pyproject.toml").touch()
    (root / "README.md").write_text("<!-- table: results | best32 -->\n<!-- /table -->\n")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    passed = ("model.weights=null", "trainer=cpu")  # every table says these
    assert command("only=[results]", passed=passed)[0] == 0
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    code, out, err = command("only=[results]", "tables_only=true", "publish=true", passed=passed)
    assert code == 0, err
    assert command.called == []
    assert str(root / "README.md") in out
    text = (root / "README.md").read_text()
    assert "| best32 | 1 | 40.00 | 50.00 | 60.00 |" in text
    assert "weights random; filters: random; 32-true." in text
    committed = (root / "conf" / "experiment" / "results" / "results.csv").read_text()
    assert [line.split(",")[0] for line in committed.splitlines()] == [
        "config",
        "best64",
        "best32",
        "seed_baseline",
    ]
    assert "minutes" in rows("results")[0]
    assert "minutes" not in committed
    assert str(root / ".github" / "images" / "frontier.png") in out
    drawn = {result.label.split(",")[0]: result for result in published_results(root)}
    assert list(drawn) == ["best64", "best32"]  # the speed of the third is not published
    its = drawn["best64"]
    assert (its.accuracy, its.low, its.high) == pytest.approx((0.943, 0.939, 0.947))
    measured = {row["config"]: float(row["test acc"]) / 100 for row in rows("results")}
    assert drawn["best32"].accuracy == pytest.approx(measured["best32"])


def test_finished_runs_are_kept_interrupted_ones_go_on_and_others_are_set_aside(command):
    command("only=[results]")
    code, out, _ = command("only=[results]", "logger=csv")
    assert code == 0
    assert command.called == []
    assert "kept: finished 2026-01-02, commit 0123abc" in out

    folder = Path("outputs/reproduce", RESULTS[0])
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "status": "interrupted"}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    command("only=[results]")
    assert command.called == [(RESULTS[0], True)]

    code, out, _ = command("only=[results]", "model.dropout=0.5")
    assert command.called == [(name, False) for name in RESULTS]
    assert (folder.parent / "replaced" / f"{RESULTS[0]}.1" / "metrics.json").is_file()
    assert f"The old run is now in {folder.parent.resolve() / 'replaced'}" in out

    code, _, _ = command("only=[results]", "tables_only=true")
    assert command.called == []
    assert f"{RESULTS[0]} was run with model.dropout=0.5, now 0.0." in (folder.parent / "tables.md").read_text()


def test_a_run_that_was_resumed_names_every_commit_and_device(command):
    command("only=[results]", "recipes=[best32]")
    path = Path("outputs/reproduce", RESULTS[1], "metrics.json")
    metrics = json.loads(path.read_text())
    first = {key: metrics.get(key) for key in ("device", "precision", "started", "git_dirty")}
    second = {**first, "epoch": 3, "device": "another", "git_commit": "2" * 40}
    starts = [{**first, "epoch": 0, "git_commit": "1" * 40}, second]
    path.write_text(json.dumps({**metrics, "starts": starts}))
    command("only=[results]", "recipes=[best32]", "tables_only=true")
    (row,) = rows("results")
    assert (row["commit"], row["device"]) == ("1111111, 2222222", "a device, another")


def test_other_weights_under_the_same_name_are_other_weights(command, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"these")
    arguments = ("only=[results]", "recipes=[best32]", f"model.weights={weights}")
    command(*arguments)
    metrics = Path("outputs/reproduce", RESULTS[1], "metrics.json")
    was = hashlib.sha256(b"these").hexdigest()
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "weights_sha256": was}))
    command(*arguments)
    assert command.called == []
    weights.write_bytes(b"others")
    command(*arguments)
    assert command.called == [(RESULTS[1], False)]
    assert Path("outputs/reproduce/replaced", f"{RESULTS[1]}.1").is_dir()


def test_a_recipe_may_have_more_seeds_than_the_others(command):
    code, _, err = command("only=[results]", "results.more_seeds.best32=[0,1,2]")
    assert code == 0, err
    assert [name for name, _ in command.called] == [*RESULTS, *(f"results-best32-full-seed{seed}" for seed in (1, 2))]
    assert [(row["config"], row["n"]) for row in rows("results")] == [("seed_baseline", "1"), ("best32", "3")]


def test_a_failing_job_is_named_and_the_others_go_on(command):
    command.failing.append(RESULTS[0])
    code, out, err = command("only=[results]")
    assert code == 1
    assert len(command.called) == 2
    assert f"error: 1 of 2 jobs failed: {RESULTS[0]}." in err
    assert [row["config"] for row in rows("results")] == ["best32"]
    assert f"Not finished: {RESULTS[0]}." in Path("outputs/reproduce/tables.md").read_text()
    assert "tables.md" in out


def test_the_ladder_shares_runs_with_the_results_and_correlates_ranks(command):
    code, _, err = command("only=[results,ladder]")
    assert code == 0, err
    names = [name for name, _ in command.called]
    assert names[:2] == RESULTS
    assert sorted(names[2:]) == [
        "ablation-bn_train-subset-seed0",
        "ablation-none-subset-seed0",
        "ladder-best32_bn_train-full-seed0",
        "ladder-seed_baseline-proxy-seed0",
    ]
    assert [row["recipe"] for row in rows("ladder")][-1] == "seed_baseline"
    assert "correlation of full and proxy: 1.00 (n = 3 recipes)" in Path("outputs/reproduce/tables.md").read_text()


def test_runs_that_parts_share_are_found_whichever_part_asks(command):
    command("only=[results]")
    _, out, _ = command("only=[ladder]")
    assert not {name for name, _ in command.called} & {"ladder-best32-full-seed0", *RESULTS}
    assert "results-best32-full-seed0" in out
    assert [row["recipe"] for row in rows("ladder")] == ["best32", "best32_bn_train", "seed_baseline"]
    command("only=[ladder]", "tables_only=true")
    assert "Not finished" not in Path("outputs/reproduce/tables.md").read_text()


def test_data_that_have_moved_are_read_where_they_are_now(command):
    command("only=[results]", passed=(*PASSED[1:], "data.root=old"))
    folder = Path("outputs/reproduce", RESULTS[0])
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "status": "interrupted"}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    command("only=[results]", passed=(*PASSED[1:], "data.root=new"))
    assert [keys["data.root"] for keys in command.resumed] == ["new"]
    assert [keys["data.root"] for keys in command.evaluated] == ["new"]


def test_another_evaluation_is_made_of_finished_runs(command):
    command("only=[results]")
    command("only=[results]", "results.evaluate=['tta=true','cifar10_1=v6']")
    assert command.called == []
    assert [keys["cifar10_1"] for keys in command.evaluated] == ["v6", "v6"]
    command("only=[results]")
    assert command.evaluated == []
    command("only=[results]", "results.evaluate=['tta=true','data.limit=100']")
    assert len(command.evaluated) == 2
    command("only=[results]")  # of all images, again
    assert len(command.evaluated) == 2
    command("only=[results]", "results.evaluate=null")
    assert command.evaluated == []


def test_an_evaluation_of_other_images_is_not_the_runs(command):
    command("only=[results]")
    path = Path("outputs/reproduce", RESULTS[1], "evaluation", "evaluation.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_sha256": "another"}))
    command("only=[results]", "tables_only=true")
    assert [row["flip TTA"] for row in rows("results")] == ["87.50", "-"]


def test_an_evaluation_that_fails_is_tried_again(command, monkeypatch):
    command("only=[results]")
    asked = ("only=[results]", "results.evaluate=['tta=true','cifar10_1=v6']")
    play = reproduce.command

    def without_files(module, arguments):
        play(module, arguments)  # notes what is asked for
        Path(arguments[-1].partition("=")[2].strip("'"), "evaluation.json").unlink(missing_ok=True)
        return False

    with monkeypatch.context() as patched:
        patched.setattr(reproduce, "command", without_files)
        assert command(*asked)[0] == 1
    assert command(*asked)[0] == 0
    assert [keys["cifar10_1"] for keys in command.evaluated] == ["v6", "v6"]


def test_a_value_that_not_all_seeds_have_is_no_mean(command):
    command("only=[results]", "results.seeds=[0,1]")
    for evaluation in Path("outputs/reproduce").glob("*best32*seed1/evaluation/evaluation.json"):
        evaluation.unlink()
    command("only=[results]", "results.seeds=[0,1]", "tables_only=true")
    assert {row["config"]: (row["n"], row["flip TTA"]) for row in rows("results")} == {
        "seed_baseline": ("2", "87.50"),
        "best32": ("2", "-"),
    }


def test_a_run_without_validation_around_its_unfreeze_has_its_row(command):
    command("only=[results]")
    metrics = Path("outputs/reproduce", RESULTS[1], "metrics.json")
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"val/acc": [None, 0.4, None, 0.6]}))
    assert command("only=[results]", "tables_only=true")[0] == 0
    assert [(row["frozen"], row["+1 epoch"]) for row in rows("results")] == [("40.00", "30.00"), ("-", "-")]


def test_equal_images(command):
    assert command("only=[scale]")[0] == 0
    assert [(row["recipe"], row["images x epochs"]) for row in rows("scale")] == [
        ("best32", "2,000 x 4"),
        ("hires", "2,000 x 4"),
    ]


def job_in(folder, **more):
    config = jobs.compose([*PASSED, "experiment=best32"])
    return jobs.Job("results-best32-full-seed0", folder / "results-best32-full-seed0", [], list(PASSED), config, **more)


def test_a_folder_may_have_an_apostrophe_in_its_name(tmp_path, monkeypatch):
    given, job = [], job_in(tmp_path / "o'brien", evaluate=["tta=true"])
    monkeypatch.setattr(reproduce, "command", lambda module, arguments: given.append(arguments) or True)
    for what in ("run", "resume"):
        assert reproduce.run_job(job, what)
    values = [
        {override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(arguments)}
        for arguments in given
    ]
    run, evaluation, resume, _ = values
    assert run["hydra.run.dir"] == resume["resume"] == str(job.folder)
    assert evaluation["checkpoint"] == str(job.checkpoint)
    assert evaluation["hydra.run.dir"] == str(job.evaluation.parent)


def test_a_run_that_another_process_trains_is_not_moved(tmp_path):
    job = job_in(tmp_path)
    with run_lock(job.folder), pytest.raises(UserError, match="trains there now"):
        jobs.set_aside(job)
    assert job.folder.is_dir()
    assert jobs.set_aside(job).is_dir()
    assert not job.folder.exists()


def test_runs_with_other_overrides_are_not_published(command, recipes):
    (recipes.parent / "pyproject.toml").touch()
    (recipes.parent / "README.md").write_text("")
    before = (recipes / "experiment" / "results" / "results.csv").read_text()
    assert command("only=[results]", "finetune.weight_decay=0.5", passed=PASSED[1:])[0] == 0
    code, _, err = command("only=[results]", "tables_only=true", "publish=true", passed=PASSED[1:])
    assert code == 1
    assert "not published: results-seed_baseline-full-seed0 was run with finetune.weight_decay=0.5, now" in err
    assert (recipes / "experiment" / "results" / "results.csv").read_text() == before


def test_what_the_tables_do_not_show_is_not_published(command, recipes):
    (recipes.parent / "pyproject.toml").touch()
    (recipes.parent / "README.md").write_text("")
    before = (recipes / "experiment" / "results" / "results.csv").read_text()
    code, _, err = command("only=[results]", "publish=true", passed=(*PASSED[1:], "data.limit=50"))
    assert code == 1
    assert f"not published: {RESULTS[0]} has data.limit=50, which no table shows." in err
    shrunk = ("results.scales.full=['data.limit=50']", "results.evaluate=['tta=true','trainer.precision=bf16-mixed']")
    code, _, err = command("only=[results]", "publish=true", *shrunk, passed=PASSED[1:])
    assert code == 1
    assert f"{RESULTS[1]} has data.limit=50, trainer.precision=bf16-mixed, which no table shows." in err
    code, _, err = command("only=[ablation]", "publish=true", "ablation.recipes={mine:['model.dropout=0.5']}")
    assert code == 1
    assert "ablation-mine-subset-seed0 is not in conf/reproduce.yaml." in err
    code, _, err = command("only=[ablation]", "publish=true", "recipes=adamw", "ablation.seeds=[0]")
    assert code == 1
    assert "ablation is published as a whole, and ablation-none-subset-seed" in err
    command.failing.append(RESULTS[1])
    code, _, err = command("only=[results]", "publish=true", "results.seeds=[0,1]", passed=PASSED[1:])
    assert code == 1
    assert f"not published: {RESULTS[1]}: not finished. recipes=[NAME] publishes" in err
    assert (recipes / "experiment" / "results" / "results.csv").read_text() == before


def test_a_run_that_is_not_evaluated_is_not_published(command, recipes):
    (recipes.parent / "pyproject.toml").touch()
    (recipes.parent / "README.md").write_text("")
    assert command("only=[results]", passed=PASSED[1:])[0] == 0
    before = (recipes / "experiment" / "results" / "results.csv").read_text()
    for path in Path().rglob("evaluation.json"):
        path.unlink()
    code, _, err = command("only=[results]", "tables_only=true", "publish=true", passed=PASSED[1:])
    assert code == 1
    assert f"{', '.join(RESULTS)}: not evaluated again, as the published rows are" in err
    assert (recipes / "experiment" / "results" / "results.csv").read_text() == before


def test_sigterm_reaches_the_run(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(100)\npathlib.Path('ended').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def terminate():
        deadline = time.monotonic() + 100
        while not Path("begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with cli.StopSignals(), pytest.raises(Interrupted):
        reproduce.command("sleeper", [])
    thread.join()
    assert not Path("ended").exists()


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert spearman([1, 2, 2, 3], [1, 3, 3, 2]) == pytest.approx(1 / 3)  # ranks 0, 1.5, 1.5, 3 and 0, 2.5, 2.5, 1
    assert spearman([1, 2], [1, 1]) != spearman([1, 2], [1, 1])  # NaN


@pytest.mark.parametrize("name", sorted(path.stem for path in (cli.conf_folder() / "ablate").glob("*.yaml")))
def test_an_ablation_changes_the_recipe_and_says_how(name):
    whole, without = (jobs.compose(["experiment=best32", *more]) for more in ([], [f"ablate={name}"]))
    assert (whole == without) == (name == "none")
    lines = (cli.conf_folder() / "ablate" / f"{name}.yaml").read_text().splitlines()
    assert lines[1] == f"# python -m cifar_tl.train experiment=best32 ablate={name}"
    assert lines[2].startswith("# Removes ")


@pytest.mark.slow
def test_the_report_of_a_sweep_over_ablations_has_their_table(tmp_path):
    accuracies = {("none", 0): 0.6, ("none", 1): 0.7, ("no_flip", 0): 0.55, ("no_flip", 1): 0.69}
    for job, ((name, seed), accuracy) in enumerate(accuracies.items()):
        run = make_run(tmp_path / str(job), [f"ablate={name}"], seed, **{"best/val/acc": accuracy})
        (run / "report.html").touch()  # drawn when the job ended
    assert report([str(tmp_path)]) == 0
    text = (tmp_path / "sweep_report.md").read_text()
    assert "| none | 65.00 | 60.00 to 70.00 | 2 |  |  |" in text
    assert "| no_flip | 62.00 | 55.00 to 69.00 | 2 | -3.00 | -5.00 to -1.00 |" in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("publish=yes_please", "publish=yes_please is not allowed: give true or false."),
        ("only=[result]", "Did you mean results?"),
        ("recipes=best33", "Did you mean best32?"),
        ("only=result", "only=result is not allowed: choose results, ablation"),
        ("results.seeds=1", "results.seeds=1 is not allowed: give a list, such as [0,1]."),
        ("only=[results] results.seeds=null", "no recipe, scale or seed"),
        ("only=[scale] ~scale.recipes.best32 ~scale.recipes.hires", "no recipe, scale or seed"),
        ("only=[]", "Nothing to run"),
        ("only=3", "only=3 is not allowed: give a list, such as [results]."),
        ("results.evaluate=tta", "results.evaluate=tta is not allowed: give a list, such as ['tta=true']."),
        ("results.recipes=best32", "results.recipes=best32 is not allowed: give lists by name"),
        ("results.recipes.best32=3", "results.recipes.best32=3 is not allowed: give a list"),
        ("~results", "~results is not allowed: only=[ablation,ladder,scale] goes without it."),
        ("results.more_seeds.best32=2", "results.more_seeds.best32=2 is not allowed: give a list"),
        ("seed=3", "are in conf/reproduce.yaml"),
        ("model.drop=0.1", "Unknown config key model.drop. Did you mean model.dropout?"),
        ("results.recipes.best32=['experiment=best33']", "experiment=best33: there is no such choice."),
        ("results.recipes.best32=['ablate=no_flipp']", "no_flip"),
    ],
)
def test_a_mistake_gets_a_readable_error_before_anything_is_run(command, argument, message):
    code, _, err = command(*argument.split())
    assert (code, command.called) == (1, [])
    assert message in err
    assert "Traceback" not in err


def test_what_is_to_come_is_said_before_the_first_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    monkeypatch.setattr(reproduce, "run_job", lambda job, _: printed.append(capsys.readouterr().out))
    code = reproduce.main(["only=[results]", "recipes=[best32]", *PASSED])
    assert code == 1  # nothing was run
    assert "results-best32-full-seed0                    20 epochs; to be run" in printed[0]
    assert "Ctrl-C stops" in printed[0]


@pytest.mark.slow
def test_a_commands_exit_code_decides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce.command("cifar_tl.train", ["--help"])
    assert not reproduce.command("cifar_tl.train", ["experiment=nothing"])


def test_runs_with_other_weights_or_data_are_runs_of_their_own(tmp_path):
    cfg = cli.compose("reproduce")
    recipes = [["model.weights=a/resnet50.pth"], ["model.weights=b/resnet50.pth"], ["data.root=c"]]
    cfg.results.recipes = {f"recipe{i}": ["experiment=best32", *given] for i, given in enumerate(recipes)}
    planned = jobs.plan_jobs(cfg, [], tmp_path)
    assert [job.name for job in planned if job.uses[0][0] == "results"] == [
        f"results-recipe{i}-full-seed0" for i in range(3)
    ]


def test_tables_of_several_scales_have_their_own_provenance(tmp_path):
    made = []
    for scale, device in (("small", "a CPU"), ("full", "a GPU")):
        make_run(tmp_path / scale, ["experiment=best32"], experiment="best32", device=device)
        made.append(Job(scale, tmp_path / scale, [], [], OmegaConf.create(), [], [("results", scale, "best32")]))
    written = write_tables(made, tmp_path)
    tables = {path.stem: path.read_text() for path in written if path.suffix == ".csv"}
    assert ("a GPU" in tables["results-full"], "a CPU" in tables["results-full"]) == (True, False)
    assert ("a CPU" in tables["results-small"], "a GPU" in tables["results-small"]) == (True, False)
    assert "best32 full" in (tmp_path / "cliff.svg").read_text()
