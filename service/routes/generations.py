"""Generations over HTTP: ask for one, look at it, fetch its images, cancel it."""

import hashlib
import json
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders

from safelatent import errors, logs, traces
from safelatent.jobs import Once
from safelatent.schema import (
    MAX_IMAGES,
    FieldError,
    Generation,
    GenerationRequest,
    Image,
    LoadedModel,
    Status,
)
from safelatent.store import image_key
from safelatent.turns import Share
from safelatent.webhooks import Event
from service import accept
from service.auth import Caller, TheCaller
from service.observing import note
from service.parts import Parts, TheParts
from service.problems import documented, header
from service.waiting import CANCEL, MAX_WAIT_S, preferred_wait, prefers_cancel
from service.watching import EVENT, EVENTS, linked, watch
from service.webhooks.addresses import Allowed, Refused, checked, sealed

webhooks = APIRouter()
router = APIRouter(
    tags=["generations"], responses=documented(errors.Unauthorized, errors.Forbidden)
)

Id = Annotated[str, Path(description="The generation's `id`.", max_length=100)]
Index = Annotated[int, Path(description="The image's `index`, from 0.", ge=0, le=2**31)]

NEGOTIATED = "Accept, Prefer"
PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": f"`wait=N` (RFC 7240): hold the line until the generation has ended, at most "
    f"N seconds, and at most {MAX_WAIT_S}. `{CANCEL}`: hanging up meanwhile cancels it. "
    "`Preference-Applied` in the answer says what was understood; the rest is ignored.",
    "schema": {"type": "string"},
    "example": "wait=60",
}
LOCATION = header("Path of the generation")
APPLIED = header("What was understood of `Prefer`", required=False)
ACCEPT = {
    "name": "Accept",
    "in": "header",
    "description": "`application/json`; `text/event-stream` for events until the end; or, with "
    "`Prefer: wait=N` and `n` of 1, `image/png`, `image/webp` or `image/jpeg` for the image, "
    "which also sets an `image_format` that the body leaves out.",
    "schema": {"type": "string"},
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "For 24 hours the same key with the same body gives the same generation, "
    "whatever became of it. A key is up to 255 characters, and each tenant has its own.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "Go on after this event. One that is malformed, unknown or too old is ignored.",
    "schema": {"type": "string"},
}

EXAMPLES: dict[str, Any] = {
    "simple": {"summary": "The defaults", "value": {"prompt": "a cat on the moon"}},
    "reproducible": {
        "summary": "Four images, fixed seed, strong safety",
        "value": {
            "prompt": "a cat on the moon",
            "n": 4,
            "seed": 7,
            "steps": 30,
            "safety": {"level": "strong", "telemetry": "heatmap"},
        },
    },
    "custom": {
        "summary": "Own concepts and numbers",
        "value": {
            "prompt": "a harbour at night",
            "safety": {
                "level": "custom",
                "concepts": ["smoke", "fire"],
                "parameters": {
                    "guidance_scale": 1500,
                    "warmup_steps": 5,
                    "threshold": 0.02,
                    "momentum_scale": 0.4,
                    "mom_beta": 0.6,
                },
            },
        },
    },
}


async def json_only(request: Request) -> None:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise errors.UnsupportedMediaType(
            f"the Content-Type is {media_type[:100] or 'missing'}: send application/json"
        )


@router.post(
    "/generate",
    status_code=202,
    response_model=Generation,
    summary="Generate images",
    dependencies=[Depends(json_only)],
    responses={
        200: {
            "model": Generation,
            "description": "Ended while the line was held: the generation, or its image with the "
            "report in `Safelatent-` headers; or a stream of events",
            "content": {
                "text/event-stream": {"itemSchema": EVENT},
                **{each: {} for each in accept.IMAGES},
            },
            "headers": {"Location": LOCATION, "Preference-Applied": APPLIED},
        },
        202: {
            "description": "Accepted; `Location` says where to look",
            "headers": {"Location": LOCATION, "Preference-Applied": APPLIED},
        },
        **documented(
            errors.MalformedBody,
            errors.MalformedHeader,
            errors.Unauthorized,
            errors.Forbidden,
            errors.ImageBlocked,
            errors.NotAcceptable,
            errors.KeyInUse,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.InvalidRequest,
            errors.SafetyCannotAct,
            errors.KeyReused,
            errors.RateLimited,
            errors.TooManyQueued,
            errors.JobError,
            errors.DeadlineExceeded,
            errors.QueueUnavailable,
            errors.QueueFull,
            errors.StoreUnavailable,
        ),
    },
    openapi_extra={"parameters": [PREFER, ACCEPT, IDEMPOTENCY_KEY]},
)
async def generate(
    asked: Annotated[GenerationRequest, Body(openapi_examples=EXAMPLES)],
    request: Request,
    response: Response,
    parts: TheParts,
    caller: TheCaller,
) -> Any:
    """Queue a generation. Answers 202 at once, or with `Prefer: wait=N` 200 once it has ended."""
    response.headers["Vary"] = NEGOTIATED
    key = once(asked, request)
    media_type = _media_type(asked, request)
    if image_format := accept.IMAGES.get(media_type):
        asked = asked.model_copy(update={"image_format": image_format})
    generation = await run_in_threadpool(submit, asked, parts, caller, response.headers, key)
    if image_format not in (None, generation.request.image_format):
        raise errors.NotAcceptable(
            f"Accept asks for {media_type}, and the generation of this Idempotency-Key is in "
            f"{generation.request.image_format}"
        )
    if media_type == accept.EVENT_STREAM:
        cancels = prefers_cancel(request.headers.getlist("prefer"))
        answer = await watch(parts.waiting, generation, caller.tenant, cancels=cancels)
        answer.headers.update(response.headers)
        answer.headers["Location"] = f"/generations/{generation.id}"
        answer.headers["Vary"] = NEGOTIATED
        if cancels:
            answer.headers["Preference-Applied"] = CANCEL
        return answer
    response.headers["Location"] = f"/generations/{generation.id}"
    generation = await _hold(generation, request, response, parts, caller)
    response.status_code = 200 if generation.status.is_terminal else 202
    if image_format and generation.status.is_terminal:
        return await run_in_threadpool(_only_image, generation, response, parts)
    return linked(generation)


@router.get(
    "/generations/{id}",
    summary="Look at a generation",
    responses=documented(errors.NotFound, errors.InvalidRequest, errors.QueueUnavailable),
    openapi_extra={"parameters": [PREFER]},
)
async def look(
    id: Id, request: Request, response: Response, parts: TheParts, caller: TheCaller
) -> Generation:
    """The generation as it stands; with `Prefer: wait=N` once it has ended."""
    generation = await run_in_threadpool(parts.jobs.fetch, id, caller.tenant)
    response.headers.update({"Cache-Control": "no-store", "Vary": "Prefer"})
    return linked(await _hold(generation, request, response, parts, caller))


@router.get(
    "/generations/{id}/events",
    summary="Watch a generation",
    response_class=Response,
    responses={
        200: EVENTS,
        204: {"description": "All was seen: `Last-Event-ID` is the end's"},
        **documented(errors.NotFound, errors.InvalidRequest, errors.QueueUnavailable),
    },
    openapi_extra={"parameters": [LAST_EVENT_ID]},
)
async def watching(id: Id, request: Request, parts: TheParts, caller: TheCaller) -> Response:
    """Server-Sent Events from a snapshot to the end; an `EventSource` reconnects by itself."""
    generation = await run_in_threadpool(parts.jobs.fetch, id, caller.tenant)
    seen = request.headers.get("last-event-id")
    return await watch(parts.waiting, generation, caller.tenant, seen)


@router.post(
    "/generations/{id}/cancel",
    summary="Cancel a generation",
    responses=documented(errors.NotFound, errors.InvalidRequest, errors.QueueUnavailable),
)
def cancel(id: Id, parts: TheParts, caller: TheCaller) -> Generation:
    """A queued one is cancelled at once, a running one within a step; one that has ended stays."""
    return linked(parts.jobs.cancel(id, caller.tenant))


@webhooks.post("generation-ended", status_code=204, tags=["generations"])
def ended(event: Event) -> None:
    """What a request's `webhook` is sent, by Standard Webhooks (docs/webhooks.md)."""


IMAGE_ERRORS = documented(
    errors.NotFound,
    errors.ImageBlocked,
    errors.NotFinished,
    errors.InvalidRequest,
    errors.QueueUnavailable,
    errors.StoreUnavailable,
)


@router.get(
    "/generations/{id}/images/{index}",
    summary="Fetch an image",
    response_class=Response,
    responses={
        200: {
            "content": {"image/png": {}, "image/webp": {}, "image/jpeg": {}},
            "headers": {"ETag": header("The image's sha256, in quotes")},
        },
        304: {"description": "`If-None-Match` has its `ETag`"},
        **IMAGE_ERRORS,
    },
)
def image(id: Id, index: Index, request: Request, parts: TheParts, caller: TheCaller) -> Response:
    """The bytes of an image. A blocked image is a 404 that says what blocked it."""
    generation, image = _image(id, index, parts, caller)
    headers = {"ETag": f'"{image.sha256}"', "Cache-Control": "private, max-age=86400, immutable"}
    if not image.blocked and headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(
        _content(generation, image, parts), headers=headers, media_type=image.media_type
    )


@router.get(
    "/generations/{id}/images/{index}/heatmap",
    summary="Fetch where safety acted on an image",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **IMAGE_ERRORS},
)
def heatmap(id: Id, index: Index, parts: TheParts, caller: TheCaller) -> Response:
    """A small PNG; only of a generation that asked for `safety.telemetry: "heatmap"`."""
    generation, image = _image(id, index, parts, caller)
    _refuse_blocked(generation, image)
    if image.safety.heatmap_url is None:
        raise errors.NotFound(
            f"image {index} has no heat map: safety.telemetry was "
            f"{generation.request.safety.telemetry!r}, or safety did not act on it"
        )
    assert image.sha256 is not None
    key = image_key(generation.id, index, image.sha256, "heatmap.png")
    content = parts.store.get(key)
    headers = {"Cache-Control": "private, max-age=86400, immutable"}
    return Response(content, headers=headers, media_type="image/png")


@router.get("/models", summary="List the models", responses=documented(errors.QueueUnavailable))
def models(parts: TheParts, caller: TheCaller) -> list[LoadedModel]:
    """The models that the caller may ask for, and how many workers hold each warm now."""
    loaded = parts.jobs.loaded()
    return [
        LoadedModel(**dict(model), workers=loaded.get(model.id, 0))
        for model in parts.jobs.models()
        if caller.rights.models is None or model.id in caller.rights.models
    ]


async def _hold(
    generation: Generation, request: Request, response: Response, parts: Parts, caller: Caller
) -> Generation:
    prefer = request.headers.getlist("prefer")
    wait_s = preferred_wait(prefer)
    if wait_s is None:
        return generation
    response.headers["Preference-Applied"] = f"wait={wait_s}"
    cancels = request.method == "POST" and prefers_cancel(prefer)
    if cancels:
        response.headers["Preference-Applied"] += f", {CANCEL}"
    held = await parts.waiting.hold(generation, caller.tenant, wait_s, request.receive)
    if held is None and cancels:
        return await run_in_threadpool(parts.jobs.cancel, generation.id, caller.tenant)
    return held or generation  # who has hung up reads neither


def _media_type(asked: GenerationRequest, request: Request) -> str:
    """The form of the answer, by the Accept header; NotAcceptable when it cannot be had."""
    offered = [accept.JSON, accept.EVENT_STREAM]
    if asked.n == 1 and preferred_wait(request.headers.getlist("prefer")) is not None:
        is_open = "image_format" not in asked.model_fields_set
        offered += [
            media_type
            for media_type, image_format in accept.IMAGES.items()
            if is_open or image_format == asked.image_format
        ]
    accepted = request.headers.getlist("accept")
    if chosen := accept.preferred(accepted, offered):
        return chosen
    raise errors.NotAcceptable(
        f"Accept is {', '.join(accepted)[:200]!r}, and this request can be answered by "
        f"{', '.join(offered)}: an image needs `Prefer: wait=N`, n of 1 (here {asked.n}), and an "
        "image_format that is the same or left out"
    )


def once(asked: GenerationRequest, request: Request) -> Once | None:
    """What the Idempotency-Key makes of a request; MalformedHeader for a bad key."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= 255:
        raise errors.MalformedHeader(
            f"the Idempotency-Key has {len(key)} characters: it should have 1 to 255"
        )
    body = json.dumps(asked.model_dump(mode="json"), sort_keys=True)
    return Once(key, hashlib.sha256(body.encode()).hexdigest())


def _only_image(generation: Generation, held: Response, parts: Parts) -> Response:
    """The bytes of a generation's one image, or the problem that there is instead."""
    if generation.status is not Status.SUCCEEDED:
        cancelled = errors.GenerationCancelled(f"generation {generation.id} was cancelled").problem
        raise errors.from_problem(generation.error or cancelled, errors.JobError)
    image = generation.images[0]
    headers = {
        **held.headers,
        "Link": f'</generations/{generation.id}>; rel="describedby"',
        "Safelatent-Id": generation.id,
        "Safelatent-Status": generation.status,
        "Safelatent-Seed": str(image.seed),
        "Safelatent-Safety-Level": generation.request.safety.level,
        "Safelatent-Safety-Applied": json.dumps(image.safety.applied),
        "Cache-Control": "no-store",
    }
    return Response(
        _content(generation, image, parts), headers=headers, media_type=image.media_type
    )


def _content(generation: Generation, image: Image, parts: Parts) -> bytes:
    _refuse_blocked(generation, image)
    assert image.sha256 is not None
    image_format = generation.request.image_format
    return parts.store.get(image_key(generation.id, image.index, image.sha256, image_format))


def submit(
    asked: GenerationRequest,
    parts: Parts,
    caller: Caller,
    headers: MutableHeaders,
    once: Once | None = None,
) -> Generation:
    """Queue what a caller asks for, as its policy and its rates allow it; `headers` tell those."""
    request, policy = caller.tighten(_complete(asked, parts))
    carried = {"request_id": logs.fields().get("request_id", ""), **traces.carried()}
    if request.webhook is not None:
        carried["seal"] = _seal(request.webhook, parts, caller)

    def admit() -> None:
        headers.update(parts.limits.admit(caller, request))

    generation = parts.jobs.submit(
        request,
        caller.tenant,
        policy,
        once,
        kept_s=caller.rights.retention_s,
        carried=carried,
        share=Share(caller.rights.weight, caller.rights.max_running),
        admit=admit,
    )
    note(generation_id=generation.id)
    parts.metrics.saw_submitted(request.model, caller.tenant, request.safety.level)
    return generation


def _seal(url: str, parts: Parts, caller: Caller) -> str:
    """Let a webhook's URL pass, or refuse it. It may hold a token, so it is not echoed."""
    secrets = parts.callers.webhook_secrets(caller.tenant)
    try:
        if not secrets:
            raise Refused(
                "cannot be signed: the operator sets SAFELATENT_WEBHOOK_SECRET, or a tenant's "
                "webhook_secrets in the policy file"
            )
        checked(url, Allowed.parse(parts.settings.webhook_allow))
    except Refused as refused:
        wrong = FieldError(field="webhook", message=str(refused))
        raise errors.InvalidRequest(f"webhook: {refused}", errors=[wrong]) from refused
    return sealed(url, secrets[0])


def _complete(asked: GenerationRequest, parts: Parts) -> GenerationRequest:
    """The request with its model, seed and size; the worker fills in what stays open."""
    cards = {model.id: model for model in parts.jobs.models()}
    default = parts.settings.model_id
    id = asked.model or default
    if id != default and id not in cards:
        known = ", ".join(sorted({default, *cards}))
        raise _invalid("model", id, f"no worker has it; known here: {known}")
    request = asked.model_copy(
        update={
            "model": id,
            "seed": secrets.randbelow(2**32 - MAX_IMAGES) if asked.seed is None else asked.seed,
        }
    )
    if card := cards.get(id):
        request.width = request.width or card.width
        request.height = request.height or card.height
        for field, value in (("width", request.width), ("height", request.height)):
            if value % card.size_multiple:
                multiple = card.size_multiple
                raise _invalid(field, value, f"should be a multiple of {multiple} for {id}")
    return request


def _invalid(field: str, value: Any, message: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"{field}: {message} (got {value!r})",
        errors=[FieldError(field=field, message=message, value=value)],
    )


def _image(id: str, index: int, parts: Parts, caller: Caller) -> tuple[Generation, Image]:
    generation = parts.jobs.fetch(id, caller.tenant)
    for image in generation.images:
        if image.index == index:
            return generation, image
    last = generation.request.n - 1
    if index > last:
        raise errors.NotFound(f"there is no image {index}: the indices are 0 to {last}")
    raise errors.NotFinished(f"generation {id} is {generation.status}, and has no image {index}")


def _refuse_blocked(generation: Generation, image: Image) -> None:
    if blocked := image.blocked:
        raise errors.ImageBlocked(
            f"image {image.index} is blocked: {blocked.check} flagged {blocked.category} "
            f"(generation {generation.id})"
        )
