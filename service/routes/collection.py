"""A tenant's generations as a whole: list them, delete one, and what may be asked for."""

import base64
import json
import logging
import re
from datetime import UTC, datetime
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Query, Request
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from safelatent import errors
from safelatent.safety import CONCEPT, LEVELS, Level, SafetyParameters
from safelatent.schema import (
    MAX_METADATA_BYTES,
    MAX_SIZE,
    MAX_TEXT,
    Capabilities,
    FieldError,
    Generation,
    GenerationPage,
    ImageFormat,
    Scheduler,
    Status,
    Telemetry,
)
from service.auth import TheCaller
from service.body import MAX_BODY
from service.parts import TheParts
from service.policy import STRICTNESS, Tenant
from service.problems import documented
from service.routes.generations import Id, models
from service.watching import linked

log = logging.getLogger("uvicorn.error")

router = APIRouter(
    tags=["generations"], responses=documented(errors.Unauthorized, errors.Forbidden)
)

MAX_LOOKED_AT = 500
"""Generations that one page looks at: where a filter finds few, the page is short."""
CANCEL_WAIT_S = 10
METADATA = "metadata."
CURSOR = re.compile(r"([0-9]{1,17}):([0-9a-f-]{36})")


def _is_no_number(time: Any) -> Any:
    if isinstance(time, str) and "-" not in time[1:]:
        raise PydanticCustomError("time", "should be a time, as 2026-01-31T12:00:00Z is one")
    return time


Time = Annotated[datetime, BeforeValidator(_is_no_number)]
"""RFC 3339; pydantic would read a number as seconds."""
FEATURES = ["events", "prefer-wait", "cancel-on-disconnect", "image-answers", "idempotency-key"]


@router.get(
    "/generations",
    summary="List generations",
    responses=documented(errors.InvalidRequest, errors.QueueUnavailable),
    openapi_extra={
        "parameters": [
            {
                "name": "metadata",
                "in": "query",
                "description": "`metadata.<name>=<value>`: only those whose metadata say so.",
                "style": "form",
                "explode": True,
                "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            }
        ]
    },
)
def generations(
    request: Request,
    parts: TheParts,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[
        str | None, Query(max_length=200, description="`next` of the page before.")
    ] = None,
    status: Status | None = None,
    created_after: Time | None = None,
    created_before: Time | None = None,
) -> GenerationPage:
    """The caller's own that are kept, newest first. A time without a zone is UTC."""
    after = None if cursor is None else _place(cursor)
    wanted = {
        name.removeprefix(METADATA): value
        for name, value in request.query_params.items()
        if name.startswith(METADATA)
    }
    oldest = _utc(created_after)
    newest = _utc(created_before) or datetime.max.replace(tzinfo=UTC)
    page = GenerationPage(data=[])
    listed = parts.jobs.owned(caller.tenant, after, int(newest.timestamp() * 1e6))
    for count, (place, generation) in enumerate(listed, 1):
        if oldest and generation.created_at <= oldest:
            return page
        if len(page.data) == limit or count > MAX_LOOKED_AT:
            page.next = _cursor(after or place)
            return page
        after = place
        if (
            status in (None, generation.status)
            and generation.created_at < newest
            and wanted.items() <= _as_text(generation).items()
        ):
            page.data.append(linked(generation))
    return page


@router.delete(
    "/generations/{id}",
    status_code=204,
    summary="Delete a generation",
    responses=documented(
        errors.NotFound,
        errors.NotFinished,
        errors.InvalidRequest,
        errors.QueueUnavailable,
        errors.StoreUnavailable,
    ),
)
async def delete(id: Id, parts: TheParts, caller: TheCaller) -> None:
    """Its images, heat maps, report and events are gone for ever; a running one is cancelled."""
    generation = await run_in_threadpool(parts.jobs.cancel, id, caller.tenant)
    generation = await parts.waiting.until_final(generation, caller.tenant, CANCEL_WAIT_S)
    if not generation.status.is_terminal:
        raise errors.NotFinished(f"generation {id} is still being cancelled: try again shortly")
    # Its images first: should that fail, it can still be found and deleted.
    await run_in_threadpool(parts.store.delete, id)
    await run_in_threadpool(parts.jobs.delete, id, caller.tenant)
    log.info("generation %s of tenant %s is deleted", id, caller.tenant)


@router.get(
    "/capabilities",
    summary="What may be asked for",
    responses=documented(errors.QueueUnavailable),
)
def capabilities(parts: TheParts, caller: TheCaller) -> Capabilities:
    """Limits, models, levels and words, as the caller's policy leaves them."""
    rights = caller.rights
    found = models(parts, caller)
    return Capabilities(
        limits={
            "n": rights.max_images,
            "steps": rights.max_steps,
            "width": MAX_SIZE,
            "height": MAX_SIZE,
            "pixels": rights.max_pixels,
            "text": MAX_TEXT,
            "metadata_bytes": MAX_METADATA_BYTES,
            "body_bytes": MAX_BODY,
            "retention_s": rights.retention_s,
            "weight": rights.weight,
            "max_running": rights.max_running,
            "max_queued": rights.max_queued,
            "requests_per_minute": rights.requests_per_minute,
            "megapixel_steps_per_minute": rights.megapixel_steps_per_minute,
        },
        models=[model.id for model in found],
        schedulers=list(get_args(Scheduler)),
        levels=_levels(rights),
        concepts=rights.concepts if rights.floor != "off" else [CONCEPT],
        concepts_fixed=rights.floor != "off",
        floor=rights.floor,
        below_floor=rights.below_floor,
        ceiling=rights.ceiling,
        checks={model.id: model.checks for model in found},
        image_formats=list(get_args(ImageFormat)),
        telemetry=list(get_args(Telemetry)),
        priorities=list(rights.priorities),
        features=[*FEATURES, *(["webhooks"] if rights.webhook_secrets else [])],
    )


def _levels(rights: Tenant) -> dict[str, SafetyParameters | None]:
    """Those that pass as they are."""
    weakest, strongest = (STRICTNESS.index(level) for level in (rights.floor, rights.ceiling))
    passing: list[Level] = [*STRICTNESS[weakest : strongest + 1]]
    if rights.ceiling != "off":
        passing.append("custom")
    return {level: LEVELS.get(level) for level in passing}


def _cursor(place: tuple[int, str]) -> str:
    return base64.urlsafe_b64encode(f"{place[0]}:{place[1]}".encode()).decode()


def _place(cursor: str) -> tuple[int, str]:
    try:
        found = CURSOR.fullmatch(base64.urlsafe_b64decode(cursor.encode()).decode())
    except ValueError:
        found = None
    if found is None:
        message = "should be the `next` of a page, as it is"
        wrong = FieldError(field="cursor", message=message, value=cursor)
        raise errors.InvalidRequest(f"cursor: {message}", errors=[wrong])
    return int(found[1]), found[2]


def _utc(when: datetime | None) -> datetime | None:
    return when.replace(tzinfo=UTC) if when and when.tzinfo is None else when


def _as_text(generation: Generation) -> dict[str, Any]:
    """Metadata as a query spells them: true is `true`, 1.5 is `1.5`."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in generation.request.metadata.items()
    }
