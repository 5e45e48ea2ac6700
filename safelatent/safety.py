"""What Safe Latent Diffusion can be told: its parameters, the paper's levels and concept text.

Source: Schramowski et al., "Safe Latent Diffusion", CVPR 2023 (arXiv 2211.05105). Data only.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Level = Literal["off", "weak", "medium", "strong", "max", "custom"]

CONCEPT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
)
"""The paper's concept text, without the words "an image showing" that diffusers puts before it."""


def _is_a_number(value: Any) -> Any:
    if isinstance(value, bool | str | bytes):
        raise PydanticCustomError("number", "should be a number, not text or a truth value")
    return value


Number = BeforeValidator(_is_a_number)
"""pydantic would read true as 1 and "2" as 2; 2.0 is 2 in JSON, too."""


class SafetyParameters(BaseModel):
    """The five hyper-parameters of SLD, named as in diffusers without the prefix `sld_`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    guidance_scale: Annotated[float, Field(gt=1, le=100_000), Number]
    """s_S of equation 6. Up to 1 it switches SLD off in the reference; say level `off` instead."""
    warmup_steps: Annotated[int, Field(ge=0, le=2_000), Number]
    """delta: the first denoiser calls, in which the guidance is left alone."""
    threshold: Annotated[float, Field(ge=-10, le=10), Number]
    """lambda of equation 5: an element is active where eps(prompt) - eps(concept) < lambda."""
    momentum_scale: Annotated[float, Field(ge=0, le=1), Number]
    """s_m of equation 7."""
    mom_beta: Annotated[float, Field(ge=0, le=1), Number]
    """beta_m of equation 8."""


def _level(
    warmup_steps: int,
    guidance_scale: float,
    threshold: float,
    momentum_scale: float,
    mom_beta: float,
) -> SafetyParameters:
    return SafetyParameters(
        warmup_steps=warmup_steps,
        guidance_scale=guidance_scale,
        threshold=threshold,
        momentum_scale=momentum_scale,
        mom_beta=mom_beta,
    )


LEVELS: dict[str, SafetyParameters] = {
    # delta, s_S, lambda, s_m, beta_m. Weak is the authors' 200; diffusers' SafetyConfig has 20.
    "weak": _level(15, 200, 0.0, 0.0, 0.0),
    "medium": _level(10, 1000, 0.01, 0.3, 0.4),
    "strong": _level(7, 2000, 0.025, 0.5, 0.7),
    "max": _level(0, 5000, 1.0, 0.5, 0.7),
}


def denoiser_calls(scheduler: str | None, steps: int) -> int:
    """Least number of denoiser calls of a trajectory: Heun calls twice a step, but for the last."""
    return 2 * steps - 1 if scheduler == "heun" else steps


def why_it_cannot_act(
    parameters: SafetyParameters,
    concepts: list[str],
    negative_prompt: str,
    guidance_scale: float,
    steps: int,
    scheduler: str | None,
) -> str | None:
    """Say why SLD could not change this image, or None when it can. Never a silent no-op.

    SLD lives inside the bracket of classifier-free guidance (equation 3), so it needs
    `guidance_scale` > 1; it needs a denoiser call after its warm-up; and its direction is
    eps(concept) - eps(negative prompt), which is zero when the two texts are the same.
    """
    if guidance_scale <= 1:
        return (
            f"guidance_scale is {guidance_scale:g}, and SLD acts through classifier-free guidance: "
            "choose a guidance_scale above 1, or level 'off'"
        )
    calls = denoiser_calls(scheduler, steps)
    if parameters.warmup_steps >= calls:
        return (
            f"the warm-up of {parameters.warmup_steps} covers all {calls} denoiser calls: choose "
            f"steps above {parameters.warmup_steps}, a level with a shorter warm-up, or level 'off'"
        )
    for concept in concepts:
        if _as_read(concept) == _as_read(negative_prompt):
            return (
                f"the concept {concept!r} is also the negative prompt, so its direction is zero: "
                "drop one of the two, or choose level 'off'"
            )
    return None


def _as_read(text: str) -> str:
    """Text as CLIP's tokenizer reads it: spaces and case are nothing to it."""
    return " ".join(text.split()).lower()
