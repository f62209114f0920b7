"""python -m cifar_tl.reproduce [key=value ...]: the published tables, from nothing but the data and the weights."""

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cifar_tl import cli
from cifar_tl.errors import Interrupted, UserError, check_flag
from cifar_tl.reproduce.jobs import Job, plan_jobs, set_aside, state, unpublishable
from cifar_tl.reproduce.publish import publish
from cifar_tl.runs.resume import kept_result, quoted

log = logging.getLogger(__name__)

RESERVED_KEYS = ("seed", "experiment", "ablate", "sweep", "resume")
"""Keys of cifar_tl.train that conf/reproduce.yaml decides."""


def main(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    known = [*yaml.safe_load((cli.conf_folder() / "reproduce.yaml").read_text()), "hydra/"]
    arguments = cli.flags_joined(arguments)
    keys = {a: a.lstrip("+~").partition("=")[0].partition(".")[0] for a in arguments}
    own = [a for a in arguments if a.startswith("-") or keys[a] in known or a.startswith("hydra/")]
    passed = [a for a in arguments if a not in own]

    def task(cfg: DictConfig) -> None:
        if decided := [a for a in passed if keys[a] in RESERVED_KEYS]:
            raise UserError(
                f"{decided[0]}: recipes and seeds of the tables are in conf/reproduce.yaml; change them there."
            )
        reproduce(cfg, passed, Path(HydraConfig.get().runtime.output_dir))

    return cli.run(task, "reproduce", own)


def reproduce(cfg: DictConfig, passed: Sequence[str], folder: Path) -> None:
    """Run what is not there yet, one after the other, and write the tables of all that is.

    Args:
        cfg: As composed from conf/reproduce.yaml.
        passed: Overrides of every run.
        folder: Gets a folder per run, and the tables.

    Raises:
        UserError: A mistake in the config, the data or the weights; or, at the end, that a run failed.
        Interrupted: Ctrl-C.
    """
    publishing = check_flag("publish", cfg.publish)
    tables_only = check_flag("tables_only", cfg.tables_only)
    jobs = plan_jobs(cfg, passed, folder)
    if tables_only and not any(kept_result(job.folder) is not None for job in jobs):
        raise UserError(f"{folder} has no finished run of these parts. Without tables_only=true they are trained.")
    failed = [] if tables_only else run_jobs(jobs)
    from cifar_tl.reproduce.frontier import draw_frontier  # late: `--help` should not wait for matplotlib
    from cifar_tl.reproduce.tables import write_tables

    written = write_tables(jobs, folder)
    if publishing:
        if reasons := unpublishable(jobs, folder):
            raise UserError(f"not published: {' '.join(reasons)}")
        checkout = cli.conf_folder().parent
        written += publish([path for path in written if path.suffix == ".csv"], checkout)
        written += draw_frontier(checkout)
    for path in written:
        log.info("%s", path)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}. Their output above says why; the tables "
            f"are without them. The same command tries them again."
        )


def run_jobs(jobs: Sequence[Job]) -> list[str]:
    """Say what there is to do, run the jobs that are not finished, and return the names of those that fail."""
    states = {job.name: state(job) for job in jobs}
    for job in jobs:
        if states[job.name][0] == "keep":
            log.info("%-44s kept: %s", job.name, states[job.name][1])
    to_do = [job for job in jobs if states[job.name][0] != "keep"]
    for job in to_do:
        log.info("%-44s %d epochs; %s", job.name, job.config.trainer.max_epochs, states[job.name][1] or "to be run")
    if to_do:
        log.info("Ctrl-C stops; the same command then goes on.")
    failed = []
    for number, job in enumerate(to_do, start=1):
        log.info("\n=== %d of %d: %s", number, len(to_do), job.name)
        if not run_job(job, states[job.name][0]):
            failed.append(job.name)
            log.error("=== %s failed", job.name)
    return failed


def run_job(job: Job, what: str) -> bool:
    """Train or continue a job as its state says, evaluate it if it asks for that, and return whether all went well."""
    if what == "replace":
        log.info("The old run is now in %s", set_aside(job))
    folder = f"hydra.run.dir={quoted(job.folder)}"
    if what != "evaluate":
        resume = [f"resume={quoted(job.folder)}", *job.places]
        arguments = resume if what == "resume" else [*job.overrides, *job.passed, folder]
        if not command("cifar_tl.train", arguments):
            return False
    if not job.evaluate:
        return True
    job.evaluation.unlink(missing_ok=True)  # what was asked for is noted before it is done
    trainer = job.config.trainer
    checkpoint = f"checkpoint={quoted(job.checkpoint)}"
    arguments = [checkpoint, f"trainer.accelerator={trainer.accelerator}", *job.evaluate]
    arguments += [override for override in job.places if override.startswith("data.root=")]
    return command("cifar_tl.evaluate", [*arguments, f"hydra.run.dir={quoted(job.evaluation.parent)}"])


def command(module: str, arguments: Sequence[str]) -> bool:
    """Run a command of this program and return whether it went well.

    Raises:
        Interrupted: Ctrl-C; the command has then ended, too.
    """
    process: subprocess.Popen[Any] = subprocess.Popen([sys.executable, "-m", module, *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = 130
        if cli.StopSignals.received():  # Ctrl-C in a terminal has reached it, too
            process.send_signal(signal.SIGTERM)
        process.wait()  # it saves what it has
    if code == 130:
        raise Interrupted("Interrupted. The same command goes on where it stopped; tables_only=true writes the tables.")
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
