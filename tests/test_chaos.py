"""A short run of the chaos: what is lost, doubled or left behind makes it fail."""

import subprocess
import sys


def test_forty_requests_survive_seeded_faults() -> None:
    command = [sys.executable, "-m", "chaos", "--n", "40", "--seed", "7", "--clients", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
