"""Everything that can go wrong, as one tree.

SafelatentError
├── RequestError             the caller's fault; the same request would fail again
│   ├── InvalidRequest         422  a field is wrong; `errors` names it
│   │   └── SafetyCannotAct    422  the safety level asked for could not change the image
│   ├── MalformedBody          400  not JSON
│   ├── MalformedHeader        400
│   ├── NotAcceptable          406  the answer cannot have a form that `Accept` asks for
│   ├── KeyInUse               409  the first request with this Idempotency-Key is being accepted
│   ├── KeyReused              422  another request had this Idempotency-Key
│   ├── BodyTooLarge           413
│   ├── BodyTooSlow            408
│   ├── UnsupportedMediaType   415
│   ├── MethodNotAllowed       405
│   ├── Unauthorized           401  no API key, or none that is valid
│   ├── BadSignature           401  a webhook's call is not genuine (`safelatent.webhooks`)
│   ├── Forbidden              403  the tenant's policy does not allow it
│   ├── RateLimited            429  more than the tenant's policy allows in a minute
│   │   └── TooManyQueued      429  as many generations of the tenant wait as its policy allows
│   ├── NotFinished            409  the generation has no images yet, or never will
│   └── NotFound               404
│       └── ImageBlocked       404  a check withholds the image
├── ServiceError             our fault, or nobody's; trying again may help
│   ├── InternalError          500
│   ├── QueueUnavailable       503  Redis does not answer
│   ├── QueueFull              503  as many generations wait as the service takes
│   ├── StoreUnavailable       503  the image store does not answer
│   ├── NotReady               503  no worker holds the default model warm
│   ├── Overloaded             503  the frontend serves as many requests as it takes
│   ├── StillRunning           504  the line was held long enough; the generation goes on
│   └── NoAnswer                    the service could not be reached (client only)
└── JobError                 an accepted generation that did not succeed
    ├── GenerationFailed            raised by the client for status `failed`
    ├── GenerationCancelled         raised by the client for status `cancelled`
    ├── OutOfMemory                 too large for this worker, alone and at its size
    ├── BadNumbers                  the model gave NaN or infinity
    ├── CheckUnavailable            an image check could not judge
    ├── DeadlineExceeded            not started within `deadline_s`
    └── WorkerCrashed               it was running at every one of several worker crashes

Each class has a stable slug and title: an error crosses HTTP and the queue as a `Problem`
(RFC 9457) and becomes the same class again on the other side.
"""

import re

from safelatent.schema import FieldError, Generation, Problem

PROBLEM_TYPE = "/problems/"


class SafelatentError(Exception):
    """Root of the tree; `problem` is the RFC 9457 body."""

    status = 500
    title = "Something went wrong"
    request_id: str | None = None
    """Of the answer that brought it (client only); the service's log has the same."""

    def __init__(
        self,
        detail: str = "",
        *,
        errors: list[FieldError] | None = None,
        problem: Problem | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ):
        self.problem = problem or Problem(
            type=PROBLEM_TYPE + self.slug(),
            title=self.title,
            status=self.status,
            detail=detail,
            errors=errors or [],
        )
        self.retry_after_s = retry_after_s
        self.headers = headers
        super().__init__(self.problem.detail or self.problem.title)

    def __str__(self) -> str:
        said = super().__str__()
        return f"{said} (request {self.request_id})" if self.request_id else said

    @classmethod
    def slug(cls) -> str:
        """The last part of the problem's `type`: QueueUnavailable is `queue-unavailable`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


class RequestError(SafelatentError):
    """The caller's fault."""

    status = 400
    title = "The request cannot be served"


class InvalidRequest(RequestError):
    """A field has a value that cannot be."""

    status = 422
    title = "The request is invalid"


class SafetyCannotAct(InvalidRequest):
    """The safety level asked for could not change the image; it is never dropped silently."""

    title = "The safety level could not act"


class MalformedBody(RequestError):
    """The body is not JSON."""

    title = "The body is not JSON"


class MalformedHeader(RequestError):
    """A header has a value that cannot be."""

    title = "A header cannot be read"


class NotAcceptable(RequestError):
    """The answer cannot have a form that the request's `Accept` asks for."""

    status = 406
    title = "There is no answer in the form that was asked for"


class KeyInUse(RequestError):
    """The first request with this Idempotency-Key is still being accepted; try again shortly."""

    status = 409
    title = "The idempotency key is in use"


class KeyReused(RequestError):
    """The Idempotency-Key belongs to a request that was not the same as this one."""

    status = 422
    title = "The idempotency key was used for another request"


class BodyTooLarge(RequestError):
    """The body is larger than the service reads."""

    status = 413
    title = "The body is too large"


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""

    status = 408
    title = "The body arrives too slowly"


class UnsupportedMediaType(RequestError):
    """The body's Content-Type is not application/json."""

    status = 415
    title = "The media type is not supported"


class MethodNotAllowed(RequestError):
    """There is such a path, but not with this method."""

    status = 405
    title = "The method is not allowed"


class NotFinished(RequestError):
    """The generation has no images: it still goes on, or it did not succeed."""

    status = 409
    title = "The generation has no images"


class Unauthorized(RequestError):
    """The call carries no API key that is known and valid."""

    status = 401
    title = "An API key is needed"


class BadSignature(RequestError):
    """A webhook's call is not signed with the receiver's secret, or is too old."""

    status = 401
    title = "The webhook's call is not genuine"


class Forbidden(RequestError):
    """The tenant's policy does not allow this request."""

    status = 403
    title = "Your policy does not allow this"


class RateLimited(RequestError):
    """More than the tenant's policy allows in a minute; `Retry-After` says when it will do."""

    status = 429
    title = "Too much was asked for in a minute"


class TooManyQueued(RateLimited):
    """As many generations of the tenant wait as its policy allows."""

    title = "Too many of your generations wait"


class NotFound(RequestError):
    """There is no such thing, or not for this caller."""

    status = 404
    title = "Not found"


class ImageBlocked(NotFound):
    """The image was made, and a check withholds it; the generation's `blocked` says which."""

    title = "The image is blocked"


class ServiceError(SafelatentError):
    """The service's fault; the same request may succeed later."""


class InternalError(ServiceError):
    """A defect of the service."""


class QueueUnavailable(ServiceError):
    """Redis does not answer."""

    status = 503
    title = "The queue is unavailable"


class QueueFull(ServiceError):
    """As many generations wait as the service takes; `Retry-After` is when there may be room."""

    status = 503
    title = "The queue is full"


class StoreUnavailable(ServiceError):
    """The image store does not answer."""

    status = 503
    title = "The image store is unavailable"


class NotReady(ServiceError):
    """The service can take no work now: no worker holds the default model warm."""

    status = 503
    title = "The service is not ready"


class Overloaded(ServiceError):
    """The frontend serves as many requests at once as it takes; try again shortly."""

    status = 503
    title = "The service is overloaded"


class StillRunning(ServiceError):
    """The line was held as long as it may be; the generation goes on, and can be looked at."""

    status = 504
    title = "The generation has not ended yet"
    generation: Generation | None = None
    """As it stood (client only)."""


class NoAnswer(ServiceError):
    """The service could not be reached."""

    status = 503
    title = "The service does not answer"


class JobError(SafelatentError):
    """An accepted generation that did not succeed."""

    title = "The generation did not succeed"


class GenerationFailed(JobError):
    """The generation ended as `failed`; `problem` says why, and so does `__cause__` as a class."""

    title = "The generation failed"
    generation: Generation | None = None


class GenerationCancelled(JobError):
    """The generation was cancelled."""

    title = "The generation was cancelled"
    generation: Generation | None = None


class OutOfMemory(JobError):
    """The image does not fit in the worker's memory, even alone."""

    title = "Not enough memory for this image"


class BadNumbers(JobError):
    """The model gave NaN or infinity for this image."""

    title = "The model gave numbers that are no image"


class CheckUnavailable(JobError):
    """An image check could not judge, so the image is withheld."""

    title = "An image check could not judge"


class DeadlineExceeded(JobError):
    """The generation was not started within its `deadline_s`."""

    status = 504
    title = "The deadline passed before a worker was free"


class WorkerCrashed(JobError):
    """The generation was running at every one of several worker crashes."""

    title = "Workers crashed on this generation"


def _tree(root: type[SafelatentError]) -> dict[str, type[SafelatentError]]:
    found = {root.slug(): root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


ERRORS: dict[str, type[SafelatentError]] = _tree(SafelatentError)
"""Every class by its slug."""


def from_problem(problem: Problem, default: type[SafelatentError]) -> SafelatentError:
    """The exception that a problem stands for, by its `type`; `default` for an unknown one."""
    return ERRORS.get(problem.type.removeprefix(PROBLEM_TYPE), default)(problem=problem)
