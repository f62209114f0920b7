"""Mistakes that people make, and what they get: a readable error, exit code 1, nothing lost."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY
from handmade import make_run
from hydra.core.override_parser.overrides_parser import OverridesParser

from cifar_tl import cli
from cifar_tl.__main__ import main as cifar_tl_main
from cifar_tl.build import build_augment
from cifar_tl.data import download
from cifar_tl.data.__main__ import main as data
from cifar_tl.data.augment import Augment
from cifar_tl.reports.__main__ import main as reports
from cifar_tl.reports.sweep_table import COLUMNS, TABLE, SweepTable
from cifar_tl.runs.table import write_csv

OWN = ("experiment=demo", "data=folder")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments, task="cifar_tl.train:main", config_name="train"):
        code = cli.run(task, config_name, list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.mark.parametrize(
    "path",
    ["2024", "2024_05", "1e3", "1.50", "true", "photo (1).png", "~/x", "a=b", "it's", "b\\'c (1)", "C:\\x\\", "@-"],
)
def test_a_path_stays_the_text_that_was_typed(path):
    argument = cli._path_as_text(f"input={path}")
    assert str(OverridesParser.create().parse_override(argument).value()) == path
    assert cli._path_as_text(argument) == argument
    assert cli._path_as_text(f"seed={path}") == f"seed={path}"


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_the_home_folder_is_known_where_hydra_makes_a_folder(key):
    argument = cli._path_as_text(f"{key}=~/runs/2024 (1)")
    assert OverridesParser.create().parse_override(argument).value() == f"{Path.home()}/runs/2024 (1)"


def test_the_home_folder_is_known_in_every_path(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    torch.save({"not": 1}, tmp_path / "home" / "w.pth")
    code, _, err = command(*TINY, "model.weights=~/w.pth")
    assert code == 1
    assert "model.weights=~/w.pth is not a ResNet-50" in err  # it was found and read


def test_lists_and_sweeps_of_paths_are_left_as_they_are():
    for argument in ("data.root=a,b", "input=[a,b]", "input=null", "data.root=/a b/c", "checkpoint='5'"):
        assert cli._path_as_text(argument) == argument


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experimnt=best32"], "Unknown config key experimnt. Did you mean experiment?"),
        (["modle.dropout=0.5"], "Unknown config key modle.dropout. Did you mean model.dropout?"),
        (["finetune.head_rl=1"], "Did you mean finetune.head_lr"),
        (["experiment=dmo"], "demo"),
        (["+model.dropuot=0.5"], "adds a config key that nothing reads"),
        ([*TINY, "finetune.unfreeze_at_epoch=4"], "unfreeze_at_epoch=4 is never reached: trainer.max_epochs=4"),
        ([*TINY, "data.batch_size=0"], "data.batch_size=0 is not allowed: give a whole number of at least 1"),
        ([*TINY, "data.batch_size=abc"], "data.batch_size=abc"),
        ([*TINY, "finetune.batchnorm=frosen"], "Did you mean frozen"),
        ([*TINY, "finetune.optimizer=adamm"], "choose adam, adamw, sgd, muon"),
        ([*TINY, "seed=-1"], "seed=-1"),
        ([*TINY, "+trainer.gradient_clip=1"], "gradient_clip"),
        ([*TINY, "trainer.precision=16-mixd"], "16-mixd"),
        ([*TINY, "model.weights=nowhere.pth"], "model.weights=nowhere.pth: no such file"),
        (["resume=nowhere"], "nowhere is no run's folder"),
        ([*OWN, "data.root=2024"], "data.root=2024: no such folder."),
        ([*OWN, "data.root=2024_05"], "data.root=2024_05: no such folder."),
        ([*OWN, "data.root=~/no where (1)"], f"data.root={Path.home()}/no where (1): no such folder."),
        ([*OWN, "data.root=[a,b]"], "data.root=['a', 'b'] is not allowed: give one path."),
        ([*OWN, "data.root=null"], "data.root=null is not allowed: give one path."),
        ([*TINY, "model.weights=5"], "model.weights=5: no such file"),
        ([*TINY, "model.weights=[a,b]"], "model.weights=['a', 'b'] is not allowed: give one path."),
        ([*TINY, "model.weights=~nobody_here/x"], "model.weights=~nobody_here/x: Could not determine home directory"),
        (["resume=~nobody_here/x"], "resume=~nobody_here/x: Could not determine home directory"),
        ([*TINY, "hydra.run.dir=~nobody_here/x"], "hydra.run.dir=~nobody_here/x: Could not determine home directory"),
        ([*TINY, "finetune.features_folder=[a]"], "finetune.features_folder=['a'] is not allowed: give one path."),
        ([*TINY, "data.root=5"], "data.root is no key of what is chosen for data: drop it"),
        (["experiment=[best32,best64]"], "experiment takes one choice. With -m, experiment=best32,best64 runs each."),
        (["logger=[csv,tensorbord]"], "logger=tensorbord: there is no such choice. Choose csv, mlflow, none, tensorb"),
        (["data.download=false", "model.weights=null"], "python -m cifar_tl.data fetch"),
        ([*TINY, "logger=null"], "logger=none"),
        ([*TINY, "+trainer.fast_dev_run=true"], "experiment=demo goes through everything in a minute"),
        ([*TINY, "trainer.devices=0"], "devices=0"),
        ([*TINY, "hydra.run.dir=/dev/null/run"], "hydra.run.dir=FOLDER"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_gets_a_readable_error(command, arguments, said):
    code, _, err = command(*arguments)
    assert code == 1
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["data=folder", "data.root={}"], ["model.weights={}", *TINY[1:]]])
def test_a_path_that_the_system_refuses_to_look_at_is_no_matter_of_outputs_alone(command, arguments):
    long = "x" * 300
    code, _, err = command("experiment=demo", *(argument.format(long) for argument in arguments))
    assert code == 1
    assert long in err
    advice = (
        "Give a folder that can be read." if "data.root={}" in arguments else "If it is to be read, give a path that"
    )
    assert f"File name too long. {advice}" in err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_cuda_asked_for_and_absent(command, accelerator):
    code, _, err = command(*TINY, f"trainer.accelerator={accelerator}")
    assert code == 1
    assert "sees no CUDA GPU here" in err
    assert "trainer.accelerator=cpu" in err


def test_missing_data_names_the_file_and_the_commands(command, tmp_path):
    code, _, err = command("data.download=false", "model.weights=null", "data.root=somewhere")
    assert code == 1
    assert str(tmp_path / "somewhere" / download.FOLDER) in err
    assert "experiment=demo" in err


@pytest.mark.parametrize(("damage", "said"), [(lambda b: b[:-5], "truncated"), (lambda b: b[:-1] + b"!", "MD5")])
@pytest.mark.slow
def test_a_damaged_data_file_is_named(command, tmp_path, shared, damage, said):
    real, copy = shared / "data" / download.FOLDER, tmp_path / "data" / download.FOLDER
    copy.mkdir(parents=True)
    for name in download.FILES:
        (copy / name).symlink_to(real / name)
    (copy / "test_batch").unlink()
    (copy / "test_batch").write_bytes(damage((real / "test_batch").read_bytes()))
    code, _, err = command("model.weights=null", "data.download=false", f"data.root='{tmp_path / 'data'}'")
    assert code == 1
    assert "test_batch" in err
    assert said in err


def test_a_truncated_checkpoint_is_named(command, tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "c.ckpt")
    (tmp_path / "c.ckpt").write_bytes((tmp_path / "c.ckpt").read_bytes()[:2000])
    code, _, err = command("checkpoint=c.ckpt", task="cifar_tl.evaluate:main", config_name="evaluate")
    assert code == 1
    assert "c.ckpt cannot be read: it is damaged" in err


def test_somebody_elses_checkpoint_is_refused(command, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "c.ckpt")
    code, _, err = command("checkpoint=c.ckpt", task="cifar_tl.evaluate:main", config_name="evaluate")
    assert code == 1
    assert "was not written by cifar_tl.train" in err


@pytest.mark.slow
def test_sweep_runs_four_jobs_in_four_folders_and_ends_with_a_table(command, tmp_path, no_run_pages):
    code, out, err = command("-m", "model.dropout=0.0,0.2", "seed=1,2", *TINY, "trainer.max_epochs=3")
    assert code == 0, err
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert sorted(p.parent.name for p in sweep.glob("*/metrics.json")) == ["0", "1", "2", "3"]
    rows = (sweep / "sweep.csv").read_text().splitlines()
    assert len(rows) == 5
    assert all("finished" in row for row in rows[1:])
    assert "best val/acc" in out
    assert "model.dropout=0.2" in out
    table = out[out.index("best val/acc") :]
    assert "seed=2" in table
    assert "data.train_size" not in table  # what all jobs share


@pytest.mark.slow
def test_a_failing_job_leaves_the_others_and_their_record_alone(command, tmp_path):
    code, out, err = command("-m", "data.eval_batch_size=0,500", *TINY, "trainer.max_epochs=3")
    assert code == 1
    assert "data.eval_batch_size=0 is not allowed" in err
    (table,) = tmp_path.glob("outputs/sweeps/*/sweep.csv")
    rows = table.read_text().splitlines()
    assert "failed" in rows[1]
    assert "finished" in rows[2]
    (page,) = tmp_path.glob("outputs/sweeps/*/1/report.html")
    assert "<svg" in page.read_text()
    assert f"  report      {page.relative_to(tmp_path)}" in out.replace(f"{tmp_path}/", "")


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_ctrl_c_says_what_is_saved_and_the_run_can_be_resumed(command, tmp_path, no_run_pages):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [*SMALL, *TINY, "trainer.max_epochs=500", "hydra.run.dir=run"]
    with subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell starts background jobs with SIGINT ignored, and tests may be one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "are saved in" in err
    assert "python -m cifar_tl.train resume=" in err
    assert "Traceback" not in err
    saved = len(json.loads((tmp_path / "run" / "metrics.json").read_text())["val/acc"])
    assert 1 <= saved < 500
    code, _, err = command("resume=run", f"trainer.max_epochs={saved + 2}")
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["epoch"] == list(range(saved + 2))


@pytest.mark.parametrize("program", ["train", "evaluate", "predict", "export"])
@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["sed=1"]], ids=lambda arguments: arguments[0])
@pytest.mark.slow
def test_help_and_typos_do_not_wait_for_torch(tmp_path, program, arguments):
    command = [sys.executable, "-X", "importtime", "-m", f"cifar_tl.{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (1 if arguments == ["sed=1"] else 0)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in imported
    assert imported.isdisjoint({"torch", "lightning", "matplotlib"})


@pytest.mark.parametrize(
    ("name", "text", "given", "expected"),
    [
        (
            "experiment/mine",
            "# @package _global_\nmodel:\n  upscal: 3\n",
            ["experiment=mine"],
            "error: model.upscal: nothing reads it. Did you mean model.upscale? Correct the file of conf that has "
            "it, one of augment=flip_crop, callbacks=none, data=cifar10, experiment=mine, finetune=two_phase, model=",
        ),
        (
            "experiment/mine",
            "model:\n  upscale: 3\nseed: 1\n",
            ["-m", "experiment=mine"],
            "error: job 0 (experiment=mine): experiment=mine: nothing reads the keys of its file, model, seed, as long "
            "as its first line is not '# @package _global_'.",
        ),
        (
            "finetune/mine",
            "defaults: [two_phase]\nhead_rate: 1\nheadlr: 2\n",
            ["finetune=mine"],
            "error: finetune.head_rate, finetune.headlr: nothing reads them. Did you mean",
        ),
        (
            "experiment/mine",
            "# @package _global_\nfinetune: short\n",
            ["experiment=mine"],
            "error: finetune: short in a file of conf would put a value in the place of a group's keys. Choose from a "
            "group in the file's defaults: '- override /finetune: short'.",
        ),
        (
            "experiment/mine",
            "# @package _global_\ndefaults: [finetune: short]\n",
            ["experiment=mine"],
            "error: conf/experiment/mine.yaml: finetune: short in its defaults is looked for in its own folder. Choose "
            "from a group with '- override /finetune: short'.",
        ),
        (
            "experiment/mine",
            "# @package _global_\nfinetune:\n\thead_lr: 1\n",
            ["experiment=mine"],
            "conf/experiment/mine.yaml, line 3, column 1: no valid YAML: found character '\\t'",
        ),
        (
            "experiment/mine",
            "# @package _global_\nseed: 1\nseed: 2\n",
            ["-m", "experiment=mine"],
            "conf/experiment/mine.yaml, line 3, column 1: no valid YAML: found duplicate key seed",
        ),
        ("experiment/mine", "", ["experiment=mine"], "error: experiment=mine: its file is empty."),
        ("trainer/mine", "defaults: [cpu]\nmax_time: null\n", ["trainer=mine"], None),
        ("data/mine", "defaults: [folder]\nroot: here\n", ["data=mine"], None),
        (
            "data/mine",
            "defaults: [folder]\nroot: here\nbatchsize: 64\n",
            ["data=mine"],
            "error: data.batchsize: nothing reads it. Did you mean data.batch_size?",
        ),
    ],
)
def test_keys_of_files_that_nothing_reads_are_refused(tmp_path, monkeypatch, capsys, name, text, given, expected):
    shutil.copytree(cli.conf_folder(), tmp_path / "conf")
    (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(cli, "conf_folder", lambda: tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    begun = []
    code = cli.run(begun.append, "train", given)
    err = capsys.readouterr().err
    if expected is None:
        assert (code, err, len(begun)) == (0, "", 1)
    else:
        assert (code, len(begun)) == (1, 0)
        assert expected in err


def test_hydras_flags_and_their_values_may_stand_anywhere():
    given = ["seed=1", "--cfg", "job", "trainer=cpu", "--info", "data=folder", "-cd", "mine", "--package=model"]
    first = ["--cfg=job", "--info=all", "--config-dir=mine", "--package=model"]
    assert cli._flags_first(cli.flags_joined(given)) == [*first, "seed=1", "trainer=cpu", "data=folder"]
    assert cli.flags_joined(["seed=1", "-i", "defaults"]) == ["seed=1", "--info=defaults"]
    assert cli.flags_joined(["seed=1", "--cfg"]) == ["seed=1", "--cfg"]  # argparse says what is missing
    assert cli.flags_joined(["--experiment", "best64"]) == ["--experiment", "best64"]  # no flag: see the refusal


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_gets_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cifar_tl.train", "--cfg", "job"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=Path(cli.__file__).parents[1])
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_broken_pipe_in_a_run_is_no_end_of_reading(command):
    def task(cfg):
        raise BrokenPipeError(32, "a logger's")

    with pytest.raises(BrokenPipeError, match="a logger's"):
        command("hydra.output_subdir=null", task=task)


def test_the_package_names_its_commands():
    listed = subprocess.run([sys.executable, "-m", "cifar_tl"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^python -m (cifar_tl\.\w+) ", listed, re.MULTILINE)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    by_make = {"cifar_tl.reproduce", "cifar_tl.benchmarks"}
    assert set(found) == set(re.findall(r"python -m (cifar_tl\.\w+)", readme)) | by_make
    assert all(importlib.util.find_spec(name) for name in found)


def test_a_command_without_its_dot_is_an_error(capsys):
    assert cifar_tl_main(["train", "experiment=demo"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "error: python -m cifar_tl carries nothing out: train experiment=demo")
    assert "python -m cifar_tl.train " in err


def test_folders_with_names_that_a_console_does_not_have_are_printed_as_escapes(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    folder = make_run(tmp_path / os.fsdecode(b"caf\xe9"), seed=0)
    assert reports([str(folder)]) == 0
    table = SweepTable()
    table._folder = folder.parent
    write_csv(folder.parent / TABLE, [COLUMNS, [folder.name, *["1"] * (len(COLUMNS) - 1)]])
    table.finish()
    assert data(["verify", "--root", str(folder)]) == 1
    printed = stream.buffer.getvalue().decode()
    assert printed.count("caf\\udce9/cifar-10-batches-py") > 1
    assert "caf\\udce9/report.html" in printed
    assert "sweep_report.html" in printed


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("trainer.max_time=00:01:00:00", "++trainer.max_time=00:01:00:00"),
        ("+trainer.num_nodes=2", "++trainer.num_nodes=2"),
        ("trainer.max_epochs=3", "trainer.max_epochs=3"),
        ("++finetune.head_lr=1", "finetune.head_lr=1"),
        ("+trainer.gpus=2", "+trainer.gpus=2"),
        ("~trainer.max_time", "~trainer.max_time"),
    ],
)
def test_keys_of_the_trainer_are_added_or_set_whichever_way_they_are_given(given, passed):
    assert cli.set_or_add(given, "train") == passed
    assert cli.set_or_add(given, "evaluate") == given.replace("++finetune", "finetune")


def test_a_key_of_the_trainer_that_a_run_was_started_with_can_be_given_again():
    twice = [cli.set_or_add(f"{plus}trainer.max_time={time}", "train") for plus, time in (("+", "a"), ("+", "b"))]
    assert cli.compose("train", twice).trainer.max_time == "b"


def test_an_augmentation_in_a_file_of_ones_own_says_what_it_does_and_no_more(command, tmp_path):
    (tmp_path / "mine" / "augment").mkdir(parents=True)
    (tmp_path / "mine" / "augment" / "small.yaml").write_text("flip: random\n")
    built = []

    def task(cfg):
        built.append(build_augment(cfg)(10))

    code, _, err = command("--config-dir=mine", "augment=small", task=task)
    assert (code, err) == (0, "")
    assert built == [Augment("random")]
