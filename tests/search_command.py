"""A search whose trials train nothing, as a process that tests kill: each writes its line and its result."""

import json
import os
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from cifar_tl import cli
from cifar_tl.reports.sweep_table import SweepTable
from cifar_tl.runs.record import write_metrics

SweepTable._draw_report = lambda self: None


def trial(cfg):
    """Wait for a second process, for ever if told to, and some time, then have a result of the trial's value alone."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_metrics(folder, {"status": "running"})
    with (begun := folder.parent / "begun.jsonl").open("a") as file:
        entry = {"trial": folder.name, "value": cfg.model.dropout, "resume": cfg.resume, "process": os.getpid()}
        file.write(json.dumps(entry) + "\n")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len({json.loads(line)["process"] for line in begun.open()}) < 2:
        time.sleep(0.05)
    hold = folder.parent / f"hold-{os.getpid()}"
    while hold.is_file():  # until this process is killed
        (folder.parent / f"held-{os.getpid()}").touch()
        time.sleep(0.05)
    time.sleep(0.3)
    write_metrics(folder, {"status": "finished", "best/val/acc": 1 - cfg.model.dropout})


if __name__ == "__main__":
    sys.exit(cli.run(trial, "train", sys.argv[1:]))
