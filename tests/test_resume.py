"""A run that was stopped and resumed equals a run that was not, bit for bit."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hydra.core.override_parser.overrides_parser import OverridesParser

from cifar_tl.errors import UserError
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.runs.folder import read_run
from cifar_tl.runs.resume import _unquoted, quoted, with_overrides_of_resumed_run
from cifar_tl.train import resumed_facts, train

# everything random is on: shuffling, augmentation, dropout; the unfreeze is at epoch 2 of 4, and images grow at epoch 3
RANDOM = (
    *TINY,
    "model.dropout=0.2",
    "finetune.warmup_epochs=0.5",
    "finetune.optimizer=muon",
    "finetune.progressive_resizing=[1,2]",
)


class Killed(BaseException):
    """Like the end of a process, nothing may catch it."""


@pytest.fixture(scope="module")
def straight(compose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(compose(*RANDOM), folder, "demo")
    return folder


@pytest.mark.slow
def test_the_optimizer_remembers_where_images_grow(straight):
    (state,) = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {values["step"].item() for values in state["state"].values() if "step" in values} == {6.0}  # not 3


@pytest.mark.parametrize(
    ("epoch", "batch"),
    [(1, 0), (2, 0), (3, 0), (2, 1)],
    ids=["before-the-unfreeze", "at-the-unfreeze", "after-the-unfreeze", "in-mid-epoch"],
)
@pytest.mark.slow
def test_resumed_run_equals_straight_run(straight, compose, tmp_path, monkeypatch, epoch, batch):
    step = ResNet50Classifier.training_step

    def dies(self, images_and_targets, batch_idx):
        if (self.current_epoch, batch_idx) == (epoch, batch):
            raise Killed
        return step(self, images_and_targets, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(ResNet50Classifier, "training_step", dies)
        with pytest.raises(Killed):
            train(compose(*RANDOM), tmp_path, "demo")
    train(compose(*RANDOM, f"resume={tmp_path}"), tmp_path, "demo")

    def state(folder, name):
        return torch.load(folder / "checkpoints" / name, weights_only=True)

    for name in ("last.ckpt", "best.ckpt"):
        expected, resumed = state(straight, name), state(tmp_path, name)
        assert expected["epoch"] == resumed["epoch"]
        assert expected["global_step"] == resumed["global_step"]
        assert_same(expected["state_dict"], resumed["state_dict"])
    assert_same(state(straight, "last.ckpt")["optimizer_states"], state(tmp_path, "last.ckpt")["optimizer_states"])

    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (straight, tmp_path))
    for key in ("train/loss", "train/acc", "val/loss", "val/acc", "lr/head", "lr/backbone", "test/acc", "test/loss"):
        assert before[key] == after[key], key
    assert before["config_sha256"] == after["config_sha256"]
    assert [start["epoch"] for start in before["starts"]] == [0]
    assert [start["epoch"] for start in after["starts"]] == [0, epoch]
    assert [start["changed"] for start in after["starts"]] == [None, {}]


def assert_same(a, b):
    """Compare nested dicts and lists of tensors and plain values exactly."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_keys_that_a_resumed_run_adds_or_takes_away_are_on_its_record(straight, compose, tmp_path):
    checkpoint = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["cifar_tl"]["facts"] |= (of_the_first_start := {"weights_sha256": "0123", "filter_rms": 0.4})
    torch.save({**checkpoint, "epoch": 2}, last := tmp_path / "last.ckpt")
    clipped = compose(*RANDOM, "+trainer.gradient_clip_val=1.0", "callbacks=early_stopping")
    assert resumed_facts(clipped, last)[0].items() >= of_the_first_start.items()
    changed = resumed_facts(clipped, last)[0]["changed"]
    assert changed["trainer.gradient_clip_val"] == 1.0
    assert changed["callbacks.early_stopping.patience"] == 5
    fewer = compose(*RANDOM, "~logger.csv", "~finetune.momentum")
    assert (
        resumed_facts(fewer, last)[0]["changed"].items()
        >= {"logger.csv._target_": None, "finetune.momentum": None}.items()
    )


BOTH = {"task": ["seed=1,2"], "hydra": []}


def test_resume_repeats_the_runs_own_overrides_in_its_own_folder(tmp_path):
    run = tmp_path / "outputs" / "demo" / "now"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text("- seed=3\n- resume=x\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    for name in ("a", "z"):
        older = tmp_path / "outputs" / "demo" / name / "checkpoints" / "last.ckpt"
        older.parent.mkdir(parents=True)
        older.touch()
        os.utime(older, (0, 0))
    arguments = with_overrides_of_resumed_run(["resume=last", "trainer.max_epochs=30"], tmp_path / "outputs")
    how = ["hydra.output_subdir=null", f"hydra.run.dir='{run}'"]
    assert arguments == ["seed=3", "trainer.max_epochs=30", f"resume='{run}'", *how]


def test_a_run_of_somebodys_own_config_folder_goes_on_with_it(tmp_path):
    (tmp_path / "conf").mkdir()
    flag = f"--config-dir={tmp_path / 'conf'}"
    providers = {"hydra": "pkg://hydra.conf", "main": "/main", "command-line": str(tmp_path / "conf")}
    sources = [{"provider": provider, "path": path} for provider, path in providers.items()]
    saved = {"runtime": {"config_sources": sources}, "overrides": BOTH}
    leave_run(tmp_path / "run")
    (tmp_path / "run" / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": saved}))
    resume = f"resume={tmp_path / 'run'}"
    assert with_overrides_of_resumed_run([resume])[0] == flag
    assert read_run(tmp_path / "run").command == f"python -m cifar_tl.train {flag}"
    moved = with_overrides_of_resumed_run(["--config-dir=/moved", resume])
    assert (moved[0], flag in moved) == ("--config-dir=/moved", False)

    leave_run(tmp_path / "sweep" / "0")  # that began when the sweep went on has no hydra.yaml
    (tmp_path / "sweep" / "multirun.yaml").write_text(json.dumps({"hydra": saved}))
    assert with_overrides_of_resumed_run([f"resume={tmp_path / 'sweep' / '0'}"])[0] == flag
    sweep = ["-m", f"resume={tmp_path / 'sweep'}"]
    assert with_overrides_of_resumed_run(sweep)[:2] == [flag, "-m"]
    assert flag not in with_overrides_of_resumed_run(["--config-dir=/moved", *sweep])

    (tmp_path / "conf").rmdir()
    with pytest.raises(UserError, match=r"not there any more. Give --config-dir=FOLDER"):
        with_overrides_of_resumed_run([resume])
    (tmp_path / "run" / ".hydra" / "hydra.yaml").write_bytes(b"\0\xff")  # damaged, and not needed
    assert with_overrides_of_resumed_run([resume])[0] == f"resume='{tmp_path / 'run'}'"


@pytest.mark.parametrize("content", [b"", b"task: {", b"a: 1", b"[1, 2]", b"\xff"])
@pytest.mark.parametrize(("name", "flags"), [(".hydra/overrides.yaml", []), ("multirun.yaml", ["-m"])])
def test_a_damaged_record_of_what_was_started_is_named(tmp_path, content, name, flags):
    leave_run(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        with_overrides_of_resumed_run([*flags, f"resume={tmp_path / 'run'}"])


def test_a_checkpoint_in_the_place_of_its_run_is_told_apart(tmp_path):
    leave_run(tmp_path / "run")
    for given in ("checkpoints/last.ckpt", "checkpoints"):
        with pytest.raises(UserError, match=r"Give the run's folder, .*/run\.$"):
            with_overrides_of_resumed_run([f"resume={tmp_path / 'run' / given}"])


def leave_run(folder, checkpoint=True, status="interrupted", log=(), text="device"):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    (folder / "train.log").write_text(text)
    os.utime(folder / "train.log", log or None)
    (folder / "metrics.json").write_text(json.dumps({"status": status}))
    if checkpoint:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").touch()
        os.utime(folder / "checkpoints" / "last.ckpt", (1000, 1000))


def test_the_last_run_is_not_another_one_where_the_newest_saved_nothing(tmp_path):
    leave_run(tmp_path / "older")
    leave_run(tmp_path / "newer", checkpoint=False)
    with pytest.raises(UserError, match=r"newer is newer than .*older and has no.*resume=.*older goes on"):
        with_overrides_of_resumed_run(["resume=last"], tmp_path)
    (tmp_path / "older" / "metrics.json").write_text('{"status": "finished"}')
    with pytest.raises(UserError, match=r"newer is newer than .*older and has no.* The older one is finished\.$"):
        with_overrides_of_resumed_run(["resume=last"], tmp_path)
    (tmp_path / "older" / "metrics.json").write_text('{"status": "interrupted"}')
    leave_run(tmp_path / "before", checkpoint=False, log=(999, 999))
    leave_run(tmp_path / "refused", checkpoint=False, text="")
    (tmp_path / "newer" / "metrics.json").write_text('{"status": "finished"}')  # somebody needed its space
    assert f"resume='{tmp_path / 'older'}'" in with_overrides_of_resumed_run(["resume=last"], tmp_path)


def test_the_last_run_is_not_tested_again_where_it_is_finished(tmp_path):
    leave_run(tmp_path / "run", status="finished")
    with pytest.raises(UserError, match=r"is finished.*go on with\. python -m cifar_tl\.evaluate"):
        with_overrides_of_resumed_run(["resume=last"], tmp_path)
    whole = {"status": "finished", "epoch": [0, 1], "plan": [{"end": 2, "upscale": None}]}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"is finished.*trainer\.max_epochs= lets it train longer, at rates of the"):
        with_overrides_of_resumed_run(["resume=last"], tmp_path)
    assert "trainer.max_epochs=30" in with_overrides_of_resumed_run(["resume=last", "trainer.max_epochs=30"], tmp_path)


def test_the_optimizer_forgets_the_frozen_phase(tiny_run):
    (state,) = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {values["step"].item() for values in state["state"].values() if "step" in values} == {6.0}  # of 12


@pytest.mark.parametrize("name", ["it's", "back\\slash", "ends with \\", "\\'", "\\\\'both\\'", "a 'b' c"])
def test_paths_are_quoted_as_hydra_reads_them(name):
    override = OverridesParser.create().parse_override(f"resume={quoted(name)}")
    assert override.value() == name
    assert _unquoted("resume", quoted(name)) == Path(name)


@pytest.mark.parametrize("arguments", [["resume=nowhere"], ["resume=last"], ["-m", "resume=last"]])
def test_resume_of_nothing_is_refused(arguments, tmp_path):
    with pytest.raises(UserError, match="resume"):
        with_overrides_of_resumed_run(arguments, tmp_path)


def test_resume_before_the_first_epoch_ended_is_refused(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[]")
    with pytest.raises(UserError, match="before its first epoch"):
        with_overrides_of_resumed_run([f"resume={tmp_path}"])


def test_arguments_without_resume_stay_as_they_are():
    assert with_overrides_of_resumed_run(["seed=1", "resume=null"]) == ["seed=1", "resume=null"]
