"""Searches by Optuna: shared, killed and continued; what is pruned; and their page."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import hydra
import optuna
import pytest
import torch
from conftest import TINY
from handmade import make_run
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from cifar_tl import cli
from cifar_tl.callbacks.pruning import Pruning
from cifar_tl.errors import UserError
from cifar_tl.reports import figures
from cifar_tl.reports.__main__ import main as report
from cifar_tl.reports.sweep_table import SweepTable
from cifar_tl.runs.record import write_metrics
from cifar_tl.runs.resume import JOURNAL, kept_result
from cifar_tl.search import OptunaSweeper, distribution, open_study
from cifar_tl.train import train

SEARCH = ("-m", "sweep=optuna", "model.dropout=interval(0, 0.5)", "hydra.sweep.dir=search")


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """Search with an objective in place of a training; return exit code, what stderr had, and the study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SweepTable, "_draw_report", lambda self: None)

    def search(objective, *arguments):
        def task(cfg):
            folder = Path(HydraConfig.get().runtime.output_dir)
            write_metrics(folder, {"status": "running"})
            write_metrics(folder, objective(int(folder.name), cfg))

        code = cli.run(task, "train", [*SEARCH, *arguments])
        study = open_study(tmp_path / "search") if (tmp_path / "search" / JOURNAL).is_file() else None
        return code, capsys.readouterr().err, study

    return search


def good(number, cfg):
    return {"status": "finished", "best/val/acc": 1 - cfg.model.dropout}


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("interval(0, 0.5)", FloatDistribution(0, 0.5)),
        ("tag(log, interval(1e-4, 1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("int(interval(1, 4))", IntDistribution(1, 4)),
        ("range(2, 11, 3)", IntDistribution(2, 8, step=3)),
        ("choice(adamw, muon)", CategoricalDistribution(["adamw", "muon"])),
        ("5,null", CategoricalDistribution(["5", "null"])),
        ("0.1,0.2", CategoricalDistribution(["0.1", "0.2"])),
        ("[128,64],[64]", CategoricalDistribution(["[128,64]", "[64]"])),
    ],
)
def test_a_search_space_is_written_in_hydras_grammar(sweep, expected):
    assert distribution(OverridesParser.create().parse_override(f"key={sweep}")) == expected


def test_a_space_that_optuna_refuses_is_named():
    with pytest.raises(UserError, match=r"key=tag\(log, interval\(0, 1.0\)\): Optuna cannot draw from it"):
        distribution(OverridesParser.create().parse_override("key=tag(log, interval(0, 1.0))"))


@pytest.mark.slow
def test_a_stopped_search_goes_on_and_tries_what_it_would_have_tried(search, tmp_path):
    begun = []

    def stopped(number, cfg):
        begun.append((number, cfg.model.dropout, cfg.resume))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return good(number, cfg)

    code, err, study = search(stopped, "hydra.sweeper.n_trials=12")
    assert code == 130
    assert "Go on with the whole sweep: python -m cifar_tl.train -m resume=" in err
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    code, err, study = search(stopped, "hydra.sweeper.n_trials=12")  # the same command
    assert code == 0, err
    assert [number for number, *_ in begun] == [0, 1, 2, 2, *range(3, 12)]
    assert begun[3][:2] == begun[2][:2]
    assert [resume for *_, resume in begun] == [None, None, None, "last", *[None] * 8, None]
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert study.best_value == pytest.approx(1 - min(value for _, value, _ in begun))
    assert len((tmp_path / "search" / "sweep.csv").read_text().splitlines()) == 13

    (tmp_path / "search").rename(tmp_path / "stopped")
    _, _, whole = search(good, "hydra.sweeper.n_trials=12")
    assert [trial.params for trial in whole.trials] == [trial.params for trial in study.trials]


def test_trials_are_told_as_they_ended_and_failed_ones_are_replaced_in_another_start(search):
    def objective(number, cfg):
        match number:
            case 0:
                raise UserError("no such thing")
            case 1:
                return {"status": "pruned", "best/val/acc": 0.1}
        return good(number, cfg)

    code, err, study = search(objective, "hydra.sweeper.n_trials=3")
    assert code == 1
    assert "error: job 0" in err
    assert "no such thing" in err
    assert [trial.state.name for trial in study.trials] == ["FAIL", "PRUNED", "COMPLETE"]
    code, err, study = search(objective, "hydra.sweeper.n_trials=3")
    assert (code, "no such thing" in err) == (0, False)  # told once
    assert [trial.state.name for trial in study.trials] == ["FAIL", "PRUNED", "COMPLETE", "COMPLETE"]


def test_a_trial_that_failed_and_was_not_told_fails_again_with_a_word(search):
    def objective(number, cfg):
        if number == 0:
            raise UserError("no such thing")
        if interrupted:
            raise KeyboardInterrupt
        return good(number, cfg)

    together = ("hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2")
    interrupted = True
    code, _, study = search(objective, *together)
    assert (code, [trial.state.name for trial in study.trials]) == (130, ["RUNNING", "RUNNING"])
    interrupted = False
    code, err, study = search(objective, *together)
    assert (code, [trial.state.name for trial in study.trials]) == (1, ["FAIL", "COMPLETE"])
    assert "error: job 0" in err
    assert "no such thing" in err


def test_searches_of_neighbouring_seeds_try_other_values(search, tmp_path):
    tried = []
    for seed in (0, 1):
        *_, study = search(good, f"seed={seed}", "hydra.sweeper.n_trials=4")
        tried.append({trial.params["model.dropout"] for trial in study.trials})
        (tmp_path / "search").rename(tmp_path / f"search{seed}")
    assert len(tried[0]) == 4
    assert not tried[0] & tried[1]


def test_a_number_of_trials_that_is_not_allowed_is_named(search):
    code, err, _ = search(good, "hydra.sweeper.n_trials=0")
    assert code == 1
    assert err.splitlines() == ["error: hydra.sweeper.n_trials=0 is not allowed: give a whole number of at least 1."]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("model.dropuot=interval(0, 0.5)", "Unknown config key model.dropuot"),
        ("augment.flip=choice(none, random", "augment.flip=choice(none, random cannot be parsed"),
        ("augment=choice(flip_crop, rotat)", "augment=rotat: there is no such choice"),
        ("seed=abc", "seed=abc is not allowed: give a whole number"),
    ],
)
def test_a_mistake_leaves_no_study_that_could_not_be_corrected(search, tmp_path, mistake, said):
    code, err, study = search(good, mistake, "hydra.sweeper.n_trials=1")
    assert (code, study) == (1, None)
    assert said in err
    assert "Traceback" not in err
    assert search(good, "hydra.sweeper.n_trials=1")[0] == 0


def test_choices_may_be_all_files_of_a_group(search):
    code, err, study = search(good, "augment=glob(*)", "hydra.sweeper.n_trials=1")
    assert code == 0, err
    files = {path.stem for path in (cli.conf_folder() / "augment").glob("*.yaml")}
    assert set(study.trials[0].distributions["augment"].choices) == files


def test_a_search_with_another_sampler_goes_on_by_the_same_command(search, monkeypatch):
    asked = []
    sample = RandomSampler.sample_independent
    monkeypatch.setattr(RandomSampler, "sample_independent", lambda *of: asked.append(of) or sample(*of))
    sampler = "hydra.sweeper.sampler"
    other = [f"{sampler}._target_=optuna.samplers.RandomSampler"]
    other += [f"~{sampler}.n_startup_trials", f"~{sampler}.constant_liar"]
    for trials in (1, 2):
        code, err, study = search(good, *other, f"hydra.sweeper.n_trials={trials}")
        assert code == 0, err
        assert len(study.trials) == trials
        assert len(asked) >= trials


@pytest.mark.parametrize(
    ("overrides", "trials"), [([], 1), (["hydra/launcher=local", "hydra.launcher.n_jobs=4"], 4)], ids=["one", "several"]
)
def test_a_launcher_of_several_jobs_is_given_several_trials(overrides, trials):
    with hydra.initialize_config_dir(str(cli.conf_folder()), version_base="1.3"):
        config = hydra.compose("train", ["sweep=optuna", *overrides], return_hydra_config=True)
    assert config.hydra.sweeper.n_jobs == trials


def test_without_optuna_a_search_says_what_to_install(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, err, _ = search(good)
    assert code == 1
    assert err.splitlines() == ["error: A search needs Optuna, and optuna is missing: pip install -e '.[optuna]'."]


def test_a_search_is_not_mixed_with_another_one(search):
    assert search(good, "hydra.sweeper.n_trials=1")[0] == 0
    code, err, study = search(good, "hydra.sweeper.n_trials=2", "seed=3")
    assert code == 1
    assert "search holds a sweep already" in err
    assert len(study.trials) == 1


def test_a_search_is_not_continued_in_a_space_of_another_kind(search, tmp_path):
    (tmp_path / "search").mkdir()
    open_study(tmp_path / "search").ask({"model.dropout": CategoricalDistribution(["0.1", "0.2"])})
    code, err, study = search(good, "hydra.sweeper.n_trials=2")
    assert code == 1
    assert re.search(r"searches model\.dropout in Categorical.*Choose another hydra\.sweep\.dir=FOLDER", err)
    assert len(study.trials) == 1


def test_a_trial_without_all_its_values_is_not_run(search, tmp_path):
    (tmp_path / "search").mkdir()
    open_study(tmp_path / "search").ask({})  # and killed there
    code, err, study = search(good, "hydra.sweeper.n_trials=2")
    assert code == 0, err
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_choices_that_are_numbers_are_drawn_by_size():
    points = {"finished": [(text, 0.5) for text in ("128", "1e-3", "32", "none", "auto")]}
    axes = figures.trials("a search", "data.batch_size", points).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-3", "32", "128", "auto", "none"]


def test_a_key_given_a_value_is_not_searched(search):
    code, err, study = search(good, "finetune.head_lr=1e-3", "hydra.sweeper.n_trials=1")
    assert code == 0, err
    assert "model.dropout" in study.trials[0].params
    assert "finetune.head_lr" not in study.trials[0].params
    fixed = [f"{key}=0.1" for key in study.trials[0].params]
    code, err, _ = search(good, "finetune.head_lr=1e-3", *fixed, "hydra.sweep.dir=other")
    assert code == 1
    assert "Nothing to search" in err


@pytest.mark.slow
def test_processes_share_a_search_and_one_that_is_killed_leaves_its_trial_to_the_others(tmp_path):
    def start():
        command = [sys.executable, str(Path(__file__).with_name("search_command.py")), *SEARCH]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    def begun():
        path = tmp_path / "search" / "begun.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    processes = [first, second] = [start(), start()]
    try:
        hold, held = (tmp_path / "search" / f"{name}-{first.pid}" for name in ("hold", "held"))
        while not held.is_file():  # in a trial: while it asks for the next one, a trial would be left that never began
            assert first.poll() is None, (tmp_path / "log").read_text()
            if len(begun()) >= 6:
                hold.touch()
            time.sleep(0.02)
        first.kill()
        first.wait()
        processes.append(third := start())
        assert [second.wait(), third.wait()] == [0, 0], (tmp_path / "log").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    study = open_study(tmp_path / "search")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 20
    assert len({trial.params["model.dropout"] for trial in study.trials}) == 20
    lines = begun()
    again = [line["trial"] for line in lines if line["resume"]]
    assert sorted(line["trial"] for line in lines) == sorted([*map(str, range(20)), *again])
    assert len(again) <= 1
    assert len((tmp_path / "search" / "sweep.csv").read_text().splitlines()) == 21


@pytest.fixture
def trial(compose, tmp_path):
    """A study of a good trial, and of one that is running; train it, after some of its epochs were reported."""

    def trial(*reported, resume=()):
        study = open_study(tmp_path)
        earlier = study.ask()
        for epoch in range(4):
            earlier.report(0.99, epoch)
        study.tell(earlier, 0.99)
        running = study.ask()
        for epoch, value in enumerate(reported):
            running.report(value, epoch)
        pruner = "callbacks.pruning.pruner"
        cfg = compose(
            *("sweep=optuna", *TINY, "finetune.features_folder=null"),
            *(f"{pruner}.n_startup_trials=1", f"{pruner}.n_warmup_steps=1"),
        )
        metrics = train(cfg, tmp_path / "1", "demo")
        for overrides in resume:
            metrics = train(OmegaConf.merge(cfg, overrides, {"resume": str(tmp_path / "1")}), tmp_path / "1", "demo")
        return metrics, open_study(tmp_path).trials[1]

    return trial


def test_a_hopeless_trial_is_pruned_and_its_record_says_why(trial, tmp_path, caplog):
    with caplog.at_level("INFO"):
        metrics, trial = trial()
    assert metrics["status"] == "pruned"
    assert metrics["epoch"] == [0, 1]
    assert metrics["pruned"].startswith("Pruned after epoch 1 by MedianPruner: validation accuracy ")
    assert metrics["pruned"].endswith("%, the best of 2 trials had 99.00% then.")
    assert metrics["pruned"] in caplog.text
    assert "test/acc" not in metrics
    assert kept_result(tmp_path / "1") == metrics["best/val/acc"]
    assert trial.intermediate_values == dict(enumerate(metrics["val/acc"]))
    assert (tmp_path / "1" / "checkpoints" / "last.ckpt").is_file()


def test_a_resumed_trial_reports_no_epoch_twice(trial):
    metrics, trial = trial(0.99, 0.99, 0.98)
    assert trial.intermediate_values == {0: 0.99, 1: 0.99, 2: 0.98, 3: metrics["val/acc"][3]}


def test_a_trial_that_was_killed_between_its_report_and_the_pruners_word_is_pruned(trial):
    metrics, trial = trial(0.5, 0.5)
    assert trial.intermediate_values == {0: 0.5, 1: 0.5}
    assert metrics["epoch"] == [0, 1]
    assert metrics["pruned"].startswith("Pruned after epoch 1 by MedianPruner: validation accuracy 50.00%")


def test_a_trial_that_was_killed_after_the_checkpoint_of_a_hopeless_epoch_is_pruned(trial):
    metrics, trial = trial(resume=[{}])
    assert metrics["epoch"] == [0, 1]
    assert metrics["status"] == "pruned"
    assert list(trial.intermediate_values) == [0, 1]


def test_a_run_that_is_no_trial_is_left_alone(compose, tmp_path):
    cfg = compose("sweep=optuna", *TINY, "finetune.features_folder=null", "trainer.max_epochs=3")
    assert train(cfg, tmp_path / "run", "demo")["status"] == "finished"


def test_a_run_has_the_very_values_that_optuna_has(search):
    tried = []

    def noted(number, cfg):
        tried.append(cfg.callbacks.ema.decay)
        return {"status": "finished", "best/val/acc": 0.5}

    close = "callbacks.ema.decay=interval(0.99995, 0.999999)"  # of four digits, all are 1
    code, error, study = search(noted, "callbacks=ema", close, "hydra.sweeper.n_trials=3")
    assert code == 0, error
    assert tried == [trial.params["callbacks.ema.decay"] for trial in study.trials]
    assert len(set(tried)) == 3


@pytest.mark.parametrize("line", ["{}", "[]", '{"op_code": 0, ', "\x00\x01"])
def test_a_damaged_journal_is_named(tmp_path, capsys, no_run_pages, line):
    make_run(tmp_path / "0", ["model.dropout=0.1"])
    (tmp_path / JOURNAL).write_text(f"{line}\n")
    with pytest.raises(UserError, match=f"{JOURNAL} cannot be read"):
        open_study(tmp_path)
    assert report([str(tmp_path)]) == 0
    page = (tmp_path / "sweep_report.html").read_text()
    assert "The search is not shown" in page
    assert "all runs" in page


def test_a_search_without_a_finished_trial_says_so(tmp_path, no_run_pages):
    study = open_study(tmp_path)
    study.tell(study.ask({"model.dropout": FloatDistribution(0, 0.5)}), state=optuna.trial.TrialState.FAIL)
    make_run(tmp_path / "0", ["model.dropout=0.1"], status="failed")
    assert report([str(tmp_path)]) == 0
    said = "The search is not shown: no trial of 1 has finished."
    assert said in (tmp_path / "sweep_report.html").read_text()


@pytest.mark.slow
def test_a_searchs_page_has_its_history_and_what_the_best_trial_has(tmp_path):
    study = open_study(tmp_path)
    space = {
        "finetune.head_lr": FloatDistribution(1e-4, 1e-1, log=True),
        "model.head": CategoricalDistribution(["[64]"]),
    }
    for number, (status, state) in enumerate(
        [("finished", "COMPLETE"), ("finished", "COMPLETE"), ("pruned", "PRUNED"), ("failed", "FAIL")]
    ):
        asked = study.ask(space)
        asked.report(0.3, 0)
        value = 0.5 + number / 10 if state == "COMPLETE" else None
        study.tell(asked, value, state=optuna.trial.TrialState[state])
        overrides = [f"finetune.head_lr={asked.params['finetune.head_lr']}"]
        why = {"pruned": "Pruned after epoch 0."} if status == "pruned" else {}
        make_run(tmp_path / str(number), overrides, status=status, **why)
    before = (tmp_path / JOURNAL).read_bytes()
    assert report([str(tmp_path)]) == 0
    assert (tmp_path / JOURNAL).read_bytes() == before
    page = (tmp_path / "sweep_report.html").read_text()
    assert "Trial 1 has the highest validation accuracy, 60.00%, of 4: 2 finished, 1 pruned, 1 failed." in page
    assert f"{study.trials[1].params['finetune.head_lr']:.4g}" in page
    assert "0.0001 to 0.1, logarithmic" in page
    assert "Best validation accuracy by trial. The best is trial 1 with 60.00%." in page
    assert "Best validation accuracy over model.head" in page
    assert f"{tmp_path / '3'} has not finished (failed)" in page
    assert "has not finished (pruned)" not in page
    assert "could not be drawn" not in page
    assert "<script" not in page
    assert "there is no test result. Pruned after epoch 0." in (tmp_path / "2" / "report.html").read_text()


def test_an_epoch_without_validation_reports_nothing_to_optuna():
    reported = {}
    study = SimpleNamespace(trials=[SimpleNamespace(intermediate_values=reported, number=0)])
    pruning = Pruning(None)
    pruning._trial = SimpleNamespace(
        number=0, study=study, report=lambda value, epoch: reported.update({epoch: value}), should_prune=lambda: False
    )
    for epoch in range(4):
        trainer = SimpleNamespace(current_epoch=epoch, callback_metrics={"val/acc": torch.tensor(epoch / 10)})
        if epoch % 2:
            pruning.on_validation_end(trainer, None)
        pruning.on_train_epoch_end(trainer, None)
    assert list(reported) == [1, 3]


def test_a_key_that_is_given_is_not_searched_whichever_way_both_are_written():
    sweeper = OptunaSweeper.__new__(OptunaSweeper)
    sweeper.params = {"+trainer.gradient_clip_val": "interval(0, 1)", "model.dropout": "interval(0, 0.5)"}
    sweeper.config_loader, sweeper.config = Mock(), None
    space, fixed = sweeper._space(["++trainer.gradient_clip_val=0.5"])
    assert (list(space), fixed) == (["model.dropout"], ["++trainer.gradient_clip_val=0.5"])
    assert list(sweeper._space([])[0]) == ["+trainer.gradient_clip_val", "model.dropout"]
