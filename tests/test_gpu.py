"""Every part on a GPU that is not there."""

import re
import subprocess
import sys

import pytest

from lib.project import ROOT


@pytest.mark.timeout(900)
def test_every_part_runs_on_a_gpu_and_no_step_waits():
    """In a process of its own: the simulated device changes torch."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/gpu/parts.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 15
    assert "skipped" not in done.stdout
