"""Run the frontend: `python -m service`."""

import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server
from pydantic import ValidationError

from safelatent import logs, traces
from service.app import create_app
from service.parts import Parts
from service.policy import UnusablePolicy
from service.protocol import MAX_HEAD, Protocol
from service.settings import Settings

GRACE_S = 10
KEEP_ALIVE_S = 75
"""Longer than load balancers keep an idle connection: they must not find it closed."""


class Server(uvicorn.Server):
    """uvicorn's, but requests that hold the line answer as soon as it is asked to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        parts: Parts = self.config.loaded_app.app.state.parts
        parts.waiting.release()
        await super().shutdown(sockets)


def configured(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the app."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,  # service/observing.py has a line for each request
        log_config=None,
        server_header=False,
        http=Protocol,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


def main() -> None:
    try:
        settings = Settings()  # type: ignore[call-arg]
        logs.configure(settings.log_level, settings.log_format)
        traces.configure("safelatent-service")
        app = create_app(settings)
        if settings.metrics_port:
            registry = app.state.parts.metrics.registry
            start_http_server(settings.metrics_port, settings.metrics_host, registry)
    except ValidationError as error:
        sys.exit(f"service: {sentence(error)}")
    except (UnusablePolicy, ValueError, OSError) as error:
        sys.exit(f"service: {error}")
    config = configured(app, settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn ends in order and then raises the signal again: having ended is success.
        signal.signal(number, lambda number, frame: None)
    parts: Parts = app.state.parts
    signal.signal(signal.SIGHUP, lambda number, frame: parts.callers.reload())
    Server(config).run()


def sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    variable = name if name.isupper() else f"SAFELATENT_{name.upper()}"
    if first["type"] == "missing":
        return f"{variable} is not set; for example {variable}=redis://127.0.0.1:6379/0"
    if first["type"] == "value_error":  # ours, which names the value unless it is a secret
        return f"{variable}: {first['msg'].removeprefix('Value error, ')}"
    return f"{variable} is {first['input']!r}: {first['msg']}"


if __name__ == "__main__":
    main()
