"""Our images are those of diffusers' (deprecated) StableDiffusionPipelineSafe, in any crowd."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionPipelineSafe

from safelatent.safety import CONCEPT, LEVELS
from safelatent.schema import GenerationRequest
from tests.checkpoint import PNDM_OF_SD14, build
from tests.worker.running import EMBEDDED, NOTES, custom, difference, load, make, spec
from worker import tasks
from worker.engine import ImageSpec, Made
from worker.families.stable_diffusion import StableDiffusion

THEIRS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:The decode_latents method is deprecated:FutureWarning"  # the oracle calls it
)

LATENTS = 1e-4
PIXELS = 3 / 255


class Oracle:
    """A checkpoint in diffusers' pipelines and in ours, and how far they ever were apart."""

    def __init__(self, checkpoint: Path):
        self.family = load(checkpoint)
        parts = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
        parts.set_progress_bar_config(disable=True)
        self.plain = parts
        self.safe = StableDiffusionPipelineSafe(**parts.components, requires_safety_checker=False)
        self.safe.set_progress_bar_config(disable=True)
        self.safe._safety_text_concept = CONCEPT
        self.own_scheduler = parts.scheduler
        self.theirs = cache(self._theirs)
        self.worst_latents = self.worst_pixels = 0.0
        self.chaotic: list[str] = []

    def _theirs(self, spec: ImageSpec) -> tuple[torch.Tensor, np.ndarray]:
        """Final latents and pixels by diffusers."""
        [latents], [pixels] = self.many(spec, [spec.seed])
        return latents[None], pixels

    def exact(self, spec: ImageSpec) -> torch.Tensor:
        """Final latents by diffusers in fp64, from the same noise."""
        shape = (1, 4, spec.height // self.family.factor, spec.width // self.family.factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(spec.seed))
        self.plain.to(torch.float64)
        latents, _ = self.many(spec, [spec.seed], latents=noise.double())
        self.plain.to(torch.float32)
        return latents.float()

    def many(
        self, spec: ImageSpec, seeds: list[int], **changed: Any
    ) -> tuple[torch.Tensor, np.ndarray]:
        kind, extra = THEIRS[spec.scheduler]
        scheduler = kind.from_config(self.own_scheduler.config, **extra)
        latents = []
        options: dict[str, Any] = {
            "prompt": spec.prompt,
            "negative_prompt": spec.negative_prompt,
            "width": spec.width,
            "height": spec.height,
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance_scale,
            "num_images_per_prompt": len(seeds),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "np",
            **changed,
        }
        if spec.safety is None:
            self.plain.scheduler = scheduler

            def on_step_end(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> Any:
                latents.append(tensors["latents"])
                return tensors

            pixels = self.plain(**options, callback_on_step_end=on_step_end).images
        else:
            self.safe.scheduler = scheduler
            pixels = self.safe(
                **options,
                **{f"sld_{name}": value for name, value in spec.safety.model_dump().items()},
                callback=lambda step, t, tensor: latents.append(tensor),
            ).images
        return latents[-1], pixels

    def compare(self, spec: ImageSpec, made: Made) -> None:
        latents, pixels = self.theirs(spec)
        if difference(made.latents, latents) > LATENTS:
            # An element on the threshold of equation 5 may fall to either side of it, by the last
            # bit of a sum whose order depends on the batch's size. So fp32 itself may not have
            # four digits of this image; nobody can be nearer to it than it is to itself.
            again = [self.many(spec, [spec.seed] * n)[0][:1] for n in (2, 4)]
            floor = max(difference(latents, other) for other in [self.exact(spec), *again])
            self.chaotic.append(f"{difference(made.latents, latents):.1e} with {floor:.1e}")
            assert difference(made.latents, latents) < 3 * floor
        else:
            self.assert_equal(made, latents, pixels)

    def assert_equal(self, made: Made, latents: torch.Tensor, pixels: np.ndarray) -> None:
        apart = difference(made.latents, latents)
        seen = float(np.abs(made.pixels / 255 - pixels).max())
        self.worst_latents = max(self.worst_latents, apart)
        self.worst_pixels = max(self.worst_pixels, seen)
        assert apart < LATENTS
        assert seen < PIXELS


@pytest.fixture(scope="module", params=["random", "emoji_scenes"])
def oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Oracle]:
    if request.param == "random":
        folder = build(tmp_path_factory.mktemp("models") / "tiny", scheduler=PNDM_OF_SD14)
    elif (EMBEDDED / "model_index.json").exists():
        folder = EMBEDDED
    else:
        pytest.skip("models/emoji_scenes is not trained yet")
    oracle = Oracle(folder)
    yield oracle
    NOTES.append(
        f"{request.param} checkpoint, worst difference to diffusers: latents "
        f"{oracle.worst_latents:.1e} of 1e-4, pixels {oracle.worst_pixels * 255:.2f} of 3"
    )
    if oracle.chaotic:
        NOTES.append(
            f"{request.param} checkpoint, images that diffusers' own fp32 misses by as much: "
            + ", ".join(oracle.chaotic)
        )


def sizes(family: StableDiffusion) -> list[tuple[int, int]]:
    side = family.model.width
    return [(side, side), (side * 3 // 2, side)]


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_makes_the_image_of_the_reference(oracle, level, scheduler):
    warmup = LEVELS[level].warmup_steps
    for width, height in sizes(oracle.family):
        one = spec(level, width=width, height=height, scheduler=scheduler, steps=warmup + 4)
        oracle.compare(one, *make(oracle.family, one))


def test_twelve_mixed_requests_together_make_the_images_of_the_reference(oracle):
    square, wide = [dict(width=w, height=h) for w, h in sizes(oracle.family)]
    crowd = [
        spec("weak", steps=19, scheduler="ddim", seed=1, **square),
        spec("weak", steps=16, scheduler="euler", seed=2, **wide, guidance_scale=5.0),
        spec("medium", steps=25, scheduler="ddim", seed=3, **wide, prompt="two dogs"),
        spec("medium", steps=12, scheduler="pndm", seed=4, **square, guidance_scale=3.0),
        spec("medium", steps=14, scheduler="euler", seed=4, **square),
        spec("strong", steps=13, scheduler="ddim", seed=5, **square, prompt="a house"),
        spec("strong", steps=17, scheduler="pndm", seed=6, **wide, negative_prompt="red"),
        spec("strong", steps=15, scheduler="euler", seed=7, **square, guidance_scale=9.0),
        spec("max", steps=12, scheduler="pndm", seed=2**32 - 1, **square),
        spec("max", steps=18, scheduler="euler", seed=8, **wide, negative_prompt="a tree"),
        spec("off", steps=20, scheduler="euler", seed=9, **square, guidance_scale=4.0),
        spec("off", steps=12, scheduler="pndm", seed=10, **wide, guidance_scale=1.0),
    ]
    together = []
    made = make(
        oracle.family, *crowd, max_rows=100, after_step=lambda images: together.append(len(images))
    )
    assert together[0] == 12
    before = len(oracle.chaotic)
    for one, image in zip(crowd, made, strict=True):
        oracle.compare(one, image)
    assert len(oracle.chaotic) - before <= 6, "most images must be beyond doubt"


def test_image_i_of_a_request_has_seed_plus_i(oracle):
    side = oracle.family.model.width
    request = GenerationRequest(
        prompt="a cat",
        negative_prompt="a dog",
        n=3,
        seed=5,
        width=side,
        height=side,
        steps=10,
        scheduler="ddim",
        safety={"level": "strong"},
    )
    specs = tasks._specs(request)
    latents, pixels = oracle.many(specs[0], [5, 6, 7])
    for i, made in enumerate(make(oracle.family, *specs)):
        oracle.assert_equal(made, latents[i : i + 1], pixels[i])


@pytest.mark.parametrize("scheduler", sorted(THEIRS.keys() - {"ddim", "pndm", "euler"}))
def test_every_other_scheduler_makes_the_image_of_the_reference(oracle, scheduler):
    """Heun calls the denoiser twice a step; the warm-up counts calls, there as here."""
    one = spec(custom(warmup_steps=5), scheduler=scheduler, steps=8, guidance_scale=4.0)
    oracle.compare(one, *make(oracle.family, one))


def test_pndm_with_its_runge_kutta_start_makes_the_image_of_the_reference(checkpoint):
    """From a DDIM configuration diffusers makes a PNDM whose first steps call four times."""
    oracle = Oracle(checkpoint)
    one = spec("strong", scheduler="pndm", steps=6)
    [made] = make(oracle.family, one)
    assert made.telemetry.calls > 6 + 1
    oracle.compare(one, made)


def test_v_prediction_takes_mask_and_threshold_in_epsilon_space(v_checkpoint):
    """A reference written out: DDIM with v, SLD's equations 2 to 8, and no code of ours."""
    pipe = StableDiffusionPipeline.from_pretrained(v_checkpoint, safety_checker=None)
    steps, s_g = 12, 7.5
    one = spec("strong", steps=steps, prompt="a cat", negative_prompt="a dog")
    level = one.safety

    embeddings = []
    for text in ("a dog", "a cat", CONCEPT):
        tokens = pipe.tokenizer(
            text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        embeddings.append(pipe.text_encoder(tokens.input_ids)[0])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_squared = torch.cumprod(1 - betas, dim=0)

    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(one.seed))
    nu = torch.zeros_like(x)
    stride = 1000 // steps
    with torch.inference_mode():
        for call in range(steps):
            t = (steps - 1 - call) * stride + 1
            alpha, sigma = alphas_squared[t].sqrt(), (1 - alphas_squared[t]).sqrt()
            v_0, v_p, v_S = [
                pipe.unet(x, torch.tensor(t), embedding).sample for embedding in embeddings
            ]
            # eps = alpha v + sigma x, so a difference of two eps is alpha times that of the v.
            apart = alpha * (v_p - v_S)
            weight = torch.where(
                apart < level.threshold, (level.guidance_scale * apart.abs()).clamp(max=1), 0
            )
            gamma = weight * (v_S - v_0) + level.momentum_scale * nu
            nu = level.mom_beta * nu + (1 - level.mom_beta) * gamma
            if call < level.warmup_steps:
                v = v_0 + s_g * (v_p - v_0)
            else:
                v = v_0 + s_g * (v_p - v_0 - gamma)
            before = alphas_squared[max(t - stride, 0)]
            x_0, eps = alpha * x - sigma * v, alpha * v + sigma * x
            x = (before.sqrt() * x_0 + (1 - before).sqrt() * eps).float()

    [made] = make(load(v_checkpoint), one)
    apart = difference(made.latents, x)
    NOTES.append(f"v-prediction, difference to the written reference: latents {apart:.1e} of 1e-4")
    assert apart < LATENTS
