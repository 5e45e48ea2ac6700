"""An error as OpenAI's clients read it. Which error it is, and what it says, `problems` decides."""

from pydantic import BaseModel
from starlette.responses import Response

from safelatent import errors
from safelatent.errors import PROBLEM_TYPE, SafelatentError
from safelatent.schema import FieldError

PREFIX = "/v1/"
"""Under this path every error has OpenAI's shape."""

CODES = {
    "unauthorized": "invalid_api_key",
    "invalid-request": "invalid_value",
    "image-blocked": "moderation_blocked",
    "rate-limited": "rate_limit_exceeded",
    "too-many-queued": "rate_limit_exceeded",
}
"""OpenAI's own words where they have one; the others are the problem's slug."""

FINAL = (errors.JobError, errors.StoreUnavailable, errors.StillRunning)
"""The package repeats a 5xx by itself, and after these each repeat would be one more generation."""


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    """The first parameter that is wrong."""
    code: str
    errors: list[FieldError]
    """All that is wrong; `param` and `message` are of the first."""


class ErrorBody(BaseModel):
    error: Error


def answer(error: SafelatentError, headers: dict[str, str]) -> Response:
    """The HTTP response of an error, with OpenAI's statuses: 400 is what a caller can mend."""
    problem = error.problem
    slug = problem.type.removeprefix(PROBLEM_TYPE)
    status = 400 if slug == "image-blocked" or problem.status == 422 else problem.status
    body = Error(
        message=problem.detail or problem.title,
        type=_type(slug, status),
        param=problem.errors[0].field if problem.errors else None,
        code=CODES.get(slug, slug.replace("-", "_")),
        errors=problem.errors,
    )
    if isinstance(error, FINAL):
        headers["X-Should-Retry"] = "false"
    content = ErrorBody(error=body).model_dump_json()
    return Response(content, status, headers, "application/json")


def _type(slug: str, status: int) -> str:
    if slug == "image-blocked":
        return "image_generation_user_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
