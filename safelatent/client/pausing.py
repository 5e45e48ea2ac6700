"""The two things that waiting needs, each for code that blocks and for code that awaits.

anyio comes with httpx, and serves asyncio and trio; it is imported where a loop already runs.
"""

import time
from contextlib import AbstractContextManager, nullcontext

GOODBYE_S = 5
"""How long a caller that leaves waits for the service to take note."""


def sleep(seconds: float) -> None:
    time.sleep(seconds)


async def async_sleep(seconds: float) -> None:
    import anyio

    await anyio.sleep(seconds)


def shield() -> AbstractContextManager[object]:
    return nullcontext()


def async_shield() -> AbstractContextManager[object]:
    """A block that runs to its end, or for `GOODBYE_S`, although its task was cancelled."""
    import anyio

    return anyio.move_on_after(GOODBYE_S, shield=True)
