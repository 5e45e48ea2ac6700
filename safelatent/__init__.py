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
    ImageStored,
    Queued,
    Snapshot,
    Started,
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
    "ImageStored",
    "Problem",
    "Queued",
    "SafelatentError",
    "SafetyParameters",
    "SafetyRequest",
    "Snapshot",
    "Started",
    "Status",
    "Step",
    "errors",
]
