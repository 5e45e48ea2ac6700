"""One exchange with the service, without I/O: what is sent, how its answer is read, and when it
is worth another try. Both clients do what this file says."""

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from safelatent import errors
from safelatent.schema import GenerationRequest, Problem

EVENT_STREAM = "text/event-stream"
HOLD_S = 30
"""How long one request holds the line; shorter than proxies do."""
QUIET_S = 45
"""A stream of events that is silent for so long is dead: the service says something each 15 s."""

SHORT_PAUSE_S = 0.25
"""Before the next look where one did not bring the end: a proxy may not let us hold the line."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
PASSING = (429, 502, 503, 504)
"""Statuses that another try may better."""

Answer = TypeVar("Answer")
AnyModel = TypeVar("AnyModel", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """What is sent, and how its answer is read. Every call may be sent again."""

    method: str
    path: str
    read: Callable[[bytes], Answer]
    body: Any = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: int = 0
    """How long the service is asked to hold the line."""
    patient: bool = False
    """Whether it is tried until its deadline, however often: it waits for a job that is queued."""

    def request(self, base_url: str, api_key: str | None) -> dict[str, Any]:
        """What httpx's `build_request` takes. The key goes to the service and to nobody else."""
        base = httpx.URL(base_url.rstrip("/") + "/")
        url = base.join(self.path.lstrip("/"))
        headers = dict(self.headers)
        if api_key and (url.scheme, url.netloc) == (base.scheme, base.netloc):
            headers["Authorization"] = f"Bearer {api_key}"
        if self.wait_s:
            headers["Prefer"] = f"wait={self.wait_s}"
        if self.body is not None:
            headers["Content-Type"] = "application/json"
        return {
            "method": self.method,
            "url": url,
            "headers": headers,
            "params": self.query or None,
            "json": self.body,
        }

    def answer(self, response: httpx.Response) -> Answer:
        """The answer's model, or its problem as an exception."""
        if not response.is_success:
            raise problem_of(response)
        try:
            return self.read(response.content)
        except ValidationError as error:
            said = f"{response.url} is no safelatent service, or of another version: {error}"
            raise errors.ServiceError(said) from error


class Tries:
    """How often one call is tried: at most `retries` times more, and never past its deadline.

    The pause doubles from `FIRST_PAUSE_S` to `LONGEST_PAUSE_S`, with up to half of it taken away
    at random, so that clients which failed together do not come back together. A `Retry-After`
    of the service is kept to instead.
    """

    def __init__(self, call: Call[Any], timeout: float, retries: int):
        self.retries = math.inf if call.patient else retries
        self.made = 0
        self._deadline = time.monotonic() + timeout + call.wait_s

    def left_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def pause_s(self, got: httpx.Response | Exception) -> float | None:
        """How long to pause before the next try; None when this answer is the last."""
        asked = None
        if isinstance(got, httpx.Response):
            asked = retry_after_s(got)
            # 409 with Retry-After: our own first try, which is still being accepted.
            if got.status_code not in PASSING and not (got.status_code == 409 and asked):
                return None
        elif isinstance(got, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.ProtocolError):
            if not isinstance(got, httpx.RemoteProtocolError):
                return None
        if self.made >= self.retries:
            return None
        pause = min(FIRST_PAUSE_S * 2 ** min(self.made, 10), LONGEST_PAUSE_S)
        pause = pause * random.uniform(0.5, 1) if asked is None else asked
        self.made += 1
        return pause if pause < self._deadline - time.monotonic() else None

    def settled(self, response: httpx.Response) -> httpx.Response:
        """The answer, where a 404 after another try means that an earlier one has deleted it."""
        if response.request.method == "DELETE" and response.status_code == 404 and self.made:
            return httpx.Response(204, request=response.request)
        return response


def submission(prompt: str | GenerationRequest, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request. Fields go as they are: the service judges them, and names them."""
    known = {"prompt": prompt} if isinstance(prompt, str) else prompt.model_dump(exclude_unset=True)
    body: dict[str, Any] = to_jsonable_python({**known, **fields})
    if isinstance(body.get("safety"), str):
        body["safety"] = {"level": body["safety"]}
    return body


def listing(
    status: str | None,
    created_after: datetime | None,
    created_before: datetime | None,
    metadata: Mapping[str, str | int | float | bool] | None,
) -> dict[str, str]:
    """The query of a list. Metadata are spelt as JSON has them, text as it is."""
    query = {f"metadata.{name}": value for name, value in (metadata or {}).items()}
    times = {"created_after": created_after, "created_before": created_before}
    query |= {name: when.isoformat() for name, when in times.items() if when}
    query |= {"status": status} if status else {}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in query.items()
    }


def reader(model: type[AnyModel]) -> Callable[[bytes], AnyModel]:
    """Reads a model from JSON. The service may be newer than we are: its new fields are ignored."""
    return lambda content: model.model_validate_json(content, extra="ignore")


def problem_of(response: httpx.Response) -> errors.SafelatentError:
    """The exception that an answer without success stands for, with the id of its request."""
    default = errors.RequestError if response.is_client_error else errors.ServiceError
    try:
        error = errors.from_problem(Problem.model_validate_json(response.content), default)
    except ValidationError:  # of a proxy, say
        error = default(f"{response.url} answered {response.status_code}: {response.text[:200]}")
    error.retry_after_s = retry_after_s(response)
    error.request_id = response.headers.get("X-Request-ID")
    return error


def retry_after_s(response: httpx.Response) -> float | None:
    """Seconds that a `Retry-After` asks for; its other form, a date, is not used by the service."""
    said = response.headers.get("Retry-After", "")
    return float(said) if said.isascii() and said.isdecimal() else None
