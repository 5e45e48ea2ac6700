"""What to do about each type of problem: said by `GET /problems/{slug}` and by the docs."""

from typing import NamedTuple


class Advice(NamedTuple):
    """Markdown, for people."""

    cause: str
    """The usual one."""
    cure: str


ADVICE = {
    "invalid-request": Advice(
        "A field is wrong, or there is no such field.",
        "Read `errors`: each names the field, what would be right, and the value.",
    ),
    "safety-cannot-act": Advice(
        "`guidance_scale` is 1 or less, the warm-up covers all steps, or a concept is the "
        "negative prompt.",
        'Change what `detail` names, or say `"level": "off"` if that is what you want.',
    ),
    "malformed-body": Advice(
        "The body is empty, or not JSON in UTF-8.",
        "Send a JSON object. In a shell, mind the quotes around `-d`.",
    ),
    "malformed-header": Advice(
        "`Prefer`, `Idempotency-Key`, `Last-Event-ID` or another header cannot be read.",
        "`detail` says which, and its form.",
    ),
    "not-acceptable": Advice(
        "`Accept` asks for a form that this request cannot have, such as one picture for `n` of 2.",
        "Ask for JSON and fetch the images by their `url`.",
    ),
    "key-in-use": Advice(
        "Two requests with one `Idempotency-Key` arrived at the same moment.",
        "Send it again shortly; you get the same generation.",
    ),
    "key-reused": Advice(
        "The `Idempotency-Key` was used for another body within 24 hours.",
        "Take a new key for a new request.",
    ),
    "body-too-large": Advice(
        "The body is larger than 1 MiB.",
        "Shorten `metadata` or texts.",
    ),
    "body-too-slow": Advice(
        "The body took longer than 30 s to arrive.",
        "Look at the network or the proxy in between.",
    ),
    "unsupported-media-type": Advice(
        "`Content-Type` is not `application/json`.",
        "Send `-H 'Content-Type: application/json'`.",
    ),
    "method-not-allowed": Advice(
        "The path exists, with other methods.",
        "`Allow` lists them.",
    ),
    "unauthorized": Advice(
        "No key, an unknown one, one that has expired or is revoked.",
        "Send `Authorization: Bearer slk_...`; the operator makes keys with `safelatent key new`.",
    ),
    "bad-signature": Advice(
        "A webhook's call has another secret, was changed, or is more than 5 minutes old.",
        "Check the secret and the clock, and verify the body byte by byte, before any JSON parser.",
    ),
    "forbidden": Advice(
        "The tenant's policy does not allow it.",
        "`errors` names each field and its limit. Ask the operator, or ask for less.",
    ),
    "rate-limited": Advice(
        "The tenant asked for more in a minute than its policy allows.",
        "Wait as long as `Retry-After` says; the client does.",
    ),
    "too-many-queued": Advice(
        "As many generations of the tenant wait as its policy allows.",
        "Wait for some to end, or cancel some.",
    ),
    "not-finished": Advice(
        "The generation still runs, or has no images.",
        "Wait for `status` to be final, then read `error`.",
    ),
    "not-found": Advice(
        "No such id, or another tenant's, or forgotten: 24 hours after its end, or as the tenant's "
        "`retention_s` says. Or Redis has lost it.",
        "Check the id and the key. What Redis lost, send again.",
    ),
    "image-blocked": Advice(
        "A check withholds this picture.",
        "`blocked` of the image says which and why. Another seed may pass.",
    ),
    "internal-error": Advice(
        "A defect of ours.",
        "Find `X-Request-ID` in the log and report it.",
    ),
    "queue-unavailable": Advice(
        "Redis does not answer.",
        "Look at Redis and `REDIS_URL`. Accepted work is not lost.",
    ),
    "queue-full": Advice(
        "As many generations wait as the service takes.",
        "Wait as long as `Retry-After` says; add workers; `SAFELATENT_MAX_QUEUED` is the bound.",
    ),
    "store-unavailable": Advice(
        "The image store does not answer, or refuses.",
        "Look at `SAFELATENT_STORE_URL`, its credentials, the disk.",
    ),
    "not-ready": Advice(
        "No worker holds the default model warm: it still loads, or it has ended.",
        "Read the worker's last line; it says what is missing. `SAFELATENT_MODEL` must be the "
        "same for both.",
    ),
    "overloaded": Advice(
        "The frontend serves as many requests at once as it takes.",
        "Try again shortly; add frontends, or raise `SAFELATENT_MAX_REQUESTS`.",
    ),
    "still-running": Advice(
        "The line was held as long as it may be.",
        "The generation goes on: ask for it by its id.",
    ),
    "no-answer": Advice(
        "The client cannot reach the service.",
        "Check the address, the port, TLS and proxies.",
    ),
    "generation-failed": Advice(
        "It ended as `failed`.",
        "Its cause is one of those below.",
    ),
    "generation-cancelled": Advice(
        "Somebody cancelled it, or hung up where that cancels.",
        "Nothing, or send it again.",
    ),
    "out-of-memory": Advice(
        "The picture does not fit in the worker's memory, even alone.",
        "Choose a smaller size, or a larger device.",
    ),
    "bad-numbers": Advice(
        "The model gave NaN or infinity, mostly in fp16.",
        "Set `SAFELATENT_DTYPE=fp32`, or try another seed or scheduler.",
    ),
    "check-unavailable": Advice(
        "An image check failed.",
        "Read the worker's log. Pictures stay withheld until it works.",
    ),
    "deadline-exceeded": Advice(
        "No worker was free within `deadline_s`.",
        "Add workers, or allow more time.",
    ),
    "worker-crashed": Advice(
        "Three workers ended while it ran.",
        "Read the workers' logs and the kernel's for an out-of-memory kill.",
    ),
}
"""By slug. The branches of the tree of errors have none: they are never answered themselves."""
