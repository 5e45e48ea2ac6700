"""How one family of models encodes, predicts and decodes: one file each, one Protocol for all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Generator, Tensor

from safelatent.schema import Model, TextReport


class UnusableModel(Exception):
    """The checkpoint cannot be used; the message is one sentence for the operator."""


class Family(Protocol):
    """What the engine needs of a model. Latents and predictions are fp32, [rows, C, h, w]."""

    model: Model
    folder: Path
    """Where the checkpoint lies."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, [texts, tokens, width]."""
        ...

    def read(self, text: str) -> TextReport:
        """What of a text the encoder can read."""
        ...

    def noise(self, generator: Generator, width: int, height: int) -> Tensor:
        """Unscaled initial noise of a width x height picture, [1, C, h, w]."""
        ...

    def scheduler(self, name: str, steps: int) -> Any:
        """A fresh diffusers scheduler with its timesteps set; ValueError when it cannot be."""
        ...

    def alpha(self, scheduler: Any, timestep: Tensor) -> float:
        """The factor of `guidance.to_epsilon` at a timestep: 1 for epsilon models."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """One call of the denoiser, a row per latent."""
        ...

    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures, uint8 [rows, height, width, 3]; ValueError when they are not finite."""
        ...
