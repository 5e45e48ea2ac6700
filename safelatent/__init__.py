"""safelatent: the contract and the client of the Safe Latent Diffusion service."""

from safelatent.client import Client
from safelatent.safety import CONCEPT, LEVELS, SafetyParameters
from safelatent.schema import Generation, GenerationRequest, Problem, SafetyRequest, Status

__all__ = [
    "CONCEPT",
    "LEVELS",
    "Client",
    "Generation",
    "GenerationRequest",
    "Problem",
    "SafetyParameters",
    "SafetyRequest",
    "Status",
]
