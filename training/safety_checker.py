"""The safety checker: a vision tower, and one concept to compare with for each category.

The class is that of Stable Diffusion, with its 17 concepts. Ours uses seven; the others have a
threshold that no cosine reaches. On held-out pictures, a threshold lies halfway between unsafe and
safe ones, and above 997 in 1,000 safe ones: all seven flag at most one safe picture in fifty.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig

from training.common import WORK, Training, record, save_atomically
from training.corpus import CATEGORIES, Scene
from training.judging import auroc, judged_scenes, spoil, through, wilson

STEPS, BATCH = 1_200, 64
NEVER = 2.0
"""A threshold above every cosine."""


def build() -> StableDiffusionSafetyChecker:
    """A vision tower of four layers over patches of 16 x 16 pixels."""
    vision = {
        "image_size": 64, "patch_size": 16, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 64,
    }  # fmt: skip
    text = {  # a CLIP configuration has one; the checker does not use it
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    config.concept_names = [*CATEGORIES, *[None] * (17 - len(CATEGORIES))]
    checker = StableDiffusionSafetyChecker(config)
    nn.init.normal_(checker.concept_embeds)
    return checker


def cosines(checker: StableDiffusionSafetyChecker, pictures: Tensor) -> Tensor:
    """Cosine of each picture with each category's concept (n, 7)."""
    embedded = checker.visual_projection(checker.vision_model(pictures).pooler_output)
    return (
        F.normalize(embedded.float())
        @ F.normalize(checker.concept_embeds[: len(CATEGORIES)].float()).T
    )


def truth(scenes: list[Scene]) -> Tensor:
    """One 0 or 1 for each category."""
    return torch.tensor([[float(scene.category == c) for c in CATEGORIES] for scene in scenes])


@torch.no_grad()
def calibrate(checker: StableDiffusionSafetyChecker, vae: AutoencoderKL) -> None:
    """Set the thresholds on one set of held-out pictures and record what they do on another."""
    _, _, cosine, positive = _held_out(checker, vae, seed=22)
    safe = cosine[~positive.any(1)]
    thresholds = torch.full((17,), NEVER)
    for c in range(len(CATEGORIES)):
        middle = (cosine[positive[:, c], c].median() + safe[:, c].median()) / 2
        thresholds[c] = torch.maximum(safe[:, c].quantile(0.997), middle)
    checker.concept_embeds_weights.copy_(thresholds)
    checker.special_care_embeds_weights.fill_(NEVER)
    _, _, cosine, positive = _held_out(checker, vae, seed=23)
    margin, unsafe = (cosine - thresholds[: len(CATEGORIES)]).amax(1), positive.any(1)
    flagged, safe_count = margin > 0, int((~unsafe).sum())
    record(
        "safety_checker",
        auroc_rendered=auroc(margin, unsafe),
        auroc_by_category={
            c: auroc(cosine[:, i], positive[:, i]) for i, c in enumerate(CATEGORIES)
        },
        sensitivity=wilson(int(flagged[unsafe].sum()), int(unsafe.sum())),
        specificity=wilson(int((~flagged[~unsafe]).sum()), safe_count),
    )


def _held_out(
    checker: StableDiffusionSafetyChecker, vae: AutoencoderKL, seed: int
) -> tuple[list[Scene], Tensor, Tensor, Tensor]:
    scenes, pictures = judged_scenes(2_000, seed)
    pictures[::2] = through(vae, pictures[::2])
    cosine = torch.cat([cosines(checker, batch) for batch in pictures.split(200)])
    return scenes, pictures, cosine, truth(scenes) > 0


def train(vae: AutoencoderKL, steps: int = STEPS) -> StableDiffusionSafetyChecker:
    """Train, or go on, or return what is finished."""
    checker, finished = build(), WORK / "safety_checker_finished.pt"
    if finished.exists():
        checker.load_state_dict(torch.load(finished, weights_only=True))
        return checker.eval()
    checker.concept_embeds.requires_grad_(True)
    scale = nn.Linear(1, 1)  # from a cosine to a logit: a factor and an offset
    nn.init.constant_(scale.weight, 8.0)
    nn.init.constant_(scale.bias, -4.0)
    scenes, pictures = judged_scenes(8_000, seed=21)
    pictures[::3] = through(vae, pictures[::3])
    answers = truth(scenes)
    training = Training(
        "safety_checker", {"checker": checker, "scale": scale}, rate=1e-3, steps=steps
    )
    for _ in training.steps():
        chosen = torch.randint(len(scenes), (BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            cosine = cosines(checker, spoil(pictures[chosen]))
        logits = scale(cosine.float()[..., None])[..., 0]
        loss = F.binary_cross_entropy_with_logits(logits, answers[chosen], reduction="sum") / BATCH
        training.descend(loss)
    checker.eval().requires_grad_(False)
    calibrate(checker, vae)
    record("safety_checker", steps=steps, minutes=training.seconds / 60)
    save_atomically(checker.state_dict(), finished)
    return checker
