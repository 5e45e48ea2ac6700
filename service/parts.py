"""What the routes share, made once by `create_app`."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from safelatent.jobs import Jobs
from safelatent.store import Store
from service.auth import Callers
from service.limits import Limits
from service.metrics import Metrics
from service.settings import Settings
from service.waiting import Waiting


@dataclass(frozen=True)
class Parts:
    settings: Settings
    jobs: Jobs
    store: Store
    waiting: Waiting
    callers: Callers
    limits: Limits
    metrics: Metrics


async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


TheParts = Annotated[Parts, Depends(_parts)]
