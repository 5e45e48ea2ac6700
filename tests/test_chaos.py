"""Short runs of the chaos: what is lost, doubled or left behind makes them fail."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "asked",
    ["chaos --n 15 --faults 8 --seed 7 --pause 0.5", "rolling --n 15 --faults 4 --seed 7"],
    ids=["all faults", "restarts one by one"],
)
def test_no_request_is_lost(asked: str) -> None:
    command = [sys.executable, "-m", "chaos", *asked.split(), "--clients", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
