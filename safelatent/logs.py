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

OURS = ("safelatent", "service", "worker")
"""Where the names of our loggers begin."""


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
        _add_our_extra,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
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


def _add_our_extra(logger: Any, method: str, event: EventDict) -> EventDict:
    """The `extra` of our own lines alone: RQ puts a failed job's arguments, the prompt, there."""
    if event["logger"].partition(".")[0] in OURS:
        return _add_extra(logger, method, event)
    return event


_add_extra = structlog.stdlib.ExtraAdder()
