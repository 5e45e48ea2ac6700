"""Webhooks by Standard Webhooks (https://www.standardwebhooks.com): what is sent, and whether it
is genuine.

A receiver needs one call:

    generation = webhooks.verify(body, headers, secret)
"""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from safelatent import errors
from safelatent.schema import Generation

PREFIX = "whsec_"
TOLERANCE_S = 300
"""How far a call's timestamp may be from the receiver's clock."""


class Event(BaseModel):
    """The body of a webhook's call. `type` repeats the generation's status."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: Literal["generation.succeeded", "generation.failed", "generation.cancelled"]
    timestamp: datetime
    """When the generation ended."""
    data: Generation
    """As `GET /generations/{id}` answers it; images are links."""


def verify(
    body: bytes, headers: Mapping[str, str], secret: str | Iterable[str], now: float | None = None
) -> Generation:
    """The generation that a call tells of; raises BadSignature unless the call is genuine.

    `body` is the bytes as they came, `headers` any mapping, `secret` one `whsec_...` or several of
    which one must fit. The same call can come twice: its `webhook-id` header is the same then.
    """
    keys = [key_of(each) for each in ([secret] if isinstance(secret, str) else secret)]
    sent = {name.lower(): value for name, value in headers.items()}
    try:
        id, timestamp, signatures = (
            sent[f"webhook-{part}"] for part in ("id", "timestamp", "signature")
        )
    except KeyError as error:
        raise errors.BadSignature(f"the header {error} is missing") from None
    if not timestamp.isascii() or not timestamp.isdecimal() or len(timestamp) > 12:
        raise errors.BadSignature("the header webhook-timestamp is no time in seconds")
    expected = [_signature(id, timestamp, body, key).encode() for key in keys]
    # Every pair is compared, so that the time taken tells nothing.
    matches = [
        hmac.compare_digest(given.encode(), one)
        for given in signatures.split(" ")
        for one in expected
    ]
    if not any(matches):
        raise errors.BadSignature("no signature fits the secret: is it the right one?")
    if abs((time.time() if now is None else now) - int(timestamp)) > TOLERANCE_S:
        raise errors.BadSignature(f"the call is more than {TOLERANCE_S} s old, or from the future")
    try:
        return Event.model_validate_json(body).data
    except ValidationError as error:
        raise errors.BadSignature(f"the call is signed, and no event that is known: {error}") from (
            error
        )


def signed(
    id: str, body: bytes, secrets: Iterable[str], now: float | None = None
) -> dict[str, str]:
    """The headers of a call: signed once with each secret, so that secrets can be changed."""
    timestamp = str(int(time.time() if now is None else now))
    signatures = [_signature(id, timestamp, body, key_of(secret)) for secret in secrets]
    return {
        "webhook-id": id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(signatures),
    }


def key_of(secret: str) -> bytes:
    """The bytes of a `whsec_...`; ValueError, which does not show it, if it is none.

    Standard Webhooks asks for 24 to 64 random bytes.
    """
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(PREFIX) or not 24 <= len(key) <= 64:
        raise ValueError(
            "a webhook secret is 'whsec_' and 24 to 64 random bytes in base64: "
            'echo "whsec_$(openssl rand -base64 32)" makes one'
        )
    return key


def _signature(id: str, timestamp: str, body: bytes, key: bytes) -> str:
    message = f"{id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, message, hashlib.sha256)).decode()
