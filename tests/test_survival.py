"""Interrupting, moving, repeating and continuing runs and sweeps: nothing is lost, and nothing is done twice."""

import errno
import fcntl
import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from cifar_tl import cli
from cifar_tl.callbacks.run_recorder import RunRecorder
from cifar_tl.checkpoints import BestCheckpoint, PacedCheckpointIO
from cifar_tl.errors import Interrupted, UserError
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.reports.run_page import write_run_report
from cifar_tl.runs.record import write_metrics
from cifar_tl.runs.resume import resume_command, run_lock, with_overrides_of_resumed_run
from cifar_tl.schedule import FinetuneSchedule
from cifar_tl.train import draw_report, main, saved_text, train

FAST = (*TINY, "data.train_size=40", "trainer.max_epochs=3", "finetune.features_folder=null")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, no_run_pages):
    """Run cifar_tl.train in an empty folder; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        before = signal.getsignal(signal.SIGINT)
        try:
            code = cli.run("cifar_tl.train:main", "train", list(arguments))
        finally:
            signal.signal(signal.SIGINT, before)  # Lightning ignores it from its first Ctrl-C on
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupt the training of one seed in its second epoch."""
    step = ResNet50Classifier.training_step

    def interrupt(seed, by):
        def interrupted(self, batch, batch_idx):
            if (self.current_epoch, batch_idx, self.provenance["facts"]["seed"]) == (1, 0, seed):
                by()
            return step(self, batch, batch_idx)

        monkeypatch.setattr(ResNet50Classifier, "training_step", interrupted)
        return lambda: monkeypatch.setattr(ResNet50Classifier, "training_step", step)

    return interrupt


@pytest.fixture(scope="module")
def half(compose, tmp_path_factory):
    """The folder of a finished short run, which a longer one may go on from; for reading only."""
    folder = tmp_path_factory.mktemp("half")
    train(compose(*FAST), folder, "demo")
    return folder


def ctrl_c():
    raise KeyboardInterrupt


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("by", [ctrl_c, sigterm])
@pytest.mark.slow
def test_an_interrupted_sweep_stops_at_once_and_goes_on_without_doing_anything_twice(command, interrupt, tmp_path, by):
    go_on = interrupt(1, by)
    code, out, err = command("-m", "seed=0,1,2", *FAST, "hydra.sweep.dir=sweep")
    assert code == 130
    assert not (tmp_path / "sweep" / "2").exists()
    assert json.loads((tmp_path / "sweep" / "1" / "metrics.json").read_text())["status"] == "interrupted"
    assert "seed=0" in out[out.index("best val/acc") :]
    assert (tmp_path / "sweep" / "sweep_report.html").is_file()
    (said,) = [line for line in err.splitlines() if line.startswith("Go on with the whole sweep: ")]
    assert "Traceback" not in err

    go_on()
    finished = (tmp_path / "sweep" / "0" / "metrics.json").read_bytes()
    code, out, err = command(*shlex.split(said)[shlex.split(said).index("cifar_tl.train") + 1 :])
    assert code == 0, err
    assert (tmp_path / "sweep" / "0" / "metrics.json").read_bytes() == finished
    metrics = [json.loads((tmp_path / "sweep" / job / "metrics.json").read_text()) for job in "012"]
    assert [m["status"] for m in metrics] == ["finished"] * 3
    assert [m["seed"] for m in metrics] == [0, 1, 2]
    assert [m["epoch"] for m in metrics] == [[0, 1, 2]] * 3
    assert len((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()) == 4


def test_a_sweep_goes_on_as_it_was_started(tmp_path):
    (tmp_path / "multirun.yaml").write_text("hydra: {overrides: {task: ['seed=0,1'], hydra: []}}")
    arguments = with_overrides_of_resumed_run(["-m", f"resume={tmp_path}"])
    how = ["hydra.output_subdir=null", f"resume='{tmp_path}'", f"hydra.sweep.dir='{tmp_path}'"]
    assert arguments == ["-m", "seed=0,1", *how]
    with pytest.raises(UserError, match="seed=2 would make it another one"):
        with_overrides_of_resumed_run(["-m", f"resume={tmp_path}", "seed=2"])
    with pytest.raises(UserError, match="Add -m"):
        with_overrides_of_resumed_run([f"resume={tmp_path}"])


@pytest.mark.parametrize("extra", [["callbacks.early_stopping.patience=3"], ["+callbacks.early_stopping.min_delta=0"]])
def test_a_run_goes_on_without_its_callbacks_and_their_keys(tmp_path, extra):
    for name, text in (
        (".hydra/overrides.yaml", json.dumps(["experiment=demo", "callbacks=early_stopping", *extra])),
        ("checkpoints/last.ckpt", ""),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    arguments = with_overrides_of_resumed_run([f"resume={tmp_path}", "callbacks=none"])
    kept = [a for a in arguments if not a.startswith(("resume=", "hydra."))]
    assert kept == ["experiment=demo", "callbacks=none"]
    assert cli.compose("train", kept).callbacks == {}
    others = with_overrides_of_resumed_run([f"resume={tmp_path}", "logger=none"])
    assert {"callbacks=early_stopping", *extra} <= {*others}


def test_a_run_goes_on_with_another_trainer_and_without_the_nodes_of_the_first(tmp_path):
    stays = ["trainer.precision=bf16-mixed", "sweep=optuna", "callbacks.pruning.pruner.n_warmup_steps=7"]
    given = ["trainer=ddp", "++trainer.num_nodes=2", "trainer.devices=4", *stays]
    for name, text in ((".hydra/overrides.yaml", json.dumps(given)), ("checkpoints/last.ckpt", "")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    arguments = with_overrides_of_resumed_run([f"resume={tmp_path}", "trainer=auto", "callbacks=none"])
    kept = [a for a in arguments if not a.startswith(("resume=", "hydra."))]
    assert kept == [*stays, "trainer=auto", "callbacks=none"]


@pytest.mark.slow
def test_failed_jobs_leave_the_table_the_page_and_every_reason(command, tmp_path):
    code, out, err = command("-m", "data.eval_batch_size=0,500,-1", *FAST, "hydra.sweep.dir=sweep")
    assert code == 1
    assert "job 0" in err
    assert "data.eval_batch_size=0 is not allowed" in err
    assert "data.eval_batch_size=-1 is not allowed" in err
    assert "2 of 3 jobs failed" in err
    assert "Error executing job" not in err
    assert "Traceback" not in err
    rows = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert ["failed" in row for row in rows[1:]] == [True, False, True]
    assert (tmp_path / "sweep" / "sweep_report.html").is_file()
    assert "best val/acc" in out


def test_one_mistake_is_one_line(command):
    code, _, err = command(*FAST, "data.batch_size=0")
    assert code == 1
    assert err.splitlines() == ["error: data.batch_size=0 is not allowed: give a whole number of at least 1."]


@pytest.mark.slow
def test_flags_may_stand_between_overrides(command, tmp_path):
    code, _, err = command("experiment=demo", "-m", "seed=1,2", *FAST, "hydra.sweep.dir=sweep")
    assert code == 0, err
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 2


@pytest.mark.slow
def test_the_best_epoch_survives_a_move(compose, tmp_path):
    first = train(compose(*FAST), tmp_path / "run", "demo")
    best = first["best/epoch"]
    (tmp_path / "run").rename(tmp_path / "moved")
    # learning rates of 0 from here on: no epoch can be better
    still = ("finetune.head_lr_unfrozen=0", "finetune.backbone_lr=0", "finetune.batchnorm=frozen")
    overrides = (*FAST, "trainer.max_epochs=5", *still, f"resume={tmp_path / 'moved'}")
    metrics = train(compose(*overrides), tmp_path / "moved", "demo")
    assert metrics["epoch"] == [0, 1, 2, 3, 4]
    assert metrics["best/epoch"] == max(range(5), key=lambda e: metrics["val/acc"][e])
    saved = torch.load(tmp_path / "moved" / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["epoch"] == metrics["best/epoch"]
    assert best in range(3)


def test_a_moved_checkpoint_callback_keeps_its_best_score(tmp_path):
    before = BestCheckpoint(dirpath=tmp_path / "before", monitor="val/acc", mode="max", filename="best")
    state = {
        **before.state_dict(),
        "best_model_score": torch.tensor(0.9),
        "best_model_path": str(tmp_path / "before" / "best.ckpt"),
        "best_k_models": {str(tmp_path / "before" / "best.ckpt"): torch.tensor(0.9)},
    }
    after = BestCheckpoint(dirpath=tmp_path / "after", monitor="val/acc", mode="max", filename="best")
    after.load_state_dict(state)
    assert after.best_model_score == 0.9
    assert after.best_model_path == str(tmp_path / "after" / "best.ckpt")
    assert list(after.best_k_models) == [str(tmp_path / "after" / "best.ckpt")]


@pytest.mark.slow
def test_another_runs_best_checkpoint_is_not_tested_as_this_ones(compose, tmp_path):
    train(compose(*FAST), tmp_path, "demo")
    path = tmp_path / "checkpoints" / "best.ckpt"
    torch.save({**torch.load(path, weights_only=True), "epoch": 7}, path)
    for status, after in (("finished", "finished"), ("running", "failed")):
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "status": status}))
        with pytest.raises(UserError, match=r"is of epoch 7, but the best one .* nothing was tested"):
            train(compose(*FAST, f"resume={tmp_path}"), tmp_path, "demo")
        assert json.loads((tmp_path / "metrics.json").read_text())["status"] == after


def test_the_best_checkpoint_and_the_one_to_resume_from_are_written_together(tmp_path):
    writer = PacedCheckpointIO(tmp_path)
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    writer.save_checkpoint({"epoch": 0}, best)
    assert not best.exists()
    writer.save_checkpoint({"epoch": 0}, last)
    assert best.exists()
    assert last.exists()
    writer._due = float("inf")  # writing was slow
    writer.save_checkpoint({"epoch": 1}, best)
    writer.save_checkpoint({"epoch": 1}, last)
    assert [torch.load(path)["epoch"] for path in (best, last)] == [0, 0]
    writer.teardown()
    assert [torch.load(path)["epoch"] for path in (best, last)] == [1, 1]


def test_the_best_checkpoint_of_an_epoch_that_was_not_saved_is_not_written(tmp_path):
    writer = PacedCheckpointIO(tmp_path)
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    writer.save_checkpoint({"epoch": 0}, best)
    writer.save_checkpoint({"epoch": 0}, last)
    writer.save_checkpoint({"epoch": 1}, best)
    writer.teardown()  # after Ctrl-C between the two
    assert [torch.load(path)["epoch"] for path in (best, last)] == [0, 0]


@pytest.mark.parametrize(("epoch", "said"), [(1, "1 of 3 epochs are saved"), (0, "before the first epoch was saved")])
def test_only_epochs_that_are_saved_are_said_to_be(compose, tmp_path, monkeypatch, epoch, said):
    saves = BestCheckpoint.on_train_epoch_end

    def interrupted(self, trainer, pl_module):
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt
        saves(self, trainer, pl_module)

    monkeypatch.setattr(BestCheckpoint, "on_train_epoch_end", interrupted)
    with pytest.raises(Interrupted, match=said):
        train(compose(*FAST), tmp_path, "demo")
    assert json.loads((tmp_path / "metrics.json").read_text())["epoch"] == list(range(epoch + 1))


def test_ctrl_c_while_the_page_is_drawn_says_that_the_result_is_saved(half, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("cifar_tl.train.write_run_report", interrupted)
    with pytest.raises(Interrupted, match=r"the result is saved\.\nDraw it by\n  python -m cifar_tl.reports "):
        draw_report(half)


def test_a_finished_job_without_a_page_gets_one_where_its_sweep_goes_on(compose, half, monkeypatch):
    drawn = []
    hydra = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(half)), mode=RunMode.MULTIRUN)
    monkeypatch.setattr("cifar_tl.train.HydraConfig.get", lambda: hydra)
    monkeypatch.setattr("cifar_tl.train.draw_report", drawn.append)
    result = main(compose(*FAST, f"resume={half}"))
    assert result == json.loads((half / "metrics.json").read_text())["best/val/acc"]
    assert drawn == [half]


@pytest.mark.parametrize(("takes", "due"), [(30.0, 90.0), (0.5, 25.5)])
def test_writing_is_put_off_for_fifty_times_what_it_takes_and_a_minute_at_most(tmp_path, monkeypatch, takes, due):
    now = [0.0]
    monkeypatch.setattr("cifar_tl.checkpoints.time.monotonic", lambda: now[0])
    monkeypatch.setattr("cifar_tl.checkpoints._write", lambda *_: now.__setitem__(0, now[0] + takes))
    writer = PacedCheckpointIO(tmp_path)
    writer.save_checkpoint({}, tmp_path / "last.ckpt")
    assert writer._due == due


@pytest.mark.slow
def test_a_full_disk_leaves_what_is_saved_and_says_how_to_go_on(command, monkeypatch, tmp_path):
    save = torch.save

    def full(checkpoint, file):
        if checkpoint["epoch"] == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(checkpoint, file)

    monkeypatch.setattr(PacedCheckpointIO, "SHARE", float("inf"))
    with monkeypatch.context() as patched:
        patched.setattr("cifar_tl.checkpoints.torch.save", full)
        code, _, err = command(*FAST, "hydra.run.dir=run")
    assert code == 1
    assert "disk is full" in err
    assert "2 of 3 epochs are saved" in err
    assert err.rstrip().endswith(f"resume={tmp_path / 'run'}")
    assert err.strip() in (tmp_path / "run" / "train.log").read_text()
    code, _, err = command("resume=run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epoch"] == [0, 1, 2]


def test_an_error_does_not_become_two_where_the_log_cannot_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "train.log").write_text("begun\n")
    log = logging.FileHandler(tmp_path / "train.log")
    monkeypatch.setattr(logging.getLogger(), "handlers", [log])
    cli._note_in_log("error: one")
    assert (tmp_path / "train.log").read_text() == "begun\nerror: one\n"

    def full(*arguments, **keys):
        raise OSError(errno.ENOSPC, "No space left on device")

    log.close()
    log.setStream(SimpleNamespace(write=full, flush=lambda: None, close=lambda: None))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        cli._note_in_log("error: two")
    assert capsys.readouterr().err == ""


def test_a_program_of_ones_own_is_told_how_it_goes_on(compose, half):
    assert saved_text(compose(*FAST), half).endswith(f"Continue by the same call, with cfg.resume='{half}'.")


def test_a_program_of_ones_own_does_not_train_over_a_run(compose, half):
    before = (half / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        train(compose(*FAST), half, "demo")
    assert (half / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("unexpected", [False, True])
def test_why_a_job_failed_is_in_its_log_where_it_had_begun(tmp_path, monkeypatch, unexpected):
    def task(cfg):
        if cfg.seed:
            logging.getLogger("cifar_tl").info("begun")
        raise ZeroDivisionError("by zero") if unexpected else UserError("not so")

    monkeypatch.chdir(tmp_path)
    for seed, folder in ((0, "refused"), (1, "failed")):
        with suppress(ZeroDivisionError):
            cli.run(task, "train", [f"seed={seed}", f"hydra.run.dir={folder}"])
    assert (tmp_path / "refused" / "train.log").read_text() == ""  # it does not count as a run that began
    said = "ZeroDivisionError: by zero" if unexpected else "ERROR error: not so"
    assert said in (tmp_path / "failed" / "train.log").read_text()


def contents(folder):
    """All files of a folder but locks, in which the process is noted that holds them."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_refused_before_anything_is_written(command, tmp_path):
    assert command(*FAST, "hydra.run.dir=run")[0] == 0
    assert "Test accuracy" in (tmp_path / "run" / "train.log").read_text()
    before = contents(tmp_path / "run")
    code, _, err = command(*FAST, "seed=5", "hydra.run.dir=run")
    assert code == 1
    assert "run holds a run already" in err
    assert "resume=run" in err
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [False, True])
def test_a_used_folder_is_refused_whatever_its_name_is_made_of(command, tmp_path, multirun):
    name = "${hydra.job.name}_${seed}" if multirun else "${hydra:job.name}_${seed}"
    arguments = [*FAST, "seed=5", f"hydra.{'sweep' if multirun else 'run'}.dir={name}", *["-m"] * multirun]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "warning" not in (out + err).lower()
    before = contents(tmp_path / "train_5")
    code, _, err = command(*arguments, "model.dropout=0.5")
    assert code == 1
    assert f"train_5 holds a {'sweep' if multirun else 'run'} already" in err
    assert f"go on with it by {'-m ' * multirun}resume=" in err
    assert contents(tmp_path / "train_5") == before


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    refused = pytest.raises(UserError, match=rf"process {os.getpid()} on .* trains there now")
    with run_lock(tmp_path), refused, run_lock(tmp_path):
        pass
    with run_lock(tmp_path):  # and whoever held it has let go
        pass


@pytest.mark.parametrize("folder", ["outputs/x", "it's here/a b", 'say "hi"', "back\\slash", "grün/日本"])
def test_the_printed_command_resumes_whatever_the_folder_is_called(folder):
    argument = shlex.split(resume_command(Path(folder)))[-1]
    value = OverridesParser.create().parse_override(argument).value()
    assert str(getattr(value, "text", value)) == folder


def record(text):
    return logging.LogRecord("x", logging.INFO, "", 0, text, None, None)


def test_a_console_that_is_closed_or_has_no_such_letters_ends_nothing(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    cli.StdoutHandler().emit(record("one"))
    cli.StdoutHandler().emit(record("two"))
    sys.stdout.close()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    cli.StdoutHandler().emit(record("Bär ⇄ 猫"))
    assert raw.getvalue() == b"B\\xe4r \\u21c4 \\u732b\n"


@pytest.mark.parametrize(
    "change",
    [
        *("seed=5", "model.head=[32]", "model.filter_rms=0.1", "data.val_size=30", "data.limit=20"),
        *("finetune.optimizer=muon", "finetune.unfreeze_at_epoch=1", "finetune.progressive_resizing=[2]"),
        *("model.upscale=2", "model.conventions=keras", "model.weights=w.pth", "data.split_seed=1"),
        *("data.train_size=50", "data.test_size=30", "finetune.stages=[layer4]"),
    ],
)
def test_a_resumed_run_refuses_what_it_cannot_change(compose, half, tmp_path, change):
    key = change.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"a resumed run cannot change {key}=.* \(the run has .*start a new run with it"
    ):
        train(compose(*FAST, change, f"resume={half}"), half, "demo")


def test_a_resumed_run_whose_images_grow_keeps_its_number_of_epochs(compose, half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    last["cifar_tl"]["config"]["finetune"]["progressive_resizing"] = [1, 2]
    torch.save(last, run / "checkpoints" / "last.ckpt")
    keys = ("finetune.progressive_resizing=[1,2]", "trainer.max_epochs=9")
    with pytest.raises(UserError, match=r"a resumed run cannot change trainer\.max_epochs=9 \(the run has "):
        train(compose(*FAST, *keys, f"resume={run}"), run, "demo")


def test_a_resumed_run_honours_other_changes_and_says_so(compose, half, tmp_path, caplog):
    shutil.copytree(half, tmp_path / "run")
    before = json.loads((half / "metrics.json").read_text())["plan"][0]["peak_lr"]
    changes = ("finetune.weight_decay=0.5", "finetune.label_smoothing=0", "trainer.max_epochs=4", "finetune.head_lr=1")
    with caplog.at_level("INFO"):
        metrics = train(compose(*FAST, *changes, f"resume={tmp_path / 'run'}"), tmp_path / "run", "demo")
    assert "changed    finetune.weight_decay=0.5 from here on (the run had 0.05)" in caplog.text
    assert metrics["epoch"] == [0, 1, 2, 3]
    assert [start["epoch"] for start in metrics["starts"]] == [0, 3]
    assert metrics["starts"][1]["changed"]["finetune.weight_decay"] == 0.5
    assert metrics["plan"][0]["peak_lr"] == before  # the phase is over
    page = write_run_report(tmp_path / "run").read_text()
    assert metrics["starts"][0]["started"] in page
    assert "resumed at epoch 3" in page
    assert "finetune.weight_decay=0.5" in page
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.0, 0.5, 0.0]


def test_warnings_of_before_a_resume_keep_what_caused_them(tmp_path):
    def recorder(backbone_lr):
        schedule = FinetuneSchedule(unfreeze_at_epoch=2, max_epochs=4, head_lr=1e-3, backbone_lr=backbone_lr)
        found = RunRecorder(tmp_path, schedule, {"images": {"val": 5000}, "changed": None})
        found.images, found.train_seconds, found.complete = 1, 1.0, True
        return found

    def epoch(recorder, accuracy):
        number = len(recorder.epochs)
        values = {"train/loss": 1.0, "val/loss": 1.0, "val/acc": accuracy}
        trainer = SimpleNamespace(current_epoch=number, is_global_zero=True, datamodule=None)
        recorder.epoch_metrics = lambda trainer: values
        recorder.on_train_start(trainer, None)
        recorder.on_train_epoch_end(trainer, None)

    first = recorder(0.5)
    for accuracy in (0.6, 0.6, 0.1):
        epoch(first, accuracy)
    (warning,) = first.content()["warnings"]
    assert "finetune.backbone_lr=0.5 " in warning
    resumed = recorder(0.001)
    resumed.load_state_dict(first.state_dict())
    epoch(resumed, 0.2)
    assert resumed.content()["warnings"] == [warning]
    assert resumed.content()["plan"][1]["peak_lr"]["backbone"] == 0.5


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = r"no file can be locked there \(No locks available\).*hydra\.run\.dir="
    with pytest.raises(UserError, match=said), run_lock(tmp_path):
        pass


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_could_save_starts_again_in_its_folder(command, half, tmp_path, monkeypatch):
    def other_start(folder):
        (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("[seed=7]")  # of one that the lock keeps out

    monkeypatch.setattr("cifar_tl.train.remove_partial_files", other_start)
    (tmp_path / "run").mkdir()
    metrics = {**json.loads((half / "metrics.json").read_text()), "status": "running"}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    code, _, err = command(*FAST, "trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1", "hydra.run.dir=run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epoch"] == [0, 1]
    assert "trainer.max_epochs=2" in (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text()


@pytest.fixture
def resumable(half, tmp_path):
    """A copy of `half` as a command would have left it, in the command's folder; what Hydra saved of it."""
    run = shutil.copytree(half, tmp_path / "run")
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text(json.dumps(FAST))
    (run / ".hydra" / "config.yaml").write_text("as it was")
    return run / ".hydra"


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("data.batch_size=0", "data.batch_size=0 is not allowed"),
        ("seed=5", "a resumed run cannot change seed=5"),
        ("finetune.schedule=cosin", "finetune.schedule=cosin is not allowed"),
        (
            "finetune.label_smoothing=0.2",
            "nothing left to train, so that finetune.label_smoothing=0.2 would change its record alone",
        ),
        ("model.dropout=0.2", "a resumed run cannot change model.dropout=0.2 (the run has 0.0)"),
        ("+logger.mine._target_=nowhere.Logger", "logger.mine: nowhere.Logger cannot be built"),
        ("callbacks=early_stopping", "nothing left to train, so that callbacks.early_stopping._target_="),
        ("hydra.run.dir=new", "resume=run goes on in the run's own folder, and hydra.run.dir=new is for a run that"),
        ("finetune.cache_features=perhaps", "finetune.cache_features=perhaps is not allowed"),
    ],
)
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(command, resumable, mistake, said):
    before = {path.name: path.read_text() for path in resumable.iterdir()}
    code, _, err = command("resume=run", mistake)
    assert code == 1
    assert said in err
    with run_lock(resumable.parent):
        code, _, err = command("resume=run", "data.eval_batch_size=7")
        assert (code, "trains there now" in err) == (1, True)
    assert {path.name: path.read_text() for path in resumable.iterdir()} == before


def test_the_command_to_go_on_repeats_what_the_run_does_not_have_yet(command, resumable, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunRecorder, "setup", interrupted)
    code, _, err = command("resume=run", "trainer.max_epochs=5", "seed=0", "hydra.run.dir=run")
    assert code == 130
    assert "3 of 5 epochs are saved" in err
    assert err.rstrip().endswith("/run trainer.max_epochs=5 seed=0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "trainer.max_epochs= lets it train longer, at rates of the longer schedule; cifar_tl.evaluate measures"),
        ({"epoch": [0]}, "More patience, callbacks=none (callbacks=ema for a run that averages weights) or another"),
        ({"plan": [{"end": 3, "upscale": 2}]}, "cifar_tl.evaluate measures it again"),
        ({"plan": []}, "cifar_tl.evaluate measures it again"),
    ],
)
def test_a_finished_run_is_kept_as_it_is(command, resumable, change, said):
    run = resumable.parent
    metrics = json.loads((run / "metrics.json").read_text())
    write_metrics(run, {**metrics, **change})
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and path.suffix != ".log"}
    code, out, err = command("resume=run")
    assert code == 0, err
    assert f"is finished: kept. {said}" in out
    assert {path: path.read_bytes() for path in before} == before


def test_a_pruned_trial_can_be_completed(command, resumable):
    run = resumable.parent
    write_metrics(run, {**json.loads((run / "metrics.json").read_text()), "status": "pruned"})
    code, _, err = command("resume=run")
    assert code == 0, err
    assert json.loads((run / "metrics.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("content", [None, b'{"status": "fin', b"null", b"\xff"])
def test_a_lost_record_of_a_run_is_written_anew_from_its_checkpoint(command, resumable, content):
    record = resumable.parent / "metrics.json"
    before = json.loads(record.read_text())
    record.unlink() if content is None else record.write_bytes(content)
    code, _, err = command("resume=run")
    assert code == 0, err
    after = json.loads(record.read_text())
    assert after["status"] == "finished"
    for key in ("epoch", "val/acc", "train/loss", "best/epoch", "weights_sha256", "seed"):
        assert after[key] == before[key]


def test_weights_alone_are_nothing_to_resume_from(command, resumable):
    checkpoints = resumable.parent / "checkpoints"
    shutil.copy(checkpoints / "best.ckpt", checkpoints / "last.ckpt")
    code, _, err = command("resume=run", "data.eval_batch_size=7")
    assert code == 1
    assert "last.ckpt has weights alone, as best.ckpt has: no run resumes from it" in err


@pytest.mark.parametrize(
    ("name", "said"), [("last.ckpt", "best.ckpt in its folder can be"), ("best.ckpt", "last.ckpt")]
)
def test_what_a_damaged_checkpoint_leaves_is_said(command, resumable, name, said):
    checkpoint = resumable.parent / "checkpoints" / name
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    code, _, err = command("resume=run", "data.eval_batch_size=7")
    assert code == 1
    assert f"{name} cannot be read: it is damaged or no checkpoint" in err
    assert said in err.partition("bytes")[2]


@pytest.mark.slow
def test_a_resume_that_is_accepted_is_what_the_next_one_goes_on_with(command, resumable):
    features = json.loads((resumable.parent / "metrics.json").read_text())["features"]
    uncached = ("finetune.weight_decay=0.5", "finetune.cache_features=false")
    code, _, err = command("resume=run", *uncached, "trainer.max_epochs=4")
    assert code == 0, err
    assert "finetune.weight_decay=0.5" in (resumable / "overrides.yaml").read_text()
    assert "weight_decay: 0.5" in (resumable / "config.yaml").read_text()
    assert command("resume=run", "trainer.max_epochs=5")[0] == 0
    metrics = json.loads((resumable.parent / "metrics.json").read_text())
    assert [start["changed"].get("finetune.weight_decay") for start in metrics["starts"][1:]] == [0.5, None]
    assert metrics["features"] == features  # of the frozen phase, which was over
    assert command("resume=run", "data.eval_batch_size=7")[0] == 0  # nothing is left to train
    metrics = json.loads((resumable.parent / "metrics.json").read_text())
    assert [start["epoch"] for start in metrics["starts"]] == [0, 3, 4, 5]
    assert metrics["starts"][-1]["changed"] == {"data.eval_batch_size": 7}
    assert "eval_batch_size: 7" in (resumable / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("given", "said"), [([], ""), (["model.conventions=keras"], "cannot change model.conventions=keras")]
)
def test_a_run_goes_on_as_it_was_where_a_default_has_changed(command, resumable, monkeypatch, given, said):
    own = cli.conf_folder()
    theirs = shutil.copytree(own, resumable.parents[1] / "conf")
    for file, old, new in (
        ("finetune/short.yaml", "unfreeze_at_epoch: 2", "unfreeze_at_epoch: 1"),
        ("train.yaml", "seed: 0", "seed: 1"),
    ):
        text = (theirs / file).read_text()
        assert old in text
        (theirs / file).write_text(text.replace(old, new))
    monkeypatch.setattr(cli, "conf_folder", lambda: theirs)
    code, _, err = command("resume=run", "trainer.max_epochs=4", *given)
    assert (code, said in err) == (int(bool(said)), True), err
    if not said:
        metrics = json.loads((resumable.parent / "metrics.json").read_text())
        assert metrics["seed"] == 0
        assert metrics["phases"][0]["epochs"] == [0, 1]
        assert metrics["starts"][-1]["changed"] == {"trainer.max_epochs": 4}


def test_data_of_a_run_from_another_folder_is_not_fetched_into_this_one(compose, half, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the run's data is not at data \(.*data\): data\.root= says where"):
        train(compose(f"resume={half}", "model.weights=null"), half, "demo")
    assert not (tmp_path / "data").exists()


def test_epochs_that_are_trained_cannot_be_taken_back(compose, half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**last, "epoch": 4}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"trainer\.max_epochs=3 is less than the 5 epochs that the run has trained"):
        train(compose(*FAST, f"resume={run}"), run, "demo")
    assert (run / "metrics.json").read_text() == (half / "metrics.json").read_text()


@pytest.mark.parametrize("error", [RuntimeError("the other processes do not answer"), KeyboardInterrupt()])
def test_a_resume_that_ends_before_it_trains_leaves_the_record_as_it_was(compose, half, tmp_path, monkeypatch, error):
    def fails(*arguments, **named):
        raise error

    run = shutil.copytree(half, tmp_path / "run")
    monkeypatch.setattr(RunRecorder, "setup", fails)
    with pytest.raises((RuntimeError, Interrupted)):
        train(compose(*FAST, "trainer.max_epochs=5", f"resume={run}"), run, "demo")
    assert (run / "metrics.json").read_text() == (half / "metrics.json").read_text()


@pytest.mark.parametrize(
    ("fact", "value", "said"),
    [
        ("split_sha256", "0" * 64, r"training or validation images have changed.*data\.root="),
        ("classes", ["zebra", *"123456789"], "classes have changed since it was started: gone .*zebra.*; new "),
    ],
)
def test_a_resumed_run_refuses_other_images_than_it_has_trained_on(compose, half, tmp_path, fact, value, said):
    run = shutil.copytree(half, tmp_path / "run")
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    last["cifar_tl"]["facts"][fact] = value
    torch.save(last, run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=said):
        train(compose(*FAST, f"resume={run}"), run, "demo")


def test_a_folder_in_use_is_refused_before_its_config_is_overwritten(command, tmp_path):
    with run_lock(tmp_path / "run"):
        code, _, err = command(*FAST, "hydra.run.dir=run")
    assert code == 1
    assert "trains there now" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_in_a_terminal_is_left_to_the_first_process(monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    before = signal.getsignal(signal.SIGINT)
    with cli.StopSignals():
        assert signal.getsignal(signal.SIGINT) == (before if rank == "0" else signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.slow
def test_a_run_goes_on_from_states_that_lie_in_memory_as_a_gpu_has_them(compose, half, tmp_path):
    weights = []
    for name, layout in (("cpu", torch.contiguous_format), ("gpu", torch.channels_last)):
        run = shutil.copytree(half, tmp_path / name)
        path = run / "checkpoints" / "last.ckpt"
        last = torch.load(path, weights_only=True)
        for state in last["optimizer_states"][0]["state"].values():
            maps = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim == 4}
            state |= {k: v.contiguous(memory_format=layout) for k, v in maps.items()}
        torch.save(last, path)
        train(compose(*FAST, "trainer.max_epochs=4", f"resume={run}"), run, "demo")
        weights.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_workers_that_the_same_signal_kills_do_not_disturb_the_saving():
    def torchs(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    before = signal.signal(signal.SIGCHLD, torchs)
    try:
        with cli.StopSignals() as signals:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGCHLD)
            assert signals.stopped(KeyboardInterrupt())
            assert signals.stopped(RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated."))
            assert not signals.stopped(RuntimeError("another one"))
        assert signal.getsignal(signal.SIGCHLD) is torchs
    finally:
        signal.signal(signal.SIGCHLD, before)
