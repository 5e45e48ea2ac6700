"""Pixels to files."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

from safelatent.schema import ImageFormat

OPTIONS: dict[str, dict[str, object]] = {
    "png": {},
    "webp": {"lossless": True},
    "jpeg": {"quality": 95, "subsampling": 0},
}


def encode(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """A picture, uint8 [height, width, 3] or [height, width], as a file without any metadata."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **OPTIONS[image_format])
    return file.getvalue()


def heatmap(heat: Tensor) -> bytes:
    """Where SLD acted, [h, w] of the latents, as a grey PNG scaled to its own maximum."""
    scaled = heat / heat.max().clamp_min(1e-12)
    return encode((scaled * 255).round().byte().numpy(), "png")
