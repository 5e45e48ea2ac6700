"""How fast a worker is while it has work: what ETAs are told by."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from safelatent.forecast import Pace
from worker.engine import Image

REMEMBERED_S = 10
"""Busy seconds that the means reach back over."""


class Meter:
    """Counts megapixel-steps, and the seconds in which there was something to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work = 0.0
        self._busy_s = 0.0
        self._held_s = 0.0
        """Of all generations together: eight at once for a second are eight seconds."""
        self._held = 0
        self._seen_at = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While a generation is in hand, from its claim until its result is stored."""
        self._change(+1)
        try:
            yield
        finally:
            self._change(-1)

    def count(self, images: Sequence[Image]) -> None:
        """These images have taken a step, which may be less or more than a call of the denoiser."""
        work = 0.0
        for image in images:
            spec = image.spec
            work += spec.width * spec.height / 1e6 * spec.steps / image.calls
        with self._lock:
            self._work += work

    def pace(self, slots: int) -> Pace:
        """The means as they stand."""
        with self._lock:
            self._tick()
            keep = min(1.0, REMEMBERED_S / self._busy_s) if self._busy_s else 1.0
            self._work *= keep
            self._busy_s *= keep
            self._held_s *= keep
            if not self._held_s:
                return Pace(0.0, 0.0, slots)
            return Pace(self._work / self._busy_s, self._work / self._held_s, slots)

    def _change(self, by: int) -> None:
        with self._lock:
            self._tick()
            self._held += by

    def _tick(self) -> None:
        now = time.monotonic()
        self._busy_s += (now - self._seen_at) if self._held else 0.0
        self._held_s += (now - self._seen_at) * self._held
        self._seen_at = now
