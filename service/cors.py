"""Which web pages of other origins may call the service: none, unless the operator names them."""

import re

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

ORIGIN = re.compile(r"\*|https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")

SENT = [
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-None-Match",
    "Last-Event-ID",
    "Prefer",
    "Traceparent",
    "X-Request-ID",
]
READ = [
    "ETag",
    "Link",
    "Location",
    "Preference-Applied",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "Safelatent-Id",
    "Safelatent-Safety-Applied",
    "Safelatent-Safety-Level",
    "Safelatent-Seed",
    "Safelatent-Status",
    "X-Request-ID",
]


def install(app: FastAPI, origins: tuple[str, ...]) -> None:
    """Let pages of these origins call the app.

    Credentials in the browser's sense (cookies) are never allowed: a page sends its API key
    itself, so that `*` gives no page what the user's browser holds.
    """
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=SENT,
            expose_headers=READ,
            allow_credentials=False,
            max_age=600,
        )
