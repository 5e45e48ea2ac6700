"""Images through an engine without threads, and a family whose seam can be watched or bent."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelatent.safety import CONCEPT, LEVELS, SafetyParameters
from worker.engine import Engine, Image, ImageSpec, Made
from worker.families import Family
from worker.families.stable_diffusion import StableDiffusion

EMBEDDED = Path(__file__).parents[2] / "models" / "emoji_scenes"

NOTES: list[str] = []
"""Measurements that a run prints at its end."""


def load(checkpoint: Path) -> StableDiffusion:
    return StableDiffusion(str(checkpoint), checkpoint.name, torch.device("cpu"), torch.float32)


def spec(level: str | SafetyParameters = "off", **changed: Any) -> ImageSpec:
    """A small image; `level` is a word of the contract or the numbers of a custom one."""
    safety = LEVELS.get(level) if isinstance(level, str) else level
    defaults: dict[str, Any] = {
        "prompt": "a cat",
        "seed": 1,
        "width": 32,
        "height": 32,
        "scheduler": "ddim",
        "steps": 4,
        "safety": safety,
        "concepts": (CONCEPT,) if safety else (),
    }
    return ImageSpec(**(defaults | changed))


def custom(**changed: float) -> SafetyParameters:
    """Level `strong` with other numbers, and no warm-up."""
    return LEVELS["strong"].model_copy(update={"warmup_steps": 0, **changed})


def step_until_idle(engine: Engine) -> None:
    for _ in range(1000):
        if engine.is_idle:
            return
        engine.step()
    raise AssertionError("the engine never gets idle")


def outcomes(engine: Engine, specs: Sequence[ImageSpec]) -> list[Made | BaseException]:
    """What becomes of images that are submitted together."""
    images = [engine.submit(one) for one in specs]
    step_until_idle(engine)
    return [outcome(image) for image in images]


def outcome(image: Image) -> Made | BaseException:
    try:
        return image.future.result(timeout=0)
    except BaseException as error:
        return error


def make(family: Family, *specs: ImageSpec, **options: Any) -> list[Made]:
    """Images that are made together by an engine of their own."""
    engine = Engine(family, **options)
    images = [engine.submit(one) for one in specs]
    step_until_idle(engine)
    return [image.future.result(timeout=0) for image in images]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two latents, relative to the largest number of the second."""
    return float((a - b).abs().max() / b.abs().max())


class Bent:
    """A family that calls `predict` of the test's instead; everything else is the real one's.

    `predict` gets the real one and its arguments. The texts that were encoded and the rows of
    every call are kept.
    """

    def __init__(self, family: Family, predict: Callable[..., Tensor] | None = None):
        self._family = family
        self._predict = predict
        self.encoded: list[str] = []
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.encoded += texts
        return self._family.encode(texts)

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        self.rows.append(len(latents))
        arguments = latents, timesteps, embeddings
        if self._predict is None:
            return self._family.predict(*arguments)
        return self._predict(self._family.predict, *arguments)

    def holds(self, embeddings: Tensor, text: str) -> Tensor:
        """Which rows are of a text."""
        return (embeddings == self._family.encode([text])).flatten(1).all(dim=1)
