"""What a run does under SLURM, told by environment variables and stand-ins for its programs; see also tests/cluster."""

import json
import os
import signal
import sys
from pathlib import Path

import hydra
import pytest
from conftest import TINY
from hydra.errors import HydraException
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from cifar_tl import cli, slurm
from cifar_tl.errors import Interrupted, UserError
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.runs.resume import with_folder_of_slurm_job, with_overrides_of_resumed_run
from cifar_tl.trainer import build_trainer

FAST = (*TINY, "data.train_size=40", "trainer.max_epochs=3", "finetune.features_folder=null")
BATCH = {"SLURM_JOB_ID": "12", "ENVIRONMENT": "BATCH"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_ID": "3"}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in {name for name in os.environ if name.startswith("SLURM_")} | {"ENVIRONMENT", "SLURM_NTASKS_PER_NODE"}:
        monkeypatch.setenv(name, "")  # so that what a test leaves there is removed after it
        monkeypatch.delenv(name)


@pytest.fixture
def environ(monkeypatch):
    def environ(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return environ


@pytest.fixture
def programs(tmp_path, environ):
    """Put an squeue before the real ones that says what it is told, and an scontrol that notes how it is called."""
    folder = tmp_path / "programs"
    folder.mkdir()
    environ(PATH=f"{folder}:{os.environ['PATH']}")

    def programs(state, preempted="N/A"):
        for name, line in {"squeue": f"echo {state} {preempted}", "scontrol": f"echo $@ >>{folder}/calls"}.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)
        return folder / "calls"

    return programs


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run cifar_tl.train in an empty folder; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def command(*arguments):
        code = cli.run("cifar_tl.train:main", "train", list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield command
    for number, handler in before.items():
        signal.signal(number, handler)  # Lightning ignores Ctrl-C after the first one


def test_a_requeued_command_finds_its_folder_and_another_one_does_not(environ):
    assert with_folder_of_slurm_job(["seed=1"]) == ["seed=1"]
    environ(**BATCH)
    first = with_folder_of_slurm_job(["seed=1"])
    assert first[0] == "seed=1"
    assert first[1].startswith("hydra.run.dir='outputs/slurm/12-")
    environ(SLURM_RESTART_COUNT="1")
    assert with_folder_of_slurm_job(["seed=1"]) == first
    assert with_folder_of_slurm_job(["seed=2"])[1] != first[1]
    assert with_folder_of_slurm_job(["-m", "seed=1,2"])[-1].startswith("hydra.sweep.dir='outputs/slurm/12-")
    for given in ("hydra.run.dir=x", "resume=x"):
        assert with_folder_of_slurm_job([given]) == [given]


def test_processes_of_torchrun_are_given_a_folder(environ, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert with_folder_of_slurm_job(["seed=1"]) == ["seed=1"]  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"torchrun started 2 processes, of one folder: give hydra\.run\.dir=FOLDER"):
        with_folder_of_slurm_job(["seed=1"])
    for given in ("hydra.run.dir=x", "resume=x"):
        assert with_folder_of_slurm_job([given]) == [given]
    environ(**BATCH)
    assert with_folder_of_slurm_job(["seed=1"])[1].startswith("hydra.run.dir='outputs/slurm/12-")


def test_processes_of_srun_share_a_folder_and_a_shell_of_salloc_has_one_by_the_time(environ):
    environ(SLURM_JOB_ID="12", SLURM_NTASKS="2")
    assert slurm.folder_of_job(["seed=1"]) is None
    environ(**SRUN)
    assert slurm.folder_of_job(["seed=1"]) == Path("outputs/slurm/12-step3")


@pytest.mark.parametrize(
    ("state", "preempted", "by_sigterm", "by_sigusr1"),
    [
        ("RUNNING", "2026-11-25T04:53:01", True, True),  # in the grace time of a preemption
        ("RUNNING", "N/A", False, True),  # SIGUSR1 some time before the limit; scancel --signal=TERM
        ("COMPLETING", "N/A", False, False),  # scancel, over its time, or started again anyway
    ],
)
def test_a_job_is_started_again_unless_somebody_has_ended_it(
    environ, programs, state, preempted, by_sigterm, by_sigusr1
):
    calls = programs(state, preempted)
    assert not slurm.requeue(preempted_only=False)  # outside of SLURM
    environ(SLURM_JOB_ID="12")
    assert slurm.requeue(preempted_only=True) == by_sigterm
    assert slurm.requeue(preempted_only=False) == by_sigusr1
    assert (calls.read_text() if calls.exists() else "") == "requeue 12\n" * (by_sigterm + by_sigusr1)


def test_a_task_of_an_array_asks_for_itself_alone(environ, programs):
    calls = programs("RUNNING", "N/A")
    environ(SLURM_JOB_ID="12", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    assert slurm.requeue(preempted_only=False)
    assert calls.read_text() == "requeue 12_3\n"


def test_where_slurms_programs_are_missing_nothing_is_started_again(environ, tmp_path):
    environ(SLURM_JOB_ID="12", PATH=str(tmp_path))
    assert not slurm.requeue(preempted_only=False)


@pytest.mark.slow
def test_sigusr1_saves_and_the_requeued_command_goes_on_and_a_finished_run_is_kept(
    command, environ, programs, monkeypatch, tmp_path, no_run_pages
):
    environ(**BATCH)
    calls = programs("RUNNING")
    step, handlers = ResNet50Classifier.training_step, []

    def signalled(self, batch, batch_idx):
        handlers.append(signal.getsignal(signal.SIGTERM))
        if (self.current_epoch, batch_idx) == (1, 0):
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(ResNet50Classifier, "training_step", signalled)
        code, _, err = command(*FAST)
    assert code == 130
    assert "1 of 3 epochs are saved" in err
    assert "SLURM starts the job again, and it goes on by itself." in err
    assert "Traceback" not in err
    assert calls.read_text() == "requeue 12\n"
    (folder,) = (tmp_path / "outputs" / "slurm").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["status"] == "interrupted"
    # not Lightning's, which may wait for other processes from inside of a step
    assert {getattr(handler, "__func__", None) for handler in handlers} == {cli.StopSignals._stop}

    environ(SLURM_RESTART_COUNT="1")
    code, out, err = command(*FAST)
    assert code == 0, err
    assert "resuming   after the last finished epoch" in out
    finished = (folder / "metrics.json").read_bytes()
    assert json.loads(finished)["epoch"] == [0, 1, 2]
    code, out, err = command(*FAST)
    assert code == 0, err
    assert "finished: kept" in out
    assert (folder / "metrics.json").read_bytes() == finished


def test_a_requeued_sweep_goes_on_and_a_new_one_in_its_folder_is_refused(environ, tmp_path):
    (tmp_path / "multirun.yaml").write_text("hydra: {overrides: {task: ['seed=0,1'], hydra: []}}")
    arguments = ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    with pytest.raises(UserError, match="holds a sweep already"):
        with_overrides_of_resumed_run(arguments)
    environ(SLURM_RESTART_COUNT="1")
    assert with_overrides_of_resumed_run(arguments) == [*arguments, f"resume='{tmp_path}'"]


def test_sigterm_and_sigusr1_end_a_command_once(command, monkeypatch):
    def train(cfg):
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of saving
            monkeypatch.setattr(cli, "saved", True, raising=False)

    assert cli.run(train, "train", ["hydra.run.dir=."]) == 130
    assert cli.saved
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_only_the_first_of_several_processes_stops(environ):
    environ(SLURM_PROCID="1")
    with cli.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.stopped(RuntimeError("Connection closed by peer"))  # when the first one is gone
    with cli.StopSignals() as signals:
        assert not signals.stopped(RuntimeError("Connection closed by peer"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_of_submitits_saves_before_submitit_starts_it_again(environ, programs, capsys, number):
    happened = []

    def requeues(number, frame):
        happened.append("submitit")
        sys.exit(-1)

    def job(cfg):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            happened.append("saved")
            raise Interrupted("1 of 3 epochs are saved.\nContinue with x") from None

    calls = programs("RUNNING", "2026-11-25T04:53:01")
    environ(SLURM_JOB_ID="12")
    before = {each: signal.signal(each, requeues) for each in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        with pytest.raises(SystemExit):
            cli._end_on_signals(job, None)
        assert signal.getsignal(signal.SIGTERM) is requeues
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if number == signal.SIGUSR2:  # it counts how often the job was out of time
        assert happened == ["saved", "submitit"]
        assert not calls.exists()
    else:
        assert happened == ["saved"]
        assert calls.read_text() == "requeue 12\n"
    assert "1 of 3 epochs are saved." in capsys.readouterr().err


def trainer(**keys):
    return {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_epochs": 1, **keys}


def test_what_salloc_leaves_in_the_environment_starts_and_awaits_nobody(environ):
    environ(SLURM_NTASKS="4", SLURM_JOB_ID="12", SLURM_JOB_NAME="train")
    built = build_trainer(trainer(), logger=False)
    assert isinstance(built._accelerator_connector.cluster_environment, LightningEnvironment)
    assert built.world_size == 1


def test_processes_of_srun_train_together(environ):
    environ(**SRUN, SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_NODEID="0", SLURM_JOB_NAME="train")
    built = build_trainer(trainer(strategy="ddp", devices=2), logger=False)
    environment = built._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    environment.validate_settings(2, 1)
    assert (built.world_size, built.global_rank) == (2, 1)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, r"srun started 2 processes, and trainer.devices=1 on 1 node\(s\) trains with 1. Give trainer=ddp"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "srun started 2,1 processes on the nodes: give each as many"),
    ],
)
def test_other_processes_of_srun_than_the_trainer_has_are_refused(environ, variables, said):
    environ(**{**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", **variables})
    with pytest.raises(UserError, match=said):
        build_trainer(trainer(), logger=False)


def test_torchrun_on_several_nodes_may_be_started_by_srun(environ):
    environ(**SRUN, SLURM_PROCID="1", SLURM_LOCALID="0", SLURM_NODEID="1")
    names = ("RANK", "GROUP_RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environ(**dict(zip(names, ("4", "1", "0", "8", "4"), strict=True)))
    environ(TORCHELASTIC_RUN_ID="1", MASTER_ADDR="localhost", MASTER_PORT="12345")
    built = build_trainer(trainer(strategy="ddp", devices=4, num_nodes=2), logger=False)
    assert isinstance(built._accelerator_connector.cluster_environment, TorchElasticEnvironment)
    assert (built.world_size, built.global_rank) == (8, 4)


def test_the_launcher_of_slurm_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with hydra.initialize_config_dir(str(cli.conf_folder()), version_base="1.3"):
        cfg = hydra.compose("train", ["hydra/launcher=slurm", "hydra.launcher.partition=x"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
    assert cfg.hydra.launcher.max_num_timeout > 0
    assert list(cfg.hydra.launcher.setup) == ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]


def test_a_launcher_that_is_not_installed_is_named():
    error = HydraException("In 'hydra/launcher/x': Could not load 'hydra/launcher/submitit_slurm'.")
    assert "needs a plugin of Hydra that is not installed" in cli.explain(error, "train")


@pytest.mark.slow
def test_jobs_in_other_processes_leave_the_table_the_page_and_every_reason(command, environ, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    environ(PYTHONPATH=os.pathsep.join(sys.path))
    arguments = ("-m", "data.eval_batch_size=0,20", *FAST, "hydra.sweep.dir=sweep", "hydra/launcher=submitit_local")
    code, out, err = command(*arguments)
    assert code == 1
    assert "job 0" in err
    assert "data.eval_batch_size=0 is not allowed" in err
    assert "1 of 2 jobs failed" in err
    assert "best val/acc" in out
    rows = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert ["failed" in row for row in rows[1:]] == [True, False]
    assert (tmp_path / "sweep" / "sweep_report.html").is_file()
