"""A training that is killed goes on where its last checkpoint was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from training import common  # noqa: E402

FATAL = 5


def learn(folder: Path, is_killed: bool = False) -> int:
    """Train a toy that saves after each of its 8 steps; returns the step that it started from.

    One that is killed dies by SIGKILL while the checkpoint after step 5 is written.
    """
    common.WORK, common.SAVE_EVERY_S = folder, -1
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 1)
    training = common.Training("toy", {"layer": layer}, rate=0.1, steps=8)
    first = training.step
    for step in training.steps():
        if is_killed and step == FATAL:
            os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
        training.descend((layer(torch.randn(4, 2)) - 1).square().mean())
    return first


def test_a_killed_training_goes_on_and_ends_as_if_never_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "WORK", None)  # as they are, again, at the end
    monkeypatch.setattr(common, "SAVE_EVERY_S", 0)
    assert learn(tmp_path / "whole") == 0
    code = (
        "import pathlib; from tests.training.test_common import learn; "
        f"learn(pathlib.Path({str(tmp_path / 'killed')!r}), is_killed=True)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert learn(tmp_path / "killed") == FATAL
    whole, resumed = (
        torch.load(tmp_path / name / "toy.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert torch.equal(*(s["modules"]["layer"]["weight"] for s in (whole, resumed)))
    assert whole["loss"] == resumed["loss"]


def test_a_checkpoint_is_written_beside_and_renamed(tmp_path: Path) -> None:
    common.save_atomically({"a": torch.ones(1)}, tmp_path / "state.pt")
    common.save_atomically({"a": torch.zeros(1)}, tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
