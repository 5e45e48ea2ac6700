"""OpenAI's image API over the same generations: their words in, their words out."""

import base64
import json
import re
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders

from safelatent import errors
from safelatent.safety import Number
from safelatent.schema import (
    Generation,
    GenerationRequest,
    Image,
    LoadedModel,
    PolicyApplied,
    Safety,
    Status,
)
from safelatent.store import image_key
from service import problems
from service.auth import Caller, TheCaller
from service.openai_errors import ErrorBody
from service.parts import Parts, TheParts
from service.routes import generations
from service.waiting import MAX_WAIT_S

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
)

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

STEPS = {"low": 25, "medium": 50, "high": 75, "xhigh": 100, "max": 150}
"""Quality in denoiser steps. The least is above every level's warm-up, so that safety can act."""
OLD_QUALITY = {"standard": "medium", "hd": "high", "auto": "medium"}

PARAMS = {
    "width": "size",
    "height": "size",
    "steps": "quality",
    "image_format": "output_format",
    "safety.level": "moderation",
}
"""Our fields by the parameters that set them."""

CATEGORIES = ("hate", "self_harm", "sexual", "violence")
"""Azure's content filters."""


class ImagesRequest(BaseModel):
    """What OpenAI's clients send. Null is the same as absent."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    prompt: str
    model: str | None = None
    """An id of `GET /v1/models`; null is the service's default."""
    n: Annotated[int, Number] | None = None
    size: str | None = None
    """`WIDTHxHEIGHT`, or `auto`: the model's native size."""
    quality: Literal["low", "medium", "high", "xhigh", "max", "standard", "hd", "auto"] | None = (
        None
    )
    response_format: Literal["b64_json", "url"] | None = None
    """`url` needs the same API key to be fetched; null is `b64_json`."""
    output_format: Literal["png", "webp", "jpeg"] | None = None
    moderation: Literal["auto", "low"] | None = None
    """`auto` is safety level `medium`, `low` is `weak`; your policy may make it stricter."""
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3), Number] | None = None
    """Accepted; the stream has finished images only."""
    user: str | None = None
    """Kept in `metadata`, as is `safety_identifier`."""
    safety_identifier: str | None = None
    safelatent: dict[str, Any] | None = None
    """Fields of `POST /generate`; they have the last word over all the others."""

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, size: str | None) -> str | None:
        if size not in (None, "auto") and not SIZE.fullmatch(size):
            raise PydanticCustomError("size", "should be 'auto' or WIDTHxHEIGHT, as in 512x512")
        return size

    @model_validator(mode="after")
    def _knows_all(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            raise PydanticCustomError(
                "unknown_parameter",
                "is not supported; the parameters are: {known}",
                {"known": ", ".join(type(self).model_fields), "field": name, "value": value},
            )
        return self

    def generation(self) -> dict[str, Any]:
        """The fields of a GenerationRequest, unchecked."""
        size = SIZE.fullmatch(self.size or "auto")
        quality = self.quality and STEPS[OLD_QUALITY.get(self.quality, self.quality)]
        mapped: dict[str, Any] = {
            "prompt": self.prompt,
            "model": self.model,
            "n": self.n,
            "width": size and int(size[1]),
            "height": size and int(size[2]),
            "steps": quality,
            "image_format": self.output_format,
        }
        parts: dict[str, dict[str, Any]] = {
            "safety": {"level": "weak" if self.moderation == "low" else None},
            "metadata": {"user": self.user, "safety_identifier": self.safety_identifier},
        }
        own = self.safelatent or {}
        for name, part in parts.items():
            mapped[name] = _given(part)
            if isinstance(own.get(name), dict):
                own = own | {name: mapped[name] | own[name]}
        return _given(mapped) | own

    def param(self, field: str) -> str:
        """What the caller calls a field of a GenerationRequest."""
        if field.split(".")[0] in (self.safelatent or {}):
            return f"safelatent.{field}"
        return PARAMS.get(field, field)


class Filter(BaseModel):
    """What the image checks saw of one category. They know one threshold: `medium` is above it."""

    filtered: bool = False
    severity: Literal["safe", "medium"] | None = None
    checked: bool = False
    """Whether any check looks for this category; if none does, nothing is known of it."""


class Report(BaseModel):
    """What no other field has: the same as in the generation."""

    id: str
    request: GenerationRequest
    policy: PolicyApplied | None
    safety: Safety | None
    images: list[Image]
    """All of them: `blocked` says why one is not in `data`."""


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    content_filter_results: dict[str, Filter]
    prompt_filter_results: dict[str, Filter]


class ImagesAnswer(BaseModel):
    created: int
    background: str = "opaque"
    output_format: str
    quality: str | None
    size: str
    data: list[ImageData]
    """The images that no check blocked."""
    safelatent: Report


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "safelatent"
    safelatent: LoadedModel


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


@router.post(
    "/images/generations",
    summary="Generate images, as OpenAI does",
    dependencies=[Depends(generations.json_only)],
    response_model=ImagesAnswer,
    responses={200: {"content": {"text/event-stream": {}}}},
    openapi_extra={"parameters": [generations.IDEMPOTENCY_KEY]},
)
async def generate(
    asked: ImagesRequest, request: Request, response: Response, parts: TheParts, caller: TheCaller
) -> Any:
    """Holds the line until the images are done; with `stream` they come as events.

    Who hangs up meanwhile cancels them, unless an Idempotency-Key says that it will come back.
    """
    generation = await run_in_threadpool(_submit, asked, request, parts, caller, response.headers)
    generation = await _ended(generation, request, parts, caller)

    def answer() -> ImagesAnswer:
        return _answer(generation, asked, str(request.base_url).rstrip("/"), parts)

    answered = await run_in_threadpool(answer)
    if not asked.stream:
        return answered
    return Response(_events(answered), 200, response.headers, "text/event-stream")


@router.get("/models", summary="List the models, as OpenAI does")
def models(parts: TheParts, caller: TheCaller) -> ModelList:
    """The models that the caller may ask for; `created` is not known and 0."""
    found = generations.models(parts, caller)
    return ModelList(data=[Model(id=model.id, safelatent=model) for model in found])


@router.get("/models/{id:path}", summary="Look at a model, as OpenAI does")
def model(id: Annotated[str, Path(max_length=200)], parts: TheParts, caller: TheCaller) -> Model:
    """One of the list; an id may hold slashes."""
    for each in models(parts, caller).data:
        if each.id == id:
            return each
    raise errors.NotFound(f"there is no model {id!r}; GET /v1/models lists them")


def _submit(
    asked: ImagesRequest, request: Request, parts: Parts, caller: Caller, headers: MutableHeaders
) -> Generation:
    """Queue it; what is wrong with it is told in the caller's words."""
    try:
        wanted = _request(asked)
        once = generations.once(wanted, request)
        return generations.submit(wanted, parts, caller, headers, once)
    except errors.RequestError as error:
        problem = error.problem
        first = problem.errors[0].field if problem.errors else ""
        if first and problem.detail.startswith(first):
            problem.detail = asked.param(first) + problem.detail.removeprefix(first)
        for wrong in problem.errors:
            wrong.field = asked.param(wrong.field)
        raise


def _request(asked: ImagesRequest) -> GenerationRequest:
    try:
        return GenerationRequest.model_validate(asked.generation())
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise problems.invalid(RequestValidationError(found)) from error


async def _ended(
    generation: Generation, request: Request, parts: Parts, caller: Caller
) -> Generation:
    """The generation once it has succeeded.

    Hanging up cancels it, for only its caller knows of it; with a key the caller can come back.
    """
    id = generation.id
    held = await parts.waiting.hold(generation, caller.tenant, MAX_WAIT_S, request.receive)
    if held is None and "idempotency-key" in request.headers:
        raise errors.StillRunning(f"generation {id} goes on, and its caller is gone")
    if held is None:
        await run_in_threadpool(parts.jobs.cancel, id, caller.tenant)
        raise errors.GenerationCancelled(f"generation {id} was cancelled: its caller is gone")
    generation = held
    match generation.status:
        case Status.SUCCEEDED:
            return generation
        case Status.CANCELLED:
            raise errors.GenerationCancelled(f"generation {id} was cancelled")
        case Status.FAILED:
            problem = generation.error or errors.JobError().problem
            said = f"generation {id} failed: {problem.title}: {problem.detail}"
            raise errors.GenerationFailed(problem=problem.model_copy(update={"detail": said}))
    raise errors.StillRunning(
        f"generation {id} is {generation.status} and goes on: look at /generations/{id} later"
    )


def _answer(generation: Generation, asked: ImagesRequest, base: str, parts: Parts) -> ImagesAnswer:
    request, images = generation.request, generation.images
    kept = [image for image in images if image.blocked is None]
    if not kept:
        seen = {f"{b.check} flagged {b.category}": None for i in images if (b := i.blocked)}
        count = "the image is" if len(images) == 1 else f"all {len(images)} images are"
        said = f"{count} blocked: {', '.join(seen)} (generation {generation.id})"
        raise errors.ImageBlocked(said)

    def data(image: Image) -> ImageData:
        data = ImageData(content_filter_results=_filters(image), prompt_filter_results=_unchecked())
        if asked.response_format == "url" and not asked.stream:
            data.url = f"{base}{image.url}"
        else:
            assert image.sha256 is not None
            key = image_key(generation.id, image.index, image.sha256, request.image_format)
            content = parts.store.get(key)
            data.b64_json = base64.b64encode(content).decode()
        return data

    return ImagesAnswer(
        created=int((generation.finished_at or generation.created_at).timestamp()),
        output_format=request.image_format,
        quality=next((name for name, steps in STEPS.items() if steps == request.steps), None),
        size=f"{kept[0].width}x{kept[0].height}",
        data=[data(image) for image in kept],
        safelatent=Report.model_validate(generation, from_attributes=True),
    )


def _events(answer: ImagesAnswer) -> str:
    """One event an image; each has the report of its own image."""
    common = answer.model_dump(mode="json", exclude={"created", "data"})
    kept = [each for each in common["safelatent"]["images"] if each["blocked"] is None]
    events = []
    for data, image in zip(answer.data, kept, strict=True):
        event = {
            "type": "image_generation.completed",
            "created_at": answer.created,
            **common,
            **data.model_dump(mode="json", exclude={"url"}),
            "safelatent": {**common["safelatent"], "images": [image]},
        }
        events.append(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n")
    return "".join(events)


def _filters(image: Image) -> dict[str, Filter]:
    """Azure's categories, and whatever else a check has flagged under its own name."""
    filters = _unchecked()
    for check in image.safety.checks:
        for category, score in check.scores.items():
            name = _azures(category)
            is_above = score > check.thresholds[category]
            if name not in filters and not is_above:
                continue
            known = filters.get(name)
            if known is None or known.severity != "medium":
                severity: Literal["safe", "medium"] = "medium" if is_above else "safe"
                filters[name] = Filter(severity=severity, checked=True)
    return filters


def _unchecked() -> dict[str, Filter]:
    """Of a prompt nothing is ever judged: safety acts on the image."""
    return {name: Filter() for name in CATEGORIES}


def _azures(category: str) -> str:
    # Stable Diffusion's checker numbers its concepts, and all are sexual (arXiv 2210.04610).
    if category.startswith("concept_"):
        return "sexual"
    return re.sub(r"[\s-]+", "_", category.lower())


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
