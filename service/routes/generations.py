"""Generations over HTTP: ask for one, look at it, fetch its images, cancel it."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from safelatent import errors
from safelatent.schema import (
    MAX_IMAGES,
    FieldError,
    Generation,
    GenerationRequest,
    Image,
    LoadedModel,
    Status,
)
from service.auth import Caller, TheCaller
from service.parts import Parts, TheParts
from service.problems import documented
from service.waiting import MAX_WAIT_S, preferred_wait

router = APIRouter(tags=["generations"])

Id = Annotated[str, Path(description="The generation's `id`.", max_length=100)]
Index = Annotated[int, Path(description="The image's `index`, from 0.", ge=0, le=2**31)]

PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": f"`wait=N` (RFC 7240): hold the line until the generation has ended, at most "
    f"N seconds, and at most {MAX_WAIT_S}. `Preference-Applied` in the answer says how long. "
    "What cannot be read is ignored.",
    "schema": {"type": "string"},
    "example": "wait=60",
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
    summary="Generate images",
    dependencies=[Depends(json_only)],
    responses={
        200: {"model": Generation, "description": "Ended while the line was held"},
        202: {"description": "Accepted; `Location` says where to look"},
        **documented(
            errors.MalformedBody,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.InvalidRequest,
            errors.SafetyCannotAct,
            errors.QueueUnavailable,
        ),
    },
    openapi_extra={"parameters": [PREFER]},
)
async def generate(
    asked: Annotated[GenerationRequest, Body(openapi_examples=EXAMPLES)],
    request: Request,
    response: Response,
    parts: TheParts,
    caller: TheCaller,
) -> Generation:
    """Queue a generation. Answers 202 at once, or with `Prefer: wait=N` 200 once it has ended."""

    generation = await run_in_threadpool(submit, asked, parts, caller)
    response.headers["Location"] = f"/generations/{generation.id}"
    generation = await _hold(generation, request, response, parts, caller)
    response.status_code = 200 if generation.status.is_terminal else 202
    return _linked(generation)


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
    return _linked(await _hold(generation, request, response, parts, caller))


@router.post(
    "/generations/{id}/cancel",
    summary="Cancel a generation",
    responses=documented(errors.NotFound, errors.InvalidRequest, errors.QueueUnavailable),
)
def cancel(id: Id, parts: TheParts, caller: TheCaller) -> Generation:
    """A queued one is cancelled at once, a running one within a step; one that has ended stays."""
    return _linked(parts.jobs.cancel(id, caller.tenant))


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
        200: {"content": {"image/png": {}, "image/webp": {}, "image/jpeg": {}}},
        **IMAGE_ERRORS,
    },
)
def image(id: Id, index: Index, request: Request, parts: TheParts, caller: TheCaller) -> Response:
    """The bytes of an image. A blocked image is a 404 that says what blocked it."""
    generation, image = _image(id, index, parts, caller)
    if blocked := image.blocked:
        raise errors.ImageBlocked(
            f"image {index} is blocked: {blocked.check} flagged {blocked.category}"
        )
    headers = {"ETag": f'"{image.sha256}"', "Cache-Control": "private, max-age=86400, immutable"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    content = parts.store.get(f"{generation.id}/{index}.{generation.request.image_format}")
    return Response(content, headers=headers, media_type=image.media_type)


@router.get(
    "/generations/{id}/images/{index}/heatmap",
    summary="Fetch where safety acted on an image",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **IMAGE_ERRORS},
)
def heatmap(id: Id, index: Index, parts: TheParts, caller: TheCaller) -> Response:
    """A small PNG; only of a generation that asked for `safety.telemetry: "heatmap"`."""
    generation, image = _image(id, index, parts, caller)
    if image.safety.heatmap_url is None:
        raise errors.NotFound(
            f"image {index} has no heat map: safety.telemetry was "
            f"{generation.request.safety.telemetry!r}, or safety did not act on it"
        )
    content = parts.store.get(f"{generation.id}/{index}.heatmap.png")
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
    wait_s = preferred_wait(request.headers.getlist("prefer"))
    if wait_s is None:
        return generation
    response.headers["Preference-Applied"] = f"wait={wait_s}"
    return await parts.waiting.until_final(generation, caller.tenant, wait_s)


def submit(asked: GenerationRequest, parts: Parts, caller: Caller) -> Generation:
    """Queue what a caller asks for, as its policy allows it."""
    request, policy = caller.tighten(_complete(asked, parts))
    return parts.jobs.submit(request, caller.tenant, policy)


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
    if generation.status is not Status.SUCCEEDED:
        raise errors.NotFinished(f"generation {id} is {generation.status}, and has no images")
    if index >= len(generation.images):
        last = len(generation.images) - 1
        raise errors.NotFound(f"there is no image {index}: the indices are 0 to {last}")
    return generation, generation.images[index]


def _linked(generation: Generation) -> Generation:
    here = f"/generations/{generation.id}"
    generation.links = {"self": here, "cancel": f"{here}/cancel"}
    return generation
