"""One table from exception to problem (RFC 9457): every error leaves the service through it."""

import json
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from safelatent import errors
from safelatent.errors import SafelatentError
from safelatent.safety import SafetyParameters
from safelatent.schema import FieldError, GenerationRequest, SafetyRequest
from service import openai_errors
from service.observing import note
from service.request_id import HEADER

SHOWN = 200
"""Characters of a wrong value that are echoed."""

MODELS: dict[str, type[BaseModel]] = {
    "": GenerationRequest,
    "safety": SafetyRequest,
    "safety.parameters": SafetyParameters,
}
"""The parts of a request that have fields, by their own path."""


def _as_it_is(error: SafelatentError, request: Request) -> SafelatentError:
    return error


def invalid(error: RequestValidationError, request: Request | None = None) -> SafelatentError:
    """What pydantic found wrong with a body or a path."""
    found: dict[str, tuple[FieldError, str]] = {}
    for each in error.errors():
        kind, path = each["type"], each["loc"]
        if kind == "json_invalid":
            return errors.MalformedBody(
                f"the body is not JSON: {each['ctx']['error']} at character {path[-1]}"
            )
        if path == ("body",) and kind == "missing":
            return errors.MalformedBody(
                "the body is empty: send a JSON object with at least a `prompt`"
            )
        field, message = _field_and_message(each)
        value = None if kind == "missing" else each.get("ctx", {}).get("value", each["input"])
        wrong = FieldError(field=field, message=message, value=_shown(value))
        found.setdefault(field, (wrong, kind))

    # A field that there is not may be the missing one, misspelt: so it is said first.
    in_order = sorted(found.values(), key=lambda each: each[1] == "missing")
    first, kind = in_order[0]
    detail = f"{first.field}: {first.message}"
    if kind not in ("missing", "safety_cannot_act"):
        detail += f" (got {json.dumps(first.value, ensure_ascii=False)})"
    if len(found) > 1:
        detail += f"; {len(found) - 1} more in `errors`"
    kinds = {kind for _, kind in found.values()}
    cls = errors.SafetyCannotAct if kinds == {"safety_cannot_act"} else errors.InvalidRequest
    return cls(detail, errors=[each for each, _ in in_order])


def _field_and_message(each: dict[str, Any]) -> tuple[str, str]:
    """Name the field, and say what would be right, of one of pydantic's errors."""
    where, *path = (str(part) for part in each["loc"])
    if path[:1] == ["metadata"] and len(path) > 2:  # a union: one error for each of its types
        message = "should be text, a finite number, true or false, under a name of 200 characters"
        return _printable(".".join(path[:2])), message
    if named := each.get("ctx", {}).get("field"):  # by a validator of several fields
        path.append(named)
    message = each["msg"].removeprefix("Input ").removeprefix("Value error, ")
    match each["type"]:
        case "extra_forbidden":
            model = MODELS.get(".".join(path[:-1]))
            known = ", ".join(model.model_fields) if model else "none"
            message = f"there is no such field; the fields are: {known}"
        case "missing":
            message = "is required"
        case "model_attributes_type" | "model_type" | "dict_type":
            message = "should be a JSON object"
            if path == ["safety"]:
                message += ', such as {"level": "strong"}'
        case "string_unicode":
            message = "should be valid Unicode, without lone surrogates"
    return _printable(".".join(path) or where), message


def _of_the_router(error: HTTPException, request: Request) -> SafelatentError:
    """What Starlette and FastAPI raise themselves."""
    match error.status_code:
        case HTTPStatus.BAD_REQUEST:
            return errors.MalformedBody("the body is not JSON in UTF-8 that can be read")
        case HTTPStatus.NOT_FOUND:
            path = _printable(request.url.path)
            return errors.NotFound(f"there is nothing at {path}; /openapi.json lists what there is")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(sorted(_methods(request)))
            error.headers = {"Allow": allowed}
            return errors.MethodNotAllowed(
                f"{_printable(request.url.path)} answers {allowed}, not {request.method}"
            )
    return errors.InternalError(f"unexpected status {error.status_code}")


def _methods(request: Request) -> set[str]:
    """What a path answers: all of its routes, of which Starlette names only the first one's."""
    methods = {
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        for route in request.app.router.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    }
    return methods | {"HEAD"} if "GET" in methods else methods


def _defect(error: Exception, request: Request) -> SafelatentError:
    """Anything else. Its traceback goes to the log, and not a word of it to the caller."""
    return errors.InternalError("the service met a defect; its log says more")


TABLE: dict[type[Exception], Callable[[Any, Request], SafelatentError]] = {
    SafelatentError: _as_it_is,
    RequestValidationError: invalid,
    HTTPException: _of_the_router,
    Exception: _defect,
}


def install(app: FastAPI) -> None:
    """Let every error of an app leave by the table."""

    def handler(to_error: Callable[[Any, Request], SafelatentError]) -> Any:
        async def handle(request: Request, raised: Exception) -> Response:
            response = answer(to_error(raised, request), request.url.path)
            response.headers.update(getattr(raised, "headers", None) or {})
            if to_error is _defect:  # uvicorn closes it, and a client should know
                response.headers["Connection"] = "close"
            if id := request.scope.get(
                "request_id"
            ):  # of a defect the answer is made outside of it
                response.headers[HEADER] = id
            return response

        return handle

    for kind, to_error in TABLE.items():
        app.add_exception_handler(kind, handler(to_error))


def answer(error: SafelatentError, path: str) -> Response:
    """The HTTP response of an error, in the dialect of the path that was asked."""
    note(problem=error.slug())
    headers = {"Cache-Control": "no-store"}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, errors.NotAcceptable):
        headers["Vary"] = "Accept, Prefer"
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith(openai_errors.PREFIX):
        return openai_errors.answer(error, headers)
    return Response(
        error.problem.model_dump_json(exclude_unset=True),
        error.problem.status,
        headers,
        "application/problem+json",
    )


Responses = dict[int | str, dict[str, Any]]


def header(description: str, required: bool = True, **schema: Any) -> dict[str, Any]:
    """A header of an answer in OpenAPI."""
    schema = {"type": "string", **schema}
    return {"description": description, "required": required, "schema": schema}


SECONDS = {"type": "integer", "minimum": 0}
HEADERS = {
    401: {"WWW-Authenticate": header("`Bearer`")},
    409: {"Retry-After": header("Seconds to wait", required=False, **SECONDS)},
    503: {"Retry-After": header("Seconds to wait", required=False, **SECONDS)},
}


ANYWHERE: tuple[type[SafelatentError], ...] = (
    errors.MalformedHeader,
    errors.BodyTooLarge,
    errors.BodyTooSlow,
    errors.InternalError,
    errors.Overloaded,
)
"""What every operation can answer."""


def documented(*kinds: type[SafelatentError]) -> Responses:
    """The `responses` of an operation in OpenAPI: these, and what every operation can answer."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    responses: Responses = {}
    for kind in dict.fromkeys((*kinds, *ANYWHERE)):
        before = responses.get(kind.status, {}).get("description")
        responses[kind.status] = {
            "description": f"{before}; or: {kind.title}" if before else kind.title,
            "content": {"application/problem+json": schema},
        }
        if headers := HEADERS.get(kind.status):
            responses[kind.status]["headers"] = headers
    return responses


def _shown(value: Any) -> Any:
    """A wrong value as JSON can carry it, not longer than `SHOWN`."""
    if isinstance(value, str):
        return _printable(value)
    try:
        text = _printable(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:
        return "a value nested too deeply to show"
    return text if text.endswith("…") else json.loads(text, parse_constant=str)


def _printable(text: str) -> str:
    text = text.encode(errors="replace").decode()
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
