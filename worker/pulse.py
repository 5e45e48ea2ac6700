"""What the GPU process shows its supervisor: that it moves, through one page of shared memory.

Writing it costs no system call and can never block, and the page outlives whoever writes it. It
holds counts and durations, no times, so a process that was stopped for a while tells no lies.
"""

import mmap
import os
import struct
import tempfile
import time
from enum import IntEnum
from typing import NamedTuple

PULSE_FD = "SAFELATENT_PULSE_FD"
"""Environment variable with the page's file descriptor, set by the supervisor for its child."""


class Phase(IntEnum):
    """What the process is at."""

    LOADING = 0
    IDLE = 1
    STEPPING = 2


class Sign(NamedTuple):
    """One look at the page."""

    phase: Phase = Phase.LOADING
    turns: int = 0
    """How often the engine has looked for work, or begun a step."""
    step_s: float = 0.0
    """Moving mean of how long a step takes."""


LAYOUT = struct.Struct("=qqd")


class Pulse:
    """The page; `beat` belongs to the engine's thread, `look` to the supervisor."""

    def __init__(self, fd: int):
        self.fd = fd
        self._page = mmap.mmap(fd, mmap.PAGESIZE)
        self._turns = 0
        self._step_s = 0.0
        self._stepping_since: float | None = None

    @classmethod
    def create(cls) -> "Pulse":
        """A new page, in a file without a name."""
        with tempfile.TemporaryFile() as file:
            file.truncate(mmap.PAGESIZE)
            return cls(os.dup(file.fileno()))

    @classmethod
    def of_environment(cls) -> "Pulse":
        """The supervisor's page; without a supervisor, one that nobody looks at."""
        fd = os.environ.get(PULSE_FD)
        return cls(int(fd)) if fd else cls.create()

    def beat(self, is_idle: bool) -> None:
        """The engine begins a turn: it waits for work, or it takes a step."""
        now = time.monotonic()
        if self._stepping_since is not None:
            took_s = now - self._stepping_since
            self._step_s += (took_s - self._step_s) / min(self._turns + 1, 20)
        self._stepping_since = None if is_idle else now
        self._turns += 1
        phase = Phase.IDLE if is_idle else Phase.STEPPING
        LAYOUT.pack_into(self._page, 0, phase, self._turns, self._step_s)

    def look(self) -> Sign:
        phase, turns, step_s = LAYOUT.unpack_from(self._page)
        return Sign(Phase(phase), turns, step_s)

    def close(self) -> None:
        self._page.close()
        os.close(self.fd)
