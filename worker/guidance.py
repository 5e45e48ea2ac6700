"""The equations of Safe Latent Diffusion (arXiv 2211.05105), one function each.

    e_0, e_p, e_S   the denoiser's predictions without text, for the prompt, for the concept
    s_g             scale of classifier-free guidance
    s_S, lam        SLD's guidance scale and threshold (lambda)
    s_m, b_m        SLD's momentum scale and momentum beta
    mu, gamma, nu   weight per element, safety guidance, momentum

Predictions are fp32 tensors [m, C, h, w], one row an image; scales are tensors [m, 1, 1, 1], so
that images of different levels share a batch. Everything comes in by argument and leaves by return.
"""

import torch
from torch import Tensor


def classifier_free(e_0: Tensor, e_p: Tensor, s_g: Tensor) -> Tensor:
    """Equation 2: guidance towards the prompt alone."""
    return e_0 + s_g * (e_p - e_0)


def safe(e_0: Tensor, e_p: Tensor, gamma: Tensor, s_g: Tensor) -> Tensor:
    """Equation 3: guidance to the prompt and away from the concept; gamma is inside the bracket."""
    return e_0 + s_g * (e_p - e_0 - gamma)


def phi(difference: Tensor, s_S: Tensor) -> Tensor:
    """Equation 6, of the difference e_p - e_S in epsilon space."""
    return s_S * difference


def mu(difference: Tensor, s_S: Tensor, lam: Tensor) -> Tensor:
    """Equation 5: the weight of an element where e_p - e_S < lambda (signed, one-sided), else 0.

    The paper prints max(1, |phi|). The authors' code, which gave the published numbers, has
    min(1, |phi|), and so do we: s_S then sets how soft the threshold is, not how strong the push.
    """
    return torch.where(difference < lam, phi(difference, s_S).abs().clamp(max=1.0), 0.0)


def gamma(mu: Tensor, e_0: Tensor, e_S: Tensor, s_m: Tensor, nu: Tensor) -> Tensor:
    """Equations 4 and 7: the weighted safety direction, with momentum."""
    return mu * (e_S - e_0) + s_m * nu


def momentum(nu: Tensor, gamma: Tensor, b_m: Tensor) -> Tensor:
    """Equation 8: the next nu. It starts at 0 and is built during the warm-up too."""
    return b_m * nu + (1 - b_m) * gamma


def to_epsilon(difference: Tensor, alpha: Tensor) -> Tensor:
    """A difference of two predictions in epsilon space, where equations 5 and 6 were tuned.

    For v-prediction v = alpha * eps - sigma * x0, a difference of two v at the same x_t is
    (eps - eps') / alpha; alpha is 1 for epsilon models. The other equations are linear and stay
    in the model's own space.
    """
    return alpha * difference


def nearest_concept(e_0: Tensor, e_p: Tensor, e_S: Tensor) -> Tensor:
    """Index of the concept whose direction is nearest to the prompt's, of e_S [k, C, h, w].

    argmax_i cos(e_Si - e_0, e_p - e_0): conflict-aware guidance (arXiv 2602.20880). Acting on the
    nearest alone keeps concepts from cancelling each other; with one concept it is SLD itself.
    """
    return cosine((e_S - e_0), (e_p - e_0).expand_as(e_S)).argmax()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two batches of directions, [m]."""
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))
