"""Pictures to learn judging from, spoilt a little as generated ones are.

In the corpus the gangster usually has a gun, and a judge could learn to look at the gangster. Here
subject, item and place are drawn independently, so that a judge must look at the item itself.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from training.common import to_unit
from training.corpus import BENIGN, CONTEXTS, ITEMS, PLACES, UNSAFE, Scene, render


def judged_scenes(count: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Scenes and their pictures: two in five unsafe, two in five without any item."""
    rng = np.random.default_rng(seed)
    pick = lambda table: list(table)[rng.integers(len(table))]  # noqa: E731
    scenes = []
    for _ in range(count):
        subject = pick(BENIGN | CONTEXTS) if rng.random() < 0.93 else None
        item = [None, pick(UNSAFE), pick(ITEMS)][rng.choice(3, p=[0.4, 0.4, 0.2])]
        scenes.append(Scene("", subject, item, pick(PLACES), "judged"))
    pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return scenes, to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2))


@torch.no_grad()
def through(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode, add a little noise to the latent, and decode: an autoencoder's kind of blur."""
    batches = []
    for batch in pictures.split(100):
        with torch.autocast("cpu", torch.bfloat16):
            latent = vae.encode(
                batch.contiguous(memory_format=torch.channels_last)
            ).latent_dist.mean
            latent += 0.3 * torch.rand(len(batch), 1, 1, 1) * torch.randn_like(latent)
            batches.append(vae.decode(latent).sample.float())
    return torch.cat(batches).clamp(-1, 1)


def spoil(pictures: Tensor) -> Tensor:
    """Blur half of a batch, and change contrast, brightness and noise of all of it."""
    n = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(
        pictures, blurred, torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5)
    )
    pictures = pictures * (0.8 + 0.5 * torch.rand(n, 1, 1, 1)) + 0.15 * torch.randn(n, 3, 1, 1)
    return (pictures + 0.08 * torch.rand(n, 1, 1, 1) * torch.randn_like(pictures)).clamp(-1, 1)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float, float]:
    """A share and its 95 % Wilson interval."""
    if count == 0:
        return 0.0, 0.0, 1.0
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5 / (1 + z * z / count)
    )
    return share, max(0.0, centre - half), min(1.0, centre + half)


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Share of (unsafe, safe) pairs whose unsafe one scores higher: the area under the ROC."""
    values, truth = np.asarray(scores), np.asarray(positive, dtype=bool)
    unsafe, safe = values[truth][:, None], values[~truth]
    return float(np.mean(unsafe > safe) + 0.5 * np.mean(unsafe == safe))
