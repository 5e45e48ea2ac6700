"""All that is said to the service: what may be asked for, two generations, their pictures."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safelatent import errors
from safelatent.client import Client, Generation
from safelatent.schema import Capabilities, LoadedModel, Status

POLL_S = 0.2
PATIENCE_S = 30
"""How long a generation that runs is looked for while the service or its Redis is away."""

AWAY = (errors.NoAnswer, errors.QueueUnavailable)


@dataclass(frozen=True)
class Choices:
    """What the caller may ask for."""

    can: Capabilities
    models: list[LoadedModel]

    @property
    def levels(self) -> list[str]:
        """From the weakest; `custom` has numbers of its own, which the page has no fields for."""
        return [level for level in self.can.levels if level != "custom"]


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: what was asked, and what has come of it so far."""

    body: dict[str, Any]
    """The request, as it is sent."""
    generation: Generation | None = None
    error: errors.SafelatentError | None = None
    picture: bytes | None = None
    heat: bytes | None = None
    """Grey PNG of the latents' size, white where safety acted most."""
    away: bool = False
    """The service does not answer now, and is asked again."""

    @property
    def level(self) -> str:
        """As it was done, which a policy may have raised."""
        asked: str = self.body["safety"]["level"]
        return self.generation.request.safety.level if self.generation else asked

    @property
    def is_over(self) -> bool:
        ended = self.generation is not None and self.generation.status.is_terminal
        return self.error is not None or ended


class Talk:
    """The service, in the four verbs that the page needs. Errors are those of `safelatent`."""

    def __init__(self, client: Client):
        self.client = client

    def choices(self) -> Choices:
        return Choices(self.client.capabilities(), self.client.models())

    def compare(self, bodies: Sequence[dict[str, Any]]) -> Iterator[list[Side]]:
        """Ask for all at once and say how they stand, until each has ended; then pictures too.

        What goes wrong with one is in its `error`, and the others go on.
        """
        sides = [self._submit(body) for body in bodies]
        yield sides
        away_since: float | None = None
        while not all(side.is_over for side in sides):
            time.sleep(POLL_S)
            sides = [side if side.is_over else self._look(side) for side in sides]
            away_since = (away_since or time.monotonic()) if _away(sides) else None
            if away_since and time.monotonic() - away_since > PATIENCE_S:
                break
            yield sides
        yield [self._fetch(side) for side in sides]

    def cancel(self, ids: Sequence[str]) -> None:
        """One that has ended stays as it is."""
        for id in ids:
            self.client.cancel(id)

    def _submit(self, body: dict[str, Any]) -> Side:
        try:
            fields = {name: value for name, value in body.items() if name != "prompt"}
            return Side(body, self.client.submit(body["prompt"], **fields))
        except errors.SafelatentError as error:
            return Side(body, error=error)

    def _look(self, side: Side) -> Side:
        assert side.generation is not None
        try:
            return replace(side, generation=self.client.get(side.generation.id), away=False)
        except AWAY:
            return replace(side, away=True)
        except errors.SafelatentError as error:
            return replace(side, error=error)

    def _fetch(self, side: Side) -> Side:
        """The side with its picture and heat map, or with the error that it ended with."""
        if side.error or side.generation is None:
            return side
        try:
            if side.away:
                self.client.get(side.generation.id)
            generation = side.generation
            if generation.status is not Status.SUCCEEDED:
                problem = generation.error or errors.GenerationCancelled("It was stopped.").problem
                return replace(side, error=errors.from_problem(problem, errors.JobError))
            [image] = generation.images
            picture = None if image.blocked else image.bytes()
            heat = image.heatmap() if image.safety.heatmap_url else None
            return replace(side, picture=picture, heat=heat)
        except errors.SafelatentError as error:
            return replace(side, error=error)


def _away(sides: Sequence[Side]) -> bool:
    return any(side.away for side in sides)
