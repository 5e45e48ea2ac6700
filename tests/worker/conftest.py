"""The models of these tests: random checkpoints, built once and loaded once."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint import build
from tests.worker.running import EMBEDDED, NOTES, load
from worker.families.stable_diffusion import StableDiffusion

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # diffusers' schedulers pass tensors to numpy.array, which torch does not expect yet.
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for note in NOTES:
        terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def family(checkpoint: Path) -> StableDiffusion:
    return load(checkpoint)


@pytest.fixture(scope="session")
def embedded() -> StableDiffusion:
    """The model of this repository."""
    return load(EMBEDDED)


@pytest.fixture(scope="session")
def v_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny-v", prediction_type="v_prediction")
