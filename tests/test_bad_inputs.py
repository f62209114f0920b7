"""tests/golden/bad_inputs.md: what people give by mistake, and the message and the exit code that they get."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image

from cifar_tl import cli

TABLE = Path(__file__).parent / "golden" / "bad_inputs.md"

T = (*TINY, "trainer.accelerator=cpu", "finetune.features_folder=null")
F = ("data=folder", "data.val_size=2", "model.weights=null", *T[-2:], "logger=csv")

ROWS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "Command line": [
        ("train", ("experimnt=best32",)),
        ("train", ("finetune.head_rl=1",)),
        ("train", ("experiment=dmo",)),
        ("train", ("best64",)),
        ("train", ("--experiment", "best64")),
        ("train", ("--lr", "0.1")),
        ("train", ("--verbose",)),
        ("train", ("--multi", "seed=1,2")),
        ("train", ("seed=1,2",)),
        ("train", ("logger=tensorboard,csv",)),
        ("train", ("experiment=best32,best64",)),
        ("train", ("trainer.fast_dev_run=true",)),
        ("evaluate", ("checkpoint=RUN", "trainer.max_epochs=3")),
        ("predict", ("checkpoint=RUN", "input=red.png", "epochs=3")),
        ("train", ("logger.tensorboard.nam=3",)),
        ("train", ("data=cifr10",)),
        ("train", ("--config-name", "demo")),
        ("train", ("lr=1e-3",)),
        ("train", ("trainer.gpus=2",)),
        ("train", ("batch_size=64",)),
        ("train", ("trainer.max_tim=00:01:00:00",)),
        ("train", ("callbacks.early_stopping.patience=3",)),
        ("train", ("model=resnet18",)),
        ("train", ("data=cifar100",)),
        ("train", ("-m", "hydra/launcher=ry")),
        ("train", ("logger=null",)),
        ("train", ("callbacks=[]",)),
        ("train", ("model.options=null",)),
        ("train", ("+trainer.limit_train_batches=true",)),
        ("train", ("+model.dropuot=0.5",)),
        ("train", ("++model.dropuot=0.5",)),
        ("train", ("+seed=1",)),
        ("train", ("model.head=[128",)),
        ("train", ("resume=nowhere",)),
        ("train", ("resume=.",)),
        ("train", ("resume=last",)),
        ("train", ("-m", "resume=nowhere")),
        ("train", ("-m", "resume=RUN")),
        ("train", ("-m", "seed=1,2", "--cfg", "job")),
        ("train", ("sweep=seeds",)),
        ("train", (*T, "hydra.run.dir=RUN")),
        ("predict", ("checkpoint=RUN",)),
        ("predict", ("checkpoint=RUN", "input=red.png", "output=table.csv", "format=json")),
        ("evaluate", ("RUN",)),
        ("reports", ("nowhere",)),
    ],
    "Config": [
        ("train", (*T, "seed=-1")),
        ("train", (*T, "seed=1764403200000")),
        ("train", (*T, "data.batch_size=0")),
        ("train", (*T, "data.batch_size=abc")),
        ("train", (*T, "data.batch_size=1", "finetune.batchnorm=train")),
        ("train", (*T, "data.one_hot=no")),
        ("train", (*T, "data.val_size=60")),
        ("train", (*T, "data.limit=5")),
        ("train", (*T, "model.dropout=1.5")),
        ("train", (*T, "model.head=[0]")),
        ("train", (*T, "finetune.unfreeze_at_epoch=never")),
        ("train", (*T, "model.head=128")),
        ("train", (*T, "model.upscale=0")),
        ("train", (*T, "augment.flip=always")),
        ("train", (*T, "augment.crop_padding=32")),
        ("train", (*T, "augment.cutout=32")),
        ("train", (*T, "finetune.unfreeze_at_epoch=4")),
        ("train", (*T, "finetune.optimizer=adamm")),
        ("train", (*T, "finetune.optimizer=sgd")),
        ("train", (*T, "finetune.batchnorm=frosen")),
        ("train", (*T, "callbacks=ema", "callbacks.ema.decay=1")),
        ("train", (*T, "+trainer.gradient_clip_val=0")),
        ("train", (*T, "callbacks=early_stopping", "callbacks.early_stopping.monitor=val_acc")),
        ("train", (*T, "callbacks=early_stopping", "callbacks.early_stopping.patience=3x")),
        ("train", (*T, "callbacks=early_stopping", "callbacks.early_stopping.start_epoch=x")),
        ("train", (*T, "finetune=gradual", "finetune.unfreeze_at_epoch=2")),
        ("train", (*T, "finetune=linear_probe", "finetune.stages=[layer4]")),
        ("train", (*T, "finetune.warmup_epochs=9")),
        ("train", (*T, "finetune.head_lr=-1")),
        ("train", (*T, "finetune.label_smoothing=1")),
        ("train", (*T, "finetune.distill_upscale=0")),
        ("train", (*T, "finetune.distill_weight=-1")),
        ("train", (*T, "finetune.cache_features=perhaps")),
        ("train", (*T, "trainer.max_epochs=0")),
        ("train", (*T, "trainer.devices=0")),
        ("train", (*T, "trainer.precision=16-mixd")),
        ("train", (*T, "trainer.log_every_n_steps=0")),
        ("train", (*T, "+trainer.gradient_clip=1")),
        ("train", (*T, "+trainer.max_time=3600")),
        ("train", (*T, "+trainer.deterministic=yes")),
        ("train", (*T, "trainer.strategy=ddp_fork_find_unused_parameters_true", "trainer.devices=2")),
        ("train", (*T, "+trainer.fast_dev_run=true")),
        ("train", (*T, "+trainer.limit_val_batches=0")),
        ("train", (*T, "+trainer.callbacks=x")),
        ("train", (*T, "+trainer.check_val_every_n_epoch=9")),
        ("train", (*T, "+callbacks.mine.patience=3")),
        ("train", (*T, "+callbacks.mine._target_=nowhere.Callback")),
    ],
    "Data": [
        ("train", ("data.download=false", "data.root=empty", "model.weights=null")),
        ("train", (*F, "data.root=nowhere")),
        ("train", (*F, "data.root=[a,b]")),
        ("train", (*F, "data.root=empty")),
        ("train", (*F, "data.root=other_test")),
        ("train", (*F, "data.root=broken")),
        ("train", (*F, "data.root=deep")),
        ("predict", ("checkpoint=RUN", "input=nowhere.png")),
        ("predict", ("checkpoint=RUN", "input=empty")),
        ("predict", ("checkpoint=RUN", "input=[a,b]")),
        ("predict", ("checkpoint=RUN", "input=red.png", "+trainer.precision=bf16-mixed")),
        ("predict", ("checkpoint=RUN", "input=*.png")),
        ("evaluate", ("checkpoint=RUN", "data.limit=0")),
        ("evaluate", ("checkpoint=RUN", "trainer.devices=2")),
        ("evaluate", ("checkpoint=RUN", "data.root=empty")),
    ],
    "Weights": [
        ("train", (*T, "model.weights=IMAGENET1K_V3")),
        ("train", (*T, "model.weights=imagenet1k_v1")),
        ("train", (*T, "model.weights=nowhere.pth")),
        ("train", (*T, "model.weights=text.pth")),
        ("train", (*T, "model.weights=truncated.ckpt")),
        ("train", (*T, "model.weights=other.pth")),
        ("train", (*T, "model.weights=code.pth")),
        ("train", (*T, "model.weights=empty")),
    ],
    "Checkpoints": [
        ("evaluate", ("checkpoint=nowhere.ckpt",)),
        ("evaluate", ("checkpoint=empty",)),
        ("evaluate", ("checkpoint=truncated.ckpt",)),
        ("evaluate", ("checkpoint=other.pth",)),
        ("evaluate", ("checkpoint=code.pth",)),
        ("evaluate", ("checkpoint=later.ckpt",)),
        ("export", ("checkpoint=RUN", "format=onx")),
        ("export", ("checkpoint=RUN", "opset=3")),
    ],
    "Environment": [
        ("train", (*T, "trainer.accelerator=mps")),
        ("train", (*T, "hydra.run.dir=text.pth/run")),
        ("train", (*T, "hydra.run.dir=/dev/null/run")),
        ("predict", ("checkpoint=RUN", "input=red.png", "output=text.pth/table.csv")),
        ("predict", ("checkpoint=RUN", "input=red.png", "output=table.xls")),
    ],
}


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_run):
    """A folder with the inputs; RUN is a finished run of four epochs."""
    monkeypatch.chdir(tmp_path)
    Path("RUN").symlink_to(tiny_run)
    for folder in (
        "empty",
        *(f"{name}/{split}/{c}" for name in ("other_test", "broken") for split in ("train", "test") for c in "ab"),
    ):
        Path(folder).mkdir(parents=True)
    Path("text.pth").write_text("no weights")
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    checkpoint = tiny_run / "checkpoints" / "best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["cifar_tl"]["format"] = 99
    torch.save(content, "later.ckpt")
    Path("truncated.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"path": Path("x")}, "code.pth")
    image = Image.new("RGB", (32, 32), "red")
    image.save("red.png")
    for name in ("other_test", "broken"):
        for split in ("train", "test"):
            for c in "ab":
                for number in range(4):
                    image.save(f"{name}/{split}/{c}/{number}.png")
    shutil.move("other_test/test/b", "other_test/test/c")
    Path("broken/test/a/1.png").write_bytes(b"no image")
    Path("broken/train/b/2.png").write_bytes(Path("red.png").read_bytes()[:60])
    shutil.copytree("broken", "deep/inside")
    return tmp_path


def run(module, arguments, capsys):
    """Return the exit code and what is on stderr."""
    if module == "reports":
        done = subprocess.run([sys.executable, "-m", "cifar_tl.reports", *arguments], capture_output=True, text=True)
        return done.returncode, done.stderr
    capsys.readouterr()
    code = cli.run(f"cifar_tl.{module}:main", module, list(arguments))
    return code, capsys.readouterr().err


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="one row needs no Apple GPU there")
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_every_mistake_has_its_message_and_exit_code(place, tiny_run, capsys, request):
    lines = [
        "What people give by mistake, and what they are told. `pytest tests/test_bad_inputs.py --update-golden`",
        "",
    ]
    lines += ["writes this table anew."]
    for title, rows in ROWS.items():
        lines += ["", f"## {title}", "", "| command | exit code | message |", "|---|---|---|"]
        for module, arguments in rows:
            code, err = run(module, arguments, capsys)
            shown = " ".join(a for a in arguments if a not in (*T, *F)) or "(none)"
            assert code == 1, f"{module} {shown}: exit code {code}\n{err}"
            assert "Traceback" not in err, err
            assert len(err) < 1200, err
            for path, name in ((str(place), "HERE"), (str(tiny_run), "RUN"), (str(cli.conf_folder()), "conf")):
                err = err.replace(path, name)
            text = " ".join(err.split()).replace("|", "\\|")
            lines.append(f"| `{module} {shown}` | {code} | {text} |")
    table = "\n".join(lines) + "\n"
    if request.config.getoption("--update-golden"):
        TABLE.write_text(table)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"lists {sum(map(len, ROWS.values()))} mistakes" in readme
    assert table == TABLE.read_text()
