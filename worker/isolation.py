"""Who runs beside whom: generations run together, but a suspect of a crash runs alone."""

import threading


class Isolation:
    """A suspect waits until nothing else runs; whoever comes later waits behind it.

    A thread keeps its place until the end of its generation is written. Left any sooner, the next
    suspect could end the process in between, and a generation that was made already would have to
    be made again, at the cost of an attempt.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[int] = set()
        """Threads whose generation runs, or has run and is not written yet."""
        self._suspects: set[int] = set()
        """Threads whose generation runs alone, or waits for that."""

    def enter(self, alone: bool) -> None:
        """Wait until this thread's generation may run. `leave` follows, whatever is raised here."""
        me = threading.get_ident()
        with self._changed:
            if alone:
                self._suspects.add(me)
            while (self._inside if alone else self._suspects) - {me}:
                self._changed.wait(0.5)  # in short waits, for RQ's timeout to be raised in
            self._inside.add(me)

    def leave(self) -> None:
        """Make way for others. A thread that is not inside may call it too."""
        me = threading.get_ident()
        with self._changed:
            self._inside.discard(me)
            self._suspects.discard(me)
            self._changed.notify_all()
