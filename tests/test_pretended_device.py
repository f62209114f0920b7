import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch before 2.9 has no devices in Python")
def test_nothing_stays_behind_or_waits_on_a_pretended_device():
    """In a process of its own: autograd counts a process's devices once, at its first backward."""
    arguments = ("-p", "no:xdist", "-p", "no:cacheprovider", str(HERE / "pretended_device.py"))
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
