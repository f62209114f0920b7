"""SLURM: what a process learns of its job from the environment, and having the job started again."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def tasks() -> int:
    """Return how many processes `srun` started this one among; 1 without srun.

    SLURM_NTASKS does not say that: in salloc, in a batch script and as a leftover, it stands for what could be started.
    """
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def restarted() -> bool:
    """Return whether the job runs again, after a preemption, a failed node, or `requeue`."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def folder_of_job(arguments: Sequence[str]) -> Path | None:
    """Return the folder of the run that a command line starts, which is the same in all processes and after a requeue.

    Args:
        arguments: The command line; commands of one batch script get folders of their own.

    Returns:
        None where a folder by the time will do: outside of SLURM, and for a single process of an interactive job.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and os.environ.get("ENVIRONMENT") == "BATCH":  # set by sbatch; only its jobs can be requeued
        return Path("outputs") / "slurm" / f"{job}-{hashlib.sha256(repr(arguments).encode()).hexdigest()[:8]}"
    if job is not None and tasks() > 1:
        return Path("outputs") / "slurm" / f"{job}-step{os.environ['SLURM_STEP_ID']}"
    return None


def requeue(preempted_only: bool) -> bool:
    """Have SLURM start this job again, and end it; return whether SLURM does so.

    A job that ends by itself while it is being preempted is not started again unless it asks for it. A job that was
    cancelled, is over its time, or is started again anyway, is no longer RUNNING, and is left alone.

    Args:
        preempted_only: Only if the job is being preempted. `scancel --signal` sends the same signals as SLURM does.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"} <= os.environ.keys():
        # one task of an array has the number of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    query = ["squeue", "--noheader", "--jobs", job, "--Format=State,PreemptTime"]
    try:
        state, preempted = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split()
        if state != "RUNNING" or (preempted_only and preempted == "N/A"):
            return False
        subprocess.run(["scontrol", "requeue", job], capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError, ValueError):  # no such programs here, an interactive job, --no-requeue
        return False
    return True
