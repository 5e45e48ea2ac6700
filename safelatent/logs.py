"""The log of the service and of the worker: every line is a record with fields, in one format.

Code logs with the standard library, and fields go into `extra`. structlog only writes them down:
so the lines of uvicorn, RQ and every other library look like ours.
"""

import logging
import sys
from typing import Annotated, Any, Literal

import structlog
from pydantic import BeforeValidator
from structlog.contextvars import bind_contextvars as bind
from structlog.contextvars import bound_contextvars as bound
from structlog.contextvars import get_contextvars as fields
from structlog.typing import EventDict

__all__ = ["Format", "Level", "bind", "bound", "configure", "fields", "formatter"]

Level = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR"],
    BeforeValidator(lambda level: level.upper() if isinstance(level, str) else level),
]
Format = Literal["json", "console"]


def configure(level: str = "INFO", format: Format | None = None) -> None:
    """Send every line to stderr: `json`, one object each, or `console`, for people.

    By default it is `console` on a terminal and `json` elsewhere.
    """
    is_terminal = sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stderr)
    default: Format = "console" if is_terminal else "json"
    handler.setFormatter(formatter(format or default, colours=is_terminal))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)


def formatter(format: Format, colours: bool = False) -> logging.Formatter:
    """What writes a record down; the fields that `bound` holds in its thread or task come along."""
    common: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        _without_colours,
    ]
    if format == "json":
        last: list[Any] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        plain = structlog.dev.plain_traceback  # a rich one would show the values of variables
        last = [
            structlog.dev.ConsoleRenderer(
                colors=colours, timestamp_key="at", exception_formatter=plain
            )
        ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=common,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )


def _without_colours(logger: object, method: str, event: EventDict) -> EventDict:
    """uvicorn sends each message twice, the second time with colours."""
    event.pop("color_message", None)
    return event
