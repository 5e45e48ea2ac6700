"""safelatent: the contract and the client of the Safe Latent Diffusion service."""

from safelatent import errors
from safelatent.client import (
    AsyncClient,
    AsyncGeneration,
    AsyncImage,
    Client,
    Finished,
    Generation,
    Image,
    Snapshot,
    Step,
)
from safelatent.errors import SafelatentError
from safelatent.safety import CONCEPT, LEVELS, SafetyParameters
from safelatent.schema import GenerationRequest, Problem, SafetyRequest, Status

__all__ = [
    "CONCEPT",
    "LEVELS",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncImage",
    "Client",
    "Finished",
    "Generation",
    "GenerationRequest",
    "Image",
    "Problem",
    "SafelatentError",
    "SafetyParameters",
    "SafetyRequest",
    "Snapshot",
    "Status",
    "Step",
    "errors",
]
