"""python tests/chaos.py [--kills 50] [--seed 0]: kill a two-phase run at random moments, go on with it, and compare.

A kill is SIGTERM, SIGKILL, or SIGKILL while a checkpoint is being written. At the end the weights, the history and the
test result have to be those of a run that nobody disturbed, bit for bit; on the way no more may be lost than one epoch
or a minute's epochs, and nothing may be left behind. When a run is over before all kills are done, another one starts.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PROGRAM = Path(__file__).with_name("small_command.py")
EPOCHS = 12
RUN = (
    *("experiment=demo", "data.train_size=220", "data.val_size=20", "data.test_size=20", "data.batch_size=20"),
    *(f"trainer.max_epochs={EPOCHS}", f"finetune.unfreeze_at_epoch={EPOCHS // 2}", "logger=csv"),
    "finetune.features_folder=null",
)
EXACT = ("epoch", "phase", "train/loss", "train/acc", "val/loss", "val/acc", "val/ece", "lr/head", "lr/backbone")
EXACT = (*EXACT, "best/epoch", "best/val/acc", "test/acc", "test/loss", "test/ece", "test/confusion")
ALLOWED_SECONDS = 60.0
"""Of epochs that a kill may cost, if they are more than one."""


def start(folder: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start the run, or go on with it."""
    saved = (folder / "checkpoints" / "last.ckpt").is_file()
    arguments = [f"resume={folder}"] if saved else [*RUN, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        return subprocess.Popen([sys.executable, PROGRAM, *arguments], env=environment, stdout=output, stderr=output)


@contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """End a process, whatever goes wrong beside it."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read(folder: Path) -> dict:
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {"status": "none"}


def saved_epochs(folder: Path) -> int:
    """Return how many epochs the checkpoint to resume from has; it and the best one have to be whole."""
    last, best = (folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    if not last.is_file():
        return 0
    torch.load(best, weights_only=True)
    return torch.load(last, weights_only=True)["epoch"] + 1


def said_epochs(log: Path) -> dict[int, float]:
    """Return the seconds of the epochs that a process has said are over."""
    lines = re.findall(r"^epoch +(\d+)/.*?([\d.]+) s$", log.read_text(), flags=re.MULTILINE)
    return {int(epoch): float(seconds) for epoch, seconds in lines}


def kill(process: "subprocess.Popen[bytes]", how: str, wait: float, folder: Path) -> bool:
    """Kill a process in the way and after the seconds that are drawn; return whether it was alive until then."""
    end = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while how == "SIGKILL while writing" and process.poll() is None and time.monotonic() < deadline:
        if any((folder / "checkpoints").glob(".*.partial.*")):
            break
        time.sleep(0.0005)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    process.wait()
    return True


def check_end(folder: Path, straight: Path, log: Path) -> None:
    """Compare a finished run with the undisturbed one."""
    ours, theirs = read(folder), read(straight)
    assert ours["status"] == "finished", f"{folder}: {ours['status']}\n{log.read_text()[-3000:]}"
    for key in EXACT:
        assert ours[key] == theirs[key], f"{key}: {ours[key]}, undisturbed {theirs[key]}"
    for name in ("last", "best"):
        mine, expected = (
            torch.load(f / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"] for f in (folder, straight)
        )
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], tensor) for key, tensor in expected.items()), f"{name}.ckpt differs"
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(left) == ["best.ckpt", "last.ckpt"], left


def chaos(kills: int, seed: int, folder: Path) -> Counter:
    """Kill runs so many times, compare each that comes to its end, and return how often each way was taken.

    Raises:
        AssertionError: Something was lost, left or changed.
    """
    draw, done = random.Random(seed), Counter()
    straight, log = folder / "undisturbed", folder / "log"
    begin = time.monotonic()
    with ended(start(straight, log)) as process:
        assert process.wait() == 0, log.read_text()
    seconds = time.monotonic() - begin
    run = folder / "run0"
    while sum(done.values()) < kills or run.exists():
        log.unlink(missing_ok=True)
        before = saved_epochs(run)
        how, wait = draw.choice(("SIGTERM", "SIGKILL", "SIGKILL while writing")), draw.uniform(0.2, 0.8) * seconds
        with ended(start(run, log)) as process:
            killed = sum(done.values()) < kills and kill(process, how, wait, run)
            assert killed or process.wait() == 0, log.read_text()[-3000:]
        if killed:
            done[how] += 1
            after, said = saved_epochs(run), said_epochs(log)
            lost = [seconds for epoch, seconds in said.items() if epoch >= after]
            assert after >= before, f"{how}: {after} epochs saved, {before} before"
            assert len(lost) <= 1 or sum(lost) <= ALLOWED_SECONDS, f"{how}: {len(lost)} epochs, {sum(lost):.1f} s"
            assert how != "SIGTERM" or len(lost) <= 1, f"SIGTERM: {len(lost)} epochs lost"  # one is being saved
            print(
                f"{sum(done.values()):3d}  {how:<22} {before:2d} -> {after:2d} epochs saved, {len(lost)} lost",
                flush=True,
            )
        if read(run)["status"] == "finished":
            check_end(run, straight, log)
            print(f"     {run.name} is finished, and is the undisturbed one, bit for bit", flush=True)
            run = folder / f"run{int(run.name[3:]) + 1}"
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ways = chaos(options.kills, options.seed, Path(place))
    print(f"{sum(ways.values())} kills ({', '.join(f'{n} {how}' for how, n in sorted(ways.items()))}): nothing lost")
