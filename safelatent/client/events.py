"""What a generation tells while it goes on: a snapshot, its steps, its end."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from safelatent import schema

AnyGeneration = TypeVar("AnyGeneration", bound=schema.Generation)


@dataclass(frozen=True)
class Snapshot(Generic[AnyGeneration]):
    """The generation as it stood when the stream began, or began anew."""

    generation: AnyGeneration
    id: str = ""


@dataclass(frozen=True)
class Step:
    """The latest denoising step; steps between two events may have been left out."""

    step: int
    steps: int
    id: str = ""


@dataclass(frozen=True)
class Finished(Generic[AnyGeneration]):
    """The end, whichever it is: the generation's `status` says. No event comes after it."""

    generation: AnyGeneration
    id: str = ""


Event = Snapshot[AnyGeneration] | Step | Finished[AnyGeneration]
