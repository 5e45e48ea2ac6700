"""The deliverer's settings, from the environment: the frontend's own, and how to deliver."""

from typing import Self

from pydantic import Field, PositiveFloat, model_validator

from service import settings


class Settings(settings.Settings):
    """SAFELATENT_WEBHOOK_RETRY_S is a JSON list."""

    webhook_retry_s: tuple[PositiveFloat, ...] = (5, 30, 120, 600, 3600, 10800, 21600, 36000)
    """Pauses between the attempts, each changed by up to a tenth at random; in all less than the
    24 hours for which a generation is kept."""
    webhook_timeout_s: float = Field(default=15, gt=0, le=60)
    """A receiver must have answered by then."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        return self  # it listens nowhere
