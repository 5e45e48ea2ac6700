"""The client: a prompt in, images and a safety report out.

    with Client() as client:
        generation = client.generate("a cat on the moon", seed=7)
        generation.images[0].save("cat.png")
        print(generation.safety)

Errors are those of `safelatent.errors`, as the service raised them.
"""

import builtins
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx
from pydantic import PrivateAttr, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from safelatent import errors, schema
from safelatent.schema import GenerationRequest, LoadedModel, Status

DEFAULT_URL = "http://127.0.0.1:8000"
HOLD_S = 30
"""How long one request holds the line; shorter than proxies do."""
PATIENCE_S = 30
"""How long a wait goes on while the service or its Redis is away."""

Answer = TypeVar("Answer")


class Image(schema.Image):
    """An image of a generation, with its bytes in reach."""

    _fetch: Callable[[str], builtins.bytes] = PrivateAttr()

    def bytes(self) -> builtins.bytes:
        """The encoded image. Raises `ImageBlocked` when a check withholds it."""
        if self.blocked or self.url is None:
            why = self.blocked and f"{self.blocked.check} flagged {self.blocked.category}"
            raise errors.ImageBlocked(f"image {self.index} is blocked: {why or 'it has no url'}")
        return self._fetch(self.url)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the image to a file; its format is the request's `image_format`."""
        content = self.bytes()
        Path(path).write_bytes(content)
        return Path(path)


class Generation(schema.Generation):
    """A generation, with its images in reach."""

    images: list[Image] = []  # type: ignore[assignment]


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One exchange with the service: what is sent, and how its answer is read. No I/O."""

    method: str
    path: str
    read: Callable[[builtins.bytes], Answer]
    body: Any = None
    wait_s: int = 0

    def options(self, timeout: float) -> dict[str, Any]:
        """What httpx's `request` takes beside method and path."""
        options: dict[str, Any] = {"timeout": timeout + self.wait_s, "headers": {}}
        if self.body is not None:
            options["json"] = self.body
        if self.wait_s:
            options["headers"]["Prefer"] = f"wait={self.wait_s}"
        return options

    def answer(self, response: httpx.Response) -> Answer:
        """The answer's model, or its problem as an exception."""
        if not response.is_success:
            raise _error(response)
        try:
            return self.read(response.content)
        except ValidationError as error:
            said = f"{response.url} is no safelatent service, or of another version: {error}"
            raise errors.ServiceError(said) from error


def submit_call(asked: str | GenerationRequest, fields: dict[str, Any]) -> Call[Generation]:
    """Fields go as they are: the service judges them, and its errors name them."""
    known = {"prompt": asked} if isinstance(asked, str) else asked.model_dump(exclude_unset=True)
    return Call("POST", "/generate", _generation, to_jsonable_python({**known, **fields}))


def look_call(id: str, wait_s: int = 0) -> Call[Generation]:
    return Call("GET", f"/generations/{id}", _generation, wait_s=wait_s)


def cancel_call(id: str) -> Call[Generation]:
    return Call("POST", f"/generations/{id}/cancel", _generation)


MODELS_CALL = Call("GET", "/models", TypeAdapter(list[LoadedModel]).validate_json)


def succeeded(generation: Generation) -> Generation:
    """The generation, or the exception that a `failed` or `cancelled` one stands for."""
    if generation.status is Status.CANCELLED:
        cancelled = errors.GenerationCancelled(f"generation {generation.id} was cancelled")
        cancelled.generation = generation
        raise cancelled
    if generation.status is Status.FAILED:
        problem = generation.error or errors.JobError().problem
        said = f"generation {generation.id} failed: {problem.title}: {problem.detail}"
        failed = errors.GenerationFailed(problem=problem.model_copy(update={"detail": said}))
        failed.generation = generation
        raise failed from errors.from_problem(problem, errors.JobError)
    return generation


class Client:
    """A safelatent service. `timeout` is for one exchange, not for a whole generation.

    `base_url` is SAFELATENT_URL when not given, else this machine's port 8000; `api_key` is
    SAFELATENT_API_KEY when not given, else none is sent; `http` is your own `httpx.Client`, for
    proxies, headers or tests.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        http: httpx.Client | None = None,
        timeout: float = 30,
    ):
        self.base_url = base_url or os.environ.get("SAFELATENT_URL") or DEFAULT_URL
        self.timeout = timeout
        self._http = http or httpx.Client()
        api_key = api_key or os.environ.get("SAFELATENT_API_KEY")
        self._authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def generate(self, prompt: str | GenerationRequest, **fields: Any) -> Generation:
        """Submit, wait, and return the generation with its images.

        `fields` are those of `GenerationRequest`. Raises `GenerationFailed` or
        `GenerationCancelled`; Ctrl-C cancels the generation.
        """
        generation = self.submit(prompt, **fields)
        try:
            return succeeded(self.wait(generation.id))
        except KeyboardInterrupt:
            with suppress(errors.SafelatentError):
                self.cancel(generation.id)
            raise

    def submit(self, prompt: str | GenerationRequest, **fields: Any) -> Generation:
        """Queue a generation and return at once."""
        return self._send(submit_call(prompt, fields))

    def get(self, id: str) -> Generation:
        """The generation as it stands."""
        return self._send(look_call(id))

    def wait(self, id: str) -> Generation:
        """The generation once its status is final, whichever that is."""
        away_since: float | None = None
        while True:
            try:
                generation = self._send(look_call(id, HOLD_S))
                away_since = None
                if generation.status.is_terminal:
                    return generation
            except (errors.QueueUnavailable, errors.NoAnswer) as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > PATIENCE_S:
                    error.add_note(f"generation {id} is not lost: ask for it again later")
                    raise
                time.sleep(error.retry_after_s or 1)

    def cancel(self, id: str) -> Generation:
        """Cancel a generation; one that has ended stays as it is."""
        return self._send(cancel_call(id))

    def models(self) -> list[LoadedModel]:
        """The models that can be asked for."""
        return self._send(MODELS_CALL)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, call: Call[Answer]) -> Answer:
        url = httpx.URL(self.base_url.rstrip("/") + "/").join(call.path.lstrip("/"))
        options = call.options(self.timeout)
        options["headers"] |= self._authorization
        try:
            response = self._http.request(call.method, url, **options)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise errors.NoAnswer(f"{self.base_url} does not answer: {error}") from error
        answer = call.answer(response)
        if isinstance(answer, Generation):
            for image in answer.images:
                image._fetch = self._bytes
        return answer

    def _bytes(self, url: str) -> bytes:
        return self._send(Call("GET", url, bytes))


def _generation(content: bytes) -> Generation:
    # The service may be newer than we are: its new fields are not for us.
    return Generation.model_validate_json(content, extra="ignore")


def _error(response: httpx.Response) -> errors.SafelatentError:
    default = errors.RequestError if response.is_client_error else errors.ServiceError
    try:
        problem = schema.Problem.model_validate_json(response.content)
    except ValidationError:  # of a proxy, say
        said = f"{response.url} answered {response.status_code}: {response.text[:200]}"
        return default(said)
    error = errors.from_problem(problem, default)
    retry_after = response.headers.get("Retry-After", "")
    error.retry_after_s = float(retry_after) if retry_after.isdecimal() else None
    return error
