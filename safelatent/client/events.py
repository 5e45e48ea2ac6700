"""What a generation tells while it goes on: a snapshot, its place, its steps, images, its end."""

from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from safelatent import schema

AnyGeneration = TypeVar("AnyGeneration", bound=schema.Generation)
AnyImage = TypeVar("AnyImage", bound=schema.Image)


@dataclass(frozen=True)
class Snapshot(Generic[AnyGeneration]):
    """The generation as it stood when the stream began, or began anew."""

    generation: AnyGeneration
    id: str = ""


@dataclass(frozen=True)
class Queued:
    """It waits, and its place has changed; 0 is next."""

    position: int
    eta_s: float | None = None
    id: str = ""


@dataclass(frozen=True)
class Started:
    """A worker has begun it; again when a crash had put it back."""

    started_at: datetime
    id: str = ""


@dataclass(frozen=True)
class Step:
    """The latest denoising step; steps between two events may have been left out."""

    step: int
    steps: int
    id: str = ""


@dataclass(frozen=True)
class ImageStored(Generic[AnyImage]):
    """An image is there, although others may still be drawn."""

    image: AnyImage
    id: str = ""


@dataclass(frozen=True)
class Finished(Generic[AnyGeneration]):
    """The end, whichever it is: the generation's `status` says. No event comes after it."""

    generation: AnyGeneration
    id: str = ""


Event = (
    Snapshot[AnyGeneration]
    | Queued
    | Started
    | Step
    | ImageStored[AnyImage]
    | Finished[AnyGeneration]
)
