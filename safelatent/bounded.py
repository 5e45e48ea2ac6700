"""A bound on what a label of a metric can say: names that come from outside are without number."""

import threading

OTHER = "other"


class Bounded:
    """The first `limit` values as they are, and every later one as "other"."""

    def __init__(self, limit: int):
        self.limit = limit
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, value: str | None) -> str:
        value = value or OTHER
        if value not in self._known:
            with self._lock:
                if len(self._known) >= self.limit:
                    return OTHER
                self._known.add(value)
        return value
