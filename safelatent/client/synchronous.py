"""The client for code that blocks.

Made from asynchronous.py by `python tools/unasync.py`; write there, and never here.
"""

import builtins
import math
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import httpx
from pydantic import ConfigDict, PrivateAttr, TypeAdapter

from safelatent import errors, schema
from safelatent.client import sse
from safelatent.client.events import (
    Event,
    Finished,
    ImageStored,
    Queued,
    Snapshot,
    Started,
    Step,
)
from safelatent.client.exchange import (
    EVENT_STREAM,
    HOLD_S,
    QUIET_S,
    SHORT_PAUSE_S,
    Call,
    Tries,
    listing,
    problem_of,
    reader,
    submission,
)
from safelatent.client.fields import RequestFields
from safelatent.client.pausing import GOODBYE_S, shield, sleep
from safelatent.client.rendering import Picture, Shown
from safelatent.schema import Capabilities, GenerationRequest, LoadedModel, Progress, Status

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

DEFAULT_URL = "http://127.0.0.1:8000"
MODELS = TypeAdapter(list[LoadedModel], config=ConfigDict(defer_build=True))

Answer = TypeVar("Answer")


class Image(Picture):
    """An image of a generation, with its bytes in reach."""

    _client: "Client | None" = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._client = (context or {}).get("client")

    def bytes(self) -> builtins.bytes:
        """The encoded image, fetched once. Raises `ImageBlocked` when a check withholds it.

        >>> content = generation.images[0].bytes()
        >>> content[:4]
        b'\\x89PNG'
        """
        if self.blocked or self.url is None:
            raise errors.ImageBlocked(f"image {self.index} is blocked: {self.why_blocked}")
        if self._content is None:
            self._content = _bound(self._client)._send(Call("GET", self.url, bytes))
        return self._content

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the image to a file, in the `image_format` of its request.

        >>> generation.images[0].save("cat.png")
        PosixPath('cat.png')
        """
        content = self.bytes()
        Path(path).write_bytes(content)
        return Path(path)

    def pil(self) -> "PillowImage":
        """The image as Pillow's, which must be installed.

        >>> picture = generation.images[0].pil()
        >>> picture.size
        (64, 32)
        """
        return self._opened(self.bytes())

    def heatmap(self) -> builtins.bytes:
        """Where safety acted, as a small PNG; for `safety={"telemetry": "heatmap"}` only.

        >>> generation = client.generate("a cat", safety={"telemetry": "heatmap"})
        >>> content = generation.images[0].heatmap()
        >>> content[:4]
        b'\\x89PNG'
        """
        url = self.safety.heatmap_url
        if url is None:
            raise errors.NotFound(
                f"image {self.index} has no heat map: ask with safety.telemetry 'heatmap'; there "
                "is none either where safety did not act"
            )
        return _bound(self._client)._send(Call("GET", url, bytes))


class Generation(Shown):
    """A generation, from the queue to its images. In a notebook it shows them."""

    images: list[Image] = []  # type: ignore[assignment]
    _client: "Client | None" = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._client = (context or {}).get("client")

    def wait(self, *, timeout: float | None = None) -> Self:
        """Wait until the status is final, whichever that is; this object is then up to date.

        >>> generation = client.submit("a cat on the moon", seed=7)
        >>> generation.wait()
        Generation('...', succeeded, 1 image)
        """
        return self._become(_bound(self._client).wait(self.id, timeout=timeout))

    def cancel(self) -> Self:
        """Cancel it. A running one ends within a step; one that has ended stays as it is.

        >>> generation = client.submit("an endless staircase")
        >>> cancelled = generation.cancel()
        >>> cancelled.wait()
        Generation('...', cancelled)
        """
        return self._become(_bound(self._client).cancel(self.id))

    def raise_for_status(self) -> Self:
        """The generation, unless it failed or was cancelled: that is raised.

        >>> generation.raise_for_status()
        Generation('...', succeeded, 1 image)
        """
        if self.status is Status.CANCELLED:
            cancelled = errors.GenerationCancelled(f"generation {self.id} was cancelled")
            cancelled.generation = self
            raise cancelled
        if self.status is Status.FAILED:
            problem = self.error or errors.JobError().problem
            said = f"generation {self.id} failed: {problem.title}: {problem.detail}"
            failed = errors.GenerationFailed(problem=problem.model_copy(update={"detail": said}))
            failed.generation = self
            raise failed from errors.from_problem(problem, errors.JobError)
        return self

    def _become(self, newer: schema.Generation) -> Self:
        for field in type(self).model_fields:
            setattr(self, field, getattr(newer, field))
        return self


class Page(schema.GenerationPage):
    model_config = ConfigDict(defer_build=True)
    data: list[Generation]  # type: ignore[assignment]


class Client:
    """A safelatent service.

    >>> from safelatent import Client
    >>> with Client(url) as client:
    ...     generation = client.generate("a cat on the moon", seed=7, safety="strong")
    >>> generation.images[0].seed
    7

    `base_url` is SAFELATENT_URL when not given, else this machine's port 8000; `api_key` is
    SAFELATENT_API_KEY when not given, else none is sent. `timeout` is in seconds and for one
    exchange with the service with all its tries, not for a whole generation. What may succeed
    later (no connection, status 429, 502, 503, 504) is tried up to `max_retries` times more, as
    `Retry-After` says or with growing pauses; the client sends an `Idempotency-Key` with each
    new generation, so that none is made twice. `http_client` is your own `httpx.Client`,
    for proxies, certificates or tests; this one closes it.

    Errors are those of `safelatent.errors`: a RequestError is the caller's fault, a ServiceError
    may pass, a JobError is a generation that was accepted and did not succeed.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30,
        max_retries: int = 3,
        http_client: httpx.Client | None = None,
    ):
        self.base_url = base_url or os.environ.get("SAFELATENT_URL") or DEFAULT_URL
        self.timeout = timeout
        self.max_retries = max_retries
        self._api_key = api_key or os.environ.get("SAFELATENT_API_KEY")
        self._http = http_client or httpx.Client()

    def generate(
        self,
        prompt: str | GenerationRequest,
        *,
        on_event: Callable[[Event[Generation, Image]], object] | None = None,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> Generation:
        """Submit, wait, and return the generation with its images.

        >>> generation = client.generate("a cat on the moon", seed=7, safety="strong")
        >>> generation.safety.effective.applied
        True

        `fields` are those of `GenerationRequest`; `on_event` hears what `events` tells. Raises
        `GenerationFailed` or `GenerationCancelled`, and after `timeout` seconds `StillRunning`:
        the generation then goes on, and is in the error. But when the caller leaves, by Ctrl-C or
        because its task is cancelled, the generation is cancelled: nobody else would know it.
        `submit` makes one that outlives its caller.
        """
        deadline = _deadline(timeout)
        generation = self.submit(prompt, idempotency_key=idempotency_key, **fields)
        try:
            if on_event and not generation.status.is_terminal:
                left_s = _left_s(deadline)
                with closing(self.events(generation.id, timeout=left_s)) as events:
                    for event in events:
                        on_event(event)
            return (generation.wait(timeout=_left_s(deadline))).raise_for_status()
        except errors.SafelatentError:
            raise
        except BaseException:
            with shield(), suppress(errors.SafelatentError):
                cancelling = Call("POST", f"/generations/{generation.id}/cancel", bytes)
                self._send(cancelling, timeout=GOODBYE_S)
            raise

    def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        idempotency_key: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> Generation:
        """Queue a generation and return at once.

        >>> generation = client.submit("a cat on the moon", n=4)
        >>> generation.status
        <Status.QUEUED: 'queued'>

        An `idempotency_key` of your own makes it safe to submit the same again, even from another
        process: within 24 hours it gives the same generation.
        """
        key = idempotency_key or os.urandom(16).hex()
        return self._send(
            Call(
                "POST",
                "/generate",
                self._generation,
                body=submission(prompt, fields),
                headers={"Idempotency-Key": key},
            )
        )

    def get(self, id: str) -> Generation:
        """The generation as it stands.

        >>> client.get(generation.id)
        Generation('...', succeeded, 1 image)
        """
        return self._send(Call("GET", f"/generations/{id}", self._generation))

    def wait(self, id: str, *, timeout: float | None = None) -> Generation:
        """The generation once its status is final, whichever that is.

        >>> generation = client.submit("a cat on the moon")
        >>> done = client.wait(generation.id, timeout=60)
        >>> done.status
        <Status.SUCCEEDED: 'succeeded'>

        After `timeout` seconds it raises `StillRunning`. It goes on while the service is away for
        a shorter time than the client's own `timeout`.
        """
        deadline = _deadline(timeout)
        while True:
            wait_s = math.ceil(min(_left_s(deadline), HOLD_S))
            path = f"/generations/{id}"
            try:
                generation = self._send(
                    Call("GET", path, self._generation, wait_s=wait_s, patient=True)
                )
            except errors.ServiceError as error:
                error.add_note(f"generation {id} is not lost: ask for it again later")
                raise
            if generation.status.is_terminal:
                return generation
            if not _left_s(deadline):
                said = (
                    f"its timeout has passed; generation {id} is {generation.status}, and goes on"
                )
                still = errors.StillRunning(said)
                still.generation = generation
                raise still
            sleep(SHORT_PAUSE_S)

    def events(
        self, id: str, *, last_event_id: str | None = None, timeout: float | None = None
    ) -> Generator[Event[Generation, Image]]:
        """What a generation tells, until its end: a `Snapshot`, `Queued` when its place changes,
        `Started`, `Step`s, `ImageStored` for each image, and `Finished`.

        >>> for event in client.events(generation.id):
        ...     print(type(event).__name__)
        Snapshot
        Finished

        A broken line is taken up again where it broke. An event's `id` as `last_event_id` goes on
        after it: who has seen the end gets nothing. After `timeout` seconds it just ends.
        """
        deadline = _deadline(timeout)
        seen = last_event_id
        while _left_s(deadline):
            headers = {"Accept": EVENT_STREAM} | ({"Last-Event-ID": seen} if seen else {})
            call = Call("GET", f"/generations/{id}/events", bytes, headers=headers, patient=True)
            response = self._exchange(call, stream=True)
            try:
                if not response.is_success:
                    raise problem_of(response)
                if response.status_code == 204:
                    return
                if not response.headers["Content-Type"].startswith(EVENT_STREAM):
                    raise errors.ServiceError(f"{response.url} is no stream of events")
                # The answer has begun; how long its next piece may take is ours to say anew.
                response.request.extensions["timeout"]["read"] = min(QUIET_S, _left_s(deadline))
                parser = sse.Parser()
                for chunk in response.iter_bytes():
                    if not _left_s(deadline):
                        return
                    for message in parser.feed(chunk):
                        seen = message.id or seen
                        if event := self._event(message):
                            yield event
                        if isinstance(event, Finished):
                            return
                    if chunk.startswith(b":") and _left_s(deadline) < QUIET_S:
                        break  # nothing happens, and the next piece may come too late
            except httpx.TransportError:
                pass  # the line broke, or was silent for too long
            finally:
                response.close()
            sleep(SHORT_PAUSE_S)

    def cancel(self, id: str) -> Generation:
        """Cancel a generation. A running one ends within a step; one that has ended stays.

        >>> generation = client.submit("an endless staircase")
        >>> cancelled = client.cancel(generation.id)
        >>> cancelled.wait()
        Generation('...', cancelled)
        """
        return self._send(Call("POST", f"/generations/{id}/cancel", self._generation))

    def delete(self, id: str) -> None:
        """Remove a generation with its images, report and events; a running one is cancelled.

        >>> client.delete(generation.id)
        """
        self._send(Call("DELETE", f"/generations/{id}", bytes))

    def list(
        self,
        *,
        status: Status | str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        metadata: dict[str, str | int | float | bool] | None = None,
    ) -> Generator[Generation]:
        """Your generations of the last 24 hours, newest first; pages are fetched as you go.

        >>> for generation in client.list(status="succeeded", metadata={"user": "u-17"}):
        ...     print(generation.request.prompt)
        a cat for u-17
        """
        query = listing(status, created_after, created_before, metadata)
        while True:
            page = self._send(Call("GET", "/generations", self._page, query=query))
            yield from page.data
            if page.next is None:
                return
            query["cursor"] = page.next

    def image(self, id: str, index: int = 0) -> bytes:
        """The encoded bytes of an image, by the id of its generation.

        >>> content = client.image(generation.id)
        >>> content[:4]
        b'\\x89PNG'
        """
        return self._send(Call("GET", f"/generations/{id}/images/{index}", bytes))

    def models(self) -> builtins.list[LoadedModel]:
        """The models that can be asked for.

        >>> for model in client.models():
        ...     print(model.id, model.width, model.height, model.workers)
        tiny 64 32 1
        """
        return self._send(Call("GET", "/models", MODELS.validate_json))

    def capabilities(self) -> Capabilities:
        """What you may ask of this service: limits, levels, schedulers, features.

        >>> capabilities = client.capabilities()
        >>> capabilities.limits["n"], list(capabilities.levels)
        (8, ['off', 'weak', 'medium', 'strong', 'max', 'custom'])
        """
        return self._send(Call("GET", "/capabilities", reader(Capabilities)))

    def close(self) -> None:
        """Close the connections; a `with` block does it by itself.

        >>> client = Client()
        >>> client.close()
        """
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

    def _send(self, call: Call[Answer], timeout: float | None = None) -> Answer:
        return call.answer(self._exchange(call, timeout=timeout))

    def _exchange(
        self, call: Call[Any], *, stream: bool = False, timeout: float | None = None
    ) -> httpx.Response:
        """Send until there is an answer that another try would not better."""
        tries = Tries(call, timeout or self.timeout, self.max_retries)
        options = call.request(self.base_url, self._api_key)
        while True:
            left_s = tries.left_s()
            limits = httpx.Timeout(left_s, read=QUIET_S if stream else left_s)
            try:
                response = self._http.send(
                    self._http.build_request(**options, timeout=limits), stream=stream
                )
                if stream and not response.is_success:
                    response.read()
            except (httpx.TransportError, httpx.InvalidURL) as error:
                if (pause_s := tries.pause_s(error)) is None:
                    said = f"{self.base_url} does not answer: {str(error) or type(error).__name__}"
                    raise errors.NoAnswer(said) from error
            else:
                if (pause_s := tries.pause_s(response)) is None:
                    return tries.settled(response)
            sleep(pause_s)

    def _generation(self, content: bytes) -> Generation:
        # The service may be newer than we are: its new fields are not for us.
        return Generation.model_validate_json(content, extra="ignore", context={"client": self})

    def _page(self, content: bytes) -> Page:
        return Page.model_validate_json(content, extra="ignore", context={"client": self})

    def _event(self, message: sse.Message) -> Event[Generation, Image] | None:
        data = message.data.encode()
        match message.event:
            case "snapshot":
                return Snapshot(self._generation(data), message.id)
            case "queued":
                place = schema.Place.model_validate_json(data)
                return Queued(place.position, place.eta_s, message.id)
            case "started":
                started = schema.Started.model_validate_json(data)
                return Started(started.started_at, message.id)
            case "step":
                progress = Progress.model_validate_json(data)
                return Step(progress.step, progress.steps, message.id)
            case "image":
                image = Image.model_validate_json(data, extra="ignore", context={"client": self})
                return ImageStored(image, message.id)
            case "finished":
                return Finished(self._generation(data), message.id)
        return None  # of a newer service


def _deadline(timeout: float | None) -> float:
    """By `time.monotonic`."""
    return time.monotonic() + (math.inf if timeout is None else timeout)


def _left_s(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0)


def _bound(client: Client | None) -> Client:
    if client is None:
        raise RuntimeError("this was not fetched by a client: get it by its id from one")
    return client
