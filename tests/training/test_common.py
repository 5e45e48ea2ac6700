"""A training that is killed goes on where its last checkpoint was."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from training import common  # noqa: E402


def learn(layer: "torch.nn.Module", steps: int, stop_at: int | None = None) -> int:
    training = common.Training("toy", {"layer": layer}, rate=0.1, steps=steps)
    first = training.step
    for step in training.steps():
        if step == stop_at:
            training.save()
            break
        training.descend((layer(torch.randn(4, 2)) - 1).square().mean())
    return first


def test_a_training_goes_on_from_its_checkpoint_and_ends_as_if_never_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fresh() -> "torch.nn.Module":
        torch.manual_seed(0)
        return torch.nn.Linear(2, 1)

    monkeypatch.setattr(common, "WORK", tmp_path / "whole")
    whole = fresh()
    learn(whole, 10)
    monkeypatch.setattr(common, "WORK", tmp_path / "halves")
    learn(fresh(), 10, stop_at=5)
    second = fresh()
    assert learn(second, 10) == 5
    assert torch.equal(whole.weight, second.weight)


def test_a_checkpoint_is_written_beside_and_renamed(tmp_path: Path) -> None:
    common.save_atomically({"a": torch.ones(1)}, tmp_path / "state.pt")
    common.save_atomically({"a": torch.zeros(1)}, tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
